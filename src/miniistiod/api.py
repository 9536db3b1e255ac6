"""The services of port 15012, discovery here and the CA beside it. What a caller did wrong is told, and no more."""

from __future__ import annotations

import itertools
import secrets
import time
from typing import TYPE_CHECKING, Any

import attrs
import trio
from google.protobuf.message import DecodeError

from hbone.daemon.logs import get_logger
from hbone.grpc import GrpcError, StatusCode
from miniistiod import auth
from miniistiod.callers import Callers, remote_of
from miniistiod.certificates import CREATE_CERTIFICATE, CertificateService
from miniistiod.discovery import ADDRESS, AUTHORIZATION, HEALTH, Subscriber, TooManyNamesError
from miniistiod.revocation import REVOCATIONS, RevocationFeed
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from miniistiod.authority import Authority
    from miniistiod.callers import Call
    from miniistiod.config import Config
    from miniistiod.mesh import Mesh
    from miniistiod.metrics import Metrics
    from miniistiod.store import Store

__all__ = ["Api"]

_log = get_logger("miniistiod.api")
DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
STATE_OF_THE_WORLD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
FIRST_REQUEST_SECONDS = 30.0
"""A stream whose client says nothing for this long ends."""
STREAMS_PER_NODE = 2
"""One that is coming and one that is going; a third ends the oldest."""


@attrs.define(eq=False)
class _Stream:
    """An open discovery stream."""

    id: str
    caller: auth.Caller
    node: auth.Node
    subscriber: Subscriber
    remote: str
    since: float
    scope: trio.CancelScope
    revocations: RevocationFeed
    wake: trio.Event = attrs.Factory(trio.Event)
    failure: GrpcError | None = None
    ended: bool = False


class Api:
    """Handlers by the path of their method."""

    def __init__(
        self,
        config: Config,
        store: Store,
        mesh: Mesh,
        metrics: Metrics,
        authority: Authority,
        issuers: auth.Verifier | None = None,
    ) -> None:
        self._config = config
        self._store = store
        self._mesh = mesh
        self._metrics = metrics
        self._authority = authority
        self._callers = Callers(auth.Authenticator(store, issuers), metrics)
        self._certificates = CertificateService(config, authority, mesh, self._callers, metrics)
        self._numbers = itertools.count(1)
        self.streams: dict[str, _Stream] = {}
        self.handlers: dict[str, Callable[[Any], Awaitable[None]]] = {
            CREATE_CERTIFICATE: self._certificates.create,
            DELTA: self.delta,
            STATE_OF_THE_WORLD: self.state_of_the_world,
        }
        authority.on_change(self.authority_changed)

    # -- discovery

    async def state_of_the_world(self, call: Call) -> None:
        """The older form of discovery, which no ztunnel speaks."""
        del call
        raise GrpcError(StatusCode.UNIMPLEMENTED, "use DeltaAggregatedResources")

    async def delta(self, call: Call) -> None:
        """One discovery stream, until either side ends it."""
        self._callers.limit_anonymous(call)
        caller = await self._callers.for_stream(call)
        if not self._mesh.status.loaded:
            raise GrpcError(StatusCode.UNAVAILABLE, "server is not ready to serve discovery information")
        with trio.move_on_after(FIRST_REQUEST_SECONDS) as waiting:
            first = _parse(discovery_pb2.DeltaDiscoveryRequest, await call.receive())
        if waiting.cancelled_caught:
            raise GrpcError(StatusCode.DEADLINE_EXCEEDED, f"no request within {FIRST_REQUEST_SECONDS:g} seconds")
        node = self._node(first, caller, call)
        stream_id = f"{next(self._numbers)}-{secrets.token_hex(4)}"
        subscriber = Subscriber(stream_id, node=node.node_name)
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
            self._mesh.listen(stream_id, lambda: stream.wake.set())
            _log.info("ztunnel connected", node=node.id, identity=str(caller.identity), by=caller.how, stream=stream_id)
            try:
                await self._mesh.present(stream_id, node, caller)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, stream, call, first)
                    await self._write(stream, call)
                    nursery.cancel_scope.cancel()
            finally:
                self._mesh.forget(stream_id)
                del self.streams[stream_id]
                self._metrics.streams.set(len(self.streams))
                _log.info("ztunnel disconnected", node=node.id, stream=stream_id)
        if stream.failure is not None:
            raise stream.failure
        if scope.cancelled_caught:
            raise GrpcError(StatusCode.UNAVAILABLE, "a newer stream of the same node took the place of this one")

    def authority_changed(self) -> None:
        """Roots or revocations changed: cut the streams of those who were revoked, tell the others."""
        for stream in self.streams.values():
            if why := auth.problem(self._store, stream.caller):
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

    def _node(self, first: discovery_pb2.DeltaDiscoveryRequest, caller: auth.Caller, call: Call) -> auth.Node:
        if not first.HasField("node") or not first.node.id:
            raise GrpcError(StatusCode.INVALID_ARGUMENT, "missing node information")
        fields = {key: value.string_value for key, value in first.node.metadata.fields.items()}
        try:
            node = auth.parse_node_id(first.node.id, fields)
            auth.check_node(node, caller)
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

    async def _read(self, stream: _Stream, call: Call, first: discovery_pb2.DeltaDiscoveryRequest) -> None:
        """Take requests; a fault is left to the writer, which owns the end of the stream."""
        try:
            request: discovery_pb2.DeltaDiscoveryRequest | None = first
            while request is not None:
                self._take(stream, request)
                stream.wake.set()
                data = await call.receive()
                request = None if data is None else _parse(discovery_pb2.DeltaDiscoveryRequest, data)
        except GrpcError as error:
            stream.failure = error
        except TooManyNamesError as error:
            stream.failure = GrpcError(StatusCode.RESOURCE_EXHAUSTED, str(error))
        stream.ended = True
        stream.wake.set()

    def _take(self, stream: _Stream, request: discovery_pb2.DeltaDiscoveryRequest) -> None:
        if request.type_url == REVOCATIONS:
            stream.revocations.request(request)
            return
        if request.type_url not in (ADDRESS, AUTHORIZATION, HEALTH):
            _log.debug("subscription to an unknown type ignored", type=request.type_url[:200], node=stream.node.id)
        rejection = stream.subscriber.request(request, trio.current_time())
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
                stream.subscriber.offer(self._mesh.snapshot)
                for response in stream.subscriber.take(trio.current_time()):
                    self._metrics.pushes.labels(_short(response.type_url)).inc()
                    await call.send(response.SerializeToString())
                if stream.ended:
                    return
                deadline = stream.subscriber.deadline
                with trio.move_on_at(float("inf") if deadline is None else deadline):
                    await stream.wake.wait()
        except GrpcError as error:
            stream.failure = stream.failure or error


def _parse(kind: Any, data: bytes | None) -> Any:
    if data is None:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, "the call ended without a message")
    try:
        return kind.FromString(data)
    except DecodeError:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, "the message cannot be parsed") from None


def _short(type_url: str) -> str:
    return type_url.rpartition(".")[2]
