"""A connection to an address that nobody has told of, where addresses are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from tests.support.gateway import open_crossing
from tests.support.mesh import gateway_at, service
from tests.support.pair import Pair, echo, open_pair

import hbone
import hbone.trio
from ztunnel.control.demand import Demand
from ztunnel.mesh import parse_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr("ztunnel.control.demand.is_loopback", lambda _: False)  # the hosts of a pair are
    async with open_pair() as pair:
        with trio.fail_after(60):
            yield pair


async def test_connection_waits_for_the_answer_and_goes_by_it(pair: Pair) -> None:
    await pair.serve(echo)
    server = pair.server.workload
    pair.store.apply_addresses([], [server.uid])
    demand = pair.client.plane._plane.demand = Demand(pair.store, "")
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        await demand.more.wait()
        assert demand.unsaid() == [f"/{pair.server.ip}"]
        pair.store.apply_addresses([server])
        demand.answered([server.uid, f"/{pair.server.ip}"])
        assert await stream.receive_some(1) == b"x"
    await pair.settle(lambda: bool(pair.client.log.completed))
    assert pair.client.log.completed[0][0].parties.hbone_authority == f"{pair.server.ip}:{pair.app_port}"
    async with await pair.connect() as stream:  # known now
        await stream.send_all(b"y")
        assert await stream.receive_some(1) == b"y"
    assert demand.unsaid() == []


async def test_connection_is_refused_while_nobody_says_what_its_destination_is(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.control.demand.ANSWER_TIMEOUT", 0.01)
    await pair.serve(echo)
    pair.store.apply_addresses([], [pair.server.workload.uid])
    pair.client.plane._plane.demand = Demand(pair.store, "")
    stream = await pair.connect()
    async with stream:
        try:
            assert await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            pass
    await pair.settle(lambda: bool(pair.client.log.denied))
    assert "the control plane did not say" in str(pair.client.log.denied[0])
    assert not pair.client.log.completed  # nothing was dialled, above all not in plaintext


async def test_service_that_a_tunnel_asks_for_by_name_is_heard_of_first(pair: Pair) -> None:
    port = await pair.serve(echo)
    web = service("web", hostname="web.example", ports={80: port})
    server = attrs.evolve(pair.server.workload, services={web.key: {}})
    pair.store.apply_addresses([server])
    demand = pair.server.plane._plane.demand = Demand(pair.store, "")
    identity = pair.client.identities.identity
    assert identity is not None
    async with hbone.trio.ConnectionPool(hbone.StaticSource(identity.svid, identity.bundles)) as pool:
        statuses: list[int] = []

        async def ask(host: str) -> None:
            try:
                stream = await pool.connect(f"{host}:80", via=(pair.server.ip, 15008), peer=str(server.identity))
            except hbone.ConnectRejected as error:
                statuses.append(error.status)
            else:
                statuses.append(200)
                await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "web.example")
            await demand.more.wait()
            assert demand.unsaid() == [web.key]
            assert not statuses
            pair.store.apply_addresses([web])
            demand.answered([web.key])
        await ask("web.example")
        await ask("other.example")  # none of the workload's: nobody is asked
        assert statuses == [200, 200, 503]
        assert demand.unsaid() == ["/127.0.0.1"]  # who that was, for the log of the next ones


async def test_gateway_of_a_network_is_asked_for_when_a_connection_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.control.demand.is_loopback", lambda _: False)
    async with open_crossing() as crossing:
        await crossing.serve(echo)
        crossing.take_service()
        gateway = crossing.store.workload_by_address("far", parse_ip(crossing.gateway.ip))
        assert gateway is not None
        crossing.store.apply_addresses([], [gateway.uid])
        demand = crossing.client.plane._plane.demand = Demand(crossing.store, "near")
        with trio.fail_after(60):
            async with await crossing.connect() as stream:
                await stream.send_all(b"x")
                await demand.more.wait()
                assert demand.unsaid() == [f"far/{crossing.gateway.ip}"]
                crossing.store.apply_addresses([gateway])
                demand.answered([f"far/{crossing.gateway.ip}"])
                assert await stream.receive_some(1) == b"x"


async def test_waypoint_asks_who_it_is_to_serve(pair: Pair) -> None:
    port = await pair.serve(echo)
    waypoint = pair.server.workload
    behind = service("behind", "240.0.0.7", waypoint=gateway_at(pair.server.ip))
    demand = pair.server.plane._plane.demand = Demand(pair.store, "")
    identity = pair.client.identities.identity
    assert identity is not None
    async with hbone.trio.ConnectionPool(hbone.StaticSource(identity.svid, identity.bundles)) as pool:
        async with trio.open_nursery() as nursery:

            async def answer(*names: str) -> None:
                await demand.more.wait()
                assert demand.unsaid() == [*names]
                pair.store.apply_addresses([behind])
                demand.answered(names)

            nursery.start_soon(answer, "/240.0.0.7")
            via = (pair.server.ip, 15008)
            stream = await pool.connect(f"240.0.0.7:{port}", via=via, peer=str(waypoint.identity))
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        await stream.aclose()
        assert demand.unsaid() == ["/127.0.0.1"]  # who that was
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, "/240.0.0.8")
            with pytest.raises(hbone.ConnectRejected, match="400"):
                await pool.connect(f"240.0.0.8:{port}", via=via, peer=str(waypoint.identity))
