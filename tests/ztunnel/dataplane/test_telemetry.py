"""What two data paths count, say in their logs, and tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from tests.support.compiled import stand_in
from tests.support.gateway import open_crossing
from tests.support.mesh import service, tcp
from tests.support.pair import Pair, echo, fresh_ip, open_pair

from ztunnel.dataplane.outbound import OutboundConnection
from ztunnel.mesh import parse_ip

if TYPE_CHECKING:
    from tests.support.pair import Host

    from hbone.events import Headers
    from ztunnel.dataplane.stream import StreamEnd


def samples(host: Host, name: str) -> dict[str, float]:
    """Samples of one family, by their labels as text."""
    host.plane.connections.account()
    lines = host.metrics.exposition()[1].decode().splitlines()
    return {
        labels: float(value)
        for labels, _, value in (
            line.removeprefix(name).rpartition(" ") for line in lines if line.startswith(name + "{")
        )
    }


def total(host: Host, name: str, *labels: str) -> float:
    return sum(value for text, value in samples(host, name).items() if all(label in text for label in labels))


async def exchanged(pair: Pair, text: bytes = b"hello world") -> trio.SocketStream:
    stream = await pair.connect()
    await stream.send_all(text)
    assert await stream.receive_some() == text
    return stream


async def test_connections_and_bytes_are_counted_by_both_sides() -> None:
    async with open_pair() as pair:
        await pair.serve(echo)
        stream = await exchanged(pair)
        for host, reporter in ((pair.client, "source"), (pair.server, "destination")):
            label = f'reporter="{reporter}"'
            assert total(host, "istio_tcp_connections_opened_total", label) == 1
            assert total(host, "istio_tcp_connections_closed_total", label) == 0
            assert total(host, "istio_tcp_received_bytes_total", label) == 11
            assert total(host, "istio_tcp_sent_bytes_total", label) == 11
        await stream.aclose()
        await pair.settle(lambda: bool(pair.client.log.completed and pair.server.log.completed))
        for host in (pair.client, pair.server):
            assert total(host, "istio_tcp_connections_closed_total", 'response_flags="-"') == 1
            assert total(host, "istio_tcp_connections_failed_total") == 0


@pytest.mark.parametrize("wanted", [True, False])
async def test_baggage_is_answered_unless_it_is_switched_off(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Headers] = []
    accepted = OutboundConnection.stream_accepted

    def heard(connection: OutboundConnection, headers: Headers) -> None:
        answers.append(headers)
        accepted(connection, headers)

    monkeypatch.setattr(OutboundConnection, "stream_accepted", heard)
    async with open_pair(response_baggage=wanted) as pair:
        await pair.serve(echo)
        await (await exchanged(pair)).aclose()
    (headers,) = answers
    found = dict(headers).get(b"baggage", b"")
    assert (b"k8s.namespace.name=default" in found, b"service.name=server" in found) == (wanted, wanted)


@pytest.mark.parametrize("wanted", [True, False])
async def test_baggage_of_a_client_that_nobody_knows_fills_labels_unless_it_is_switched_off(wanted: bool) -> None:
    async with open_pair(response_baggage=wanted) as pair:
        await pair.serve(echo)
        stranger = parse_ip(fresh_ip())  # no workload has this address
        pair.client.calls.options = attrs.evolve(pair.client.calls.options, source=stranger)
        await (await exchanged(pair)).aclose()
        await pair.settle(lambda: bool(pair.server.log.completed))
        (labels,) = samples(pair.server, "istio_tcp_connections_opened_total")
        assert ('source_workload="client"' in labels) is wanted
        assert 'source_principal="spiffe://cluster.local/ns/default/sa/client"' in labels


async def test_the_network_is_told_to_the_peer_behind_a_gateway_and_to_nobody_else() -> None:
    def listen_in(host: Host, heard: list[Headers]) -> None:
        received = host.plane.inbound.connect_received

        def connect_received(end: StreamEnd, headers: Headers) -> None:
            heard.append(headers)
            received(end, headers)

        stand_in(host.plane.inbound, "connect_received", connect_received)

    near: list[Headers] = []
    async with open_pair(network="near") as pair:
        listen_in(pair.server, near)
        for host in (pair.client, pair.server):
            pair.store.apply_addresses([attrs.evolve(host.workload, network="near")])
        await pair.serve(echo)
        await (await exchanged(pair)).aclose()
    assert [b"x-forwarded-network" in dict(headers) for headers in near] == [False]
    far: list[Headers] = []
    async with open_crossing() as crossing:
        listen_in(crossing.server, far)
        await crossing.serve(echo)
        crossing.take_service()
        await (await exchanged(crossing)).aclose()
    assert [dict(headers).get(b"x-forwarded-network") for headers in far] == [b"near"]
    assert [request.network for request in crossing.gateway.requests] == [None]


async def test_a_workload_by_host_name_is_resolved_on_demand_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_pair() as pair:
        port = await pair.serve(echo)

        async def getaddrinfo(host: str, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
            await trio.lowlevel.checkpoint()
            assert host == "db.example"
            return [(2, 1, 6, "", (pair.server.ip, 0))]

        monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
        key = "default/db.example"
        outside = service("db", "240.0.0.9", hostname="db.example", ports={80: port})
        pair.store.apply_addresses([outside, tcp("db", hostname="db.example", services={key: {}})])
        pair.app_port = 80
        for _ in range(2):
            pair.client.calls.destination = (outside.vips[0].ip, 80)
            async with await trio.open_tcp_stream(*pair.client.outbound) as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
        (labels,) = samples(pair.client, "istio_on_demand_dns_total")
        assert 'hostname="db.example"' in labels
        assert total(pair.client, "istio_on_demand_dns_total") == 2
