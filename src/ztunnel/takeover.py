"""A new ztunnel takes the place of the one that runs, and no connection notices.

The sockets are passed on, not made anew, so what waits on them waits on. Both have them for a moment; whoever accepts
a connection serves it to its end.

```text
new     -> {"take": 1, "pid": ...}
running -> {"socket": "outbound"} with a descriptor, for each socket; then {"end": n}
           the new one gets its picture of the mesh and its certificate, while the running one serves
new     -> {"serving": pid}                                    it accepts
running -> {"lock": true} with the state directory's lock      it accepts no more, drains, and ends
```

Each end sees by the kernel that the other is of its own user. When the connection ends before `serving`, the running
one goes on as if nothing had been asked.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

import trio

from hbone.daemon.logs import get_logger
from hbone.errors import HboneError
from ztunnel.given import Given, GivenSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

__all__ = ["TakeOver", "TakeOverFailed", "serve_takeover"]

VERSION: Final = 1
MESSAGE_SIZE: Final = 4096
"""Bytes of a message at most."""
MAX_SOCKETS: Final = 4096
ANSWER: Final = 10.0
"""Seconds that either side has for the next message of an exchange."""
PREPARE: Final = 120.0
"""Seconds that a new ztunnel has from getting the sockets to accepting."""

log = get_logger("ztunnel.takeover")


class TakeOverFailed(HboneError):
    """The running ztunnel did not give its sockets, or the new one did not get ready; the running one goes on."""


class _Ended(Exception):
    """The other end closed the connection."""


class _Channel:
    """One connection: JSON objects, with a descriptor or without."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock

    def peer_user(self) -> int:
        """User id of the process at the other end. Source: unix(7), SO_PEERCRED."""
        raw = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", raw)[1])

    async def send(self, message: dict[str, Any], fd: int | None = None) -> None:
        rights = []
        if fd is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())]
        try:
            with trio.fail_after(ANSWER):
                await self.sock.sendmsg([json.dumps(message).encode()], rights)
        except (OSError, trio.TooSlowError):
            raise _Ended from None

    async def receive(self, seconds: float = ANSWER) -> tuple[dict[str, Any], int | None]:
        """The next message, and the descriptor that came with it.

        Raises:
            _Ended: none comes.
            TakeOverFailed: it is none of ours.
        """
        try:
            with trio.fail_after(seconds):
                data, ancillary, flags, _ = await self.sock.recvmsg(
                    MESSAGE_SIZE, socket.CMSG_SPACE(4 * 8), socket.MSG_CMSG_CLOEXEC
                )
        except (OSError, trio.TooSlowError):
            raise _Ended from None
        fds = array.array("i")
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
        if not data:
            _close(fds)
            raise _Ended
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        if not isinstance(message, dict) or flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > 1:
            _close(fds)
            raise TakeOverFailed("the other ztunnel sent a message that cannot be read; are both of one release?")
        return message, fds[0] if fds else None

    def close(self) -> None:
        self.sock.close()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


async def serve_takeover(
    listener: socket.socket,
    sockets: Callable[[], Sequence[tuple[str, socket.socket]]],
    release: Callable[[int], Awaitable[int | None]],
) -> None:
    """Give the sockets to whom asks, until one accepts from them.

    Args:
        listener: SOCK_SEQPACKET; stays the caller's.
        sockets: what there is to give, with the names.
        release: called with the process id of the new one when it accepts; returns the lock to pass on.
    """
    accepting = trio.socket.from_stdlib_socket(listener)
    while True:
        try:
            sock, _ = await accepting.accept()
        except OSError as error:
            log.warning("nobody can be heard on the take-over socket for now", error=str(error))
            await trio.sleep(1)
            continue
        channel = _Channel(sock)
        try:
            if await _give(channel, sockets, release):
                return
        except (_Ended, TakeOverFailed) as error:
            log.warning(
                "a ztunnel that asked for our sockets did not take over; going on", error=str(error) or "it ended"
            )
        finally:
            channel.close()


async def _give(
    channel: _Channel,
    sockets: Callable[[], Sequence[tuple[str, socket.socket]]],
    release: Callable[[int], Awaitable[int | None]],
) -> bool:
    asked, fd = await channel.receive()  # first: closing a socket with unread bytes would lose the answer
    _close([fd] if fd is not None else [])
    if channel.peer_user() != os.geteuid():
        await channel.send({"error": "the running ztunnel is another user's"})
        raise TakeOverFailed(f"it is of user {channel.peer_user()}, and this ztunnel is of user {os.geteuid()}")
    if asked.get("take") != VERSION:
        await channel.send({"error": f"the running ztunnel gives its sockets in version {VERSION} only; restart it"})
        raise TakeOverFailed(f"it wants version {asked.get('take')!r}")
    log.info("another ztunnel gets ready to take over", pid=asked.get("pid"))
    given = sockets()
    for name, sock in given:
        await channel.send({"socket": name}, sock.fileno())
    await channel.send({"end": len(given)})
    serving, fd = await channel.receive(PREPARE + ANSWER)
    _close([fd] if fd is not None else [])
    pid = serving.get("serving")
    if not isinstance(pid, int):
        raise TakeOverFailed("it sent no message that it accepts")
    lock = await release(pid)
    with contextlib.suppress(_Ended):  # it has the sockets, and gets the lock as soon as we end
        await channel.send({"lock": lock is not None}, lock)
    return True


class TakeOver:
    """The new one's end.

    Args:
        path: where the running one listens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._channel: _Channel | None = None

    async def take(self) -> Given | None:
        """Get the sockets of the ztunnel that runs; None where none runs.

        Raises:
            TakeOverFailed: it does not give them.
        """
        sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        found: list[GivenSocket] = []
        try:
            with trio.fail_after(ANSWER):
                await sock.connect(str(self.path))
            self._channel = channel = _Channel(sock)
            if channel.peer_user() != os.geteuid():
                raise TakeOverFailed(f"{str(self.path)!r} is answered by a process of user {channel.peer_user()}")
            await channel.send({"take": VERSION, "pid": os.getpid()})
            while True:
                message, fd = await channel.receive()
                if fd is not None:
                    found.append(GivenSocket(str(message.get("socket", "")), socket.socket(fileno=fd)))
                if "error" in message:
                    raise TakeOverFailed(str(message["error"])[:200])
                if "end" in message or len(found) > MAX_SOCKETS:
                    break
            if message.get("end") != len(found):
                raise TakeOverFailed("not every socket of the running ztunnel arrived; is RLIMIT_NOFILE too low?")
        except (FileNotFoundError, ConnectionRefusedError):
            self.close()
            sock.close()
            return None
        except BaseException as error:
            self.close()
            sock.close()
            Given(found).close()
            if isinstance(error, OSError | _Ended | trio.TooSlowError):
                raise TakeOverFailed("the running ztunnel did not give its sockets; it may be stopping") from None
            raise
        return Given(found)

    async def serving(self) -> int | None:
        """Say that we accept; returns the lock of the state directory when the running one passes it on.

        None means that it ended meanwhile, by itself or at a signal. Its sockets are ours all the same.
        """
        channel = self._channel
        if channel is None:
            return None
        try:
            await channel.send({"serving": os.getpid()})
            _, lock = await channel.receive()
        except (_Ended, TakeOverFailed):
            return None
        finally:
            self.close()
        return lock

    def close(self) -> None:
        """Leave it to the other one, if it was not taken yet."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
