"""Host names of workloads, looked up for connections."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from tests.support.mesh import service, tcp
from tests.support.pair import echo, open_pair

from ztunnel.dataplane.names import KEEP_SECONDS, Names, look_up
from ztunnel.errors import ResolutionFailed
from ztunnel.mesh import Protocol, parse_ip

if TYPE_CHECKING:
    from ztunnel.mesh import IpAddress

V4, V6 = parse_ip("192.0.2.1"), parse_ip("2001:db8::1")


class Resolver:
    """Answers when it is let to, and counts."""

    def __init__(self, *addresses: IpAddress) -> None:
        self.addresses = list(addresses)
        self.asked: Counter[str] = Counter()
        self.gate = trio.Event()
        self.gate.set()

    async def __call__(self, hostname: str) -> list[IpAddress]:
        self.asked[hostname] += 1
        await self.gate.wait()
        if hostname == "broken.example":
            raise ResolutionFailed(hostname, "no such name")
        return self.addresses


def names(resolver: Resolver, **options: bool) -> Names:
    return Names(trio.current_time, lookup=resolver, **options)


@pytest.mark.parametrize(("hint", "ipv6", "found"), [(V4, True, V4), (V6, True, V6), (V6, False, V4)])
async def test_the_family_that_was_asked_for_comes_first(hint: IpAddress, *, ipv6: bool, found: IpAddress) -> None:
    assert await names(Resolver(V4, V6), ipv6=ipv6).resolve("a.example", hint) == found


async def test_another_family_is_better_than_none() -> None:
    assert await names(Resolver(V4)).resolve("a.example", V6) == V4


@pytest.mark.parametrize(("addresses", "why"), [((), "no addresses resolved"), ((V6,), "no addresses resolved")])
async def test_a_name_without_a_usable_address_is_refused(addresses: tuple[IpAddress, ...], why: str) -> None:
    with pytest.raises(ResolutionFailed, match=why):
        await names(Resolver(*addresses), ipv6=False).resolve("a.example", V4)


async def test_a_burst_asks_once(autojump_clock: trio.testing.MockClock) -> None:
    resolver = Resolver(V4)
    resolver.gate = trio.Event()
    asking = names(resolver)
    found: list[IpAddress] = []

    async def ask() -> None:
        found.append(await asking.resolve("a.example", V4))

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        resolver.gate.set()
    assert found == [V4] * 100
    assert resolver.asked == {"a.example": 1}


async def test_an_answer_is_used_for_seconds_only(autojump_clock: trio.testing.MockClock) -> None:
    resolver = Resolver(V4)
    asking = names(resolver)
    for wait, asked in ((0, 1), (KEEP_SECONDS / 2, 1), (KEEP_SECONDS, 2)):
        await trio.sleep(wait)
        await asking.resolve("a.example", V4)
        assert resolver.asked["a.example"] == asked


async def test_a_failure_is_asked_about_again_and_by_each_who_waits(autojump_clock: trio.testing.MockClock) -> None:
    resolver = Resolver(V4)
    asking = names(resolver)
    for _ in range(2):
        with pytest.raises(ResolutionFailed, match="no such name"):
            await asking.resolve("broken.example", V4)
    assert resolver.asked["broken.example"] == 2


async def test_no_answer_is_an_error_in_time(autojump_clock: trio.testing.MockClock) -> None:
    resolver = Resolver(V4)
    resolver.gate = trio.Event()
    asking = names(resolver)
    with pytest.raises(ResolutionFailed, match="no answer within 5 s"):
        await asking.resolve("a.example", V4)
    resolver.gate.set()
    assert await asking.resolve("a.example", V4) == V4  # who gave up is in nobody's way


async def test_who_asked_first_may_give_up_without_the_others(autojump_clock: trio.testing.MockClock) -> None:
    resolver = Resolver(V4)
    resolver.gate = trio.Event()
    asking = names(resolver)
    found: list[IpAddress] = []

    async def ask() -> None:
        found.append(await asking.resolve("a.example", V4))

    async with trio.open_nursery() as nursery:
        with contextlib.suppress(trio.TooSlowError), trio.fail_after(1):
            await asking.resolve("a.example", V4)
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        resolver.gate.set()
    assert found == [V4]


async def test_the_systems_resolver_is_asked() -> None:
    assert parse_ip("127.0.0.1") in await look_up("localhost")
    with pytest.raises(ResolutionFailed):
        await look_up("a..example")


async def test_connections_to_a_workload_known_by_name_reach_it_and_are_counted() -> None:
    async with open_pair() as pair:
        port = await pair.serve(echo)
        resolver = Resolver(parse_ip(pair.server.ip))
        pair.client.plane.outbound.names = Names(trio.current_time, lookup=resolver)
        key = "default/web.default.svc.cluster.local"
        named = tcp("named", hostname="web.example", services={key: {80: port}})
        pair.store.apply_addresses([service("web", "240.96.0.1", ports={80: 0}), named])
        for _ in range(3):
            pair.client.calls.destination = (parse_ip("240.96.0.1"), 80)
            async with await trio.open_tcp_stream(*pair.client.outbound) as stream:
                await stream.send_all(b"hello")
                with trio.fail_after(30):
                    assert await stream.receive_some() == b"hello"
        assert resolver.asked == {"web.example": 1}
        ((labels, count),) = pair.client.metrics.counts.on_demand.items()
        assert (labels[1], count) == ("web.example", 3)


async def test_a_workload_that_joins_the_mesh_while_its_name_is_looked_up_is_not_reached_in_plaintext() -> None:
    async with open_pair() as pair:
        served: list[trio.SocketStream] = []

        async def serve(stream: trio.SocketStream) -> None:
            served.append(stream)

        port = await pair.serve(serve)
        resolver = Resolver(parse_ip(pair.server.ip))
        resolver.gate = trio.Event()
        pair.client.plane.outbound.names = Names(trio.current_time, lookup=resolver)
        services = {"default/web.default.svc.cluster.local": {80: port}}
        named = tcp("named", hostname="web.example", services=services)
        pair.store.apply_addresses([service("web", "240.96.0.1", ports={80: 0}), named])
        pair.client.calls.destination = (parse_ip("240.96.0.1"), 80)
        async with await trio.open_tcp_stream(*pair.client.outbound) as stream:
            await pair.settle(lambda: bool(resolver.asked))
            pair.store.apply_addresses(
                [tcp("named", hostname="web.example", services=services, protocol=Protocol.HBONE)]
            )
            resolver.gate.set()
            with trio.fail_after(30):
                assert await stream.receive_some() == b""
        await pair.settle(lambda: bool(pair.client.log.errors))
        assert not served
        assert "default/sa/server" in pair.client.log.errors[0]  # another's certificate than the workload's
