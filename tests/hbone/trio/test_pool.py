"""ConnectionPool against servers on a network in memory."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from tests.support.tunnels import ca, who

from hbone.config import ConnectionConfig
from hbone.connect import Authority, Baggage, ConnectRequest
from hbone.endpoint import Endpoint
from hbone.errors import (
    ConnectionLost,
    ConnectRejected,
    ErrorCode,
    HboneError,
    IdentityError,
    LocalProtocolError,
    PeerIdentityError,
    StreamResetError,
    TlsError,
)
from hbone.identity import StaticSource, any_peer
from hbone.pool import PoolStatistics
from hbone.testing.ca import TestCa
from hbone.testing.network import Network
from hbone.tls import TlsContext
from hbone.trio import Connection, ConnectionPool, HboneStream, serve_listeners

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio.testing import MockClock

    from hbone.identity import Identity
    from hbone.pool import PoolKey

VIA = ("10.0.0.7", 15008)
ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"


async def echo(stream: HboneStream) -> None:
    async for data in stream:
        await stream.send_all(data)


def source_of(identity: Identity) -> StaticSource:
    return StaticSource(identity.svid, identity.bundles)


@contextlib.asynccontextmanager
async def serving(
    network: Network,
    handler: Callable[[HboneStream], Awaitable[object]] = echo,
    address: tuple[str, int] = VIA,
    identity: Identity | None = None,
    **options: Any,
) -> AsyncIterator[trio.CancelScope]:
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[Any]) -> None:
        with scope:
            await serve_listeners(
                handler,
                source_of(identity or who("orders")),
                [network.listen(*address)],
                authorize=options.pop("authorize", any_peer),
                task_status=task_status,
                **options,
            )

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield scope
        scope.cancel()


def make_pool(network: Network, **options: Any) -> ConnectionPool:
    return ConnectionPool(source_of(who("web")), open_transport=network.open_transport, **options)


async def ask(stream: HboneStream, question: bytes) -> bytes:
    await stream.send_all(question)
    await stream.send_eof()
    answer = b""
    async for data in stream:
        answer += data
    return answer


async def test_streams_share_one_tunnel() -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        answers: list[bytes] = []

        async def one(number: int) -> None:
            stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            async with stream:
                answers.append(await ask(stream, b"%d" % number))

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(one, number)
        assert sorted(answers) == sorted(b"%d" % number for number in range(100))
        assert network.dials == [VIA]
        await trio.testing.wait_all_tasks_blocked()
        assert pool.statistics().streams == 0


async def test_the_hundred_and_first_stream_gets_a_second_tunnel() -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        streams = [await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS) for _ in range(101)]
        assert len(network.links) == 2
        await streams[0].aclose()
        await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert len(network.links) == 2


async def test_a_thousand_callers_open_ten_tunnels() -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                nursery.start_soon(functools.partial(pool.connect, "10.0.0.7:8080", via=VIA, peer=ORDERS))
        assert len(network.links) == 10
        assert pool.statistics().streams == 1000


async def test_tunnels_are_separate_by_expected_peer() -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        await pool.connect("10.0.0.7:8080", via=VIA, peer=None)
        await pool.connect("10.0.0.7:8080", via=VIA, peer=[ORDERS, str(ca().id("shop", "web"))])
        assert len(network.links) == 3


async def test_another_peer_than_expected_is_refused() -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        with pytest.raises(PeerIdentityError, match="orders"):
            await pool.connect("10.0.0.7:8080", via=VIA, peer="spiffe://cluster.local/ns/shop/sa/payments")
        assert pool.statistics().tunnels == 0


async def test_without_an_expected_peer_the_authorizer_decides() -> None:
    network = Network()
    other = TestCa("elsewhere.example")
    theirs = other.identity("shop", "orders", also=[ca()])
    ours = ca().identity("shop", "web", also=[other])
    async with serving(network, identity=theirs):
        async with ConnectionPool(source_of(ours), open_transport=network.open_transport) as pool:
            with pytest.raises(PeerIdentityError):
                await pool.connect("10.0.0.7:8080", via=VIA, peer=None)
        async with ConnectionPool(source_of(ours), authorize=any_peer, open_transport=network.open_transport) as pool:
            stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=None)
            assert stream.peer.trust_domain == "elsewhere.example"


async def test_a_server_that_refuses_us_says_so_by_an_alert() -> None:
    network = Network()
    async with serving(network, authorize=lambda peer, own: False), make_pool(network) as pool:
        with pytest.raises((TlsError, ConnectionLost)):
            await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)


async def test_nobody_there_is_told_to_each_caller_and_the_next_one_tries() -> None:
    network = Network()
    async with make_pool(network) as pool:
        failures: list[ConnectionLost] = []

        async def one() -> None:
            try:
                await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            except ConnectionLost as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        assert len(failures) == 5
        assert len(network.dials) == 5
        assert "10.0.0.7:15008" in str(failures[0])


async def test_a_dial_is_given_up_after_its_time(autojump_clock: MockClock) -> None:
    network = Network()
    network.silent.add(VIA)
    async with make_pool(network) as pool:
        before = trio.current_time()
        with pytest.raises(ConnectionLost, match="within 10 s"):
            await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert trio.current_time() - before == pytest.approx(10.0)


async def test_a_cancelled_dial_leaves_the_turn_to_the_next() -> None:
    network = Network()
    network.silent.add(VIA)
    async with serving(network), make_pool(network) as pool:
        async with trio.open_nursery() as nursery:
            first = trio.CancelScope()

            async def dialing() -> None:
                with first:
                    await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)

            nursery.start_soon(dialing)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(functools.partial(pool.connect, "10.0.0.7:8080", via=VIA, peer=ORDERS))
            await trio.testing.wait_all_tasks_blocked()
            network.silent.clear()
            first.cancel()
        assert network.dials == [VIA, VIA]
        assert pool.statistics().streams == 1


async def test_a_cancelled_waiter_costs_nobody_his_turn() -> None:
    network = Network()
    network.silent.add(VIA)
    async with serving(network), make_pool(network) as pool:
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in range(4)]

            async def one(scope: trio.CancelScope) -> None:
                with scope:
                    await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)

            for scope in scopes:
                nursery.start_soon(one, scope)
                await trio.testing.wait_all_tasks_blocked()
            network.silent.clear()
            scopes[0].cancel()  # its turn goes to the second, who is cancelled in the same breath
            scopes[1].cancel()
        assert pool.statistics().streams == 2


async def test_a_rejected_connect_keeps_the_tunnel() -> None:
    network = Network()

    async def refuse(stream: HboneStream) -> None:
        stream.reject(401)

    async with serving(network, refuse), make_pool(network) as pool:
        for _ in range(2):
            with pytest.raises(ConnectRejected) as caught:
                await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            assert caught.value.status == 401
        assert len(network.links) == 1


async def test_a_handler_that_fails_before_the_answer_is_503() -> None:
    network = Network()

    async def fail(stream: HboneStream) -> None:
        raise ValueError("a fault of the handler's")

    async with serving(network, fail), make_pool(network) as pool:
        with pytest.raises(ConnectRejected) as caught:
            await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert caught.value.status == 503


async def test_a_handler_that_fails_later_resets_only_its_stream() -> None:
    network = Network()

    async def fail(stream: HboneStream) -> None:
        data = await stream.receive_some()
        if data == b"fail":
            raise ValueError("a fault of the handler's")
        await stream.send_all(data)
        await echo(stream)

    async with serving(network, fail), make_pool(network) as pool:
        good = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        bad = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        await bad.send_all(b"fail")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await bad.receive_some()
        assert isinstance(caught.value.__cause__, StreamResetError)
        assert caught.value.__cause__.code is ErrorCode.INTERNAL_ERROR
        await good.send_all(b"go on")
        assert await ask(good, b" still here") == b"go on still here"


async def test_a_handler_that_returns_at_once_answers_200_and_ends() -> None:
    network = Network()

    async def nothing(stream: HboneStream) -> None:
        await trio.lowlevel.checkpoint()

    async with serving(network, nothing), make_pool(network) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert await stream.receive_some() == b""


async def test_a_connect_that_was_never_processed_is_tried_on_another_tunnel() -> None:
    network = Network()
    first = True

    async def refuse_once(stream: HboneStream) -> None:
        nonlocal first
        if first:
            first = False
            stream.reset(ErrorCode.REFUSED_STREAM)
        else:
            await echo(stream)

    async with serving(network, refuse_once), make_pool(network) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert await ask(stream, b"hello") == b"hello"
        assert len(network.links) == 2


async def test_a_peer_that_always_refuses_is_given_up() -> None:
    network = Network()

    async def refuse(stream: HboneStream) -> None:
        stream.reset(ErrorCode.REFUSED_STREAM)

    async with serving(network, refuse), make_pool(network) as pool:
        with pytest.raises(StreamResetError):
            await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert len(network.links) == 4


async def test_a_connect_that_was_answered_by_a_reset_is_not_tried_again() -> None:
    network = Network()

    async def reset(stream: HboneStream) -> None:
        stream.reset(ErrorCode.CONNECT_ERROR)

    async with serving(network, reset), make_pool(network) as pool:
        with pytest.raises(StreamResetError):
            await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert len(network.links) == 1


async def test_a_draining_server_finishes_its_streams_and_new_ones_go_elsewhere() -> None:
    network = Network()
    async with make_pool(network) as pool:
        async with serving(network, drain_timeout=60.0) as scope:
            old = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            async with serving(network):
                new = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
                assert await ask(new, b"new") == b"new"
                assert await ask(old, b"old") == b"old"
                assert len(network.links) == 2


async def test_a_server_cuts_what_does_not_end_in_time(autojump_clock: MockClock) -> None:
    network = Network()
    async with make_pool(network) as pool:
        before = 0.0
        async with serving(network, drain_timeout=7.0) as scope:
            stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            before = trio.current_time()
            scope.cancel()
        assert 7.0 <= trio.current_time() - before < 9.0
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_eof()


async def test_an_idle_tunnel_is_closed_after_its_time(autojump_clock: MockClock) -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        await ask(stream, b"hello")
        await trio.sleep(299)
        assert pool.statistics().tunnels == 1
        await trio.sleep(2)
        assert pool.statistics().tunnels == 0


async def test_a_tunnel_unused_for_long_is_asked_first(autojump_clock: MockClock) -> None:
    network = Network()
    quiet = ConnectionConfig(keepalive_interval=0)
    async with serving(network, config=quiet), make_pool(network, config=quiet) as pool:
        await ask(await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS), b"hello")
        await trio.sleep(60)
        await ask(await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS), b"hello")
        assert len(network.links) == 1


async def test_a_tunnel_that_does_not_answer_is_replaced(autojump_clock: MockClock) -> None:
    network = Network()
    quiet = ConnectionConfig(keepalive_interval=0)
    async with serving(network, config=quiet), make_pool(network, config=quiet) as pool:
        await ask(await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS), b"hello")
        await trio.sleep(60)
        network.links[0].client.send_stream.send_all_hook = trio.sleep_forever  # a black hole
        before = trio.current_time()
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert await ask(stream, b"hello") == b"hello"
        assert len(network.links) == 2
        assert trio.current_time() - before < 5.0


async def test_a_lost_tunnel_is_replaced() -> None:
    network = Network()
    async with serving(network), make_pool(network) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        network.links[0].cut()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        again = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert await ask(again, b"hello") == b"hello"
        assert len(network.links) == 2


async def test_a_new_tunnel_uses_the_newest_certificate_and_old_ones_live_on() -> None:
    network = Network()
    seen: list[int] = []

    async def note(stream: HboneStream) -> None:
        chain = stream.session.endpoint.tls.peer_chain
        seen.append(chain[0].serial_number)
        await echo(stream)

    source = source_of(who("web"))
    async with serving(network, note):
        async with ConnectionPool(source, max_streams=1, open_transport=network.open_transport) as pool:
            old = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            fresh = ca().identity("shop", "web")
            source.rotate(fresh.svid, fresh.bundles)
            new = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            assert await ask(old, b"old") == b"old"
            assert await ask(new, b"new") == b"new"
    assert seen == [who("web").svid.serial, fresh.svid.serial]


async def test_leaving_the_pool_sends_what_was_queued() -> None:
    network = Network()
    received = bytearray()

    async def collect(stream: HboneStream) -> None:
        async for data in stream:
            received.extend(data)

    async with serving(network, collect):
        async with make_pool(network) as pool:
            stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            await stream.send_all(b"x" * 100_000)
        await trio.testing.wait_all_tasks_blocked()
        assert len(received) == 100_000


async def test_an_error_leaves_the_pool_without_a_group_around_it() -> None:
    network = Network()
    async with serving(network):
        with pytest.raises(KeyError, match="mine"):  # noqa: PT012 - what the block raises is the matter
            async with make_pool(network) as pool:
                await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
                raise KeyError("mine")


async def test_the_pool_is_used_within_its_block() -> None:
    pool = make_pool(Network())
    with pytest.raises(ConnectionLost, match="closed"):
        await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)


async def test_what_is_no_spiffe_id_is_refused_before_a_dial() -> None:
    network = Network()
    async with make_pool(network) as pool:
        with pytest.raises(IdentityError):
            await pool.connect("10.0.0.7:8080", via=VIA, peer="orders")
        assert network.dials == []


# What a peer, or the end of the pool, could leave behind


class Waiters:
    """Tasks that ask a pool for a stream, and what became of them."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self.failures: list[Exception] = []

    async def one(self) -> None:
        try:
            await self.pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        except (HboneError, ZeroDivisionError) as error:
            self.failures.append(error)


async def test_all_who_wait_are_told_when_the_pool_is_closed(autojump_clock: MockClock) -> None:
    network = Network()
    network.silent.add(VIA)
    async with trio.open_nursery() as nursery:
        async with make_pool(network) as pool:
            waiters = Waiters(pool)
            for _ in range(5):
                nursery.start_soon(waiters.one)
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert [str(error) for error in waiters.failures] == ["the ConnectionPool is closed"] * 4
    assert len(waiters.failures) == 5  # the one who dialled has its own deadline


async def test_a_source_that_fails_fails_all_who_wait(autojump_clock: MockClock) -> None:
    class Failing(StaticSource):
        broken = False

        def current(self) -> Identity:
            if self.broken:
                raise ZeroDivisionError
            return super().current()

    network = Network()
    network.silent.add(VIA)
    identity = who("web")
    source = Failing(identity.svid, identity.bundles)
    async with ConnectionPool(source, open_transport=network.open_transport) as pool:
        waiters = Waiters(pool)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(waiters.one)
                    await trio.testing.wait_all_tasks_blocked()
                source.broken = True
    assert [type(error) for error in waiters.failures] == [ConnectionLost] + 4 * [ZeroDivisionError]


async def test_who_waits_under_an_identity_that_changes_is_not_forgotten(autojump_clock: MockClock) -> None:
    network = Network()
    network.silent.add(VIA)
    identity, other = who("web"), who("payments")
    source = StaticSource(identity.svid, identity.bundles)
    async with serving(network), ConnectionPool(source, open_transport=network.open_transport) as pool:
        waiters = Waiters(pool)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(waiters.one)
                    await trio.testing.wait_all_tasks_blocked()
                source.rotate(other.svid)
                network.silent.clear()
    assert len(waiters.failures) == 1
    assert len(network.dials) == 2


async def test_a_new_tunnel_is_not_the_one_that_goes_beyond_the_capacity() -> None:
    network = Network()
    elsewhere = ("10.0.0.8", 15008)
    async with serving(network), serving(network, address=elsewhere), make_pool(network, capacity=1) as pool:
        first = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        second = await pool.connect("10.0.0.8:8080", via=elsewhere, peer=ORDERS)
        assert await ask(first, b"one") == b"one"
        assert await ask(second, b"two") == b"two"
        assert network.dials == [VIA, elsewhere]


async def test_headers_that_the_peer_does_not_take_cost_no_tunnel() -> None:
    network = Network()
    large = ConnectRequest(
        authority=Authority.parse("10.0.0.7:8080"), baggage=Baggage(workload_name="w" * 1000, namespace="n" * 1000)
    )
    async with serving(network, config=ConnectionConfig(max_header_list_size=1024)), make_pool(network) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert await ask(stream, b"hello") == b"hello"
        with pytest.raises(LocalProtocolError, match="the peer takes 1024"):
            await pool.connect(large, via=VIA, peer=ORDERS)
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        assert await ask(stream, b"again") == b"again"
        assert network.dials == [VIA]


class SlowPool(ConnectionPool):
    """Much happens between the end of a handshake and its use."""

    async def _make_tunnel(self, key: PoolKey, identity: Identity) -> Connection:
        tunnel = await super()._make_tunnel(key, identity)
        await trio.testing.wait_all_tasks_blocked()
        return tunnel


async def test_a_tunnel_that_ended_before_its_first_stream_is_not_dialled_in_circles() -> None:
    network = Network()
    async with serving(network, authorize=lambda peer, own: False):
        async with SlowPool(source_of(who("web")), open_transport=network.open_transport) as pool:
            with trio.fail_after(10), pytest.raises(ConnectionLost, match="refused our certificate"):
                await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            assert network.dials == [VIA]
            assert pool.statistics() == PoolStatistics(tunnels=0, idle=0, streams=0, dialing=0)


async def test_a_peer_that_lets_nobody_in_is_given_up_and_its_tunnels_are_closed() -> None:
    network = Network()
    listener = network.listen(*VIA)
    served: list[Connection] = []

    async def serve_draining(nursery: trio.Nursery) -> None:
        while True:
            transport = await listener.accept()
            endpoint = Endpoint(
                TlsContext.server(who("orders")), client=False, authorize=lambda _: True, now=trio.current_time()
            )
            connection = Connection(transport, endpoint, client=False)
            await nursery.start(connection.run)
            connection.drain()
            served.append(connection)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_draining, nursery)
        async with SlowPool(source_of(who("web")), open_transport=network.open_transport) as pool:
            with trio.fail_after(10), pytest.raises(ConnectionLost, match="took no stream on 4 tunnels"):
                await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
            assert len(network.dials) == 4
            await trio.testing.wait_all_tasks_blocked()
            assert all(connection.failure is not None for connection in served)
        nursery.cancel_scope.cancel()
