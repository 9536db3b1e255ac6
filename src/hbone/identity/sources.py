"""Who we are: an SVID with the bundles that we believe, and where a program gets them from."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from typing import TYPE_CHECKING, Protocol

import attrs

from hbone.errors import IdentityError
from hbone.identity.spiffe import SpiffeId, quoted
from hbone.identity.svid import (
    MAX_PEM_SIZE,
    TrustBundle,
    TrustBundles,
    X509Svid,
    issued_by,
    load_certificates,
    load_private_key,
    svid_id,
    validity_problem,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["FileSource", "Identity", "IdentitySource", "StaticSource"]

RACY_NANOSECONDS = 50_000_000
"""A file changed more recently than this may change again under the same time stamp; it is read once more."""

_versions = itertools.count(1)


@attrs.frozen(eq=False)
class Identity:
    """Who we are and whom we believe: one consistent set, which never changes."""

    svid: X509Svid
    bundles: Mapping[str, TrustBundle] = attrs.field(converter=TrustBundles)
    version: int = attrs.field(factory=lambda: next(_versions))
    """Another number for every Identity of this process, growing."""

    @property
    def id(self) -> SpiffeId:
        """Who we are."""
        return self.svid.id


class IdentitySource(Protocol):
    """Where a program's identity comes from."""

    def current(self) -> Identity:
        """The newest identity.

        Raises:
            IdentityError: there is none.
        """
        ...

    def subscribe(self, callback: Callable[[Identity], object]) -> Callable[[], None]:
        """Have `callback` called with each newer identity; returns what ends that."""
        ...


class _Subscribers:
    """Callbacks in the order of their subscription; one may end itself or another while they are called."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[Identity], object]] = {}
        self._numbers = itertools.count()

    def add(self, callback: Callable[[Identity], object]) -> Callable[[], None]:
        number = next(self._numbers)
        self._callbacks[number] = callback
        return lambda: self._callbacks.pop(number, None) and None

    def notify(self, identity: Identity) -> None:
        for number, callback in list(self._callbacks.items()):
            if number in self._callbacks:
                callback(identity)


class StaticSource:
    """An identity that the program brings, and replaces with `rotate`."""

    def __init__(
        self, svid: X509Svid, bundles: TrustBundle | Iterable[TrustBundle] | Mapping[str, TrustBundle]
    ) -> None:
        self._identity = Identity(svid, bundles)
        self._subscribers = _Subscribers()

    def current(self) -> Identity:
        """The newest identity."""
        return self._identity

    def rotate(
        self,
        svid: X509Svid,
        bundles: TrustBundle | Iterable[TrustBundle] | Mapping[str, TrustBundle] | None = None,
    ) -> Identity:
        """Use another SVID, and other bundles where given; connections that live are left alone."""
        self._identity = Identity(svid, self._identity.bundles if bundles is None else bundles)
        self._subscribers.notify(self._identity)
        return self._identity

    def subscribe(self, callback: Callable[[Identity], object]) -> Callable[[], None]:
        """Have `callback` called by each `rotate`; returns what ends that."""
        return self._subscribers.add(callback)


_Signature = tuple[tuple[int, int, int] | None, ...]


class FileSource:
    """An identity in PEM files, read again when one of them changes.

    `current()` looks at the files' time, inode and size; nothing runs in the background. A bad write keeps the
    last good set, and `error` says what is wrong until the files are good again. Writers replace files by rename;
    while only some of the files are new, the set is inconsistent and the last good one is kept.

    Args:
        cert: the leaf, then intermediates.
        key: its private key, not encrypted.
        roots: the roots of the certificate's own trust domain.
        bundles: instead of `roots`, a file of roots for each trust domain.
        now: the clock, in seconds since the epoch.

    Raises:
        IdentityError: the files are missing or unusable now.
    """

    def __init__(
        self,
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        roots: str | os.PathLike[str] | None = None,
        *,
        bundles: Mapping[str, str | os.PathLike[str]] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        if (roots is None) == (bundles is None) or bundles == {}:
            raise IdentityError("give either roots or bundles, and at least one bundle; whom to believe has no default")
        self._cert = os.fspath(cert)
        self._key = os.fspath(key)
        self._roots = None if roots is None else os.fspath(roots)
        self._bundles = {str(domain): os.fspath(path) for domain, path in (bundles or {}).items()}
        self._paths = [self._cert, self._key, *([self._roots] if self._roots is not None else self._bundles.values())]
        self._now = now
        self._subscribers = _Subscribers()
        self.error: IdentityError | None = None
        """Why the files as they are now cannot be used; None while they can."""
        self._signature = self._look()
        self._contents = self._read()
        self._identity = self._parse()

    def current(self) -> Identity:
        """The newest usable identity."""
        signature = self._look()
        if signature is None or signature != self._signature:
            self._signature = signature  # as it was before the read: a write in between is seen the next time
            try:
                contents = self._read()
                if contents == self._contents and self.error is None:
                    return self._identity
                self._contents = contents
                identity = self._parse()
            except IdentityError as error:
                self.error = error
            else:
                self.error = None
                self._identity = identity
                self._subscribers.notify(identity)
        return self._identity

    def subscribe(self, callback: Callable[[Identity], object]) -> Callable[[], None]:
        """Have `callback` called when `current()` finds a newer identity; returns what ends that."""
        return self._subscribers.add(callback)

    def _look(self) -> _Signature | None:
        """What tells one content of the files from another; None while they are too fresh to tell."""
        found: list[tuple[int, int, int] | None] = []
        fresh = (self._now() * 1e9) - RACY_NANOSECONDS
        racy = False
        for path in self._paths:
            try:
                status = os.stat(path)
            except OSError:
                found.append(None)
                continue
            racy = racy or status.st_mtime_ns > fresh
            found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return None if racy else tuple(found)

    def _read(self) -> dict[str, bytes]:
        return {path: _read(path) for path in self._paths}

    def _parse(self) -> Identity:
        svid = self._svid()
        now = datetime.datetime.fromtimestamp(self._now(), datetime.UTC)
        problem = validity_problem(svid.leaf, now)
        if problem:
            raise IdentityError(f"{self._cert} holds the certificate of {svid.id}, but {problem}")
        files = self._bundles if self._roots is None else {svid.id.trust_domain: self._roots}
        bundles = TrustBundles([self._bundle(domain, path, now) for domain, path in files.items()])
        own = bundles.get(svid.id.trust_domain)
        if own is not None and not any(issued_by(svid.chain[-1], root) for root in own.roots):
            raise IdentityError(
                f"{self._cert} was signed by {quoted(svid.chain[-1].issuer.rfc4514_string())}, and none of the roots in"
                f" {files[own.trust_domain]} made that signature; add the root, or the intermediates in between"
            )
        return Identity(svid, bundles)

    def _svid(self) -> X509Svid:
        chain = load_certificates(self._contents[self._cert], self._cert)
        key = load_private_key(self._contents[self._key], self._key)
        try:
            return X509Svid(svid_id(chain[0]), chain, key)
        except IdentityError as error:
            raise IdentityError(f"{self._cert} with {self._key} cannot be used: {error}") from error

    def _bundle(self, trust_domain: str, path: str, now: datetime.datetime) -> TrustBundle:
        roots = load_certificates(self._contents[path], path)
        valid = [root for root in roots if not validity_problem(root, now)]
        if not valid:
            raise IdentityError(f"none of the roots in {path} is valid now: {validity_problem(roots[0], now)}")
        try:
            return TrustBundle(trust_domain, valid)
        except IdentityError as error:
            raise IdentityError(f"{path} cannot be used as roots of {trust_domain}: {error}") from error


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PEM_SIZE + 1)
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror or error}") from error
    return data
