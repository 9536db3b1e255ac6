from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from tests.support.control_plane import ScriptedControlPlane, ScriptedStream
from tests.support.daemon import CA, Resource, settings
from tests.support.gateway import Gateway
from tests.support.pair import fresh_port

import ztunnel
from hbone.errors import ConfigurationError, ErrorCode
from hbone.identity import RevocationLists, SpiffeId
from hbone.trio import HboneStream
from ztunnel.control.ca import CaClient
from ztunnel.control.revocation import REVOCATION_TYPE, pack_lists
from ztunnel.control.transport import ControlPlaneError
from ztunnel.errors import (
    ConnectFailed,
    IdentityUnavailable,
    PeerRevoked,
    TlsFailed,
    TunnelRejected,
    UnknownLocalWorkload,
)
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

# Loopback addresses of this file alone: peers are dialled on 15008.
ALPHA, BETA = "127.91.7.1", "127.91.7.2"


def packed(ip: str) -> bytes:
    return bytes(map(int, ip.split(".")))


def described(
    name: str, ip: str, *, account: str | None = None, services: dict[str, int] | None = None, tunnels: bool = True
) -> Resource:
    uid = f"c1//Pod/shop/{name}"
    message = workload_pb2.Workload(
        uid=uid,
        name=name,
        namespace="shop",
        service_account=account or name,
        addresses=[packed(ip)],
        tunnel_protocol=workload_pb2.HBONE if tunnels else workload_pb2.NONE,
    )
    for host, port in (services or {}).items():
        ports = workload_pb2.PortList(ports=[workload_pb2.Port(service_port=port, target_port=port)])
        message.services[f"shop/{host}"].CopyFrom(ports)
    return uid, "1", workload_pb2.Address(workload=message).SerializeToString()


def service(host: str, vip: str, port: int) -> Resource:
    message = workload_pb2.Service(
        name=host.partition(".")[0],
        namespace="shop",
        hostname=host,
        addresses=[workload_pb2.NetworkAddress(address=packed(vip))],
        ports=[workload_pb2.Port(service_port=port, target_port=port)],
    )
    return f"shop/{host}", "1", workload_pb2.Address(service=message).SerializeToString()


def on(network: str, resource: Resource, gateway: str = "") -> Resource:
    """The same on another network, reached through `gateway`."""
    name, version, body = resource
    message = workload_pb2.Address.FromString(body)
    if message.HasField("service"):
        message.service.addresses[0].network = network
    else:
        message.workload.network = network
        if gateway:
            way = workload_pb2.NetworkAddress(network=network, address=packed(gateway))
            reference = workload_pb2.GatewayAddress(address=way, hbone_mtls_port=15009)
            message.workload.network_gateway.CopyFrom(reference)
    return name, version, message.SerializeToString()


def deny(account: str) -> Resource:
    match = authorization_pb2.Match(
        principals=[authorization_pb2.StringMatch(exact=f"cluster.local/ns/shop/sa/{account}")]
    )
    rule = authorization_pb2.Rule(clauses=[authorization_pb2.Clause(matches=[match])])
    message = authorization_pb2.Authorization(
        name="deny", namespace="shop", scope=authorization_pb2.NAMESPACE, action=authorization_pb2.DENY, rules=[rule]
    )
    return "shop/deny", "1", message.SerializeToString()


MESH = (
    described("alpha", ALPHA),
    described("beta", BETA, services={"beta.shop.internal": 7000}),
    service("beta.shop.internal", "240.0.0.1", 7000),
)


@attrs.frozen
class Side:
    """One embedded ztunnel and its control plane."""

    mesh: ztunnel.Ztunnel
    control: ScriptedControlPlane
    stream: ScriptedStream

    async def push(self, type_url: str, *resources: Resource) -> None:
        self.stream.respond(type_url, resources)
        await self.stream.request()


@contextlib.asynccontextmanager
async def side(
    name: str,
    ip: str,
    *,
    account: str | None = None,
    resources: tuple[Resource, ...] = MESH,
    policies: tuple[Resource, ...] = (),
    control: ScriptedControlPlane | None = None,
    network: str = "",
    on_connection: Callable[[Mapping[str, Any]], object] | None = None,
) -> AsyncIterator[Side]:
    ca = control or ScriptedControlPlane(time.time)
    if control is None:
        ca.sign_with(CA)
    xds = ScriptedControlPlane(time.time)
    config = settings(
        PROXY_WORKLOAD_INFO=f"shop/{name}/{account or name}",
        ZTUNNEL_BIND_ADDRESS=ip,
        ZTUNNEL_HBONE_PORT="15008",
        NETWORK=network,
    )
    made = ztunnel.Ztunnel(
        config, on_connection=on_connection, xds=xds.dial, authority=CaClient(ca.dial, lifetime=3600)
    )
    async with made as mesh:
        stream = await xds.next_stream()
        await stream.opening()
        stream.respond(AUTHORIZATION_TYPE, policies)
        stream.respond(ADDRESS_TYPE, resources)
        await stream.request()
        await stream.request()
        yield Side(mesh, ca, stream)


async def echo(stream: HboneStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def talk(stream: trio.abc.HalfCloseableStream, text: bytes = b"hello") -> bytes:
    async with stream:
        await stream.send_all(text)
        await stream.send_eof()
        return b"".join([data async for data in stream])


async def test_two_programs_talk_through_a_tunnel_with_identities() -> None:
    seen: list[str] = []

    async def handler(stream: HboneStream) -> None:
        seen.append(str(stream.peer))
        await echo(stream)

    async with side("alpha", ALPHA) as alpha, side("beta", BETA) as beta:
        await beta.mesh.listen(7000, handler)
        stream = await alpha.mesh.connect(BETA, 7000)
        assert isinstance(stream, HboneStream)
        assert str(stream.peer) == "spiffe://cluster.local/ns/shop/sa/beta"
        assert await talk(stream) == b"hello"
        assert seen == ["spiffe://cluster.local/ns/shop/sa/alpha"]


async def test_service_is_reached_by_its_host_name() -> None:
    async with side("alpha", ALPHA) as alpha, side("beta", BETA) as beta:
        await beta.mesh.listen(7000, echo)
        assert await talk(await alpha.mesh.connect("beta.shop.internal", 7000)) == b"hello"


async def test_workload_that_takes_no_tunnels_is_reached_by_plain_tcp(nursery: trio.Nursery) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    listeners = await trio.open_tcp_listeners(fresh_port(), host="127.91.7.9")
    await nursery.start(trio.serve_listeners, serve, listeners)
    port = listeners[0].socket.getsockname()[1]
    async with side("alpha", ALPHA, resources=(*MESH, described("old", "127.91.7.9", tunnels=False))) as alpha:
        stream = await alpha.mesh.connect("127.91.7.9", port)
        assert not isinstance(stream, HboneStream)
        assert await talk(stream) == b"hello"
        assert samples(alpha)["istio_tcp_connections_closed_total", "unknown"] == 1
        assert samples(alpha)["istio_tcp_sent_bytes_total", "unknown"] == 5
    nursery.cancel_scope.cancel()


async def test_another_network_is_reached_by_a_tunnel_inside_the_one_to_its_gateway(nursery: trio.Nursery) -> None:
    """And the gateway, which ends the outer one, reads nothing of it."""
    gateway = Gateway("127.91.7.3", 15009)
    gateway.targets.append((BETA, 15008))
    ca = ScriptedControlPlane(time.time)
    ca.sign_with(CA)
    identity = await CaClient(ca.dial, lifetime=3600).create(SpiffeId.istio("cluster.local", "shop", "gateway"), None)
    await nursery.start(gateway.serve, identity)
    mesh = (
        on("near", described("alpha", ALPHA)),
        on("far", described("beta", BETA, services={"beta.shop.internal": 7000}), gateway.ip),
        on("far", described("gateway", gateway.ip)),
        on("near", service("beta.shop.internal", "240.0.0.1", 7000)),
    )
    async with (
        side("alpha", ALPHA, resources=mesh, network="near") as alpha,
        side("beta", BETA, resources=mesh, network="far") as beta,
    ):
        await beta.mesh.listen(7000, echo)
        stream = await alpha.mesh.connect("beta.shop.internal", 7000)
        assert isinstance(stream, HboneStream)
        assert str(stream.peer) == "spiffe://cluster.local/ns/shop/sa/beta"
        assert await talk(stream, b"a secret" * 10_000) == b"a secret" * 10_000
        assert b"secret" not in gateway.carried
        assert gateway.requests[0].network is None
    gateway.scope.cancel()


async def test_denied_connection_says_401() -> None:
    async with side("alpha", ALPHA) as alpha, side("beta", BETA, policies=(deny("alpha"),)) as beta:
        await beta.mesh.listen(7000, echo)
        with pytest.raises(TunnelRejected, match="401"):
            await alpha.mesh.connect(BETA, 7000)


async def test_change_of_policy_closes_a_live_stream() -> None:
    async with side("alpha", ALPHA) as alpha, side("beta", BETA) as beta:
        await beta.mesh.listen(7000, echo)
        stream = await alpha.mesh.connect(BETA, 7000)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        await beta.push(AUTHORIZATION_TYPE, deny("alpha"))
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert getattr(caught.value.__cause__, "code", None) is ErrorCode.CONNECT_ERROR


async def test_port_without_handler_says_503() -> None:
    async with side("alpha", ALPHA) as alpha, side("beta", BETA) as beta:
        await beta.mesh.listen(7000, echo)
        with pytest.raises(TunnelRejected, match="503"):
            await alpha.mesh.connect(BETA, 7001)


async def test_wrong_identity_fails_closed_instead_of_going_plain() -> None:
    lied = (described("alpha", ALPHA), described("beta", BETA, account="other"))
    async with side("alpha", ALPHA, resources=lied) as alpha, side("beta", BETA) as beta:
        await beta.mesh.listen(7000, echo)
        with pytest.raises(TlsFailed):
            await alpha.mesh.connect(BETA, 7000)


async def test_peer_that_does_not_answer_tunnels_is_not_reached_in_plaintext(nursery: trio.Nursery) -> None:
    reached: list[object] = []

    async def serve(stream: trio.SocketStream) -> None:
        reached.append(stream)

    listeners = await trio.open_tcp_listeners(fresh_port(), host=BETA)
    await nursery.start(trio.serve_listeners, serve, listeners)
    async with side("alpha", ALPHA) as alpha:
        with pytest.raises(ConnectFailed):
            await alpha.mesh.connect(BETA, listeners[0].socket.getsockname()[1])
    assert not reached
    nursery.cancel_scope.cancel()


async def test_without_a_certificate_the_reason_is_told() -> None:
    control = ScriptedControlPlane(time.time)
    control.dial_error = ControlPlaneError("the CA answered UNAUTHENTICATED: no")
    async with side("alpha", ALPHA, control=control) as alpha:
        with pytest.raises(IdentityUnavailable, match="UNAUTHENTICATED"):
            await alpha.mesh.connect(BETA, 7000)


async def test_unknown_workload_cannot_connect(autojump_clock: object) -> None:
    async with side("alpha", ALPHA, resources=MESH[1:]) as alpha:
        with pytest.raises(UnknownLocalWorkload):
            await alpha.mesh.connect(BETA, 7000)


async def test_nothing_listens_before_it_is_asked_for() -> None:
    async with side("alpha", ALPHA) as alpha:
        assert alpha.mesh.tunnel_address is None
        with pytest.raises(OSError, match="15008"):
            await trio.open_tcp_stream(ALPHA, 15008)


def samples(side: Side) -> dict[tuple[str, str], float]:
    """Values of the program's metrics, by name and security policy or reporter."""
    return {
        (sample.name, sample.labels.get("connection_security_policy", sample.labels.get("reporter", ""))): sample.value
        for family in side.mesh.metrics.collect()
        for sample in family.samples
    }


async def test_every_connection_is_told_and_counted_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    told: dict[str, list[Mapping[str, Any]]] = {"alpha": [], "beta": []}

    def broken(fields: Mapping[str, Any]) -> None:
        told["beta"].append(fields)
        raise KeyError("mine")

    caplog.set_level("INFO", "access")
    async with (
        side("alpha", ALPHA, on_connection=told["alpha"].append) as alpha,
        side("beta", BETA, on_connection=broken) as beta,
    ):
        await beta.mesh.listen(7000, echo)
        stream = await alpha.mesh.connect("beta.shop.internal", 7000)
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        mutual = "mutual_tls"
        for each in (alpha, beta):  # live ones count, too
            assert samples(each)["istio_tcp_connections_opened_total", mutual] == 1
            assert samples(each)["istio_tcp_received_bytes_total", mutual] == 5
            assert ("istio_tcp_connections_closed_total", mutual) not in samples(each)
        await stream.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()
        with pytest.raises(TunnelRejected):
            await alpha.mesh.connect(BETA, 7001)
        with trio.fail_after(10):
            while len(told["beta"]) < 2:
                await trio.sleep(0.01)
        for name, each, sent in (("alpha", alpha, "bytes_sent"), ("beta", beta, "bytes_recv")):
            well, badly = told[name]
            assert (well[sent], "error" in well, well["direction"]) == (
                5,
                False,
                "outbound" if name == "alpha" else "inbound",
            )
            assert well["src.identity"] == "spiffe://cluster.local/ns/shop/sa/alpha"
            assert well["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/beta"
            assert well["duration"].endswith("ms")
            assert "503" in badly["error"] or "nobody listens" in badly["error"]
            assert samples(each)["istio_tcp_connections_closed_total", mutual] >= 1
            assert b"istio_tcp_connections_failed_total" in each.mesh.metrics.exposition()[1]
        lines = [record.getMessage() for record in caplog.records if record.name == "access"]
        assert sum("connection complete" in line for line in lines) == 4


async def test_change_of_policy_has_its_name_in_the_log() -> None:
    told: list[Mapping[str, Any]] = []
    async with side("alpha", ALPHA) as alpha, side("beta", BETA, on_connection=told.append) as beta:
        await beta.mesh.listen(7000, echo)
        stream = await alpha.mesh.connect(BETA, 7000)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        await beta.push(AUTHORIZATION_TYPE, deny("alpha"))
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        assert [line["error"] for line in told] == ["connection closed due to policy change"]


@pytest.mark.parametrize("informed", ["alpha", "beta"])
async def test_certificate_that_was_taken_back_ends_live_tunnels_and_makes_no_new_one(informed: str) -> None:
    """Whichever side hears of it, about the other's."""
    told: list[Mapping[str, Any]] = []
    async with (
        side("alpha", ALPHA, on_connection=told.append) as alpha,
        side("beta", BETA, on_connection=told.append) as beta,
    ):
        await beta.mesh.listen(7000, echo)
        stream = await alpha.mesh.connect(BETA, 7000)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        knows, other = (alpha, beta) if informed == "alpha" else (beta, alpha)
        lists = RevocationLists([CA.crl(serial(other), at=time.time())])
        await knows.push(REVOCATION_TYPE, ("mesh", "1", pack_lists(lists)))
        with trio.fail_after(10):
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            if informed == "alpha":
                with pytest.raises(PeerRevoked, match="revoked by"):
                    await alpha.mesh.connect(BETA, 7000)
            else:
                with pytest.raises((TlsFailed, ConnectFailed)):
                    await alpha.mesh.connect(BETA, 7000)
            reporter = "source" if informed == "alpha" else "destination"
            while samples(knows).get(("istio_crl_policy_rejections_total", reporter)) != 2:
                await trio.sleep(0.01)
        await stream.aclose()
        assert "connection closed: peer certificate revoked by CRL" in [line.get("error") for line in told]


def serial(side: Side) -> int:
    assert side.mesh._mesh is not None
    identity = side.mesh._mesh.svids.current()
    assert identity is not None
    return identity.svid.leaf.serial_number


async def test_bad_ports_and_destinations_are_told() -> None:
    async with side("alpha", ALPHA) as alpha:
        with pytest.raises(ConfigurationError, match="from 1 to 65535"):
            await alpha.mesh.listen(0, echo)
        await alpha.mesh.listen(7000, echo)
        with pytest.raises(ConfigurationError, match="has a handler already"):
            await alpha.mesh.listen(7000, echo)
        with pytest.raises(ConfigurationError, match="no destination"):
            await alpha.mesh.connect("bad host", 80)


async def test_error_of_the_block_leaves_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with side("alpha", ALPHA):
            raise KeyError("mine")


async def test_it_is_used_only_inside_its_block() -> None:
    mesh = ztunnel.Ztunnel(settings())
    with pytest.raises(ConfigurationError, match="inside its"):
        await mesh.connect(BETA, 1)
    with pytest.raises(ConfigurationError, match="PROXY_WORKLOAD_INFO"):
        ztunnel.Ztunnel(attrs.evolve(settings(), workload=None))
