"""What a ztunnel keeps on disk: its certificate and the last good picture of the mesh.

```text
STATE/                 0700
  svid.pem             0600  private key and certificate chain
  roots.pem            0600  the roots that came with them
  crl.pem              0600  the revocation lists that discovery sent last
  mesh.snapshot        0600  a line of JSON, then the store's snapshot; its modification time is
                             when the picture was last known to be current
  enrolment.json       0600  where this host was enrolled, and as what
  admin.sock           0600  the admin pages, for `ztunnel status` and `ztunnel explain`
  takeover.sock        0600  where the next ztunnel asks for our sockets
  lock                 0600  held by the process that uses the directory
```

Each file is replaced by rename. A file that is torn, damaged or another workload's is refused with one warning.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING

import attrs
import trio
from cryptography.hazmat.primitives.hashes import SHA256, Hash

from hbone.daemon.files import require_private_directory, write_private
from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError, IdentityError
from hbone.identity import Identity, X509Svid
from ztunnel.control.ca import check_path, check_validity, read_roots
from ztunnel.control.transport import ControlPlaneError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

__all__ = ["CacheWriter", "SavedSnapshot", "StateDir"]

FORMAT = 1
MAX_SNAPSHOT = 512 * 1024 * 1024
"""Bytes of a snapshot that are written or read."""
MAX_PEM = 1024 * 1024
QUIET = 0.1
"""Seconds without a change before the snapshot is written."""
LONGEST = 2.0
"""Seconds after a change by which the snapshot is written, however many follow."""
SHARE = 10
"""The writer rests this many times as long as the last write took."""
TOUCH = 60.0
"""Seconds between two notes that the snapshot is still current."""
RETRY = 30.0
"""Seconds until a failed write is tried again."""
FLUSH_TIMEOUT = 5.0
"""Seconds for the last write at shutdown."""

log = get_logger("ztunnel.control.cache")


@attrs.frozen
class SavedSnapshot:
    """A snapshot from the disk."""

    data: bytes
    saved_at: float
    """When it was last known to be current, seconds since 1970."""


class StateDir:
    """The private directory of one ztunnel."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which must be private; `open` checks that."""
        self.path = path
        self._lock: int | None = None
        self._owned = trio.Event()
        self._owned.set()

    @classmethod
    def open(cls, path: Path) -> StateDir:
        """Make sure that the directory is there, nobody else's, and used by no other ztunnel; `release` it afterwards.

        Raises:
            ConfigurationError: it cannot be made, others may read it, or another process uses it.
        """
        state = cls.join(path)
        state.acquire()
        return state

    @classmethod
    def join(cls, path: Path) -> StateDir:
        """Read what another ztunnel keeps there, and write nothing before `acquire`.

        Raises:
            ConfigurationError: it cannot be made, or others may read it.
        """
        state = cls(require_private_directory(path))
        state.disown()
        return state

    def acquire(self, lock: int | None = None) -> None:
        """Become the one who writes there.

        Args:
            lock: descriptor of the lock, held, from the process that gives it up.

        Raises:
            ConfigurationError: another process uses it.
        """
        try:
            self._lock = lock
            if lock is None:
                self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            assert self._lock is not None
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigurationError(
                f"the state directory {str(self.path)!r} is in use by another ztunnel; stop it, replace it by"
                " 'ztunnel run --take-over', or set ZTUNNEL_STATE_DIR"
            ) from None
        except OSError as error:
            self.release()
            raise ConfigurationError(
                f"the state directory {str(self.path)!r} cannot be used: {error.strerror}"
            ) from None
        self._owned.set()

    @property
    def owned(self) -> bool:
        """We are the one who writes there."""
        return self._owned.is_set()

    async def until_owned(self) -> None:
        """Wait until we are."""
        await self._owned.wait()

    @property
    def lock(self) -> int | None:
        """Descriptor of the lock, to be passed on."""
        return self._lock

    def disown(self) -> None:
        """Write nothing further: another process does from here on."""
        self._owned = trio.Event()

    def release(self) -> None:
        """Let another process have it."""
        self.disown()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def takeover_socket(self) -> Path:
        """Where the next ztunnel asks for our sockets."""
        return self.path / "takeover.sock"

    @property
    def admin_socket(self) -> Path:
        """Where `ztunnel status` finds the daemon."""
        return self.path / "admin.sock"

    # certificate

    def save_identity(self, identity: Identity) -> None:
        """Keep key, chain and roots. Roots first: an old certificate is checked against the new roots at worst.

        Raises:
            OSError: the disk is full, or the directory gone.
        """
        roots = b"".join(bundle.to_pem() for bundle in identity.bundles.values())
        chain, key = identity.svid.to_pem()
        write_private(self.path / "roots.pem", roots)
        write_private(self.path / "svid.pem", key + chain)

    def load_identity(self, *, namespace: str, service_account: str, now: float) -> Identity | None:
        """The certificate of the last run, where it is this workload's and still valid.

        Args:
            namespace: Of the workload that is served.
            service_account: Of the workload that is served.
            now: Wall clock, seconds since 1970.

        Returns:
            None when there is none, or none that may be used; the latter is logged once.
        """
        path = self.path / "svid.pem"
        try:
            pem = _read(path, MAX_PEM)
            roots_pem = _read(self.path / "roots.pem", MAX_PEM)
            if pem is None or roots_pem is None:
                return None
            svid = X509Svid.from_pem(pem, pem)
            if (svid.id.namespace, svid.id.service_account) != (namespace, service_account):
                raise ControlPlaneError(f"it is for {svid.id}, and this workload is {namespace}/{service_account}")
            check_validity(svid, datetime.datetime.fromtimestamp(now, datetime.UTC))
            bundle = read_roots(roots_pem, svid.id.trust_domain)
            check_path(svid, bundle)
        except (OSError, IdentityError, ControlPlaneError) as error:
            log.warning("saved certificate not used", path=str(path), error=str(error))
            return None
        return Identity(svid, bundle)

    def roots_pem(self) -> bytes | None:
        """The roots of the last certificate or of the enrolment, to trust the control plane by."""
        try:
            return _read(self.path / "roots.pem", MAX_PEM)
        except (OSError, ControlPlaneError):
            return None

    # revocation lists

    def save_revocations(self, pem: bytes) -> None:
        """Keep the lists that discovery sent.

        Raises:
            OSError: the disk is full, or the directory gone.
        """
        write_private(self.path / "crl.pem", pem)

    def load_revocations(self) -> bytes | None:
        """The lists of the last run, PEM.

        Raises:
            OSError: they cannot be read.
        """
        path = self.path / "crl.pem"
        return path.read_bytes() if path.exists() else None

    # snapshot

    def save_snapshot(self, data: bytes | Sequence[bytes], workload: str, stale_since: float | None = None) -> None:
        """Keep the picture of the mesh as `workload` sees it.

        Args:
            data: The picture, or the pieces of it.
            workload: Whose it is.
            stale_since: Since when it may be out of date, seconds since 1970; None: it is current.

        Raises:
            OSError: the disk is full, or the directory gone.
            ControlPlaneError: it is too large to be kept.
        """
        pieces = [data] if isinstance(data, bytes) else data
        length = sum(map(len, pieces))
        if length > MAX_SNAPSHOT:
            raise ControlPlaneError(f"the snapshot has {length} bytes; at most {MAX_SNAPSHOT} are kept")
        header = {"format": FORMAT, "workload": workload, "length": length, "sha256": _sha256(pieces)}
        path = self.path / "mesh.snapshot"
        write_private(path, [json.dumps(header).encode() + b"\n", *pieces])
        if stale_since is not None:
            os.utime(path, (stale_since, stale_since))

    def load_snapshot(self, workload: str) -> SavedSnapshot | None:
        """The picture of the last run, where it is whole and this workload's.

        Returns:
            None when there is none, or none that may be used; the latter is logged once.
        """
        path = self.path / "mesh.snapshot"
        try:
            raw = _read(path, MAX_SNAPSHOT + 4096)
            if raw is None:
                return None
            data = _unwrap(raw, workload)
            return SavedSnapshot(data, path.stat().st_mtime)
        except (OSError, ControlPlaneError) as error:
            log.warning("saved mesh not used", path=str(path), error=str(error))
            return None

    def touch_snapshot(self) -> None:
        """Note that the snapshot is still current."""
        try:
            os.utime(self.path / "mesh.snapshot")
        except FileNotFoundError:
            pass  # none was written yet
        except OSError as error:
            log.warning("state directory cannot be written", path=str(self.path), error=str(error))


def _unwrap(raw: bytes, workload: str) -> bytes:
    line, newline, data = raw.partition(b"\n")
    try:
        header = json.loads(line) if newline and len(line) < 4096 else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ControlPlaneError("it is no snapshot of a ztunnel")
    if header.get("format") != FORMAT:
        raise ControlPlaneError(f"its format is {header.get('format')!r}; this version reads {FORMAT}")
    if header.get("workload") != workload:
        raise ControlPlaneError(f"it is of workload {header.get('workload')!r}, and this is {workload!r}")
    if header.get("length") != len(data) or header.get("sha256") != _sha256([data]):
        raise ControlPlaneError("it is torn or damaged")
    return data


def _sha256(pieces: Sequence[bytes]) -> str:
    """By the OpenSSL that TLS uses: hashlib's own would be another four megabytes of the daemon."""
    digest = Hash(SHA256())
    for piece in pieces:
        digest.update(piece)
    return digest.finalize().hex()


def _read(path: Path, limit: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    if len(data) > limit:
        raise ControlPlaneError(f"it is larger than {limit} bytes")
    return data


class CacheWriter:
    """Writes what changed, a little later and in a thread, so that no connection waits for a disk."""

    def __init__(
        self,
        state: StateDir,
        *,
        workload: str,
        snapshot: Callable[[], Awaitable[bytes | Sequence[bytes]]],
        in_sync: Callable[[], bool],
        stale_since: Callable[[], float | None] = lambda: None,
    ) -> None:
        """Write to `state`.

        Args:
            state: Where to.
            workload: Whose picture it is.
            snapshot: Makes the bytes to keep.
            in_sync: Whether the picture is current now.
            stale_since: Since when it may be out of date, seconds since 1970.
        """
        self._state = state
        self._workload = workload
        self._snapshot = snapshot
        self._in_sync = in_sync
        self._stale_since = stale_since
        self._dirty = False
        self._identity: Identity | None = None
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._rest = 0.0
        self._failed = False

    def mesh_changed(self) -> None:
        """The picture changed, or is no longer known to be current."""
        self._dirty = True
        self._wake.set()

    def identity_changed(self, identity: Identity) -> None:
        """There is a new certificate."""
        self._identity = identity
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled or stopped, and then what is left, for five seconds at most."""
        await self._state.until_owned()
        with self._scope:
            await self._write_on()
        self._stopped.set()

    async def stop(self) -> None:
        """Write what is left, and nothing from then on."""
        self._scope.cancel()
        if self._state.owned:
            await self._stopped.wait()

    async def _write_on(self) -> None:
        try:
            while True:
                if not self._dirty and self._identity is None:
                    with trio.move_on_after(TOUCH):
                        await self._wake.wait()
                self._wake = trio.Event()
                if self._dirty or self._identity is not None:
                    await self._settle()
                    await trio.sleep(await self._write())
                elif self._in_sync():
                    await trio.to_thread.run_sync(self._state.touch_snapshot)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + FLUSH_TIMEOUT):
                await self._write()
                if self._in_sync():
                    await trio.to_thread.run_sync(self._state.touch_snapshot)

    async def _settle(self) -> None:
        latest = trio.current_time() + max(LONGEST, self._rest)
        if self._identity is None and self._rest:
            await trio.sleep(self._rest)
        while self._identity is None and trio.current_time() < latest:
            wake = self._wake
            with trio.move_on_after(QUIET) as quiet:
                await wake.wait()
            if quiet.cancelled_caught:
                return
            self._wake = trio.Event()

    async def _write(self) -> float:
        """Write what is due; returns how long to rest before the next."""
        identity, dirty = self._identity, self._dirty
        started = time.perf_counter()
        try:
            if identity is not None:
                await trio.to_thread.run_sync(self._state.save_identity, identity)
                if self._identity is identity:
                    self._identity = None
            if dirty:
                self._dirty = False
                try:
                    data = await self._snapshot()
                    stale = self._stale_since()
                    await trio.to_thread.run_sync(self._state.save_snapshot, data, self._workload, stale)
                except BaseException:
                    self._dirty = True
                    raise
        except (OSError, ControlPlaneError) as error:
            if not self._failed:
                log.warning("state not saved; trying again", path=str(self._state.path), error=str(error))
            self._failed = True
            return RETRY
        self._failed = False
        if dirty:
            self._rest = min(RETRY, (time.perf_counter() - started) * SHARE)
        return 0.0
