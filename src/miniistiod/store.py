"""The state: one SQLite file in a private directory. Whatever was answered to a caller was committed before.

Several processes may open it (the daemon and `miniistiod token create`); each change is one short transaction, and
SQLite lets one writer in at a time. Methods are safe to call from threads.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

import attrs
from cryptography import x509

from hbone.daemon.files import require_private_directory, write_private
from hbone.errors import ConfigurationError, IdentityError
from hbone.identity import TrustDomain
from miniistiod import ca, tokens
from miniistiod.registry import HboneMark

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = ["ADMIN_SOCKET", "DATABASE", "ROOT_FILE", "IssuedCertificate", "Redemption", "Store", "TokenRecord"]

DATABASE = "state.db"
ROOT_FILE = "root-cert.pem"
ADMIN_SOCKET = "admin.sock"
SCHEMA_VERSION = 1
RETRY_SECONDS = 60.0
"""How long the same key may come again with a one-time token, after an answer was lost on its way."""
_BUSY_SECONDS = 10.0
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE roots (
  id INTEGER PRIMARY KEY, certificate BLOB NOT NULL, key BLOB, signing INTEGER NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE certificates (
  serial TEXT PRIMARY KEY, spiffe_id TEXT NOT NULL, name TEXT NOT NULL, key_sha256 TEXT NOT NULL,
  issued REAL NOT NULL, expires REAL NOT NULL, caller TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX certificates_expires ON certificates (expires);
CREATE TABLE tokens (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, secret_sha256 TEXT NOT NULL, namespace TEXT NOT NULL,
  service_account TEXT NOT NULL, name TEXT, created REAL NOT NULL, expires REAL NOT NULL,
  spent REAL, spent_key_sha256 TEXT, revoked REAL
) STRICT, WITHOUT ROWID;
CREATE TABLE marks (
  namespace TEXT NOT NULL, name TEXT NOT NULL, service_account TEXT NOT NULL, node TEXT NOT NULL,
  since REAL NOT NULL, PRIMARY KEY (namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE vips (
  namespace TEXT NOT NULL, host TEXT NOT NULL, number INTEGER NOT NULL UNIQUE, PRIMARY KEY (namespace, host)
) STRICT, WITHOUT ROWID;
CREATE TABLE first_seen (
  kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, seen REAL NOT NULL,
  PRIMARY KEY (kind, namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE documents (path TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""


@attrs.frozen(kw_only=True)
class TokenRecord:
    """A token as it is listed; its secret is not kept."""

    id: str
    kind: str
    """`one-time` or `reusable`."""
    namespace: str
    service_account: str
    name: str | None
    created: float
    expires: float
    spent: float | None
    revoked: float | None

    def state(self, now: float) -> str:
        """What it is good for now, in a word."""
        if self.revoked is not None:
            return "revoked"
        if self.spent is not None:
            return "used"
        return "expired" if now >= self.expires else "valid"


@attrs.frozen(kw_only=True)
class Redemption:
    """What came of presenting a one-time token."""

    token: TokenRecord | None
    """None: refused, for `reason`."""
    reason: str = ""


@attrs.frozen(kw_only=True)
class IssuedCertificate:
    """A line of the register of certificates."""

    serial: str
    spiffe_id: str
    name: str
    key_sha256: str
    issued: float
    expires: float
    caller: str


class Store:
    """The state of one mesh. Use `Store.create` once, `Store.open` afterwards; close it."""

    def __init__(self, directory: Path, connection: sqlite3.Connection) -> None:
        self.directory = directory
        self._connection = connection
        self._lock = threading.RLock()
        self.trust_domain = self._meta("trust_domain").decode()
        self.token_key = self._meta("token_key")

    # -- opening

    @classmethod
    def create(cls, directory: Path, trust_domain: str, now: datetime.datetime) -> Store:
        """Make the state with a new root.

        Raises:
            ConfigurationError: there is one already, or the directory or the trust domain cannot be used.
        """
        try:
            TrustDomain(trust_domain)
        except IdentityError as error:
            raise ConfigurationError(str(error)) from None
        directory = require_private_directory(directory)
        path = directory / DATABASE
        if path.exists():
            raise ConfigurationError(f"{str(path)!r} exists; a second root would split the mesh, so leave out --init")
        if leftovers := [item.name for item in directory.iterdir() if not item.name.startswith(".")]:
            raise ConfigurationError(
                f"{str(directory)!r} is not empty ({leftovers[0]!r} is in it) and has no {DATABASE}; name another"
                " directory, or restore the database"
            )
        signer = ca.make_root(trust_domain, now)
        # Made under another name: a crash half way leaves no state that looks whole.
        unfinished = directory / f".{DATABASE}.{secrets.token_hex(8)}"
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        connection = _connect(unfinished)
        try:
            connection.executescript(f"BEGIN;{_TABLES}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
            with connection:
                connection.executemany(
                    "INSERT INTO meta VALUES (?, ?)",
                    [("trust_domain", trust_domain.encode()), ("token_key", secrets.token_bytes(32))],
                )
                connection.execute(
                    "INSERT INTO roots (certificate, key, signing, created) VALUES (?, ?, 1, ?)",
                    (ca.certificate_pem(signer.certificate).encode(), signer.key_pem(), now.timestamp()),
                )
        finally:
            connection.close()
        unfinished.rename(path)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Store:
        """Open the state of before.

        Raises:
            ConfigurationError: there is none, it is of a newer version, damaged, or open to others.
        """
        if not directory.exists():
            raise ConfigurationError(
                f"the state directory {str(directory)!r} does not exist; name the one of before, or start a new mesh"
                " with --init"
            )
        directory = require_private_directory(directory, create=False)
        path = directory / DATABASE
        if not path.exists():
            raise ConfigurationError(
                f"there is no {DATABASE} in {str(directory)!r}; name the directory of before, or start a new mesh with"
                " --init"
            )
        if path.stat().st_mode & 0o077:
            raise ConfigurationError(
                f"{str(path)!r} holds the root's key and others can read it; run 'chmod 0600 {path}'"
            )
        try:
            connection = _connect(path)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == SCHEMA_VERSION:
                connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.Error as error:
            raise ConfigurationError(f"{str(path)!r} cannot be read ({error}); restore it from a backup") from None
        if version != SCHEMA_VERSION:
            connection.close()
            raise ConfigurationError(
                f"{str(path)!r} has the format {version} and this version reads {SCHEMA_VERSION}; use the version of"
                " miniistiod that wrote it, or a newer one"
            )
        try:
            store = cls(directory, connection)
        except (LookupError, sqlite3.Error) as error:
            connection.close()
            raise ConfigurationError(f"{str(path)!r} is damaged ({error}); restore it from a backup") from None
        with contextlib.suppress(FileNotFoundError):
            if (directory / ROOT_FILE).read_bytes() == store.roots_pem():
                return store
        write_private(directory / ROOT_FILE, store.roots_pem(), 0o644)
        return store

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer; what is done inside is durable when it ends."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def _meta(self, key: str) -> bytes:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        if not rows:
            raise LookupError(f"no {key}")
        return bytes(rows[0][0])

    # -- authority

    def signer(self) -> ca.Signer:
        """The certificate and key that sign now."""
        ((certificate, key),) = self._rows("SELECT certificate, key FROM roots WHERE signing = 1")
        return ca.Signer.from_pem(certificate, key)

    def roots(self) -> list[x509.Certificate]:
        """Every root that hosts must believe."""
        return [
            x509.load_pem_x509_certificate(row[0]) for row in self._rows("SELECT certificate FROM roots ORDER BY id")
        ]

    def roots_pem(self) -> bytes:
        """The same as one text."""
        return b"".join(bytes(row[0]) for row in self._rows("SELECT certificate FROM roots ORDER BY id"))

    def record_certificate(
        self, certificate: x509.Certificate, *, spiffe_id: str, name: str, key_sha256: str, caller: str, now: float
    ) -> None:
        """Enter a certificate in the register; to be done before it is handed out."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    f"{certificate.serial_number:032x}",
                    spiffe_id,
                    name,
                    key_sha256,
                    now,
                    certificate.not_valid_after_utc.timestamp(),
                    caller,
                ),
            )

    def forget_expired(self, now: float) -> int:
        """Take certificates and tokens out of the register a week after their end."""
        with self._transaction() as connection:
            old = now - 7 * 86_400
            count = connection.execute("DELETE FROM certificates WHERE expires < ?", (old,)).rowcount
            return count + connection.execute("DELETE FROM tokens WHERE expires < ?", (old,)).rowcount

    def certificates(self, now: float, limit: int = 100_000) -> list[IssuedCertificate]:
        """Certificates that are valid, newest first."""
        rows = self._rows(
            "SELECT serial, spiffe_id, name, key_sha256, issued, expires, caller FROM certificates"
            " WHERE expires > ? ORDER BY issued DESC, serial LIMIT ?",
            now,
            limit,
        )
        names = [field.name for field in attrs.fields(IssuedCertificate)]
        return [IssuedCertificate(**dict(zip(names, row, strict=True))) for row in rows]

    # -- tokens

    def add_token(
        self,
        *,
        token_id: str,
        kind: str,
        secret: str,
        namespace: str,
        service_account: str,
        name: str | None,
        now: float,
        expires: float,
    ) -> None:
        """List a new token; of its text only the hash is kept."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO tokens (id, kind, secret_sha256, namespace, service_account, name, created, expires)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (token_id, kind, tokens.secret_hash(secret), namespace, service_account, name, now, expires),
            )

    def list_tokens(self) -> list[TokenRecord]:
        """Every token, oldest first."""
        return [_record(row) for row in self._rows(f"SELECT {_TOKEN_FIELDS} FROM tokens ORDER BY created, id")]

    def revoke_token(self, token_id: str, now: float) -> bool:
        """Make a token worthless; False when there is none of that id."""
        with self._transaction() as connection:
            return bool(
                connection.execute(
                    "UPDATE tokens SET revoked = coalesce(revoked, ?) WHERE id = ?", (now, token_id)
                ).rowcount
            )

    def reusable(self, text: str, token: tokens.ReusableToken, now: float) -> str:
        """Why a reusable token is worthless though its signature holds; empty when it is good."""
        rows = self._rows(f"SELECT {_TOKEN_FIELDS}, secret_sha256 FROM tokens WHERE id = ?", token.id)
        if not rows:
            return f"the token {token.id} is not listed"
        record = _record(rows[0][:-1])
        if record.kind != "reusable" or not secrets.compare_digest(rows[0][-1], tokens.secret_hash(text)):
            return f"the token {token.id} is another's"
        return "" if record.state(now) == "valid" else f"the token {token.id} is {record.state(now)}"

    def redeem(self, secret: str, key_sha256: str, now: float) -> Redemption:
        """Spend a one-time token, durably, before anything is issued for it.

        The same key may come again within a minute: its answer may have been lost.
        """
        token_id = tokens.split_secret(secret)
        if token_id is None:
            return Redemption(token=None, reason="not a one-time token")
        given = tokens.secret_hash(secret)
        with self._transaction() as connection:
            row = connection.execute(
                f"SELECT {_TOKEN_FIELDS}, secret_sha256, spent_key_sha256 FROM tokens WHERE id = ?", (token_id,)
            ).fetchone()
            if row is None or not secrets.compare_digest(row[-2], given) or row[1] != "one-time":
                return Redemption(token=None, reason="an unknown one-time token")
            record = _record(row[:-2])
            if record.revoked is not None or now >= record.expires:
                return Redemption(token=None, reason=f"the one-time token {record.id} is {record.state(now)}")
            if record.spent is None:
                connection.execute(
                    "UPDATE tokens SET spent = ?, spent_key_sha256 = ? WHERE id = ?", (now, key_sha256, record.id)
                )
            elif row[-1] != key_sha256 or not 0 <= now - record.spent <= RETRY_SECONDS:
                return Redemption(token=None, reason=f"the one-time token {record.id} was used already")
            return Redemption(token=record)

    # -- what the mesh remembers besides its documents

    def marks(self) -> dict[tuple[str, str], HboneMark]:
        """WorkloadEntries that are known to run a ztunnel."""
        rows = self._rows("SELECT namespace, name, service_account, node FROM marks")
        return {(row[0], row[1]): HboneMark(service_account=row[2], node=row[3]) for row in rows}

    def mark(self, namespace: str, name: str, service_account: str, node: str, now: float) -> None:
        """Remember that a WorkloadEntry runs a ztunnel."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO marks VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " service_account = excluded.service_account, node = excluded.node",
                (namespace, name, service_account, node, now),
            )

    def vips(self) -> dict[tuple[str, str], int]:
        """Automatic addresses."""
        return {(row[0], row[1]): row[2] for row in self._rows("SELECT namespace, host, number FROM vips")}

    def first_seen(self) -> dict[tuple[str, str, str], datetime.datetime]:
        """When documents were first seen."""
        return {
            (row[0], row[1], row[2]): datetime.datetime.fromtimestamp(row[3], datetime.UTC)
            for row in self._rows("SELECT kind, namespace, name, seen FROM first_seen")
        }

    def documents(self) -> dict[str, str]:
        """The last good set of documents, path to text."""
        return {row[0]: row[1] for row in self._rows("SELECT path, text FROM documents")}

    def keep_documents(
        self,
        files: Mapping[str, str],
        vips: Mapping[tuple[str, str], int],
        seen: Iterable[tuple[str, str, str]],
        now: float,
    ) -> None:
        """Remember a good set of documents with what was decided for it, all or nothing."""
        with self._transaction() as connection:
            before = dict(connection.execute("SELECT path, text FROM documents"))
            connection.executemany(
                "DELETE FROM documents WHERE path = ?", [(path,) for path in before if path not in files]
            )
            connection.executemany(
                "INSERT OR REPLACE INTO documents VALUES (?, ?)",
                [(path, text) for path, text in files.items() if before.get(path) != text],
            )
            connection.execute("DELETE FROM vips")
            connection.executemany(
                "INSERT INTO vips VALUES (?, ?, ?)", [(*key, number) for key, number in vips.items()]
            )
            wanted = set(seen)
            known = set(connection.execute("SELECT kind, namespace, name FROM first_seen"))
            connection.executemany(
                "DELETE FROM first_seen WHERE kind = ? AND namespace = ? AND name = ?", sorted(known - wanted)
            )
            connection.executemany(
                "INSERT INTO first_seen VALUES (?, ?, ?, ?)", [(*key, now) for key in sorted(wanted - known)]
            )

    def describe(self) -> str:
        """The state in one line of JSON, without secrets; for debug pages."""
        counts = {
            table: self._rows(f"SELECT count(*) FROM {table}")[0][0] for table in ("certificates", "tokens", "marks")
        }
        return json.dumps({"trust_domain": self.trust_domain, **counts})


_TOKEN_FIELDS = "id, kind, namespace, service_account, name, created, expires, spent, revoked"


def _record(row: Any) -> TokenRecord:
    names = [name.strip() for name in _TOKEN_FIELDS.split(",")]
    return TokenRecord(**dict(zip(names, row, strict=True)))


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")
    return connection
