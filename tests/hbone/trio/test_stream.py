"""HboneStream against the contract of Trio's streams, and what HTTP/2 adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from tests.support.tunnels import clog, open_tunnels

from hbone.errors import ConnectionLost, ConnectRejected, ErrorCode, LocalProtocolError, StreamResetError

if TYPE_CHECKING:
    from hbone.trio import HboneStream


async def test_the_contract_of_half_closeable_streams() -> None:
    async with open_tunnels() as tunnels:

        async def make() -> tuple[HboneStream, HboneStream]:
            return await tunnels.pair()

        async def make_clogged() -> tuple[HboneStream, HboneStream]:
            client, server = await tunnels.pair()
            await clog(client)
            await clog(server)
            return client, server

        await trio.testing.check_half_closeable_stream(make, make_clogged)


async def test_end_stream_each_way_closes_the_stream() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        await client.send_all(b"question")
        await client.send_eof()
        assert await server.receive_some() == b"question"
        assert await server.receive_some() == b""
        await server.send_all(b"answer")
        await server.send_eof()
        assert await client.receive_some() == b"answer"
        assert await client.receive_some() == b""
        assert tunnels.client.engine.open_streams == 0
        assert tunnels.server.engine.open_streams == 0


@pytest.mark.parametrize("code", list(ErrorCode))
async def test_what_a_reset_means_to_who_reads(code: ErrorCode) -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        await server.send_all(b"before")
        server.reset(code)
        assert await client.receive_some() == b"before"
        if code in (ErrorCode.NO_ERROR, ErrorCode.CANCEL):
            assert await client.receive_some() == b""
        else:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await client.receive_some()
            assert isinstance(caught.value.__cause__, StreamResetError)
            assert caught.value.__cause__.code is code
        with pytest.raises(trio.BrokenResourceError):
            await client.send_all(b"x")


async def test_reset_is_connect_error_unless_told_otherwise() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        client.reset()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await server.receive_some()
        assert isinstance(caught.value.__cause__, StreamResetError)
        assert caught.value.__cause__.code is ErrorCode.CONNECT_ERROR
        with pytest.raises(trio.ClosedResourceError):
            await client.receive_some()


async def test_aclose_lets_the_peer_read_everything() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        await client.send_all(b"x" * 200_000)
        await client.aclose()
        received = 0
        while data := await server.receive_some():
            received += len(data)
        assert received == 200_000


async def test_a_lost_connection_breaks_streams_after_what_they_hold() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        await server.send_all(b"before")
        await trio.testing.wait_all_tasks_blocked()
        tunnels.cut()
        await trio.testing.wait_all_tasks_blocked()
        assert await client.receive_some() == b"before"
        for verb in (client.receive_some, client.send_eof, client.wait_send_all_might_not_block):
            with pytest.raises(trio.BrokenResourceError) as caught:
                await verb()
            assert isinstance(caught.value.__cause__, ConnectionLost)


async def test_a_slow_stream_does_not_stall_others() -> None:
    async with open_tunnels() as tunnels:
        slow, slow_server = await tunnels.pair()
        await clog(slow)
        fast, fast_server = await tunnels.pair()
        received = 0

        async def receive() -> None:
            nonlocal received
            while data := await fast_server.receive_some():
                received += len(data)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for _ in range(100):
                await fast.send_all(bytes(100_000))
            await fast.send_eof()
        assert received == 10_000_000
        slow_server.reset()


async def test_a_stream_that_nobody_reads_holds_no_more_than_its_window() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        sent = await clog(client)
        assert len(server._buffer) <= 256 * 1024
        assert sent == len(server._buffer)


async def test_a_cancelled_sender_leaves_the_tunnel_whole() -> None:
    async with open_tunnels() as tunnels:
        client, _ = await tunnels.pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, bytes(3_000_000))
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        client.reset(ErrorCode.CANCEL)
        other, other_server = await tunnels.pair()
        await other.send_all(b"still fine")
        assert await other_server.receive_some() == b"still fine"


async def test_a_server_rejects_before_it_uses_the_stream() -> None:
    async with open_tunnels() as tunnels:
        async with trio.open_nursery() as nursery:

            async def refuse() -> None:
                (await tunnels.requested()).reject(401)

            nursery.start_soon(refuse)
            with pytest.raises(ConnectRejected) as caught:
                await tunnels.client.connect("10.0.0.7:8080")
            assert caught.value.status == 401


async def test_an_accepted_stream_cannot_be_rejected() -> None:
    async with open_tunnels() as tunnels:
        _, server = await tunnels.pair()
        with pytest.raises(LocalProtocolError):
            server.reject(503)


async def test_peer_and_request_are_known() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair("shop.example:443")
        assert str(server.peer) == "spiffe://cluster.local/ns/shop/sa/web"
        assert str(client.peer) == "spiffe://cluster.local/ns/shop/sa/orders"
        assert str(server.request.authority) == "shop.example:443"


async def test_frames_grow_to_what_the_peer_allows() -> None:
    async with open_tunnels() as tunnels:
        client, server = await tunnels.pair()
        await client.send_all(bytes(64 * 1024))
        assert tunnels.client.engine.statistics().sent_frames == 1
        assert await server.receive_some()


async def test_cancelling_connect_resets_the_stream() -> None:
    async with open_tunnels() as tunnels:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tunnels.client.connect, "10.0.0.7:8080")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        stream = await tunnels.requested()
        await trio.testing.wait_all_tasks_blocked()
        assert isinstance(stream.failure, StreamResetError)
        assert tunnels.client.engine.open_streams == 0
