"""What a TCP connection and a stream are to each other."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from tests.support.tunnels import Tunnels, open_tunnels

from hbone.errors import ErrorCode, StreamResetError
from hbone.trio.relay import relay

if TYPE_CHECKING:
    from hbone.trio import HboneStream


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream(*listener.socket.getsockname()[:2])
        return near, await listener.accept()


async def joined(tunnels: Tunnels, nursery: trio.Nursery) -> tuple[trio.SocketStream, HboneStream]:
    """An application's socket at one end, a stream at the other."""
    app, tcp = await tcp_pair()
    client, server = await tunnels.pair()
    nursery.start_soon(relay, server, tcp)
    return app, client


async def test_each_direction_ends_on_its_own() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, stream = await joined(tunnels, nursery)
        await app.send_all(b"question")
        await app.send_eof()
        assert await stream.receive_some() == b"question"
        assert await stream.receive_some() == b""
        await stream.send_all(b"answer")
        await stream.send_eof()
        assert await app.receive_some() == b"answer"
        assert await app.receive_some() == b""
        await app.aclose()


async def test_a_reset_application_is_rst_stream_connect_error() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, stream = await joined(tunnels, nursery)
        await app.send_all(b"x")
        assert await stream.receive_some() == b"x"
        app.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        app.socket.close()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, StreamResetError)
        assert caught.value.__cause__.code is ErrorCode.CONNECT_ERROR


async def test_a_reset_stream_is_econnreset_to_the_application() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, stream = await joined(tunnels, nursery)
        stream.reset()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await app.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        await app.aclose()


async def test_a_cancelled_stream_is_a_normal_end_to_the_application() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, stream = await joined(tunnels, nursery)
        await stream.send_all(b"last words")
        stream.reset(ErrorCode.CANCEL)
        assert await app.receive_some() == b"last words"
        assert await app.receive_some() == b""
        await app.aclose()


async def test_a_peer_that_is_done_reading_does_not_cut_what_it_sent() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, tcp = await tcp_pair()
        client, server = await tunnels.pair()
        nursery.start_soon(relay, client, tcp)
        await server.send_all(b"answer")
        server.close()  # END_STREAM, then RST_STREAM NO_ERROR
        with contextlib.suppress(trio.BrokenResourceError):
            for _ in range(100):
                await app.send_all(bytes(10_000))
        assert await app.receive_some() == b"answer"
        assert await app.receive_some() == b""
        await app.aclose()


async def test_an_application_that_resets_while_it_is_sent_to_is_connect_error() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, stream = await joined(tunnels, nursery)
        app.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        nursery.start_soon(app.aclose)
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.send_all(bytes(64 * 1024 * 1024))
        assert isinstance(caught.value.__cause__, StreamResetError)
        assert caught.value.__cause__.code is ErrorCode.CONNECT_ERROR


async def test_a_lost_tunnel_resets_the_application() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, _ = await joined(tunnels, nursery)
        tunnels.cut()
        with pytest.raises(trio.BrokenResourceError):
            await app.receive_some()
        await app.aclose()


async def test_a_lost_tunnel_ends_the_relay_of_an_application_that_does_not_read() -> None:
    async with open_tunnels() as tunnels, trio.open_nursery() as nursery:
        app, tcp = await tcp_pair()
        client, server = await tunnels.pair()
        ended = trio.Event()

        async def relayed() -> None:
            await relay(server, tcp)
            ended.set()

        async def send_without_end() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await client.send_all(bytes(65_536))

        nursery.start_soon(relayed)
        nursery.start_soon(send_without_end)
        await trio.testing.wait_all_tasks_blocked(0.05)
        tunnels.cut()
        with trio.fail_after(5):
            await ended.wait()
        await app.aclose()
