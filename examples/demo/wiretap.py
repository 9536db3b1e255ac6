"""Two ways to see what travels between the ztunnels: a packet socket, or a relay in front of one of them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    import socket

__all__ = ["PacketTap", "RelayTap", "Tap"]

LIMIT = 64 << 20
ETHERNET, IPV4, TCP = 14, 0x0800, 6


class Tap:
    """What was seen, both directions."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.nbytes = 0

    def note(self, payload: bytes | bytearray | memoryview) -> None:
        """Keep `payload`, up to a limit."""
        self.nbytes += len(payload)
        if len(self.seen) < LIMIT:
            self.seen += payload

    def contains(self, marker: bytes) -> bool:
        """Whether `marker` went by in the clear."""
        return marker in self.seen


class PacketTap(Tap):
    """Every TCP packet on the wire from or to one port. Needs CAP_NET_RAW."""

    def __init__(self, packets: socket.socket, port: int) -> None:
        super().__init__()
        self._packets = packets
        self._port = port

    async def run(self) -> None:
        """Read packets until cancelled."""
        sock = trio.socket.from_stdlib_socket(self._packets)
        with sock:
            while True:
                self._look(memoryview(await sock.recv(65536)))

    def _look(self, frame: memoryview) -> None:
        if len(frame) < ETHERNET + 40 or struct.unpack_from(">H", frame, 12)[0] != IPV4 or frame[ETHERNET + 9] != TCP:
            return
        tcp = ETHERNET + (frame[ETHERNET] & 15) * 4
        if self._port in struct.unpack_from(">HH", frame, tcp):
            self.note(frame[tcp + (frame[tcp + 12] >> 4) * 4 :])


class RelayTap(Tap):
    """A relay that stands at the tunnel port and passes everything on."""

    def __init__(self, listener: trio.SocketListener, target: tuple[str, int]) -> None:
        super().__init__()
        self._listener = listener
        self._target = target

    async def run(self) -> None:
        """Relay until cancelled."""
        await trio.serve_listeners(self._relay, [self._listener])

    async def _relay(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream(*self._target, local_address=near.socket.getpeername()[0])
        except OSError:
            await trio.aclose_forcefully(near)
            return
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, near, far)
            nursery.start_soon(self._copy, far, near)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            async for data in source:
                self.note(data)
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.aclose_forcefully(source)
            await trio.aclose_forcefully(sink)
