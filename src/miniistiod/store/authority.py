"""The part of the state that the certificate authority lives on: roots, the register, what is revoked.

`generation` counts what changes trust: roots, signers, revocations. A certificate is recorded under the generation it
was signed by, or not at all, so none is handed out with a bundle, or to a caller, of before a change.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs
from cryptography import x509

from hbone.errors import ConfigurationError
from miniistiod import ca
from miniistiod.rotation import Facts, Rotation, Step
from miniistiod.store.base import CRL_FILE, ROOT_FILE, Database
from miniistiod.store.records import IssuedCertificate, Revoked, RootRecord, StaleAuthorityError, fields_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

__all__ = ["AuthorityState", "Crl", "Plugged"]

_CERTIFICATE = "serial, spiffe_id, name, key_sha256, issued, expires, caller, token, parent, signer, node, grp, revoked"


@attrs.frozen(kw_only=True)
class Plugged:
    """What is public of a CA that is plugged in from files; PEM."""

    certificate: str
    """What signs."""
    issuers: str
    """The certificates above it, up to the root."""
    roots: str


@attrs.frozen(kw_only=True)
class Crl:
    """The lists of revoked certificates as they were published last."""

    number: int
    generation: int
    made: float
    pem: str


class AuthorityState(Database):
    """Roots, certificates, revocations."""

    # -- roots

    @property
    def generation(self) -> int:
        """Counts changes of roots, signers and revocations."""
        return int(self._meta("generation"))

    def _bump(self) -> int:
        number = self.generation + 1
        self._set("generation", str(number).encode())
        return number

    def root_records(self) -> list[RootRecord]:
        """The roots that this state made, oldest first."""
        rows = self._rows("SELECT id, certificate, key, signing, created FROM roots ORDER BY id")
        return [
            RootRecord(id=row[0], certificate=row[1], key=row[2], signing=bool(row[3]), created=row[4]) for row in rows
        ]

    def plugged(self) -> Plugged | None:
        """The CA that is plugged in from files; None when the state has its own."""
        raw = self._find("plugged")
        return None if raw is None else Plugged(**json.loads(raw))

    def plug(self, plugged: Plugged) -> None:
        """From now on certificates are signed by a CA from files, or by another one."""
        with self._transaction():
            if self.rotation() is not None:
                raise ConfigurationError(
                    "the root is being rotated; finish that before a CA is plugged in ('miniistiod root show')"
                )
            if self.plugged() != plugged:
                self._set("plugged", json.dumps(attrs.asdict(plugged)).encode())
                self._bump()
        self.publish_roots()

    def signers(self) -> list[ca.Signer]:
        """Every root whose key is here."""
        return [ca.Signer.from_pem(item.certificate, item.key) for item in self.root_records() if item.key is not None]

    def signer(self) -> ca.Signer:
        """The root that signs now.

        Raises:
            ConfigurationError: the CA is plugged in from files, and its key is not here.
        """
        return self._signer_of(next((item for item in self.root_records() if item.signing), None))

    def server_signer(self) -> ca.Signer:
        """The root that signs the certificate of port 15012; during a rotation that may be the older one.

        Raises:
            ConfigurationError: the CA is plugged in from files, and its key is not here.
        """
        rotation = self.rotation()
        if rotation is None or rotation.serving is not None:
            return self.signer()
        return self._signer_of(next((item for item in self.root_records() if item.id == rotation.old), None))

    def _signer_of(self, record: RootRecord | None) -> ca.Signer:
        if self.plugged() is not None or record is None or record.key is None:
            raise ConfigurationError(
                f"the key that signs is not in {str(self.directory)!r}; the CA is plugged in from files (--ca-dir)"
            )
        return ca.Signer.from_pem(record.certificate, record.key)

    def server_root(self) -> x509.Certificate:
        """The root that port 15012 shows; enrolment tokens name it."""
        plugged = self.plugged()
        if plugged is None:
            return self.server_signer().certificate
        return x509.load_pem_x509_certificates((plugged.certificate + plugged.issuers).encode())[-1]

    def roots(self) -> list[x509.Certificate]:
        """Every root that hosts must believe."""
        pem = self.roots_pem()
        return x509.load_pem_x509_certificates(pem) if pem else []

    def roots_pem(self) -> bytes:
        """The same as one text."""
        plugged = self.plugged()
        if plugged is not None:
            return plugged.roots.encode()
        return b"".join(item.certificate for item in self.root_records())

    def publish_roots(self) -> None:
        """Bring `root-cert.pem` up to date, and `crl.pem` as it was published last."""
        if pem := self.roots_pem():
            self._publish(ROOT_FILE, pem)
        crl = self.crl()
        if crl is not None and crl.pem:
            self._publish(CRL_FILE, crl.pem.encode())

    # -- rotation

    def rotation(self) -> Rotation | None:
        """The rotation that is under way."""
        raw = self._find("rotation")
        return None if raw is None else Rotation(**json.loads(raw))

    def begin_rotation(self, signer: ca.Signer, now: float, skew: float) -> Rotation:
        """Publish a second root; it signs nothing yet.

        Raises:
            ConfigurationError: one is under way, or the CA is plugged in.
        """
        with self._transaction() as connection:
            if self.plugged() is not None:
                raise ConfigurationError(
                    "the CA is plugged in from files; rotate it by replacing them, first root-cert.pem with both roots"
                )
            if self.rotation() is not None:
                raise ConfigurationError("a rotation is under way; 'miniistiod root show' says what it waits for")
            (old,) = (item.id for item in self.root_records() if item.signing)
            cursor = connection.execute(
                "INSERT INTO roots (certificate, key, signing, created) VALUES (?, ?, 0, ?)",
                (ca.certificate_pem(signer.certificate).encode(), signer.key_pem(), now),
            )
            assert cursor.lastrowid is not None
            rotation = Rotation(old=old, new=cursor.lastrowid, generation=self._bump(), published=now, skew=skew)
            self._keep(rotation)
        self.publish_roots()
        return rotation

    def advance_rotation(self, step: Step, now: float) -> None:
        """Take the next step of a rotation.

        Raises:
            ConfigurationError: `step` is not the next one.
        """
        with self._transaction() as connection:
            rotation = self.rotation()
            if rotation is None or rotation.step.next is not step:
                raise ConfigurationError(
                    f"the step {step.value!r} is not the next one of a rotation; 'miniistiod root show' says which is"
                )
            if step is Step.SIGNING:
                connection.execute("UPDATE roots SET signing = (id = ?)", (rotation.new,))
                self._keep(attrs.evolve(rotation, signing=now))
            elif step is Step.SERVING:
                self._keep(attrs.evolve(rotation, serving=now))
            else:
                connection.execute("DELETE FROM roots WHERE id = ?", (rotation.old,))
                self._set("rotation", None)
            self._bump()
        self.publish_roots()

    def _keep(self, rotation: Rotation) -> None:
        self._set("rotation", json.dumps(attrs.asdict(rotation)).encode())

    def facts(self, rotation: Rotation, now: float) -> Facts:
        """What is still in use of the time before."""
        old = next((item for item in self.root_records() if item.id == rotation.old), None)
        signer = "" if old is None else ca.fingerprint(x509.load_pem_x509_certificate(old.certificate))
        queries = (
            ("SELECT max(expires) FROM certificates WHERE revoked IS NULL AND generation < ?", rotation.generation),
            ("SELECT max(expires) FROM certificates WHERE revoked IS NULL AND signer = ?", signer),
            (
                "SELECT max(expires) FROM tokens WHERE kind = 'one-time' AND revoked IS NULL AND spent IS NULL"
                " AND root_sha256 = ?",
                signer,
            ),
        )
        unaware, by_old, tokens = (
            end if (end := self._rows(query, value)[0][0] or 0.0) > now - rotation.skew else 0.0
            for query, value in queries
        )
        unlisted = float(self._find("unlisted_until") or b"0")
        unlisted = unlisted if unlisted > now - rotation.skew else 0.0
        return Facts(unaware=max(unaware, unlisted), old=max(by_old, unlisted), tokens=tokens)

    # -- register

    def record_certificate(
        self,
        certificate: x509.Certificate,
        *,
        spiffe_id: str,
        name: str,
        key_sha256: str,
        caller: str,
        now: float,
        generation: int | None = None,
        signer: str = "",
        token: str = "",
        parent: str = "",
        node: str = "",
        group: str = "",
    ) -> None:
        """Enter a certificate in the register; to be done before it is handed out.

        Raises:
            StaleAuthorityError: `generation` is not the present one; sign again by what holds now.
        """
        with self._transaction() as connection:
            present = self.generation
            if generation not in (None, present):
                raise StaleAuthorityError
            connection.execute(
                f"INSERT INTO certificates ({_CERTIFICATE}, generation) VALUES ({', '.join('?' * 14)})",
                (
                    serial_text(certificate.serial_number),
                    spiffe_id,
                    name,
                    key_sha256,
                    now,
                    certificate.not_valid_after_utc.timestamp(),
                    caller,
                    token,
                    parent,
                    signer,
                    node,
                    group,
                    None,
                    present,
                ),
            )

    def forget_expired(self, now: float) -> int:
        """Take certificates and tokens out of the register a week after their end."""
        with self._transaction() as connection:
            old = now - 7 * 86_400
            connection.execute("DELETE FROM revoked_identities WHERE at < ?", (now - 366 * 86_400,))
            count = connection.execute("DELETE FROM certificates WHERE expires < ?", (old,)).rowcount
            return count + connection.execute("DELETE FROM tokens WHERE expires < ?", (old,)).rowcount

    def certificates(self, now: float, limit: int = 100_000, *, token: str | None = None) -> list[IssuedCertificate]:
        """Certificates that have not ended, revoked ones too, newest first; with `token` those that go back to it."""
        rows = self._rows(
            f"SELECT {_CERTIFICATE} FROM certificates WHERE expires > ? AND token = coalesce(?, token)"
            " ORDER BY issued DESC, serial LIMIT ?",
            now,
            token,
            limit,
        )
        return [_certificate(row) for row in rows]

    def certificate(self, serial: str) -> IssuedCertificate | None:
        """A certificate of the register."""
        rows = self._rows(f"SELECT {_CERTIFICATE} FROM certificates WHERE serial = ?", serial)
        return _certificate(rows[0]) if rows else None

    # -- revocation

    def identity_revoked(self, spiffe_id: str) -> float | None:
        """When an identity was revoked: what proves it from before is worthless, listed or not."""
        rows = self._rows("SELECT at FROM revoked_identities WHERE spiffe_id = ?", spiffe_id)
        return float(rows[0][0]) if rows else None

    def revoke(
        self,
        now: float,
        *,
        serial: str | None = None,
        spiffe_id: str | None = None,
        name: tuple[str, str] | None = None,
        token: str | None = None,
        plaintext: bool = False,
    ) -> Revoked:
        """Take away what was given to a certificate's holder, an identity, a machine or a token, all or nothing.

        A certificate goes with all that were renewed with it; a reusable token that one was issued for goes too.

        Args:
            now: seconds since 1970.
            serial: a certificate's.
            spiffe_id: an identity's, wherever it is used.
            name: namespace and name of a machine's workload.
            token: a token's id, for it and all that was got by it.
            plaintext: let its workload be reached in plaintext again; else peers insist on HBONE, which fails.
        """
        with self._transaction() as connection:
            records = self._family(self._meant(serial, spiffe_id, name, token))
            tokens = self._tokens_of(records, spiffe_id, name, token)
            # What a node's proxy got by its token goes with the proxy, as what it got by its certificate does.
            got = [
                row[0]
                for item in tokens
                for row in self._rows(
                    "SELECT serial FROM certificates JOIN tokens ON token = id WHERE id = ? AND tokens.node != ''",
                    item,
                )
            ]
            records = self._family([*(record.serial for record in records), *got])
            connection.executemany(
                "UPDATE certificates SET revoked = coalesce(revoked, ?) WHERE serial = ?",
                [(now, record.serial) for record in records],
            )
            connection.executemany(
                "UPDATE tokens SET revoked = coalesce(revoked, ?) WHERE id = ?", [(now, item) for item in tokens]
            )
            identities = {record.spiffe_id for record in records if record.caller.startswith("JWT ")}
            identities |= {spiffe_id} if spiffe_id is not None else set()
            connection.executemany(
                "INSERT OR REPLACE INTO revoked_identities VALUES (?, ?)", [(item, now) for item in identities]
            )
            machines = self._machines_of(records, spiffe_id, name, now)
            registrations = _delete(connection, "registrations", machines)
            marks = _delete(connection, "marks", machines) if plaintext else []
            found = Revoked(
                certificates=tuple(record.serial for record in records if record.revoked is None),
                tokens=tuple(tokens),
                marks=tuple(marks),
                registrations=tuple(registrations),
            )
            if found or identities:
                self._bump()
            return found

    def _meant(
        self, serial: str | None, spiffe_id: str | None, name: tuple[str, str] | None, token: str | None
    ) -> list[str]:
        """Serials of the certificates that a revocation names."""
        if token is not None:
            rows = self._rows("SELECT serial FROM certificates WHERE token = ?", token)
        elif serial is not None:
            rows = self._rows("SELECT serial FROM certificates WHERE serial = ?", serial)
        elif spiffe_id is not None:
            rows = self._rows("SELECT serial FROM certificates WHERE spiffe_id = ?", spiffe_id)
        else:
            assert name is not None
            pattern = f"spiffe://{self.trust_domain}/ns/{name[0]}/sa/*"
            rows = self._rows("SELECT serial FROM certificates WHERE name = ? AND spiffe_id GLOB ?", name[1], pattern)
        return [row[0] for row in rows]

    def _family(self, serials: Sequence[str]) -> list[IssuedCertificate]:
        """Certificates, with those that were renewed with them, and so on."""
        found = dict.fromkeys(serials)
        fresh = list(found)
        while fresh:
            children = [
                row[0]
                for parent in fresh
                for row in self._rows("SELECT serial FROM certificates WHERE parent = ?", parent)
            ]
            fresh = [item for item in dict.fromkeys(children) if item not in found]
            found.update(dict.fromkeys(fresh))
        return [record for item in found if (record := self.certificate(item)) is not None]

    def _tokens_of(
        self,
        records: Sequence[IssuedCertificate],
        spiffe_id: str | None,
        name: tuple[str, str] | None,
        token: str | None,
    ) -> list[str]:
        """Ids of tokens that are not revoked yet and could get the holder a new certificate."""
        rows = self._rows(
            "SELECT id, namespace, service_account, name FROM tokens WHERE revoked IS NULL ORDER BY created, id"
        )
        used = {token, *(record.token for record in records)}
        found = []
        for token_id, namespace, account, bound in rows:
            same_identity = spiffe_id == f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{account}"
            # One that was used is meant too: a reusable one anyway, and a one-time token's key may come again.
            if same_identity or name == (namespace, bound) or token_id in used:
                found.append(token_id)
        return found

    def _machines_of(
        self,
        records: Sequence[IssuedCertificate],
        spiffe_id: str | None,
        name: tuple[str, str] | None,
        now: float,
    ) -> list[tuple[str, str]]:
        """Namespace and name of the workloads whose machine is meant."""
        if name is not None:
            return [name]
        machines: dict[tuple[str, str], None] = {}
        if spiffe_id is not None:
            for table in ("marks", "registrations"):
                for namespace, item, account in self._rows(f"SELECT namespace, name, service_account FROM {table}"):
                    if spiffe_id == f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{account}":
                        machines[namespace, item] = None
            return list(machines)
        serials = {record.serial for record in records}
        for namespace, item, held in self._rows("SELECT namespace, name, serial FROM registrations"):
            if held in serials:
                machines[namespace, item] = None
        for record in records:
            # Another certificate of the same machine, enrolled a second time, keeps it in the mesh.
            others = self._rows(
                "SELECT 1 FROM certificates WHERE name = ? AND spiffe_id = ? AND revoked IS NULL AND expires > ?",
                record.name,
                record.spiffe_id,
                now,
            )
            if record.name and not others:
                machines[record.spiffe_id.partition("/ns/")[2].partition("/")[0], record.name] = None
        return list(machines)

    def revoked_by(self, signer: str, now: float) -> list[tuple[int, float]]:
        """Serial and time of revoked certificates of one signer that have not ended."""
        rows = self._rows(
            "SELECT serial, revoked FROM certificates WHERE revoked IS NOT NULL AND signer = ? AND expires > ?"
            " ORDER BY revoked, serial",
            signer,
            now,
        )
        return [(int(row[0], 16), row[1]) for row in rows]

    def crl(self) -> Crl | None:
        """The lists that were published last."""
        raw = self._find("crl")
        return None if raw is None else Crl(**json.loads(raw))

    def keep_crl(self, crl: Crl) -> bool:
        """Publish new lists; False when they are out of date already, or another process was quicker."""
        with self._transaction():
            before = self.crl()
            if crl.generation != self.generation or crl.number != (before.number if before else 0) + 1:
                return False
            self._set("crl", json.dumps(attrs.asdict(crl)).encode())
        self._publish(CRL_FILE, crl.pem.encode())
        return True


def serial_text(serial: int) -> str:
    """A serial as it is listed."""
    return f"{serial:032x}"


def _delete(connection: sqlite3.Connection, table: str, machines: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        machine
        for machine in machines
        if connection.execute(f"DELETE FROM {table} WHERE namespace = ? AND name = ?", machine).rowcount
    ]


def _certificate(row: Any) -> IssuedCertificate:
    return IssuedCertificate(**fields_of(_CERTIFICATE, row))
