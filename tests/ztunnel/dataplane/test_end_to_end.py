"""Two data paths over loopback, with real sockets and certificates."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from tests.support.mesh import tcp
from tests.support.pair import CA, Pair, counts, echo, open_pair, reset

from ztunnel.mesh import Authorization, parse_ip
from ztunnel.mesh.policy import Action, Kind, Match, PolicyScope, StringMatch

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with open_pair() as pair:
        with trio.fail_after(20):
            yield pair


def allow(*principals: str, name: str = "allow", scope: PolicyScope = PolicyScope.NAMESPACE) -> Authorization:
    """An ALLOW policy for these principals."""
    match = Match(principals=tuple(StringMatch(Kind.EXACT, f"cluster.local/ns/default/sa/{who}") for who in principals))
    return Authorization(name=name, namespace="default", scope=scope, action=Action.ALLOW, rules=(((match,),),))


async def read_all(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    async for chunk in stream:
        data += chunk
    return bytes(data)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_bytes_go_there_and_back(pair: Pair) -> None:
    await pair.serve(echo)
    async with await pair.connect() as stream:
        await stream.send_all(b"hello")
        await stream.send_eof()
        assert await read_all(stream) == b"hello"
    await pair.settle(lambda: bool(pair.client.log.completed and pair.server.log.completed))
    (record, received, sent, error) = pair.client.log.completed[0]
    assert (received, sent, error) == (5, 5, None)
    assert record.parties.hbone_authority == f"{pair.server.ip}:{pair.app_port}"
    (record, received, sent, error) = pair.server.log.completed[0]
    assert (received, sent, error) == (5, 5, None)
    assert str(record.parties.source_identity) == "spiffe://cluster.local/ns/default/sa/client"


async def test_what_streams_have_in_common_does_not_outlive_a_change_of_the_mesh(pair: Pair) -> None:
    await pair.serve(echo)
    for name in ("server", "server", "renamed"):
        if name == "renamed":
            pair.store.apply_addresses([attrs.evolve(pair.server.workload, canonical_name=name)], [])
        async with await pair.connect() as stream:
            await stream.send_eof()
            assert await read_all(stream) == b""
    await pair.settle(lambda: len(pair.server.log.completed) == len(pair.client.log.completed) == 3)
    first, second, third = (record.parties for record, *_ in pair.server.log.completed)
    assert first is second
    for parties in (third, pair.client.log.completed[-1][0].parties):
        assert parties.destination_workload is not None
        assert parties.destination_workload.canonical_name == "renamed"


async def test_each_direction_ends_by_itself(pair: Pair) -> None:
    async def reversed_half_close(stream: trio.SocketStream) -> None:
        await stream.send_all(b"first")
        await stream.send_eof()
        assert await read_all(stream) == b"second"
        done.set()

    done = trio.Event()
    await pair.serve(reversed_half_close)
    async with await pair.connect() as stream:
        assert await read_all(stream) == b"first"
        await stream.send_all(b"second")
        await stream.send_eof()
        await done.wait()


async def test_a_reset_of_the_client_reaches_the_application(pair: Pair) -> None:
    begun, broken = trio.Event(), trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        begun.set()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some(1)
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        broken.set()

    await pair.serve(app)
    stream = await pair.connect()
    await stream.send_all(b"x")
    await begun.wait()
    reset(stream)
    await broken.wait()
    await pair.settle(lambda: bool(pair.server.log.completed))
    assert pair.server.log.errors == ["send: the stream was reset: CONNECT_ERROR"]
    assert pair.client.log.errors == []


async def test_a_reset_of_the_application_reaches_the_client(pair: Pair) -> None:
    async def app(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        reset(stream)

    await pair.serve(app)
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some(1)
        assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_a_hundred_connections_share_one_tunnel_and_the_next_gets_another(pair: Pair) -> None:
    await pair.serve(echo)
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(await pair.connect()) for _ in range(100)]
        for number, stream in enumerate(streams):
            await stream.send_all(b"%d" % number)
        for number, stream in enumerate(streams):
            assert await stream.receive_some(10) == b"%d" % number
        assert len(pair.client.plane.dialer.tunnels) == len(pair.server.plane.inbound.tunnels) == 1
        one_more = await stack.enter_async_context(await pair.connect())
        await one_more.send_all(b"x")
        assert await one_more.receive_some(1) == b"x"
        assert len(pair.client.plane.dialer.tunnels) == 2
        for stream in streams:
            await stream.send_eof()
            assert await stream.receive_some(1) == b""


async def test_a_thousand_connections_at_once_dial_no_more_tunnels_than_they_need(pair: Pair) -> None:
    await pair.serve(echo)
    limit = trio.CapacityLimiter(150)
    most = 0

    async def visit() -> None:
        nonlocal most
        async with limit, await pair.connect() as stream:
            await stream.send_all(b"y")
            assert await stream.receive_some(1) == b"y"
            most = max(most, len(pair.client.plane.dialer.tunnels))

    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(visit)
    assert most == 2
    await pair.settle(lambda: len(pair.server.log.completed) == 1000)


async def test_sleeping_readers_do_not_stall_others(pair: Pair) -> None:
    size = 3 << 20
    asleep = trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        if await stream.receive_some(1) == b"s":
            await asleep.wait()
        await read_all(stream)
        await stream.send_all(b"done")

    await pair.serve(app)
    async with contextlib.AsyncExitStack() as stack:
        sleepers = [await stack.enter_async_context(await pair.connect()) for _ in range(20)]
        async with trio.open_nursery() as nursery:

            async def push(stream: trio.SocketStream, kind: bytes) -> None:
                await stream.send_all(kind + b"x" * size)
                await stream.send_eof()
                assert await read_all(stream) == b"done"

            for stream in sleepers:
                nursery.start_soon(push, stream, b"s")
            await trio.sleep(0.2)
            async with await pair.connect() as stream:
                await push(stream, b"a")
            assert pair.client.plane.budget.used + pair.server.plane.budget.used <= 2 * pair.server.plane.budget.limit
            asleep.set()


async def test_bulk_arrives_whole_in_both_directions_at_once(pair: Pair) -> None:
    size = 8 << 20
    payload = bytes(range(256)) * (size // 256)
    await pair.serve(echo)
    async with await pair.connect() as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(payload)
            await stream.send_eof()

        nursery.start_soon(send)
        assert await read_all(stream) == payload
    await pair.settle(lambda: bool(pair.server.log.completed))
    assert pair.server.log.completed[0][1:] == (size, size, None)


async def test_a_policy_that_does_not_allow_is_a_401_and_its_reason_is_logged(pair: Pair) -> None:
    await pair.serve(echo)
    pair.store.apply_policies([allow("somebody")], [])
    async with await pair.connect() as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b""
    await pair.settle(lambda: bool(pair.server.log.completed and pair.client.log.completed))
    reason = "connection closed due to policy rejection: allow policies exist, but none allowed"
    assert pair.server.log.errors == [reason]
    assert pair.client.log.errors == ["http status: 401 Unauthorized"]


async def test_a_change_of_policy_closes_what_it_no_longer_allows(pair: Pair) -> None:
    await pair.serve(echo)
    pair.store.apply_policies([allow("client")], [])
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        pair.store.apply_policies([allow("client", name="another")], [])
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        pair.store.apply_policies([], ["default/allow", "default/another"])
        pair.store.apply_policies([allow("somebody")], [])
        with pytest.raises(trio.BrokenResourceError):  # a FIN would make what came look complete
            await stream.receive_some(1)
    await pair.settle(lambda: bool(pair.server.log.completed))
    assert pair.server.log.errors == ["connection closed due to policy change"]
    assert pair.client.log.errors == ["receive: the stream was reset: CONNECT_ERROR"]


async def test_each_stream_of_a_tunnel_is_ruled_by_the_policies_of_its_time(pair: Pair) -> None:
    """Also where none was open when they changed: nobody was asked again then."""
    await pair.serve(echo)

    async def is_let_in() -> bool:
        done = len(pair.server.log.completed)
        answer = b""
        async with await pair.connect() as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"x")
                answer = await stream.receive_some(1)
        await pair.settle(lambda: len(pair.server.log.completed) > done)
        return answer == b"x"

    assert await is_let_in()
    assert await is_let_in()
    pair.store.apply_policies([allow("somebody")], [])
    assert not await is_let_in()
    assert not await is_let_in()
    pair.store.apply_policies([allow("somebody", "client")], [])
    assert await is_let_in()
    pair.store.apply_policies([], ["default/allow"])
    assert await is_let_in()
    pair.store.apply_policies([allow("somebody", scope=PolicyScope.WORKLOAD_SELECTOR)], [])
    assert await is_let_in()
    pair.store.apply_addresses([attrs.evolve(pair.server.workload, authorization_policies=("default/allow",))], [])
    assert not await is_let_in()


async def test_a_workload_that_names_another_policy_is_asked_again(pair: Pair) -> None:
    await pair.serve(echo)
    pair.store.apply_policies([allow("somebody", scope=PolicyScope.WORKLOAD_SELECTOR)], [])
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        selected = attrs.evolve(pair.server.workload, authorization_policies=("default/allow",))
        pair.store.apply_addresses([selected], [])
        await pair.settle(lambda: bool(pair.server.log.completed))
    assert pair.server.log.errors == ["connection closed due to policy change"]


async def test_a_peer_that_is_down_is_refused_and_never_reached_in_plaintext(pair: Pair) -> None:
    reached = 0

    async def app(stream: trio.SocketStream) -> None:
        nonlocal reached
        reached += 1

    await pair.serve(app)
    pair.server.plane.listeners["hbone"].close()
    await trio.testing.wait_all_tasks_blocked()
    async with await pair.connect() as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some(1) == b""
    await pair.settle(lambda: bool(pair.client.log.completed))
    assert pair.client.log.errors == ["connection failed: Connection refused"]
    assert reached == 0


async def test_one_dial_fails_for_all_who_wait_for_it(pair: Pair) -> None:
    await pair.serve(echo)
    pair.server.plane.listeners["hbone"].close()
    await trio.testing.wait_all_tasks_blocked()
    counts.clear()
    streams = [await pair.connect() for _ in range(20)]
    await pair.settle(lambda: len(pair.client.log.completed) == 20)
    assert counts["connect"] <= 20  # at most one each; those that were there together share one
    for stream in streams:
        await stream.aclose()


async def test_a_peer_with_another_identity_is_refused(pair: Pair) -> None:
    await pair.serve(echo)
    pair.server.identities.identity = CA.identity("default", "impostor")
    async with await pair.connect() as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some(1) == b""
    await pair.settle(lambda: bool(pair.client.log.completed))
    assert "spiffe://cluster.local/ns/default/sa/impostor" in pair.client.log.errors[0]


async def test_without_a_certificate_there_is_no_connection(pair: Pair) -> None:
    await pair.serve(echo)
    pair.client.identities.identity = None
    async with await pair.connect() as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some(1) == b""
    await pair.settle(lambda: bool(pair.client.log.completed))
    assert pair.client.log.errors == ["identity error: the CA is away"]


async def test_a_connection_to_one_of_our_own_listeners_is_refused(pair: Pair) -> None:
    for destination in (None, (parse_ip("127.0.0.1"), 15008), (parse_ip(pair.client.ip), 15008)):
        pair.client.calls.destination = destination
        async with await trio.open_tcp_stream(*pair.client.outbound) as stream:
            with contextlib.suppress(trio.BrokenResourceError):
                assert await stream.receive_some(1) == b""
    assert pair.client.log.denied == ["attempted recursive call to ourselves"] * 3


async def test_an_application_that_is_down_is_a_503(pair: Pair) -> None:
    pair.app_port = 1
    async with await pair.connect() as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some(1) == b""
    await pair.settle(lambda: bool(pair.server.log.completed and pair.client.log.completed))
    assert pair.client.log.errors == ["http status: 503 Service Unavailable"]
    assert pair.server.log.errors == ["connection failed: Connection refused"]


async def test_a_lost_tunnel_resets_both_applications(pair: Pair) -> None:
    begun, broken = trio.Event(), trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        begun.set()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        broken.set()

    await pair.serve(app)
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        await begun.wait()
        (tunnel,) = pair.client.plane.dialer.tunnels
        tunnel._sock.shutdown(socket.SHUT_RDWR)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        await broken.wait()
    assert not pair.client.plane.dialer.tunnels
    await pair.settle(lambda: not pair.server.plane.inbound.tunnels)


async def test_plaintext_comes_in_without_an_identity(pair: Pair) -> None:
    port = await pair.serve(echo)
    pair.server.calls.destination = (parse_ip(pair.server.ip), port)
    async with await trio.open_tcp_stream(*pair.server.inbound) as stream:
        await stream.send_all(b"plain")
        await stream.send_eof()
        assert await read_all(stream) == b"plain"
    await pair.settle(lambda: bool(pair.server.log.completed))
    record, received, sent, error = pair.server.log.completed[0]
    assert record.parties.source_identity is None
    assert (received, sent, error) == (5, 5, None)
    pair.store.apply_policies([allow("client")], [])
    async with await trio.open_tcp_stream(*pair.server.inbound) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some(1) == b""
    await pair.settle(lambda: len(pair.server.log.completed) == 2)
    assert "policy rejection" in pair.server.log.errors[0]


async def test_a_destination_out_of_the_mesh_is_passed_through(pair: Pair) -> None:
    await pair.serve(echo)
    pair.store.apply_addresses([], [pair.server.workload.uid])
    pair.store.apply_addresses([tcp("plain", pair.server.ip)], [])
    async with await pair.connect() as stream:
        await stream.send_all(b"plain")
        await stream.send_eof()
        assert await read_all(stream) == b"plain"
    await pair.settle(lambda: bool(pair.client.log.completed))
    record, received, sent, error = pair.client.log.completed[0]
    assert record.parties.hbone_authority is None
    assert (received, sent, error) == (5, 5, None)
    assert not pair.client.plane.dialer.tunnels


async def test_a_drain_lets_open_connections_finish_and_takes_no_new_ones(pair: Pair) -> None:
    await pair.serve(echo)
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some(1) == b"x"
        drained = trio.Event()

        async def drain() -> None:
            await pair.server.plane.drain()
            drained.set()

        pair.nursery.start_soon(drain)
        await pair.settle(lambda: all(tunnel.engine.draining for tunnel in pair.client.plane.dialer.tunnels))
        await stream.send_all(b"y")
        assert await stream.receive_some(1) == b"y"
        async with await pair.connect() as late:
            with contextlib.suppress(trio.BrokenResourceError):
                assert await late.receive_some(1) == b""
        assert not drained.is_set()
        await stream.send_eof()
        assert await stream.receive_some(1) == b""
    await drained.wait()
    assert not pair.server.plane.inbound.tunnels
    assert pair.server.log.errors == []
    await pair.settle(lambda: not pair.client.plane.dialer.tunnels)


async def test_a_drained_tunnel_delivers_its_last_bytes_to_a_peer_that_reads_late(pair: Pair) -> None:
    data = os.urandom(250_000)

    async def answer(stream: trio.SocketStream) -> None:
        assert await read_all(stream) == b"?"
        await stream.send_all(data)

    await pair.serve(answer)
    async with await pair.connect() as first, await pair.connect() as stream:
        await first.send_all(b"?")
        await first.send_eof()
        assert await read_all(first) == data
        async with pair.looking_away():
            inbound = pair.server.plane.inbound
            await stream.send_all(b"?")
            await pair.settle(lambda: len(pair.server.plane.connections.inbound) == 1)
            inbound.drain()
            (tunnel,) = inbound.tunnels
            tunnel.on_time(pair.reactor.clock() + 6)  # the second GOAWAY
            await stream.send_eof()
            await pair.settle(lambda: not inbound.tunnels)
            assert pair.reactor.farewells
        assert await read_all(stream) == data  # and the client's WINDOW_UPDATE comes to a tunnel that is closed
    await pair.settle(lambda: not pair.reactor.farewells)
    assert pair.client.log.errors == []


async def test_the_deadline_of_a_drain_cuts_what_is_left() -> None:
    async with open_pair() as pair:
        await pair.serve(echo)
        async with await pair.connect() as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some(1) == b"x"
            object.__setattr__(pair.client.plane.config, "drain_deadline", 0.05)
            await pair.client.plane.drain()
            pair.client.plane.close()
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        assert pair.client.log.errors == ["connection closed due to connection drain"]


async def test_no_descriptor_is_left_behind() -> None:
    before = descriptors()
    async with open_pair() as pair:
        await pair.serve(echo)
        for _ in range(20):
            async with await pair.connect() as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some(1) == b"x"
        streams = [await pair.connect() for _ in range(10)]
        for stream in streams[:5]:
            reset(stream)
        for stream in streams[5:]:
            await stream.aclose()
        await pair.settle(lambda: not len(pair.client.plane.connections) and not len(pair.server.plane.connections))
        await pair.settle(lambda: not pair.client.plane.outbound.pending)
    assert descriptors() == before
