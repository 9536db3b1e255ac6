"""Connections to another network, end to end: app, our data path, a gateway, the data path behind it, app."""

from __future__ import annotations

import contextlib
import os
import random
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing
from tests.support.compiled import stand_in
from tests.support.gateway import NAME, Crossing, open_crossing
from tests.support.pair import CA, Host, echo, make_host, reset

from hbone.identity import Identity, RevocationLists
from ztunnel.control.revocation import pack_lists
from ztunnel.errors import ResponseFlag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1 << 20
PREFIX = "spiffe://cluster.local/ns/default/sa/"


@pytest.fixture
async def crossing() -> AsyncIterator[Crossing]:
    async with open_crossing() as crossing:
        await crossing.serve(echo)
        crossing.take_service()
        yield crossing


async def answer(crossing: Crossing, said: bytes = b"hello") -> trio.SocketStream:
    stream = await crossing.connect()
    await stream.send_all(said)
    with trio.fail_after(30):
        assert await stream.receive_some() == said
    return stream


async def is_cut(stream: trio.SocketStream) -> None:
    """It was reset, or closed with nothing said."""
    with trio.fail_after(30):
        try:
            assert await stream.receive_some() == b""
        except trio.BrokenResourceError:
            pass
        await stream.aclose()


async def is_reset(stream: trio.SocketStream) -> None:
    with trio.fail_after(30):
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            await stream.aclose()
            return
    raise AssertionError("it ended as if it were complete")


async def nothing_left(crossing: Crossing) -> None:
    """The inner tunnel is gone, and its place on the outer one is free."""
    plane = crossing.client.plane
    await crossing.settle(lambda: not plane.inner.tunnels and not any(t.streams for t in plane.dialer.tunnels))
    await crossing.settle(lambda: not plane.connections.outbound)


async def test_bytes_cross_and_the_gateway_reads_none_of_them(crossing: Crossing) -> None:
    async with await answer(crossing, b"a secret between two"):
        pass
    assert b"secret" not in crossing.gateway.carried
    assert crossing.gateway.carried[:1] == b"\x16"  # a TLS handshake
    (request,) = crossing.gateway.requests
    assert str(request.authority) == NAME
    assert request.network is None
    await nothing_left(crossing)


async def test_both_logs_name_who_really_talked(crossing: Crossing) -> None:
    async with await answer(crossing):
        pass
    await nothing_left(crossing)
    await crossing.settle(lambda: bool(crossing.server.log.completed))
    ((here, *_),) = crossing.client.log.completed
    fields = here.fields()
    assert str(fields["dst.addr"]) == f"{crossing.gateway.ip}:15009"
    assert fields["dst.hbone_addr"] == NAME
    assert fields["dst.service"] == "web.default.svc.cluster.local"
    assert (fields["dst.workload"], fields["dst.identity"]) == ("server", PREFIX + "server")
    assert fields["dst.cluster"] == "c2"
    ((there, *_),) = crossing.server.log.completed
    fields = there.fields()
    assert fields["dst.hbone_addr"] == NAME
    assert (fields["src.workload"], fields["src.identity"]) == ("client", PREFIX + "client")
    assert there.parties.source_workload is None  # the gateway's address says nothing of the client


async def test_counters_are_of_who_answered(crossing: Crossing) -> None:
    async with await answer(crossing):
        pass
    await nothing_left(crossing)
    (traffic,) = crossing.client.metrics.counts.traffic.values()
    labels = traffic.label_dict(ResponseFlag.NONE)
    assert labels["destination_workload"] == "server"
    assert labels["destination_principal"] == PREFIX + "server"
    assert labels["connection_security_policy"] == "mutual_tls"
    assert (traffic.opened_count, traffic.received_bytes, traffic.sent_bytes) == (1, 5, 5)
    assert traffic.closed_by_flag == {ResponseFlag.NONE: 1}


async def test_megabytes_cross_whole_both_ways_at_once(crossing: Crossing) -> None:
    data = bytes(range(256)) * 4096 * 4
    stream = await crossing.connect()
    back = bytearray()

    async def send() -> None:
        await stream.send_all(data)
        await stream.send_eof()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async for part in stream:
                back += part
    assert back == data
    await stream.aclose()
    await nothing_left(crossing)


async def test_two_endpoints_behind_one_gateway_take_turns(crossing: Crossing) -> None:
    other = make_host(crossing.reactor, crossing.store, "other", network="far")
    try:
        crossing.far(other)
        crossing.gateway.targets.append((other.ip, 15008))
        listeners = await trio.open_tcp_listeners(crossing.app_port, host=other.ip)
        crossing.nursery.start_soon(trio.serve_listeners, echo, listeners)
        other.plane.start()
        streams = [await answer(crossing, b"%d" % n) for n in range(6)]
        assert len(crossing.client.plane.dialer.tunnels) == 1
        assert len(crossing.client.plane.inner.tunnels) == 6
        assert len(crossing.server.plane.inbound.tunnels) == len(other.plane.inbound.tunnels) == 3
        for stream in streams:
            await stream.aclose()
        await nothing_left(crossing)
    finally:
        other.plane.close()


async def test_the_clients_end_crosses_and_the_answer_comes_back() -> None:
    async def count(stream: trio.SocketStream) -> None:
        total = sum([len(part) async for part in stream])
        await stream.send_all(b"%d" % total)

    async with open_crossing() as crossing:
        await crossing.serve(count)
        crossing.take_service()
        async with await crossing.connect() as stream:
            await stream.send_all(b"x" * 300_000)
            await stream.send_eof()
            with trio.fail_after(30):
                assert b"".join([part async for part in stream]) == b"300000"
        await nothing_left(crossing)


async def test_the_servers_end_crosses_and_the_client_goes_on() -> None:
    heard = bytearray()
    done = trio.Event()

    async def bye(stream: trio.SocketStream) -> None:
        await stream.send_all(b"bye")
        await stream.send_eof()
        async for part in stream:
            heard.extend(part)
        done.set()

    async with open_crossing() as crossing:
        await crossing.serve(bye)
        crossing.take_service()
        async with await crossing.connect() as stream:
            with trio.fail_after(30):
                assert b"".join([part async for part in stream]) == b"bye"
            await stream.send_all(b"after your end")
            await stream.send_eof()
            with trio.fail_after(30):
                await done.wait()
        assert heard == b"after your end"
        await nothing_left(crossing)


async def test_a_reset_crosses_from_the_client() -> None:
    failures: list[BaseException] = []
    done = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some())
        try:
            await stream.receive_some()
        except trio.BrokenResourceError as exc:
            failures.append(exc)
        done.set()

    async with open_crossing() as crossing:
        await crossing.serve(handler)
        crossing.take_service()
        reset(await answer(crossing))
        with trio.fail_after(30):
            await done.wait()
        assert failures
        await nothing_left(crossing)


async def test_a_reset_crosses_from_the_server() -> None:
    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(await stream.receive_some())
        await stream.receive_some()
        reset(stream)

    async with open_crossing() as crossing:
        await crossing.serve(handler)
        crossing.take_service()
        stream = await answer(crossing)
        await stream.send_all(b"now")
        await is_reset(stream)
        await nothing_left(crossing)


async def test_a_gateway_that_dies_resets_what_it_carried(crossing: Crossing) -> None:
    stream = await answer(crossing)
    crossing.gateway.scope.cancel()
    await is_reset(stream)
    await nothing_left(crossing)
    assert not crossing.client.plane.dialer.tunnels


async def test_a_stream_that_the_gateway_ends_without_the_peers_word_is_a_reset(crossing: Crossing) -> None:
    """TLS says what is complete, and a gateway can't."""
    stream = await answer(crossing)
    await crossing.gateway.streams[0].send_eof()
    await is_reset(stream)
    await nothing_left(crossing)
    assert "without a TLS close_notify" in crossing.client.log.errors[0]


async def test_a_refusal_of_the_gateway_is_told(crossing: Crossing) -> None:
    crossing.gateway.answers.append(503)
    await is_cut(await crossing.connect())
    await crossing.settle(lambda: bool(crossing.client.log.errors))
    assert crossing.client.log.errors == [
        f"http status: 503 Service Unavailable, from the network gateway {crossing.gateway.ip}:15009"
    ]
    (traffic,) = crossing.client.metrics.counts.traffic.values()
    assert traffic.label_dict(ResponseFlag.CONNECT)["destination_workload"] == "unknown"
    assert (traffic.opened_count, traffic.failed_by_flag) == (1, {ResponseFlag.CONNECT: 1})
    await nothing_left(crossing)


async def test_an_endpoint_that_is_down_is_an_error_and_the_next_one_is_tried_by_the_next_connection(
    crossing: Crossing,
) -> None:
    crossing.gateway.targets.insert(0, (crossing.gateway.ip, 1))
    await is_cut(await crossing.connect())
    async with await answer(crossing):
        pass
    await nothing_left(crossing)


async def test_a_refusal_behind_the_gateway_is_told(crossing: Crossing) -> None:
    stand_in(crossing.server.plane.inbound, "_serve", lambda end, *_: end.reject(401))
    await is_cut(await crossing.connect())
    await crossing.settle(lambda: bool(crossing.client.log.errors))
    assert crossing.client.log.errors == ["http status: 401 Unauthorized"]
    await nothing_left(crossing)


async def test_a_gateway_of_another_identity_gets_no_stream() -> None:
    async with open_crossing(identity=CA.identity("default", "impostor")) as crossing:
        await crossing.serve(echo)
        crossing.take_service()
        await is_cut(await crossing.connect())
        await crossing.settle(lambda: bool(crossing.client.log.errors))
        assert "did not present the expected SAN" in crossing.client.log.errors[0]
        assert not crossing.gateway.requests


async def test_whoever_else_the_gateway_hands_on_to_gets_no_byte(crossing: Crossing) -> None:
    crossing.server.identities.identity = CA.identity("default", "impostor")
    await is_cut(await crossing.connect())
    await crossing.settle(lambda: bool(crossing.client.log.errors))
    assert crossing.client.log.errors == [
        f"tls error: identity verification error: peer did not present the expected SAN ({PREFIX}server),"
        f" got {PREFIX}impostor"
    ]
    assert not crossing.server.log.completed
    await nothing_left(crossing)


async def test_the_services_names_are_expected_behind_the_gateway(crossing: Crossing) -> None:
    crossing.take_service(subject_alt_names=(PREFIX + "other",))
    crossing.server.identities.identity = CA.identity("default", "other")
    async with await answer(crossing):
        pass


async def test_no_gateway_means_no_connection_and_no_plaintext(crossing: Crossing) -> None:
    crossing.store.apply_addresses([attrs.evolve(crossing.server.workload, network_gateway=None)])
    await is_cut(await crossing.connect())
    assert crossing.client.log.denied == [
        "no valid destination: 240.96.0.1:80 is on network 'far', and no gateway to there is known"
    ]
    assert not crossing.gateway.requests


async def test_a_gateway_that_is_away_is_told() -> None:
    async with open_crossing() as crossing:
        await crossing.serve(echo)
        crossing.take_service()
        crossing.gateway.scope.cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await is_cut(await crossing.connect())
        await crossing.settle(lambda: bool(crossing.client.log.errors))
        assert "connection failed" in crossing.client.log.errors[0]


# Certificates


async def load(host: Host, *serials: Identity) -> None:
    lists = RevocationLists([CA.crl(*(identity.svid.leaf for identity in serials))])
    await host.revocations.received_all(pack_lists(lists))


async def test_a_live_inner_tunnel_ends_when_its_peer_is_revoked(crossing: Crossing) -> None:
    stream = await answer(crossing)
    assert crossing.server.identities.identity is not None
    await load(crossing.client, crossing.server.identities.identity)
    await is_reset(stream)
    await nothing_left(crossing)
    assert crossing.client.log.errors == ["connection closed: peer certificate revoked by CRL"]
    assert crossing.client.metrics.counts.crl_rejected == {"source": 1}
    assert len(crossing.client.plane.dialer.tunnels) == 1  # the gateway's own certificate is good
    await is_cut(await crossing.connect())
    await crossing.settle(lambda: len(crossing.client.log.errors) == 2)
    assert "was revoked by" in crossing.client.log.errors[1]


async def test_a_revoked_gateway_ends_all_that_it_carries() -> None:
    identity = CA.identity("default", "gateway")
    async with open_crossing(identity=identity) as crossing:
        await crossing.serve(echo)
        crossing.take_service()
        stream = await answer(crossing)
        await load(crossing.client, identity)
        await is_reset(stream)
        await nothing_left(crossing)
        assert crossing.client.log.errors == ["connection closed: peer certificate revoked by CRL"]
        assert not crossing.client.plane.dialer.tunnels


async def test_a_new_certificate_is_shown_by_the_next_inner_tunnel(crossing: Crossing) -> None:
    async with await answer(crossing):
        renewed = CA.identity("default", "client")
        crossing.client.identities.identity = renewed
        async with await answer(crossing):
            shown = [tunnel.endpoint.tls.peer_chain[0] for tunnel in crossing.server.plane.inbound.tunnels]
            assert len(shown) == 2
            assert shown.count(renewed.svid.leaf) == 1
            assert len(crossing.client.plane.dialer.tunnels) == 1


async def test_without_a_certificate_nothing_goes_even_through_a_tunnel_that_stands(crossing: Crossing) -> None:
    async with await answer(crossing):
        crossing.client.identities.identity = None
        await is_cut(await crossing.connect())
        await crossing.settle(lambda: bool(crossing.client.log.errors))
        assert crossing.client.log.errors == ["identity error: the CA is away"]


# Policies, drains, back-pressure


async def test_a_draining_server_lets_the_connection_finish(crossing: Crossing) -> None:
    async with await answer(crossing) as stream:
        crossing.server.plane.inbound.drain()
        await crossing.settle(lambda: all(t.engine.draining for t in crossing.client.plane.inner.tunnels))
        await stream.send_all(b"still here")
        with trio.fail_after(30):
            assert await stream.receive_some() == b"still here"
    await nothing_left(crossing)
    await crossing.settle(lambda: not crossing.server.plane.inbound.tunnels)


async def test_a_draining_gateway_lets_the_connection_finish(crossing: Crossing) -> None:
    crossing.gateway.scope.cancel()
    crossing.gateway.scope = trio.CancelScope()
    await crossing.settle(lambda: not crossing.gateway.serving)
    crossing.gateway.drain_timeout = 60.0
    await crossing.nursery.start(crossing.gateway.serve, CA.identity("default", "gateway"))
    async with await answer(crossing) as stream:
        crossing.gateway.scope.cancel()
        await crossing.settle(lambda: all(t.engine.draining for t in crossing.client.plane.dialer.tunnels))
        for _ in range(3):
            await stream.send_all(b"still here")
            with trio.fail_after(30):
                assert await stream.receive_some() == b"still here"
    await nothing_left(crossing)
    await crossing.settle(lambda: not crossing.client.plane.dialer.tunnels)


async def test_a_stream_that_the_gateway_did_not_look_at_is_asked_for_again(crossing: Crossing) -> None:
    crossing.gateway.answers += [0, 0]
    async with await answer(crossing):
        pass
    assert len(crossing.gateway.requests) == 3
    await nothing_left(crossing)
    crossing.gateway.answers += [0, 0, 0]
    await is_cut(await crossing.connect())
    await crossing.settle(lambda: crossing.client.log.errors == ["the network gateway took no stream"])
    await nothing_left(crossing)


async def test_a_hundred_connections_at_once_cross_by_few_outer_tunnels(crossing: Crossing) -> None:
    answered = 0

    async def one(number: int) -> None:
        nonlocal answered
        async with await answer(crossing, b"%d" % number):
            answered += 1
            await crossing.settle(lambda: answered == 100)

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(one, number)
    assert len(crossing.client.plane.dialer.tunnels) <= 2
    await nothing_left(crossing)
    assert not crossing.client.log.errors


async def test_an_app_that_gives_up_takes_its_half_made_tunnel_along(crossing: Crossing) -> None:
    silent = await trio.open_tcp_listeners(0, host=crossing.gateway.ip)
    crossing.gateway.targets[:] = [(crossing.gateway.ip, silent[0].socket.getsockname()[1])]
    stream = await crossing.connect()
    await crossing.settle(lambda: any(t.connected for t in crossing.client.plane.inner.tunnels))
    reset(stream)
    await nothing_left(crossing)
    await silent[0].aclose()


async def test_silence_behind_the_gateway_is_an_error_after_ten_seconds(crossing: Crossing) -> None:
    silent = await trio.open_tcp_listeners(0, host=crossing.gateway.ip)
    crossing.gateway.targets[:] = [(crossing.gateway.ip, silent[0].socket.getsockname()[1])]
    stream = await crossing.connect()
    await crossing.settle(lambda: any(t.connected for t in crossing.client.plane.inner.tunnels))
    (tunnel,) = crossing.client.plane.inner.tunnels
    tunnel.on_time(crossing.reactor.clock() + 9)
    assert not tunnel.closed
    tunnel.on_time(crossing.reactor.clock() + 11)
    await is_cut(stream)
    await crossing.settle(lambda: bool(crossing.client.log.errors))
    assert "TLS handshake was not complete after 10 s" in crossing.client.log.errors[0]
    await nothing_left(crossing)
    await silent[0].aclose()


async def test_no_descriptor_is_left_behind(crossing: Crossing) -> None:
    async with await answer(crossing):
        pass
    await nothing_left(crossing)
    await crossing.settle(lambda: not crossing.server.plane.inbound.tunnels)
    before = len(os.listdir("/proc/self/fd"))
    rng = random.Random(5)
    for number in range(30):
        crossing.gateway.answers[:] = [503] if number % 5 == 0 else []
        if number % 5 == 1:
            crossing.gateway.targets.insert(0, (crossing.gateway.ip, 1))
        stream = await crossing.connect()
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"x" * rng.randrange(1, 100_000))
            with trio.fail_after(30):
                await stream.receive_some()
        if rng.random() < 0.5:
            reset(stream)
        else:
            await stream.aclose()
        if number % 5 == 1:
            crossing.gateway.targets[:] = [(crossing.server.ip, 15008)]
    await nothing_left(crossing)
    await crossing.settle(lambda: not crossing.server.plane.inbound.tunnels)
    await crossing.settle(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_sleeping_readers_bound_what_is_taken_in() -> None:
    """Neither end reads: what both data paths and all buffers of the kernel took stays far below what was offered."""
    release = trio.Event()

    async def flood(stream: trio.SocketStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, stream)
            await release.wait()
            nursery.cancel_scope.cancel()

    offered = 0

    async def pour(stream: trio.SocketStream) -> None:
        nonlocal offered
        while True:
            await stream.send_all(bytes(65_536))
            offered += 65_536

    async with open_crossing() as crossing:
        await crossing.serve(flood)
        crossing.take_service()
        stream = await crossing.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, stream)
            taken = -1
            with trio.fail_after(60):
                while offered != taken or not offered:
                    taken = offered
                    await trio.sleep(0.3)
            nursery.cancel_scope.cancel()
        (tunnel,) = crossing.client.plane.inner.tunnels
        queued = [len(c.relay._queue) for c in crossing.client.plane.connections.outbound if c.relay is not None]
        assert max(queued) <= 4 * MIB
        assert len(tunnel.engine.out) < MIB
        release.set()
        reset(stream)
        await nothing_left(crossing)


async def test_a_closed_data_path_leaves_no_tunnel(crossing: Crossing) -> None:
    stream = await answer(crossing)
    crossing.client.plane.close()
    await is_cut(stream)
    assert not crossing.client.plane.inner.tunnels
    assert not crossing.client.plane.dialer.tunnels


async def test_page_and_dump_tell_inner_tunnels(crossing: Crossing) -> None:
    async with await answer(crossing):
        plane = crossing.client.plane
        inner = [tunnel for tunnel in plane.tunnels() if tunnel["inner"]]
        assert [(tunnel["peer"], tunnel["streams"]) for tunnel in inner] == [(PREFIX + "server", 1)]
        (connection,) = plane.connections.outbound
        dumped = connection.dump()
        assert dumped is not None
        assert (dumped["protocol"], dumped["originalDst"]) == ("DOUBLEHBONE", "240.96.0.1:80")
