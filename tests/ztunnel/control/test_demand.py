"""Addresses are asked for when they are needed, once, and what the control plane says of them is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from tests.support.control_plane import OnDemand, ScriptedStream

from hbone.grpc import GrpcError, StatusCode
from ztunnel.control import demand as demand_module
from ztunnel.control.demand import ANSWER_TIMEOUT, Demand
from ztunnel.errors import DiscoveryTooSlow
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE, Store, parse_ip
from ztunnel.wire import discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

WEB = "c1//Pod/shop/web"
IP = parse_ip("10.0.0.7")


def address(uid: str = WEB, ip: str = "10.0.0.7") -> bytes:
    made = workload_pb2.Workload(uid=uid, name="web", namespace="shop", addresses=[parse_ip(ip).packed])
    return workload_pb2.Address(workload=made).SerializeToString()


class Bench(OnDemand):
    async def open(self) -> ScriptedStream:
        """A stream on which the policies are known."""
        stream = await self.control.next_stream()
        await stream.opening()
        stream.respond(AUTHORIZATION_TYPE, nonce="b")
        assert (await stream.request()).response_nonce == "b"
        return stream


@pytest.fixture
async def bench(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> Bench:
    bench = Bench()
    nursery.start_soon(bench.client.run)
    return bench


def respond(stream: ScriptedStream, name: str, payload: bytes, aliases: Iterable[str] = (), version: str = "1") -> None:
    response = discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="a")
    response.resources.add(name=name, version=version, aliases=aliases).resource.value = payload
    stream.send_raw(response.SerializeToString())


async def test_opening_subscribes_to_all_policies_and_to_no_address(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.control.next_stream()
    opening = await stream.opening()
    assert list(opening[ADDRESS_TYPE].resource_names_subscribe) == ["*"]
    assert list(opening[ADDRESS_TYPE].resource_names_unsubscribe) == ["*"]
    assert not opening[AUTHORIZATION_TYPE].resource_names_subscribe
    stream.respond(AUTHORIZATION_TYPE, nonce="b")
    await bench.client.ready.wait()  # policies are enough
    assert bench.client.in_sync


@pytest.mark.parametrize(("name", "aliases"), [(WEB, ["/10.0.0.7", "/10.0.0.8"]), ("/10.0.0.7", ["/10.0.0.7"])])
async def test_unknown_address_is_asked_for_once_and_the_answer_recognised_by_name_or_alias(
    autojump_clock: trio.testing.MockClock, bench: Bench, nursery: trio.Nursery, name: str, aliases: list[str]
) -> None:
    stream = await bench.open()
    learned: list[bool] = []

    async def connect() -> None:
        await bench.demand.learn(IP, "shop")
        learned.append(bench.store.workload_by_address("", IP) is not None)

    for _ in range(3):
        nursery.start_soon(connect)
    request = await stream.request()
    assert list(request.resource_names_subscribe) == ["/10.0.0.7"]
    assert not request.response_nonce
    respond(stream, name, address(), aliases)
    ack = await stream.request()
    assert (ack.response_nonce, ack.HasField("error_detail")) == ("a", False)
    await trio.testing.wait_all_tasks_blocked()
    assert learned == [True] * 3
    assert bench.demand.missing(IP, "shop") == []


async def test_resource_under_a_name_that_is_neither_its_own_nor_an_alias_is_refused(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.open()
    respond(stream, "/10.0.0.7", address(), ["/10.0.0.9"])
    assert "calls itself" in (await stream.request()).error_detail.message


async def test_address_that_is_nobodys_is_asked_for_once(
    autojump_clock: trio.testing.MockClock, bench: Bench, nursery: trio.Nursery
) -> None:
    stream = await bench.open()
    nursery.start_soon(bench.demand.learn, IP, "shop")
    await stream.request()
    stream.respond(ADDRESS_TYPE, removed=["/10.0.0.7"], nonce="a1")
    await stream.request()
    assert bench.demand.missing(IP, "shop") == []
    with trio.fail_after(0.1):
        await bench.demand.learn(IP, "shop")
    respond(stream, WEB, address(), ["/10.0.0.7"])  # later there is somebody, and the server says so by itself
    await stream.request()
    assert bench.store.workload_by_address("", IP) is not None


async def test_silent_control_plane_is_waited_for_a_bounded_time(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    await bench.open()
    began = trio.current_time()
    with pytest.raises(DiscoveryTooSlow, match=r"did not say within 5 s what 10\.0\.0\.7 is"):
        await bench.demand.learn(IP, "shop")
    assert trio.current_time() - began == pytest.approx(ANSWER_TIMEOUT)
    assert bench.demand.missing(IP, "shop")  # the next connection waits again, and may be luckier


async def test_loopback_is_never_asked_for() -> None:
    assert Demand(Store(), "").missing(parse_ip("127.0.0.1"), "shop") == []
    assert Demand(Store(), "n").missing(parse_ip("::ffff:10.0.0.7"), "shop") == ["n/10.0.0.7"]


async def test_reconnect_tells_versions_of_what_is_held_and_names_of_what_is_not(
    autojump_clock: trio.testing.MockClock, bench: Bench, nursery: trio.Nursery
) -> None:
    stream = await bench.open()
    for name in ("/10.0.0.7", "/10.0.0.8", "/10.0.0.9"):
        bench.demand.ask(name)
    await stream.request()
    respond(stream, WEB, address(), ["/10.0.0.7"], version="4")
    await stream.request()
    stream.respond(ADDRESS_TYPE, removed=["/10.0.0.8"], nonce="a1")
    await stream.request()
    stream.fail(GrpcError(StatusCode.UNAVAILABLE, "transport is closing"))
    opening = await (await bench.control.next_stream()).opening()
    versions = dict(opening[ADDRESS_TYPE].initial_resource_versions)
    assert versions == {WEB: "4", "/10.0.0.7": "", "/10.0.0.8": "", "/10.0.0.9": ""}
    assert list(opening[ADDRESS_TYPE].resource_names_unsubscribe) == ["*"]


async def test_waypoint_of_a_service_is_asked_for_too(
    autojump_clock: trio.testing.MockClock, bench: Bench, nursery: trio.Nursery
) -> None:
    stream = await bench.open()
    nursery.start_soon(bench.demand.learn, IP, "shop")
    await stream.request()
    made = workload_pb2.Service(name="api", namespace="shop", hostname="api.shop")
    made.addresses.add().address = IP.packed
    made.waypoint.hostname.namespace, made.waypoint.hostname.hostname = "gw", "way.gw"
    made.waypoint.hbone_mtls_port = 15008
    respond(stream, "shop/api.shop", workload_pb2.Address(service=made).SerializeToString(), ["/10.0.0.7"])
    requests = [await stream.request(), await stream.request()]
    assert sorted(name for each in requests for name in each.resource_names_subscribe) == ["gw/way.gw"]


async def test_names_are_bounded_and_the_oldest_that_are_nobodys_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand_module, "MAX_NAMES", 3)
    demand = Demand(Store(), "")
    first = demand.ask("/a")
    assert first is not None
    for name in ("/b", "/c"):
        demand.ask(name)
    demand.answered(["/c", "/b"])
    demand.ask("/d")
    assert demand.opening() == ["/a", "/b", "/d"]
    demand.ask("/e")
    demand.ask("/f")
    assert first.is_set()  # rather than wait for ever, it is asked for again
    assert demand.opening() == ["/d", "/e", "/f"]


async def test_waiter_sees_the_store_that_has_the_answer_in_a_crowd(
    autojump_clock: trio.testing.MockClock, bench: Bench, nursery: trio.Nursery
) -> None:
    stream = await bench.open()
    found: list[bool] = []

    async def connect() -> None:
        await bench.demand.learn(IP, "shop")
        found.append(bench.store.workload_by_address("", IP) is not None)

    nursery.start_soon(connect)
    await stream.request()
    crowd = [(f"c1//Pod/x/{n}", "1", address(f"c1//Pod/x/{n}", f"10.1.{n // 250}.{n % 250}")) for n in range(2000)]
    response = discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="a")
    response.resources.add(name=WEB, aliases=["/10.0.0.7"]).resource.value = address()
    for uid, version, payload in crowd:
        response.resources.add(name=uid, version=version).resource.value = payload
    stream.send_raw(response.SerializeToString())
    await stream.request()
    await trio.testing.wait_all_tasks_blocked()
    assert found == [True]
