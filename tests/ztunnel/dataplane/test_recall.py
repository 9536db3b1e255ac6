"""Revocation lists against handshakes and live tunnels, between two data paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing
from tests.support.compiled import stand_in
from tests.support.pair import CA, Host, Pair, echo, open_pair

from hbone.identity import Identity, RevocationLists
from ztunnel.control.revocation import pack_lists
from ztunnel.errors import ResponseFlag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cryptography import x509

REVOKED = "connection closed: peer certificate revoked by CRL"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with open_pair() as pair:
        await pair.serve(echo)
        yield pair


async def load(host: Host, *lists: x509.CertificateRevocationList) -> None:
    await host.revocations.received_all(pack_lists(RevocationLists(lists)))


def leaf(host: Host) -> x509.Certificate:
    assert host.identities.identity is not None
    return host.identities.identity.svid.leaf


async def opened(pair: Pair) -> trio.SocketStream:
    stream = await pair.connect()
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"hello"
    return stream


async def ends(stream: trio.SocketStream) -> None:
    with trio.fail_after(5):
        try:
            assert await stream.receive_some() == b""
        except trio.BrokenResourceError:
            pass
        await stream.aclose()


def flags(host: Host) -> set[ResponseFlag]:
    return {flag for traffic in host.metrics.counts.traffic.values() for flag in traffic.failed_by_flag}


async def test_the_server_closes_a_live_tunnel_of_a_revoked_client(pair: Pair) -> None:
    first, second = await opened(pair), await opened(pair)
    await load(pair.server, CA.crl(leaf(pair.client)))
    await ends(first)
    await ends(second)
    await pair.settle(lambda: len(pair.server.log.errors) == 2)
    assert pair.server.log.errors == [REVOKED, REVOKED]
    assert flags(pair.server) == {ResponseFlag.CERT_REVOKED}
    assert pair.server.metrics.counts.crl_rejected == {"destination": 1}  # by tunnel, not by connection
    assert b'istio_crl_policy_rejections_total{reporter="destination"} 1' in pair.server.metrics.exposition()[1]
    assert not pair.server.plane.inbound.tunnels


async def test_the_client_closes_a_live_tunnel_to_a_revoked_server(pair: Pair) -> None:
    stream = await opened(pair)
    await load(pair.client, CA.crl(leaf(pair.server)))
    await ends(stream)
    await pair.settle(lambda: bool(pair.client.log.errors))
    assert pair.client.log.errors == [REVOKED]
    assert flags(pair.client) == {ResponseFlag.CERT_REVOKED}
    assert pair.client.metrics.counts.crl_rejected == {"source": 1}
    assert not pair.client.plane.dialer.tunnels


async def test_a_revoked_intermediate_ends_every_tunnel_below_it() -> None:
    middle = CA.intermediate()
    async with open_pair() as pair:
        await pair.serve(echo)
        pair.client.identities.identity = Identity(middle.svid("default", "client"), CA.bundle)
        stream = await opened(pair)
        await load(pair.server, CA.crl(middle.certificate))
        await ends(stream)
        await pair.settle(lambda: pair.server.log.errors == [REVOKED])


async def test_a_revoked_intermediate_two_levels_up_ends_the_tunnels_below_it() -> None:
    upper = CA.intermediate("upper")
    lower = upper.intermediate("lower")
    async with open_pair() as pair:
        await pair.serve(echo)
        pair.client.identities.identity = Identity(lower.svid("default", "client"), CA.bundle)
        stream = await opened(pair)
        await load(pair.server, CA.crl(upper.certificate), upper.crl())
        await ends(stream)
        await pair.settle(lambda: pair.server.log.errors == [REVOKED])


async def test_a_leaf_that_its_intermediate_revoked_ends_its_tunnel() -> None:
    middle = CA.intermediate()
    async with open_pair() as pair:
        await pair.serve(echo)
        pair.client.identities.identity = Identity(middle.svid("default", "client"), CA.bundle)
        stream = await opened(pair)
        await load(pair.server, CA.crl(), middle.crl(leaf(pair.client)))
        await ends(stream)
        await pair.settle(lambda: pair.server.log.errors == [REVOKED])


async def siblings(pair: Pair, one: Identity, other: Identity) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two connections of the client, through a tunnel each."""
    pair.client.identities.identity = one
    first = await opened(pair)
    (tunnel,) = pair.client.plane.dialer.tunnels
    pair.client.plane.dialer.pool.retire(tunnel)
    pair.client.identities.identity = other
    second = await opened(pair)
    assert len(pair.server.plane.inbound.tunnels) == 2
    return first, second


async def lives(stream: trio.SocketStream) -> None:
    async with stream:
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"


async def test_a_revoked_leaf_leaves_its_siblings_alone(pair: Pair) -> None:
    middle = CA.intermediate()
    one, other = (Identity(middle.svid("default", "client"), CA.bundle) for _ in range(2))
    first, second = await siblings(pair, one, other)
    await load(pair.server, middle.crl(one.svid.leaf), CA.crl())
    await ends(first)
    await lives(second)


async def test_of_two_intermediates_of_one_name_only_the_revoked_ones_tunnels_end(pair: Pair) -> None:
    revoked, good = CA.intermediate("twin"), CA.intermediate("twin")
    one, other = (Identity(ca.svid("default", "client"), CA.bundle) for ca in (revoked, good))
    first, second = await siblings(pair, one, other)
    await load(pair.server, CA.crl(revoked.certificate))
    await ends(first)
    await lives(second)


async def test_an_intermediate_that_is_sent_beside_the_path_does_not_count(pair: Pair) -> None:
    used, junk = CA.intermediate("used"), CA.intermediate("junk")
    issued = used.issue(uris=["spiffe://cluster.local/ns/default/sa/client"])
    sent = attrs.evolve(issued, chain=(*issued.chain, junk.certificate))
    pair.client.identities.identity = Identity(sent.unchecked_svid(issued.svid().id), CA.bundle)
    stream = await opened(pair)
    await load(pair.server, CA.crl(junk.certificate))
    await trio.testing.wait_all_tasks_blocked(0.05)
    await stream.send_all(b"still here")
    assert await stream.receive_some() == b"still here"
    await load(pair.server, CA.crl(junk.certificate, used.certificate))
    await ends(stream)


async def test_lists_that_name_others_leave_live_tunnels_and_handshakes_alone(pair: Pair) -> None:
    async with await opened(pair) as stream:
        await load(pair.server, CA.crl(CA.svid("default", "other").leaf))
        await load(pair.client, CA.crl(CA.svid("default", "other").leaf))
        await trio.testing.wait_all_tasks_blocked(0.05)
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"
    assert not pair.server.metrics.counts.crl_rejected


async def test_the_server_refuses_the_handshake_of_a_revoked_client(pair: Pair) -> None:
    await load(pair.server, CA.crl(leaf(pair.client)))
    await ends(await pair.connect())
    await pair.settle(lambda: bool(pair.server.log.denied))
    assert "was revoked by" in pair.server.log.denied[0]
    assert pair.server.metrics.counts.crl_rejected == {"destination": 1}
    assert not pair.server.log.completed


async def test_the_client_refuses_the_handshake_of_a_revoked_server(pair: Pair) -> None:
    await load(pair.client, CA.crl(leaf(pair.server)))
    await ends(await pair.connect())
    await pair.settle(lambda: bool(pair.client.log.errors))
    assert "was revoked by" in pair.client.log.errors[0]
    assert flags(pair.client) == {ResponseFlag.CERT_REVOKED}
    assert pair.client.metrics.counts.crl_rejected == {"source": 1}


async def test_a_new_certificate_comes_in_again(pair: Pair) -> None:
    await load(pair.server, CA.crl(leaf(pair.client)))
    await ends(await pair.connect())
    pair.client.identities.identity = CA.identity("default", "client")
    await (await opened(pair)).aclose()


async def test_lists_that_come_during_a_handshake_are_asked_when_it_is_done(pair: Pair) -> None:
    """The lists change between the context's making and the end of the handshake."""
    accepted = pair.server.plane.inbound._shake_hands
    crl = RevocationLists([CA.crl(leaf(pair.client))])

    def shake_hands(*arguments: object) -> None:
        accepted(*arguments)  # type: ignore[arg-type]
        pair.server.revocations._set(crl, RevocationLists())

    stand_in(pair.server.plane.inbound, "_shake_hands", shake_hands)
    await ends(await pair.connect())
    await pair.settle(lambda: bool(pair.server.log.denied))
    assert pair.server.log.denied == [REVOKED]
    assert pair.server.metrics.counts.crl_rejected == {"destination": 1}


async def test_a_closed_data_path_asks_no_more(pair: Pair) -> None:
    pair.server.plane.close()
    await load(pair.server, CA.crl(leaf(pair.client)))
    assert pair.server.revocations._callbacks == []
