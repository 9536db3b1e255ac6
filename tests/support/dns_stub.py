"""A resolver like systemd-resolved's stub: hears on 127.0.0.53, asks another, and is a user of its own.

Run on a host: `python -m tests.support.dns_stub UPLINK`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys

import trio
from tests.support.dns import both, exactly

USER = 65_534  # nobody


async def ask(uplink: str, data: bytes, *, datagram: bool) -> bytes:
    if datagram:
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            await sock.connect((uplink, 53))
            await sock.send(data)
            return bytes(await sock.recv(65_535))
    async with await trio.open_tcp_stream(uplink, 53) as stream:
        await stream.send_all(len(data).to_bytes(2, "big") + data)
        return await exactly(stream, int.from_bytes(await exactly(stream, 2), "big"))


async def main(uplink: str) -> None:
    udp, listener = both("127.0.0.53", 53)
    os.setgid(USER)
    os.setuid(USER)

    async def answer(data: bytes, peer: object) -> None:
        with trio.move_on_after(5):
            await udp.sendto(await ask(uplink, data, datagram=True), peer)  # type: ignore[call-overload]

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                while head := await exactly(stream, 2):
                    data = await exactly(stream, int.from_bytes(head, "big"))
                    reply = await ask(uplink, data, datagram=False)
                    await stream.send_all(len(reply).to_bytes(2, "big") + reply)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        while True:
            data, peer = await udp.recvfrom(65_535)
            nursery.start_soon(answer, data, peer)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
