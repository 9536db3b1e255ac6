"""The daemon's end of the process that forks workers."""

from __future__ import annotations

import array
import os
import pickle
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import trio

from hbone.errors import HboneError

if TYPE_CHECKING:
    from ztunnel.workers.worker import Setup

__all__ = ["StartFailed", "Starter"]

START = 30.0
"""Seconds for a worker to be started."""


class StartFailed(HboneError):
    """A worker could not be started."""


class Starter:
    """The process that forks workers; started again when it is gone.

    Args:
        setup: what workers have in common.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: trio.socket.SocketType | None = None
        self._busy = trio.Lock()
        self._closed = False

    async def fork(self, number: int, sock: int, memory: int) -> int:
        """Start a worker on these descriptors; its process id.

        Raises:
            StartFailed: why not.
        """
        async with self._busy:
            for last in (False, True):
                try:
                    return await self._ask(number, sock, memory)
                except (OSError, EOFError, trio.TooSlowError, trio.ClosedResourceError) as error:
                    self._end()
                    if last:
                        raise StartFailed(f"the process that starts workers failed: {error!r}") from None
        raise AssertionError

    async def _ask(self, number: int, sock: int, memory: int) -> int:
        if self._closed:
            raise StartFailed("the daemon is stopping")
        if self._socket is None:
            self._launch()
        assert self._socket is not None
        with trio.fail_after(START):
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock, memory]).tobytes())
            await self._socket.sendmsg([str(number).encode()], [rights])
            answer = await self._socket.recv(256)
        if not answer:
            raise EOFError("it ended")
        if answer.startswith(b"-"):
            raise StartFailed(f"a worker cannot be started: {answer[1:].decode(errors='replace').lower()}")
        return int(answer)

    def _launch(self) -> None:
        setup = self._setup
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        file = os.memfd_create("ztunnel-setup", os.MFD_CLOEXEC)
        try:
            os.write(file, pickle.dumps(setup))
            os.lseek(file, 0, os.SEEK_SET)
            kept = {fd for listeners in setup.listeners for fd in listeners.values()}
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I" if sys.flags.isolated else "-P",
                    "-m",
                    "ztunnel.workers.starter",
                    str(theirs.fileno()),
                    str(file),
                ],
                stdin=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not _is_secret(name)},
                pass_fds=[theirs.fileno(), file, setup.output_lock, *kept],
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(file)
        self._socket = trio.socket.from_stdlib_socket(ours)

    def close(self) -> None:
        """End it, and start no further one. Workers that were started live on."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _is_secret(name: str) -> bool:
    return name == "AUTH_TOKEN" or name.startswith(("XDS_HEADER_", "CA_HEADER_"))
