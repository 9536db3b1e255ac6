"""What systemd is told, where it waits to be told (`Type=notify`). Source: sd_notify(3)."""

from __future__ import annotations

import contextlib
import os
import socket

import trio

__all__ = ["notify", "notify_main"]

_BARRIER_SECONDS = 5.0


def notify(*lines: str) -> None:
    """Tell it these lines."""
    _notify("\n".join(lines))


async def notify_main() -> None:
    """Tell systemd that we are the unit's main process, and wait until it knows: the old one may end next.

    Source: sd_notify(3), MAINPID and BARRIER.
    """
    if not os.environ.get("NOTIFY_SOCKET"):
        return
    notify(f"MAINPID={os.getpid()}")
    reading, writing = os.pipe()
    try:
        _notify("BARRIER=1", writing)
    finally:
        os.close(writing)
    with trio.move_on_after(_BARRIER_SECONDS), contextlib.closing(trio.lowlevel.FdStream(reading)):
        await trio.lowlevel.wait_readable(reading)  # it closed its end


def _notify(text: str, fd: int | None = None) -> None:
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        if fd is None:
            sock.sendto(text.encode(), address)
        else:
            sock.connect(address)
            socket.send_fds(sock, [text.encode()], [fd])
