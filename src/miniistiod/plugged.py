"""A CA whose certificate and key lie in files, under the names that Istio gives them.

```text
DIR/                 private (0700)
  ca-cert.pem        what signs: a root, or an intermediate
  ca-key.pem         its key, 0600
  cert-chain.pem     from ca-cert.pem up to the root; may be empty when ca-cert.pem is the root
  root-cert.pem      the roots that hosts are to believe
  ca-crl.pem         optional: lists of revoked CA certificates, published along with ours
```

The files are looked at all the time. A set that does not hold together changes nothing; a bundle of roots may only
grow or shrink, so that no host is left with none of them.

Source: Istio's plug-in CA certificates.
"""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, TypeAlias

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from hbone.daemon.files import require_private_directory
from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError, IdentityError
from hbone.identity.svid import (
    UNPARSABLE,
    TrustBundle,
    check_ca,
    issued_by,
    load_certificates,
    load_private_key,
    validity_problem,
)
from miniistiod import ca
from miniistiod.store import Plugged, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["CaDirectory", "CaFiles", "new_state", "read_ca", "read_directory"]

_log = get_logger("miniistiod.ca")
CERTIFICATE, KEY, CHAIN, ROOTS, LISTS = "ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem", "ca-crl.pem"
REQUIRED = (CERTIFICATE, KEY, CHAIN, ROOTS)
MAX_BYTES = 1 << 20
"""Of one file."""
MAX_PATH = 8
"""Certificates from the one that signs up to its root."""
QUIET = 0.1
"""Seconds for which nothing may have moved: files are replaced one after the other."""

_Stamp: TypeAlias = tuple[tuple[str, int, int, int] | None, ...]


@attrs.frozen(kw_only=True)
class CaFiles:
    """A set of files that holds together."""

    signer: ca.Signer
    roots: tuple[x509.Certificate, ...]
    lists: str = ""
    """PEM."""

    @property
    def public(self) -> Plugged:
        """What the state keeps of it."""
        return Plugged(
            certificate=ca.certificate_pem(self.signer.certificate),
            issuers="".join(ca.certificate_pem(item) for item in self.signer.issuers),
            roots="".join(ca.certificate_pem(item) for item in self.roots),
        )


def read_ca(files: Mapping[str, bytes], trust_domain: str, now: datetime.datetime) -> CaFiles:
    """Read a set of files, by name.

    Raises:
        IdentityError: what does not hold together, naming the file.
    """
    certificate = load_certificates(files[CERTIFICATE], CERTIFICATE)[0]
    _check_issuer(certificate, now, CERTIFICATE)
    key = load_private_key(files[KEY], KEY)
    if not isinstance(key, ca.SigningKey):
        raise IdentityError(f"{KEY} is of a kind that cannot sign certificates")
    if key.public_key() != certificate.public_key():
        raise IdentityError(f"{KEY} does not belong to {CERTIFICATE}; give the two that were made together")
    roots = TrustBundle.from_pem(trust_domain, files[ROOTS], ROOTS).roots
    chain = load_certificates(files[CHAIN], CHAIN) if files[CHAIN].strip() else ()
    issuers = _path(certificate, chain, roots, now)
    return CaFiles(
        signer=ca.Signer(certificate, key, issuers),
        roots=roots,
        lists=_lists(files.get(LISTS, b""), (certificate, *issuers, *roots)),
    )


def _check_issuer(certificate: x509.Certificate, now: datetime.datetime, what: str) -> None:
    try:
        check_ca(certificate)
    except IdentityError as error:
        raise IdentityError(f"{what} cannot be used: {error}") from None
    if problem := validity_problem(certificate, now):
        raise IdentityError(f"{what} cannot be used: {problem}")


def _path(
    certificate: x509.Certificate,
    chain: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    now: datetime.datetime,
) -> tuple[x509.Certificate, ...]:
    """The certificates above the one that signs, up to a root of the bundle."""
    path: list[x509.Certificate] = []
    last = certificate
    while last not in roots:
        found = next((item for item in (*roots, *chain) if item != last and issued_by(last, item)), None)
        if found is None or found in path or len(path) >= MAX_PATH:
            subject = last.issuer.rfc4514_string()
            raise IdentityError(
                f"{CERTIFICATE} does not lead to a root of {ROOTS} through {CHAIN}: nothing there is {subject!r}"
            )
        what = ROOTS if found in roots else CHAIN
        _check_issuer(found, now, what)
        length = found.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        if length is not None and length < len(path) + 1:
            raise IdentityError(
                f"{what} has a CA certificate that allows {length} below it, and there are {len(path) + 1}"
            )
        path.append(found)
        last = found
    return tuple(path)


def _lists(pem: bytes, issuers: Sequence[x509.Certificate]) -> str:
    end = b"-----END X509 CRL-----"
    texts = []
    for part in pem.split(end)[:-1]:
        try:
            crl = x509.load_pem_x509_crl(part + end)
            signed = any(
                issuer.subject == crl.issuer
                and isinstance(key := issuer.public_key(), ca.PublicKey)
                and crl.is_signature_valid(key)
                for issuer in issuers
            )
        except UNPARSABLE:
            raise IdentityError(f"{LISTS} holds a list that cannot be parsed") from None
        if not signed:
            raise IdentityError(
                f"{LISTS} holds a list of {crl.issuer.rfc4514_string()!r}, which is no CA of these files"
            )
        texts.append(crl.public_bytes(serialization.Encoding.PEM).decode())
    if pem.strip() and not texts:
        raise IdentityError(f"{LISTS} holds no list; it must have a block BEGIN X509 CRL")
    return "".join(texts)


def read_directory(path: Path, trust_domain: str, now: datetime.datetime) -> CaFiles:
    """Read the set of files in a directory.

    Raises:
        ConfigurationError: they cannot be used.
    """
    directory = require_private_directory(path, create=False)
    files: dict[str, bytes] = {}
    for name in (*REQUIRED, LISTS):
        path = directory / name
        try:
            with path.open("rb") as file:
                files[name] = file.read(MAX_BYTES + 1)
            if name == KEY and path.stat().st_mode & 0o077:
                raise ConfigurationError(f"{str(path)!r} is a key that others can read; run 'chmod 0600 {path}'")
        except FileNotFoundError:
            if name == LISTS:
                continue
            raise ConfigurationError(
                f"{name} is missing in {str(directory)!r}; a CA needs {', '.join(REQUIRED)}"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{str(path)!r} cannot be read: {(error.strerror or '').lower()}") from None
        if len(files[name]) > MAX_BYTES:
            raise ConfigurationError(f"{str(path)!r} has more than {MAX_BYTES} bytes")
    try:
        return read_ca(files, trust_domain, now)
    except IdentityError as error:
        raise ConfigurationError(f"the CA in {str(directory)!r} cannot be used: {error}") from None


def new_state(directory: Path, trust_domain: str, ca_dir: Path | None) -> Store:
    """The state of a new mesh, with a root of its own or the CA of `ca_dir`.

    Raises:
        ConfigurationError: there is one already, or what is to sign cannot be used; nothing is made then.
    """
    now = datetime.datetime.now(datetime.UTC)
    files = None if ca_dir is None else read_directory(ca_dir, trust_domain, now)
    return Store.create(directory, trust_domain, now, plugged=None if files is None else files.public)


class CaDirectory:
    """The files as they are in force.

    Args:
        path: their directory.
        store: the state, whose roots they must agree with.
        wall: seconds since 1970.

    Raises:
        ConfigurationError: they cannot be used.
    """

    def __init__(self, path: Path, store: Store, *, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._trust_domain = store.trust_domain
        self._wall = wall
        self.problem = ""
        """Why the newest files are not in force; empty when they are."""
        self._refused: _Stamp | None = None
        self._seen, self._since = self._stamp(), 0.0
        self._loaded = self._seen
        self.files = self._read()
        self._agree(store)

    @property
    def more_lists(self) -> str:
        """Lists of revoked CA certificates, PEM."""
        return self.files.lists

    def current(self) -> ca.Signer:
        """What signs now; looks at the files, and keeps to what was good while they are not."""
        stamp, now = self._stamp(), time.monotonic()
        if stamp != self._seen:
            self._seen, self._since = stamp, now
        if stamp != self._loaded and stamp != self._refused and now - self._since >= QUIET:
            self._reload(stamp)
        return self.files.signer

    def _reload(self, stamp: _Stamp) -> None:
        try:
            found = self._read()
            before, after = set(self.files.roots), set(found.roots)
            if not (before <= after or after <= before):
                raise ConfigurationError(
                    f"{ROOTS} in {str(self._path)!r} has lost roots and gained others in one step; put the old and the"
                    " new ones into it first, and take the old ones out when every certificate was renewed"
                )
        except ConfigurationError as error:
            self.problem, self._refused = str(error), stamp
            _log.error("CA files refused, the last good ones stay in force", reason=self.problem)
            return
        self.files, self._loaded, self.problem, self._refused = found, stamp, "", None
        _log.info("CA files in force", signer=ca.fingerprint(found.signer.certificate), roots=len(found.roots))

    def adopt(self, store: Store) -> None:
        """Tell the state which CA is in force."""
        store.plug(self.files.public)

    def _agree(self, store: Store) -> None:
        """A mesh that lives on other roots would fall apart."""
        known = set(store.roots())
        present = set(self.files.roots)
        if not known or known <= present or present <= known:
            return
        if store.plugged() is None and not store.certificates(self._wall(), limit=1):
            return  # its own root has signed nothing that is still in use
        raise ConfigurationError(
            f"{ROOTS} in {str(self._path)!r} lacks roots that the mesh lives on; add those of"
            f" {str(store.directory / 'root-cert.pem')!r} to it until every certificate was renewed"
        )

    def _read(self) -> CaFiles:
        moment = datetime.datetime.fromtimestamp(self._wall(), datetime.UTC)
        return read_directory(self._path, self._trust_domain, moment)

    def _stamp(self) -> _Stamp:
        found: list[tuple[str, int, int, int] | None] = []
        for name in (*REQUIRED, LISTS):
            try:
                status = (self._path / name).stat()
            except OSError:
                found.append(None)
            else:
                found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)
