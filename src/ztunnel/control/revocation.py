"""Which certificates are taken back: the lists of a file (`CRL_PATH`) and of discovery, in force together.

```text
CRL_PATH   looked at every second, read two seconds after its last change; unreadable: the lists before stay in force
discovery  one resource, `mesh`; kept in the state directory as well, so that a restart forgets nothing
```

A list is never dropped for its age. Source: Istio's ztunnel, CRL_PATH; it goes on without a file that is broken at the
start, and we don't start.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.protobuf.message import DecodeError

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError, IdentityError
from hbone.identity import RevocationLists
from ztunnel.wire import revocation_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from pathlib import Path

    from ztunnel.control.cache import StateDir

__all__ = ["REVOCATION_NAME", "REVOCATION_TYPE", "Revocations", "pack_lists", "read_file", "read_resource"]

REVOCATION_TYPE = "type.googleapis.com/hbone.v1.RevocationLists"
REVOCATION_NAME = "mesh"
MAX_FILE = 16 * 1024 * 1024
"""Bytes of a file of lists."""
POLL = 1.0
"""Seconds between two looks at the file."""
QUIET = 2.0
"""Seconds without a change before the file is read. Source: Istio's ztunnel, debounce of file watches."""
LONGEST = 10.0
"""Seconds after a change by which it is read, however many follow."""

_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)

log = get_logger("ztunnel.control.revocation")


def read_file(data: bytes) -> RevocationLists:
    """The lists of a file: every `X509 CRL` block of a PEM file, or else one list in DER. An empty file has none.

    Raises:
        IdentityError: it is neither, or holds a list that cannot be used.

    Source: Istio's ztunnel, CRL_PATH.
    """
    if not data.strip():
        return RevocationLists()
    if not data.startswith(b"-----BEGIN"):
        return _read([data], x509.load_der_x509_crl)
    blocks: list[bytes] = _BLOCK.findall(data)
    if len(blocks) != data.count(b"-----BEGIN X509 CRL-----"):
        raise IdentityError("a revocation list has no end; the file is cut")
    return _read(blocks, x509.load_pem_x509_crl)


def read_resource(body: bytes) -> RevocationLists:
    """The lists of a `RevocationLists` message.

    Raises:
        IdentityError: it is none, or holds a list that cannot be used.
    """
    try:
        message = revocation_pb2.RevocationLists.FromString(body)
    except DecodeError:
        raise IdentityError("these bytes are no RevocationLists") from None
    return _read(message.lists, x509.load_der_x509_crl)


def _read(blocks: Iterable[bytes], load: Callable[[bytes], x509.CertificateRevocationList]) -> RevocationLists:
    found = []
    for number, block in enumerate(blocks, 1):
        try:
            found.append(load(block))
        except (ValueError, TypeError):
            raise IdentityError(f"revocation list {number} cannot be parsed") from None
    return RevocationLists(found)


def pack_lists(lists: RevocationLists) -> bytes:
    """What `read_resource` reads."""
    encoded = [found.public_bytes(serialization.Encoding.DER) for found in lists.lists]
    return revocation_pb2.RevocationLists(lists=encoded).SerializeToString()


class Revocations:
    """The lists in force.

    Args:
        path: of a file of lists; it may be missing and come later.
        state: where the lists of discovery are kept.
        in_thread: runs what waits for a disk or takes long.

    Raises:
        ConfigurationError: the file is there and cannot be used.
    """

    def __init__(
        self,
        path: Path | None = None,
        state: StateDir | None = None,
        *,
        in_thread: Callable[..., Awaitable[Any]] = trio.to_thread.run_sync,
    ) -> None:
        self.current = RevocationLists()
        """All of them."""
        self.error: str | None = None
        """Why the file's newest content is not in force."""
        self._path = path
        self._state = state
        self._in_thread = in_thread
        self._file = RevocationLists()
        self._mesh = RevocationLists()
        self._seen: tuple[int, ...] | None = None
        self._callbacks: list[Callable[[], object]] = []
        if path is not None:
            self._begin(path)

    def _begin(self, path: Path) -> None:
        self._seen = _look(path)
        try:
            self._file = self.current = _load(path)
        except FileNotFoundError:
            self.error = "the file is missing"
            log.warning(
                "revocation lists are missing: certificates that they would name are accepted until the file comes",
                path=str(path),
            )
        except (OSError, IdentityError) as error:
            raise ConfigurationError(
                f"CRL_PATH {str(path)!r} cannot be used: {_reason(error)}; repair the file, or unset CRL_PATH"
            ) from None

    def next_update(self) -> float | None:
        """When the first of the lists should have been replaced by a newer one, seconds since 1970."""
        due = [found.next_update_utc for found in self.current.lists]
        return min((moment.timestamp() for moment in due if moment is not None), default=None)

    def restore(self) -> None:
        """Put the lists of discovery that were kept on disk in force."""
        if self._state is None:
            return
        try:
            data = self._state.load_revocations()
            lists = read_file(data) if data is not None else RevocationLists()
        except (OSError, IdentityError) as error:
            log.warning("saved revocation lists not used", path=str(self._state.path), error=_reason(error))
        else:
            self._set(self._file, lists)

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call after each change of `current`; returns what ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    async def received(self, body: bytes | None) -> None:
        """Put what discovery sent in force, and on disk; None: it has no lists any more.

        Raises:
            IdentityError: it cannot be used; the lists before stay in force.
        """
        lists = await self._in_thread(read_resource, body) if body is not None else RevocationLists()
        if _same(lists, self._mesh):
            return
        self._set(self._file, lists)
        log.info("revocation lists of the mesh in force", lists=len(lists.lists))
        if self._state is not None and self._state.owned:
            try:
                await self._in_thread(self._state.save_revocations, _pem(lists))
            except OSError as error:
                log.warning("state directory cannot be written", path=str(self._state.path), error=_reason(error))

    async def received_all(self, body: bytes) -> None:
        """In a worker: these are all the lists there are."""
        self._set(RevocationLists(), await self._in_thread(read_resource, body))

    async def run(self) -> None:
        """Watch the file until cancelled."""
        path = self._path
        if path is None:
            return
        while True:
            await trio.sleep(POLL)
            seen = await self._in_thread(_look, path)
            if seen != self._seen:
                await self._reload(path, seen)

    async def _reload(self, path: Path, seen: tuple[int, ...] | None) -> None:
        with trio.move_on_after(LONGEST):
            while True:
                await trio.sleep(QUIET)
                now = await self._in_thread(_look, path)
                if now == seen:
                    break
                seen = now
        self._seen = seen
        try:
            lists = await self._in_thread(_load, path)
        except (OSError, IdentityError) as error:
            self.error = _reason(error)
            log.warning("revocation lists not read; those before stay in force", path=str(path), error=self.error)
            return
        self.error = None
        if not _same(lists, self._file):
            self._set(lists, self._mesh)
        log.info("revocation lists read", path=str(path), lists=len(lists.lists))

    def _set(self, file: RevocationLists, mesh: RevocationLists) -> None:
        self._file, self._mesh = file, mesh
        self.current = RevocationLists.joined(file, mesh)
        for callback in list(self._callbacks):
            callback()


def _look(path: Path) -> tuple[int, ...] | None:
    """What tells one content of a file from another without reading it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_dev, found.st_size


def _load(path: Path) -> RevocationLists:
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise IdentityError(f"it is larger than {MAX_FILE} bytes")
    return read_file(data)


def _same(one: RevocationLists, other: RevocationLists) -> bool:
    return one.lists == other.lists


def _pem(lists: RevocationLists) -> bytes:
    return b"".join(found.public_bytes(serialization.Encoding.PEM) for found in lists.lists)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
