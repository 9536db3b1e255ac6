"""A ztunnel that asks for addresses when it needs them, and our control plane's answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
import trio.testing
from tests.support.control_plane import OnDemand, ScriptedStream

from miniistiod.catalog import Catalog, Entry, Plan, entry
from miniistiod.discovery import Subscriber
from ztunnel.mesh import ADDRESS_TYPE, parse_ip
from ztunnel.mesh.route import Plain, Tunnel, route
from ztunnel.wire import workload_pb2

if TYPE_CHECKING:
    from ztunnel.mesh import Address, Workload

KEY = "shop/api.shop.internal"


def workload(name: str, ip: str, *, serves: bool = False, node: str = "") -> Entry:
    made = workload_pb2.Address()
    one = made.workload
    one.uid, one.name, one.namespace, one.node = f"c1/{name}", name, "shop", node
    one.addresses.append(parse_ip(ip).packed)
    one.tunnel_protocol = workload_pb2.HBONE
    if serves:
        port = one.services[KEY].ports.add()
        port.service_port, port.target_port = 80, 8080
    members = (KEY,) if serves else ()
    return entry(ADDRESS_TYPE, made, one.uid, aliases=(f"/{ip}",), members=members, node=node, previous={})


def service(vip: str) -> Entry:
    made = workload_pb2.Address()
    one = made.service
    one.name, one.namespace, one.hostname = "api", "shop", "api.shop.internal"
    one.addresses.add().address = parse_ip(vip).packed
    port = one.ports.add()
    port.service_port, port.target_port = 80, 8080
    return entry(ADDRESS_TYPE, made, KEY, aliases=(f"/{vip}",), is_service=True, previous={})


class Bench(OnDemand):
    """The client, and our server's state machine on a stream in memory."""

    def __init__(self, *entries: Entry) -> None:
        super().__init__("here")
        self.catalog = Catalog()
        self.put(*entries)
        self.stream: ScriptedStream
        self.subscriber: Subscriber
        self.asked = 0

    def put(self, *entries: Entry) -> None:
        self.catalog.apply(Plan(addresses={one.name: one for one in entries}))

    async def serve(self) -> None:
        while True:
            self.stream = await self.control.next_stream()
            self.subscriber = Subscriber("s", self.catalog, node="here")
            with trio.CancelScope() as self.serving:
                while True:
                    request = await self.stream.request()
                    self.asked += bool(request.resource_names_subscribe)
                    assert not request.HasField("error_detail"), request.error_detail.message
                    self.subscriber.request(request, trio.current_time())
                    self.push()

    def push(self) -> None:
        for response in self.subscriber.take(trio.current_time()):
            self.stream.send_raw(response.data)

    async def route(self, ip: str, port: int = 80) -> object:
        address: Address = (parse_ip(ip), port)
        await self.demand.learn(address[0], "shop")
        source: Workload = self.store.workloads["c1/own"]
        return route(self.store, source, address)


async def test_what_a_connection_needs_is_learned_and_followed(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(
        workload("own", "10.0.0.1", node="here"),
        workload("web", "10.0.0.7"),
        workload("one", "10.0.0.8", serves=True),
        workload("other", "10.0.0.9"),
        service("240.0.0.1"),
    )
    nursery.start_soon(bench.serve)
    nursery.start_soon(bench.client.run)
    await bench.client.ready.wait()
    await trio.testing.wait_all_tasks_blocked()
    assert set(bench.store.workloads) == {"c1/own"}  # the node's own comes unasked

    found = await bench.route("10.0.0.7")
    assert isinstance(found, Tunnel)
    assert found.workload.uid == "c1/web"
    found = await bench.route("240.0.0.1")
    assert isinstance(found, Tunnel)
    assert found.authority == "10.0.0.8:8080"
    assert isinstance(await bench.route("192.0.2.1"), Plain)
    asked = bench.asked
    assert isinstance(await bench.route("192.0.2.1"), Plain)  # known to be nobody's, and not asked for again
    assert bench.asked == asked
    assert "c1/other" not in bench.store.workloads  # nobody wanted it

    bench.put(workload("late", "192.0.2.1"), workload("two", "10.0.0.10", serves=True))
    bench.push()
    await trio.testing.wait_all_tasks_blocked()
    assert isinstance(await bench.route("192.0.2.1"), Tunnel)
    assert len(bench.store.endpoints(bench.store.services[KEY])) == 2

    before = set(bench.store.workloads)
    bench.catalog.apply(Plan(addresses={"c1/web": None}))
    bench.stream.end()
    bench.serving.cancel()
    await trio.sleep(1)
    await trio.testing.wait_all_tasks_blocked()
    assert set(bench.store.workloads) == before - {"c1/web"}
    assert isinstance(await bench.route("10.0.0.7"), Plain)
    assert bench.asked == asked + 1  # the opening of the new stream; names are told with it
