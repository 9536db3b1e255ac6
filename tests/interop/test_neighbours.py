"""Envoy in a mesh of ours: as waypoint, as a sidecar that speaks HBONE, and as sidecars that speak their own TLS."""

from __future__ import annotations

import contextlib
import ssl
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.background import mesh_ca
from tests.support.lab import DOCUMENTS, ECHO, FAR, GUARDED, WITHIN, Lab, lab
from tests.support.shop import until
from tests.support.sizes import FULL

from hbone.errors import ConnectRejected
from hbone.testing.envoy import EnvoyPorts, config, envoy, sidecar_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hbone.testing.ca import Issued

pytestmark = [pytest.mark.interop, pytest.mark.netns, pytest.mark.timeout(300)]

HELLO = b"hello world"
MTLS = 9443

GUARDS = """
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: waypoint, namespace: shop, labels: {app: waypoint, networking.istio.io/tunnel: http}}
spec: {address: "{delta}", serviceAccount: waypoint}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: waypoint, namespace: shop}
spec:
  hosts: [waypoint.shop.mesh]
  addresses: [10.88.0.9]
  resolution: STATIC
  ports: [{number: 15008, name: mesh, protocol: TCP}]
  workloadSelector: {labels: {app: waypoint}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: by-address, namespace: shop, labels: {istio.io/waypoint-for: all}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  addresses: [{value: "{delta}"}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: by-name, namespace: shop, labels: {istio.io/waypoint-for: service}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  addresses: [{type: Hostname, value: waypoint.shop.mesh}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: guarded, namespace: shop, labels: {istio.io/use-waypoint: by-address}}
spec:
  hosts: [guarded.shop.mesh]
  addresses: [10.88.0.3]
  resolution: STATIC
  ports: [{number: 80, name: tcp, protocol: TCP, targetPort: 9000}]
  workloadSelector: {labels: {app: guarded}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: within, namespace: shop, labels: {istio.io/use-waypoint: by-name}}
spec:
  hosts: [within.shop.mesh]
  addresses: [10.88.0.5]
  resolution: STATIC
  ports: [{number: 80, name: tcp, protocol: TCP, targetPort: 9000}]
  workloadSelector: {labels: {app: guarded}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: inner, namespace: shop, labels: {app: inner}}
spec: {address: "{epsilon}", network: elsewhere, serviceAccount: inner}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: far, namespace: shop}
spec:
  hosts: [far.shop.mesh]
  addresses: [10.88.0.6]
  resolution: STATIC
  ports: [{number: 80, name: tcp, protocol: TCP}]
  workloadSelector: {labels: {app: inner}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: by-the-waypoint, namespace: shop}
spec:
  selector: {matchLabels: {app: guarded}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/waypoint, cluster.local/ns/shop/sa/neighbour]}}]
  - to: [{operation: {ports: ["9443"]}}]
"""
GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: to-elsewhere
  namespace: shop
  labels: {topology.istio.io/network: elsewhere}
  annotations: {gateway.istio.io/service-account: waypoint}
spec:
  gatewayClassName: istio-remote
  listeners: [{name: cross-network, port: 15008, protocol: HBONE, tls: {mode: Passthrough}}]
  addresses: [ADDRESS]
"""
MESH = (
    DOCUMENTS.replace("{app: guarded, kind: orders}", "{app: guarded, istio.io/use-waypoint: by-address}").replace(
        "{app: orders, kind: orders}", "{app: orders, kind: orders, networking.istio.io/tunnel: http}"
    )
    + GUARDS
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("lab")
    # In the long run addresses are asked for when they are needed; what is seen from outside is the same.
    environment = {"XDS_ON_DEMAND": "true", "ISTIO_META_DNS_CAPTURE": "false"} if FULL else {}
    with lab(directory, MESH, ("alpha", "gamma", "epsilon"), {"epsilon": "elsewhere"}, environment) as running:
        yield running


def material(found: Lab, directory: Path, account: str) -> Issued:
    """Files that Envoy reads, with a certificate of the mesh."""
    directory.mkdir(exist_ok=True)
    ca = mesh_ca(found.mesh)
    issued = ca.issue(uris=[f"spiffe://cluster.local/ns/shop/sa/{account}"])
    (directory / "envoy.pem").write_bytes(issued.cert_pem)
    (directory / "envoy.key").write_bytes(issued.key_pem)
    (directory / "root.pem").write_bytes(ca.root_pem)
    return issued


@contextlib.asynccontextmanager
async def tunnelling(
    found: Lab,
    directory: Path,
    host: str,
    account: str,
    *,
    waypoint: bool = False,
    application: tuple[str, int] = ("127.0.0.1", ECHO),
) -> AsyncIterator[EnvoyPorts]:
    """Envoy with HBONE both ways; a waypoint sends what comes by HBONE on by HBONE, others to an application."""
    material(found, directory, account)
    ports = EnvoyPorts()
    ports.hbone = 15008
    bootstrap = config(
        directory,
        ports,
        application=("127.0.0.1", ports.outbound) if waypoint else application,
        tunnel_to=(found.address("gamma"), 15008),
        authority=f"{found.address('gamma')}:{ECHO}",
        bind="0.0.0.0",
    )
    async with envoy(directory, ports, bootstrap, host=found.host(host)):
        yield ports


async def test_envoy_is_the_waypoint_of_a_workload_and_of_services(found: Lab, tmp_path: Path) -> None:
    gamma, delta = found.address("gamma"), found.address("delta")
    with pytest.raises(ConnectRejected) as caught:  # the policy at the destination says who may come
        await found.tunnel("gamma", f"{gamma}:{ECHO}")
    assert caught.value.status == 401
    async with tunnelling(found, tmp_path, "delta", "waypoint", waypoint=True):
        for address, port, service in (
            (gamma, ECHO, None),
            (GUARDED, 80, "guarded.shop.mesh"),
            (WITHIN, 80, "within.shop.mesh"),  # its waypoint is known by host name
        ):
            assert await found.becomes(HELLO, "alpha", address, port)
            line = await found.logged(
                "alpha", direction="outbound", dst__hbone_addr=f"{address}:{port}", bytes_sent=11, dst__service=service
            )
            assert line["dst.addr"] == f"{delta}:15008"
            assert line["dst.workload"] == "waypoint"
            assert line["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/waypoint"
        came = await found.logged("gamma", direction="inbound", src__workload="waypoint", bytes_sent=11)
        assert came["src.identity"] == "spiffe://cluster.local/ns/shop/sa/waypoint"
        assert came["src.addr"].startswith(delta + ":")
        streams = [await found.connect("alpha", GUARDED, 80) for _ in range(20)]
        for number, stream in enumerate(streams):
            await stream.send_all(b"%02d" % number)
        assert [await stream.receive_some() for stream in streams] == [b"%02d" % n for n in range(20)]
        assert await found.host("alpha").established(15008) == 1
        for stream in streams:
            await stream.aclose()
    # No waypoint: no connection past it.
    assert await found.ask("alpha", GUARDED, 80) == b""
    assert await found.ask("alpha", gamma) == b""


@pytest.mark.parametrize("address", ["{value: DELTA}", "{type: Hostname, value: waypoint.shop.mesh}"])
async def test_envoy_is_the_gateway_of_another_network(found: Lab, tmp_path: Path, address: str) -> None:
    delta = found.address("delta")
    found.mesh.apply("gateway", GATEWAY.replace("ADDRESS", address.replace("DELTA", delta)))
    behind = (found.address("epsilon"), 15008)
    name = "far.shop.mesh:80"
    async with tunnelling(found, tmp_path, "delta", "waypoint", application=behind):
        assert await found.becomes(b"waypoint\n" + HELLO, "alpha", FAR, 80)
        line = await found.logged("alpha", direction="outbound", dst__hbone_addr=name, bytes_sent=11)
        assert line["dst.addr"] == f"{delta}:15008"
        assert (line["dst.workload"], line["dst.service"]) == ("inner", "far.shop.mesh")
        assert line["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/inner"
        came = await found.logged("epsilon", direction="inbound", dst__hbone_addr=name, bytes_recv=11)
        assert came["src.identity"] == "spiffe://cluster.local/ns/shop/sa/client"
        assert came["src.addr"].startswith(delta + ":")
    assert await found.ask("alpha", FAR, 80) == b""
    # Whoever is behind it stays unreachable, directly too, while the gateway is away and when it is forgotten.
    found.mesh.withdraw("gateway")
    seen = len(found.ztunnel("alpha").records())

    async def forgotten() -> bool:
        assert await found.ask("alpha", FAR, 80) == b""
        return any(
            "no gateway to there" in record.get("error", "") for record in found.ztunnel("alpha").records()[seen:]
        )

    assert await until(forgotten, seconds=30)


async def test_envoy_is_a_sidecar_that_takes_and_makes_tunnels(found: Lab, tmp_path: Path) -> None:
    beta = found.address("beta")
    async with tunnelling(found, tmp_path, "beta", "orders") as ports:
        assert await found.becomes(HELLO, "alpha", beta)
        line = await found.logged("alpha", direction="outbound", dst__workload="orders", bytes_sent=11)
        assert (line["dst.addr"], line["dst.hbone_addr"]) == (f"{beta}:15008", f"{beta}:{ECHO}")
        assert await found.ask("beta", "127.0.0.1", ports.outbound) == b""  # orders may not come to guarded
    async with tunnelling(found, tmp_path, "beta", "neighbour") as ports:
        assert await found.ask("beta", "127.0.0.1", ports.outbound) == HELLO
        came = await found.logged("gamma", src__identity="spiffe://cluster.local/ns/shop/sa/neighbour", bytes_sent=11)
        assert came["src.addr"].startswith(beta + ":")


async def test_tls_among_sidecars_passes_untouched_both_ways(found: Lab, tmp_path: Path) -> None:
    gamma, plain = found.address("gamma"), found.address("plain")
    here, there = EnvoyPorts(), EnvoyPorts()
    here.hbone = there.hbone = MTLS
    shown = material(found, tmp_path / "here", "sidecar-here")
    material(found, tmp_path / "there", "sidecar-there")
    application = ("127.0.0.1", ECHO)
    async with (
        envoy(
            tmp_path / "here",
            here,
            sidecar_config(tmp_path / "here", here, application=application, neighbour=(plain, MTLS)),
            host=found.host("gamma"),
        ),
        envoy(
            tmp_path / "there",
            there,
            sidecar_config(tmp_path / "there", there, application=application, neighbour=(gamma, MTLS)),
            host=found.host("plain"),
        ),
    ):
        # From outside into the captured host, and from the captured host to outside.
        assert await found.ask("plain", "127.0.0.1", there.outbound) == HELLO
        came = await found.logged("gamma", direction="inbound", dst__addr=f"{gamma}:{MTLS}")
        assert came["src.addr"].startswith(plain + ":")
        assert "src.identity" not in came
        assert await found.ask("gamma", "127.0.0.1", here.outbound) == HELLO
        went = await found.logged("gamma", direction="outbound", dst__addr=f"{plain}:{MTLS}")
        assert "dst.hbone_addr" not in went
        # What the other end of TLS is, and what it chose, is as if nobody stood between.
        context = ssl.create_default_context(cadata=mesh_ca(found.mesh).root_pem.decode())
        context.check_hostname = False
        context.load_cert_chain(tmp_path / "there" / "envoy.pem", tmp_path / "there" / "envoy.key")
        context.set_alpn_protocols(["istio"])
        with trio.fail_after(30):
            stream = trio.SSLStream(await found.connect("plain", gamma, MTLS), context, https_compatible=True)
            await stream.do_handshake()
            assert stream.selected_alpn_protocol() == "istio"
            assert ssl.DER_cert_to_PEM_cert(stream.getpeercert(binary_form=True)).encode() == shown.cert_pem
            await stream.send_all(HELLO)
            assert await stream.receive_some() == HELLO
            await trio.aclose_forcefully(stream)
