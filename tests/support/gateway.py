"""Two networks in one process: a client on one, a server on the other, and a gateway of ours between them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import attrs
import trio
from tests.support.mesh import gateway_at, service, tcp
from tests.support.pair import CA, Host, Pair, fresh_ip, make_host

import hbone
import hbone.trio
from hbone.trio.relay import relay
from ztunnel.dataplane import Reactor
from ztunnel.mesh import Store, parse_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.identity import Identity

__all__ = ["VIP", "WEB", "Crossing", "Gateway", "open_crossing"]

VIP = (parse_ip("240.96.0.1"), 80)
"""Where the client's application connects to."""
WEB = "default/web.default.svc.cluster.local"
NAME = "web.default.svc.cluster.local:80"


class Gateway:
    """An east-west gateway: it ends the outer tunnel and hands on the bytes, which it cannot read.

    Args:
        ip: where it listens.
        port: its port.
    """

    def __init__(self, ip: str, port: int) -> None:
        self.ip = ip
        self.port = port
        self.targets: list[tuple[str, int]] = []
        """Endpoints behind it; taken in turn."""
        self.requests: list[hbone.ConnectRequest] = []
        self.carried = bytearray()
        """The first bytes of what it handed on."""
        self.answers: list[int] = []
        """Statuses to refuse the next streams with; 0 for REFUSED_STREAM, as if they had not been looked at."""
        self.drain_timeout = 0.2
        self.streams: list[hbone.trio.HboneStream] = []
        self.scope = trio.CancelScope()
        self.serving = False

    async def handle(self, stream: hbone.trio.HboneStream) -> None:
        """Serve one stream."""
        self.requests.append(stream.request)
        if self.answers:
            status = self.answers.pop(0)
            if status:
                stream.reject(status)
            else:
                stream.reset(hbone.ErrorCode.REFUSED_STREAM)
            return
        target = self.targets.pop(0)
        self.targets.append(target)
        self.streams.append(stream)
        try:
            upstream = await trio.open_tcp_stream(*target)
        except OSError:
            stream.reject(503)
            return
        await relay(_Seen(stream, self), upstream)  # type: ignore[arg-type]

    async def serve(self, identity: Identity, *, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `scope` is cancelled."""
        source = hbone.StaticSource(identity.svid, identity.bundles)
        self.serving = True
        with self.scope:
            await hbone.trio.serve(
                self.handle,
                source,
                port=self.port,
                host=self.ip,
                authorize=hbone.same_trust_domain,
                drain_timeout=self.drain_timeout,
                task_status=task_status,
            )
        self.serving = False


class _Seen:
    """A stream of which the gateway notes what it can see."""

    def __init__(self, stream: hbone.trio.HboneStream, gateway: Gateway) -> None:
        self._stream = stream
        self._gateway = gateway

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def __aenter__(self) -> _Seen:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stream.aclose()

    async def receive_some(self) -> bytes:
        data = await self._stream.receive_some()
        if len(self._gateway.carried) < 1 << 20:
            self._gateway.carried += data
        return data


@attrs.define(eq=False)
class Crossing(Pair):
    """The pair, with what lies between."""

    gateway: Gateway = attrs.field(kw_only=True)

    def take_service(self, **values: Any) -> None:
        """Tell both of the service whose only endpoint is the server."""
        values.setdefault("ports", {80: self.app_port})
        self.store.apply_addresses([service("web", f"near/{VIP[0]}", **values)])

    async def connect(self) -> trio.SocketStream:
        """What the client's application does: connect to the service, captured."""
        self.client.calls.destination = VIP
        return await trio.open_tcp_stream(*self.client.outbound)

    def far(self, host: Host, **values: Any) -> None:
        """Put a host on the far network, behind the gateway."""
        reference = gateway_at(self.gateway.ip, self.gateway.port, network="far")
        values.setdefault("services", {WEB: {}})
        host.workload = attrs.evolve(host.workload, network="far", network_gateway=reference, cluster_id="c2", **values)
        self.store.apply_addresses([host.workload])


@contextlib.asynccontextmanager
async def open_crossing(
    *, identity: Identity | None = None, gateway_port: int = 0, **config: Any
) -> AsyncIterator[Crossing]:
    """A client on `near`, a server on `far`, and the gateway; all in the test's own Trio.

    Args:
        identity: the gateway's, if another than expected.
        gateway_port: where another gateway will listen on 127.0.0.1, which the caller starts.
        config: of both data paths.
    """
    reactor = Reactor()
    store = Store()
    client = make_host(reactor, store, "client", **{"network": "near", **config})
    server = make_host(reactor, store, "server", **{"network": "far", **config})
    gateway = Gateway("127.0.0.1", gateway_port) if gateway_port else Gateway(fresh_ip(), 15009)
    async with trio.open_nursery() as nursery:
        crossing = Crossing(reactor, store, client, server, nursery, gateway=gateway)
        client.workload = attrs.evolve(client.workload, network="near")
        store.apply_addresses([client.workload, tcp("gateway", gateway.ip, network="far")])
        crossing.far(server)
        gateway.targets.append((server.ip, 15008))
        await nursery.start(lambda task_status: reactor.run_in_trio(task_status=task_status))
        if not gateway_port:
            await nursery.start(gateway.serve, identity or CA.identity("default", "gateway"))
        client.plane.start()
        server.plane.start()
        try:
            yield crossing
        finally:
            client.plane.close()
            server.plane.close()
            gateway.scope.cancel()
            nursery.cancel_scope.cancel()
