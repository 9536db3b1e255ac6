"""A mesh in network namespaces with every kind of neighbour, shared by the tests of a module.

| host | what it is |
| --- | --- |
| alpha | the client; captured, with its ztunnel |
| beta | one endpoint of the service `orders`; captured, with its ztunnel |
| gamma | the other endpoint; captured, with its ztunnel, which may show applications their client's own address |
| delta | nothing: a place for a waypoint that is no ztunnel |
| epsilon | a waypoint behind its own ztunnel; captured |
| plain | no ztunnel, not captured; a workload that takes plaintext |
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any

import attrs
import trio
from tests.support.background import background, mesh_ca
from tests.support.routing import bring_replies_back
from tests.support.shop import until

from hbone.identity import Identity, SpiffeId, StaticSource
from hbone.testing.hosts import Host, NamespaceHost
from hbone.testing.mesh import Mesh, Ztunnel, mesh
from hbone.trio import ConnectionPool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = [
    "DOCUMENTS",
    "ECHO",
    "FAR",
    "GUARDED",
    "NAMED",
    "ORDERS",
    "SANDWICHED",
    "WHO",
    "WITHIN",
    "Lab",
    "lab",
]

ECHO, WHO, BEHIND = 9000, 9100, 15088
"""Ports: an echo; one that says which host it is, and the client's address; the waypoint behind its ztunnel."""
ORDERS, NAMED, GUARDED, SANDWICHED, WITHIN, FAR = (f"10.88.0.{number}" for number in range(1, 7))
"""Virtual addresses: see DOCUMENTS."""

ZTUNNELS = {"alpha": "client", "beta": "orders", "gamma": "guarded", "epsilon": "inner"}

DOCUMENTS = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {address: "{alpha}", serviceAccount: client}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: orders, namespace: shop, labels: {app: orders, kind: orders}}
spec: {address: "{beta}", serviceAccount: orders, ports: {special: 9000}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: guarded, namespace: shop, labels: {app: guarded, kind: orders}}
spec: {address: "{gamma}", serviceAccount: guarded}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: legacy, namespace: shop, labels: {app: legacy}}
spec: {address: "{plain}", serviceAccount: legacy}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: orders, namespace: shop}
spec:
  hosts: [orders.shop.mesh]
  addresses: [10.88.0.1]
  resolution: STATIC
  ports:
  - {number: 80, name: tcp, protocol: TCP, targetPort: 9000}
  - {number: 81, name: who, protocol: TCP, targetPort: 9100}
  workloadSelector: {labels: {kind: orders}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: named, namespace: shop}
spec:
  hosts: [named.shop.mesh]
  addresses: [10.88.0.2]
  resolution: STATIC
  ports: [{number: 80, name: special, protocol: TCP}]
  workloadSelector: {labels: {app: orders}}
"""


@attrs.define(eq=False)
class Lab:
    """The running mesh, seen from a test's own thread."""

    mesh: Mesh
    headers: list[bytes] = attrs.field(factory=list)
    """PROXY headers that came to the waypoint on epsilon."""

    def address(self, host: str) -> str:
        return self.mesh.hosts[host].address

    def host(self, name: str) -> Host:
        return self.mesh.hosts[name]

    def ztunnel(self, host: str) -> Ztunnel:
        return self.mesh.ztunnels[host]

    async def connect(self, source: str, address: str, port: int = ECHO) -> trio.SocketStream:
        """As an application on `source` would."""
        return await self.host(source).connect(address, port)

    async def ask(self, source: str, address: str, port: int = ECHO, data: bytes = b"hello world") -> bytes:
        """Send `data` and the end, and read to the end; what came before a reset, or before nobody was there."""
        answer = b""
        with contextlib.suppress(OSError, trio.BrokenResourceError), trio.move_on_after(30):
            async with await self.connect(source, address, port) as stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(data)
                    await stream.send_eof()
                while part := await stream.receive_some():
                    answer += part
        return answer

    async def becomes(self, wanted: bytes, source: str, address: str, port: int = ECHO) -> bool:
        """Whether asking gets `wanted` within half a minute, while a change is on its way."""

        async def asked() -> bool:
            return await self.ask(source, address, port) == wanted

        return await until(asked, seconds=30)

    async def total(self, host: str, name: str, *labels: str) -> float:
        """Sum of a counter's samples that have all of `labels`, written as on the page."""
        found = await self.ztunnel(host).metrics()
        return sum(
            value
            for sample, value in found.items()
            if sample.partition("{")[0] == name and all(label in sample for label in labels)
        )

    async def logged(self, host: str, **fields: Any) -> dict[str, Any]:
        """The first line of a ztunnel's log with `fields`; see `Daemon.until_logged`."""
        return await self.ztunnel(host).until_logged(30.0, **fields)

    def identity(self, account: str, trust_domain: str = "cluster.local") -> Identity:
        """A certificate of the mesh's root."""
        return Identity(mesh_ca(self.mesh, trust_domain).svid("shop", account), [mesh_ca(self.mesh).bundle])

    def pool(self, source: str, identity: Identity) -> ConnectionPool:
        """Tunnels from `source`, past its ztunnel if it has one: what a peer of any make could do."""
        return ConnectionPool(StaticSource(identity.svid, identity.bundles), open_transport=self.host(source).connect)

    async def tunnel(
        self, host: str, authority: str, account: str = "client", trust_domain: str = "cluster.local"
    ) -> bytes:
        """CONNECT `authority` at the ztunnel of `host`, from the host without one; an echo's answer.

        Raises:
            HboneError: refused.
        """
        peer = str(SpiffeId.istio("cluster.local", "shop", ZTUNNELS[host]))
        with trio.fail_after(30):
            async with self.pool("plain", self.identity(account, trust_domain)) as pool:
                stream = await pool.connect(authority, via=(self.address(host), 15008), peer=peer)
                async with stream:
                    await stream.send_all(b"hello world")
                    await stream.send_eof()
                    return b"".join([part async for part in stream])


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


def _who(name: str) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def who(stream: trio.SocketStream) -> None:
        await stream.send_all(f"{name} {stream.socket.getpeername()[0]}".encode())
        await stream.send_eof()
        async for _ in stream:
            pass

    return who


def _quiet(handler: Callable[[trio.SocketStream], Awaitable[None]]) -> Callable[[trio.SocketStream], Awaitable[None]]:
    async def quiet(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                await handler(stream)

    return quiet


def _waypoint(found: Lab) -> Callable[[trio.SocketStream], Awaitable[None]]:
    """Says that it is the waypoint, and echoes; on port 15088 after a PROXY header, which it keeps."""

    async def serve(stream: trio.SocketStream) -> None:
        rest = b""
        if stream.socket.getsockname()[1] == BEHIND:
            while len(rest) < 16 or len(rest) < 16 + int.from_bytes(rest[14:16], "big"):
                part = await stream.receive_some()
                if not part:
                    return
                rest += part
            size = 16 + int.from_bytes(rest[14:16], "big")
            found.headers.append(rest[:size])
            rest = rest[size:]
        await stream.send_all(b"waypoint\n" + rest)
        await echo(stream)

    return serve


@contextlib.asynccontextmanager
async def _running(
    directory: Path,
    documents: str,
    ztunnels: Iterable[str],
    networks: Mapping[str, str],
    environment: Mapping[str, str],
) -> AsyncIterator[Lab]:
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "plain"]
    started = mesh(directory, names, namespaces=True, documents={"lab": documents}, capture=False, network="10.78.0")
    async with started as running, trio.open_nursery() as nursery:
        found = Lab(running)

        def listen(host: str, port: int, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
            sock = running.hosts[host].make(lambda: socket.create_server(("", port), backlog=100))
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            nursery.start_soon(trio.serve_listeners, _quiet(handler), [listener])

        async def add(host: str) -> None:
            account = ZTUNNELS[host]
            own = {"NETWORK": networks[host]} if host in networks else {}
            workload = ("shop", account, account)
            ztunnel = await running.add_ztunnel(host, workload, environment={**environment, **own}, wait=False)
            await ztunnel.until_ready(120.0)

        for host in ("alpha", "beta", "gamma", "plain"):
            listen(host, ECHO, echo)
            listen(host, WHO, _who(host))
        for port in (BEHIND, 80):
            listen("epsilon", port, _waypoint(found))
        async with trio.open_nursery() as starting:
            for host in ztunnels:
                machine = running.hosts[host]
                assert isinstance(machine, NamespaceHost)
                machine.capture()
                if host == "gamma":
                    bring_replies_back(machine)
                starting.start_soon(add, host)
        yield found
        nursery.cancel_scope.cancel()


def lab(
    directory: Path,
    documents: str = DOCUMENTS,
    ztunnels: Iterable[str] = tuple(ZTUNNELS),
    networks: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> AbstractContextManager[Lab]:
    """Run it for the body, in a thread.

    Args:
        directory: for its files.
        documents: YAML; `{host}` stands for a host's address.
        ztunnels: hosts that have one, and are captured.
        networks: of hosts that are on another than the others.
        environment: of all ztunnels.
    """
    return background(lambda: _running(directory, documents, ztunnels, networks or {}, environment or {}))
