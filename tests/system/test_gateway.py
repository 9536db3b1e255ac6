"""Two networks and the gateway between them, as processes: what crosses, and what happens when the gateway goes."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from tests.support.shop import ECHO, LOOPBACK, kinds, serve_echo, until

from hbone.testing.hosts import NamespaceHost
from hbone.testing.mesh import Mesh, Ztunnel, mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

VIP = "240.7.7.7"
DOCUMENTS = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {address: "{alpha}", serviceAccount: client}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: orders, namespace: shop, labels: {app: orders}}
spec: {address: "{beta}", serviceAccount: orders, network: far}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: gate, namespace: shop, labels: {app: gate}}
spec: {address: "{gamma}", serviceAccount: gate, network: far}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: orders, namespace: shop}
spec:
  hosts: [orders.shop.internal]
  addresses: [240.7.7.7]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{number: 80, name: tcp, protocol: TCP, targetPort: 9000}]
  workloadSelector: {labels: {app: orders}}
"""
GATEWAY = """\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata:
  name: far
  namespace: shop
  labels: {topology.istio.io/network: far}
  annotations: {gateway.istio.io/service-account: gate}
spec:
  gatewayClassName: istio-remote
  addresses: [{value: "{gamma}"}]
  listeners: [{name: tunnels, port: 15009, protocol: HBONE}]
"""


@contextlib.asynccontextmanager
async def two_networks(directory: Path, *, namespaces: bool) -> AsyncIterator[Mesh]:
    """`alpha` on the default network; `beta`, and the gateway on `gamma`, on `far`."""
    started = mesh(
        directory,
        ["alpha", "beta", "gamma"],
        namespaces=namespaces,
        documents={"shop": DOCUMENTS, "gateway": GATEWAY},
        capture=False,
        loopback=LOOPBACK,
    )
    async with started as running, trio.open_nursery() as nursery:
        listener = await running.hosts["beta"].listen(ECHO)
        nursery.start_soon(trio.serve_listeners, serve_echo, [listener])
        for host, name, network in (("alpha", "client", ""), ("beta", "orders", "far")):
            machine = running.hosts[host]
            if isinstance(machine, NamespaceHost):
                machine.capture()
            await running.add_ztunnel(host, ("shop", name, name), environment={"NETWORK": network})
        gamma = running.hosts["gamma"]
        await running.add_ztunnel(
            "gamma",
            ("shop", "gate", "gate"),
            environment={"NETWORK": "far", "PYTHONPATH": _path()},
            command=[sys.executable, "-m", "tests.support.gateway_process", gamma.address, "15009"],
            wait=False,
        )
        assert await until(lambda: _listens(running), seconds=60)
        yield running
        nursery.cancel_scope.cancel()


def _path() -> str:
    here = str(Path(__file__).parents[2])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


async def _listens(running: Mesh) -> bool:
    gamma = running.hosts["gamma"]
    try:
        await (await gamma.connect(gamma.address, 15009)).aclose()
    except OSError:
        return False
    return True


async def say(running: Mesh, data: bytes) -> bytes:
    """One connection of `alpha` to the service on the other network."""
    back = bytearray()
    try:
        stream = await running.connect("alpha", VIP, 80)
    except OSError:
        return b""
    async with stream, trio.open_nursery() as nursery:

        async def send() -> None:
            try:
                await stream.send_all(data)
                await stream.send_eof()
            except trio.BrokenResourceError:
                pass

        nursery.start_soon(send)
        try:
            async for part in stream:
                back += part
        except trio.BrokenResourceError:
            nursery.cancel_scope.cancel()
    return bytes(back)


async def last(ztunnel: Ztunnel) -> dict[str, object]:
    """The last line of its access log, once a connection is complete; a thread writes it a moment later."""
    await ztunnel.until_logged(message="connection complete")
    return [record for record in ztunnel.records() if record.get("scope") == "access"][-1]


@kinds
async def test_a_service_on_another_network_is_reached_through_its_gateway(tmp_path: Path, namespaces: bool) -> None:
    async with two_networks(tmp_path, namespaces=namespaces) as running:
        gamma = running.hosts["gamma"].address
        data = bytes(range(256)) * 4096
        with trio.fail_after(60):
            assert await say(running, data) == data
        alpha, beta = running.ztunnels["alpha"], running.ztunnels["beta"]
        here, there = await last(alpha), await last(beta)
        assert (here["dst.workload"], here["dst.addr"]) == ("orders", f"{gamma}:15009")
        assert here["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/orders"
        assert here["dst.hbone_addr"] == there["dst.hbone_addr"] == "orders.shop.internal:80"
        assert there["src.identity"] == "spiffe://cluster.local/ns/shop/sa/client"
        assert here["bytes_sent"] == here["bytes_recv"] == there["bytes_recv"] == len(data)

        # The gateway is taken out of the mesh: nothing goes plain, or straight.
        running.withdraw("gateway")
        assert await until(lambda: _refused(running, alpha), seconds=30)
        assert "no gateway to there is known" in str(
            [record for record in alpha.records() if record.get("message") == "connection failed"][-1]["error"]
        )
        running.apply("gateway", GATEWAY.replace("{gamma}", gamma))

        async def crosses() -> bool:
            return await say(running, b"again") == b"again"

        assert await until(crosses, seconds=30)
        assert await running.ztunnels["gamma"].stop() is not None
        with trio.fail_after(60):
            assert await say(running, b"gone") == b""


async def _refused(running: Mesh, alpha: Ztunnel) -> bool:
    return await say(running, b"hello") == b"" and any(
        record.get("message") == "connection failed" for record in alpha.records()
    )
