"""Discovery on port 15012: one task that reads and one that writes for each stream, around a pure state machine."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.grpc import GrpcError, StatusCode
from miniistiod import auth
from miniistiod.callers import host_of, parse, remote_of
from miniistiod.discovery import (
    ADDRESS,
    AUTHORIZATION,
    HEALTH,
    FellBehindError,
    Response,
    Subscriber,
    TooManyNamesError,
    World,
)
from miniistiod.revocation import REVOCATIONS, RevocationFeed
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from miniistiod.authority import Authority
    from miniistiod.callers import Call, Callers
    from miniistiod.mesh import Mesh
    from miniistiod.metrics import Metrics
    from miniistiod.registrar import Registrar
    from miniistiod.store import Store

__all__ = ["DELTA", "STATE_OF_THE_WORLD", "Discovery"]

_log = get_logger("miniistiod.api")
DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
STATE_OF_THE_WORLD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
FIRST_REQUEST_SECONDS = 30.0
"""A stream whose client says nothing for this long ends."""
STREAMS_PER_NODE = 2
"""One that is coming and one that is going; a third ends the oldest."""
MAX_REQUEST = 64 << 20
"""Bytes of one request: a client that comes back says what it has, which is 100,000 names and versions and more."""


_Request: TypeAlias = discovery_pb2.DeltaDiscoveryRequest | discovery_pb2.DiscoveryRequest


@attrs.define(eq=False)
class _Stream:
    """An open discovery stream."""

    id: str
    caller: auth.Caller
    node: auth.Node
    subscriber: Subscriber | World
    remote: str
    since: float
    scope: trio.CancelScope
    revocations: RevocationFeed
    wake: trio.Event = attrs.Factory(trio.Event)
    idle: bool = False
    """The writer has sent everything, and waits."""
    ready: list[Response] = attrs.Factory(list)
    """What was found to be due while it waited."""
    failure: GrpcError | None = None
    ended: bool = False


class Discovery:
    """Handlers of both discovery methods, and the streams that are open."""

    def __init__(
        self,
        store: Store,
        mesh: Mesh,
        metrics: Metrics,
        authority: Authority,
        callers: Callers,
        registrar: Registrar,
    ) -> None:
        self._store = store
        self._mesh = mesh
        self._metrics = metrics
        self._authority = authority
        self._callers = callers
        self._registrar = registrar
        self._numbers = itertools.count(1)
        self.streams: dict[str, _Stream] = {}

    async def state_of_the_world(self, call: Call) -> None:
        """The older form of discovery: every answer has everything. No ztunnel speaks it."""
        await self._serve(call, discovery_pb2.DiscoveryRequest)

    async def delta(self, call: Call) -> None:
        """Incremental discovery."""
        await self._serve(call, discovery_pb2.DeltaDiscoveryRequest)

    async def _serve(self, call: Call, kind: type[_Request]) -> None:
        """One discovery stream, until either side ends it."""
        self._callers.limit_anonymous(call)
        caller = await self._callers.for_stream(call)
        if not self._mesh.status.loaded:
            raise GrpcError(StatusCode.UNAVAILABLE, "server is not ready to serve discovery information")
        with trio.move_on_after(FIRST_REQUEST_SECONDS) as waiting:
            # The caller is known by now, so what it may send is what it may need.
            first = parse(kind, await call.receive(MAX_REQUEST))
        if waiting.cancelled_caught:
            raise GrpcError(StatusCode.DEADLINE_EXCEEDED, f"no request within {FIRST_REQUEST_SECONDS:g} seconds")
        node = self._node(first, caller, call)
        stream_id = f"{next(self._numbers)}-{secrets.token_hex(4)}"
        catalog = self._mesh.catalog
        delta = kind is discovery_pb2.DeltaDiscoveryRequest
        subscriber = Subscriber(stream_id, catalog, node=node.node_name) if delta else World(stream_id, catalog)
        with trio.CancelScope() as scope:
            stream = _Stream(
                stream_id,
                caller,
                node,
                subscriber,
                remote_of(call),
                time.time(),
                scope,
                RevocationFeed(stream=stream_id),
            )
            self._end_oldest(stream)
            self.streams[stream_id] = stream
            self._metrics.streams.set(len(self.streams))
            self._mesh.listen(stream_id, lambda: _news(stream))
            _log.info("ztunnel connected", node=node.id, identity=str(caller.identity), by=caller.how, stream=stream_id)
            try:
                # It may have been revoked while we waited; from here on `authority_changed` finds it.
                if why := await trio.to_thread.run_sync(auth.problem, self._store, caller):
                    raise self._callers.refused(call, "discovery", why, "authentication failure")
                await self._registrar.connected(stream_id, node, caller, host_of(call))
                await self._mesh.present(stream_id, node, caller)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, stream, call, first)
                    await self._write(stream, call)
                    nursery.cancel_scope.cancel()
            finally:
                self._mesh.forget(stream_id)
                self._registrar.disconnected(stream_id)
                del self.streams[stream_id]
                self._metrics.streams.set(len(self.streams))
                _log.info("ztunnel disconnected", node=node.id, stream=stream_id)
        if stream.failure is not None:
            raise stream.failure
        if scope.cancelled_caught:
            raise GrpcError(StatusCode.UNAVAILABLE, "a newer stream of the same node took the place of this one")

    async def authority_changed(self) -> None:
        """Roots or revocations changed: cut the streams of those who were revoked, tell the others."""
        streams = list(self.streams.values())
        problems = await trio.to_thread.run_sync(
            lambda: [auth.problem(self._store, stream.caller) for stream in streams]
        )
        for stream, why in zip(streams, problems, strict=True):
            if why:
                _log.warning("ztunnel cut off", node=stream.node.id, identity=str(stream.caller.identity), reason=why)
                stream.failure = GrpcError(StatusCode.UNAUTHENTICATED, "authentication failure")
                stream.scope.cancel()
            stream.wake.set()

    def end_streams(self) -> None:
        """The control plane goes away: clients are to connect again."""
        for stream in self.streams.values():
            stream.failure = GrpcError(StatusCode.UNAVAILABLE, "the control plane is shutting down")
            stream.ended = True
            stream.wake.set()

    def _node(self, first: _Request, caller: auth.Caller, call: Call) -> auth.Node:
        if not first.HasField("node") or not first.node.id:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, "missing node information")
        try:
            node = auth.read_node(first.node)
            auth.check_node(node, caller)
            if caller.name is not None:
                node = attrs.evolve(node, name=caller.name)  # its token said who it is, and it cannot be another
        except auth.BadNode as error:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, str(error)) from None
        except auth.Refused as error:
            self._metrics.unauthenticated.labels("discovery").inc()
            _log.warning("discovery refused", reason=str(error), peer=remote_of(call))
            raise GrpcError(
                StatusCode.PERMISSION_DENIED,
                "authorization failed: the node's namespace and service account are not those of the caller",
            ) from None
        return node

    def _end_oldest(self, new: _Stream) -> None:
        same = [
            stream
            for stream in self.streams.values()
            if stream.node.id == new.node.id and stream.caller.identity == new.caller.identity
        ]
        for stream in same[: max(0, len(same) + 1 - STREAMS_PER_NODE)]:
            stream.scope.cancel()

    async def _read(self, stream: _Stream, call: Call, first: _Request) -> None:
        """Take requests; a fault is left to the writer, which owns the end of the stream."""
        try:
            request: _Request | None = first
            while request is not None:
                self._take(stream, request)
                stream.wake.set()
                data = await call.receive(MAX_REQUEST)
                request = None if data is None else parse(type(first), data)
        except GrpcError as error:
            stream.failure = error
        except TooManyNamesError as error:
            stream.failure = GrpcError(StatusCode.RESOURCE_EXHAUSTED, str(error))
        stream.ended = True
        stream.wake.set()

    def _take(self, stream: _Stream, request: _Request) -> None:
        if request.type_url == REVOCATIONS and isinstance(request, discovery_pb2.DeltaDiscoveryRequest):
            stream.revocations.request(request)
            return
        if request.type_url not in (ADDRESS, AUTHORIZATION, HEALTH):
            _log.debug("subscription to an unknown type ignored", type=request.type_url[:200], node=stream.node.id)
        # A stream speaks one of the two forms: `_serve` made the one that fits.
        rejection = stream.subscriber.request(request, trio.current_time())  # type: ignore[arg-type]
        if rejection is not None:
            self._metrics.rejected.labels(_short(rejection.type_url)).inc()
            _log.warning(
                "a ztunnel rejected what it was sent",
                node=stream.node.id,
                type=_short(rejection.type_url),
                reason=rejection.message,
            )

    async def _write(self, stream: _Stream, call: Call) -> None:
        try:
            while True:
                stream.wake = trio.Event()
                lists = stream.revocations.take(self._authority.view.crl)
                if lists is not None:
                    await call.send(lists.SerializeToString())
                ready, stream.ready = stream.ready, []
                for response in (*ready, *stream.subscriber.take(trio.current_time())):
                    self._metrics.pushes.labels(_short(response.type_url)).inc()
                    await call.send(response.parts)
                if stream.ended:
                    return
                deadline = stream.subscriber.deadline
                with trio.move_on_at(float("inf") if deadline is None else deadline):
                    stream.idle = True
                    await stream.wake.wait()
                stream.idle = False
        except GrpcError as error:
            stream.failure = stream.failure or error
        except FellBehindError as error:
            stream.failure = GrpcError(StatusCode.UNAVAILABLE, str(error))


def _news(stream: _Stream) -> None:
    """The mesh changed. Who waits and gets nothing of it sleeps on: a look is cheaper than a turn of the loop."""
    if stream.idle:
        try:
            stream.ready += stream.subscriber.take(trio.current_time())
        except FellBehindError:
            pass  # the writer finds out too, and tells
        else:
            if not stream.ready:
                return
    stream.wake.set()


def _short(type_url: str) -> str:
    return type_url.rpartition(".")[2]
