"""The two services of port 15012, CA and discovery. What a caller did wrong is told; who it failed to be is not."""

from __future__ import annotations

import datetime
import itertools
import secrets
import time
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import trio
from google.protobuf.message import DecodeError

from hbone.daemon.logs import get_logger
from hbone.grpc import GrpcError, StatusCode
from miniistiod import auth, ca
from miniistiod.discovery import ADDRESS, AUTHORIZATION, HEALTH, Subscriber, TooManyNamesError
from ztunnel.wire import ca_pb2, discovery_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.identity import SpiffeId
    from miniistiod.config import Config
    from miniistiod.mesh import Mesh
    from miniistiod.metrics import Metrics
    from miniistiod.store import Store

__all__ = ["Api", "Call"]

_log = get_logger("miniistiod.api")
_audit = get_logger("miniistiod.ca")
CREATE_CERTIFICATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
STATE_OF_THE_WORLD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
FIRST_REQUEST_SECONDS = 30.0
"""A stream whose client says nothing for this long ends."""
STREAMS_PER_NODE = 2
"""One that is coming and one that is going; a third ends the oldest."""


class Call(Protocol):
    """What is used of `hbone.trio.grpc.GrpcCall`."""

    @property
    def peer(self) -> SpiffeId | None:
        """Identity of the verified client certificate."""
        ...

    @property
    def metadata(self) -> Any:
        """Header fields, as pairs of name and value."""
        ...

    @property
    def remote_address(self) -> Any:
        """Where the caller connected from."""
        ...

    async def receive(self) -> bytes | None:
        """The next message; None at the end."""
        ...

    async def send(self, message: bytes, /) -> None:
        """Send a message."""
        ...


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
    wake: trio.Event = attrs.Factory(trio.Event)
    failure: GrpcError | None = None
    ended: bool = False


class Api:
    """Handlers by the path of their method."""

    def __init__(self, config: Config, store: Store, mesh: Mesh, metrics: Metrics) -> None:
        self._config = config
        self._store = store
        self._mesh = mesh
        self._metrics = metrics
        self._signer = store.signer()
        self._roots = store.roots()
        self._authenticator = auth.Authenticator(store)
        self._anonymous = auth.RateLimiter(per_second=50, burst=500)
        self._callers = auth.RateLimiter(per_second=10, burst=100)
        self._numbers = itertools.count(1)
        self.streams: dict[str, _Stream] = {}
        self.handlers: dict[str, Callable[[Any], Awaitable[None]]] = {
            CREATE_CERTIFICATE: self.create_certificate,
            DELTA: self.delta,
            STATE_OF_THE_WORLD: self.state_of_the_world,
        }
        metrics.root_expiry.set(self._signer.certificate.not_valid_after_utc.timestamp())

    # -- certificates

    async def create_certificate(self, call: Call) -> None:
        """Sign a certificate for the identity that the caller has shown to be."""
        self._metrics.requests.inc()
        request = _parse(ca_pb2.IstioCertificateRequest, await call.receive())
        self._limit_anonymous(call)
        # The whole request is judged before a token is spent on it.
        try:
            key = ca.parse_request(request.csr)
            lifetime = ca.lifetime_for(
                request.validity_duration, self._config.default_lifetime, self._config.max_lifetime
            )
        except (ca.CertificateRequestError, ca.LifetimeError) as error:
            self._metrics.bad_requests.inc()
            _log.info("certificate request refused", reason=str(error), peer=_remote(call))
            raise GrpcError(StatusCode.INVALID_ARGUMENT, f"CSR signing error ({error})") from None
        key_sha256 = ca.key_hash(key)
        try:
            caller = await trio.to_thread.run_sync(
                self._authenticator.for_certificate, call.peer, call.metadata, key_sha256, time.time()
            )
        except auth.Refused as error:
            self._metrics.unauthenticated.labels("ca").inc()
            _log.warning("certificate refused", reason=str(error), peer=_remote(call))
            raise GrpcError(StatusCode.UNAUTHENTICATED, "request authenticate failure") from None
        wanted = dict(request.metadata.fields).get("ImpersonatedIdentity")
        if wanted is not None and wanted.string_value != str(caller.identity):
            self._metrics.unauthenticated.labels("ca").inc()
            _log.warning(
                "certificate for another identity refused",
                caller=str(caller.identity),
                wanted=wanted.string_value[:2048],
                peer=_remote(call),
            )
            raise GrpcError(StatusCode.UNAUTHENTICATED, "request impersonation authentication failure")
        if not self._callers.allow(str(caller.identity), time.monotonic()):
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "request rate limit exceeded: try again in a second")
        chain = await trio.to_thread.run_sync(self._sign, caller, key, key_sha256, lifetime)
        if caller.enrolled:
            await self._mesh.enrolled(caller)
        await call.send(ca_pb2.IstioCertificateResponse(cert_chain=chain).SerializeToString())

    def _sign(self, caller: auth.Caller, key: ca.PublicKey, key_sha256: str, lifetime: datetime.timedelta) -> list[str]:
        now = datetime.datetime.now(datetime.UTC)
        try:
            certificate = ca.issue(self._signer, key, caller.identity, lifetime, now)
        except ca.SigningError as error:
            _log.error("cannot sign", reason=str(error))
            raise GrpcError(StatusCode.INTERNAL, "CSR signing error (the authority cannot sign)") from None
        self._store.record_certificate(
            certificate,
            spiffe_id=str(caller.identity),
            name=caller.name or "",
            key_sha256=key_sha256,
            caller=caller.how,
            now=now.timestamp(),
        )
        self._metrics.issued.labels(caller.how.rpartition(" ")[0] or caller.how).inc()
        _audit.info(
            "certificate issued",
            identity=str(caller.identity),
            serial=f"{certificate.serial_number:032x}",
            key=key_sha256,
            caller=caller.how,
            expires=certificate.not_valid_after_utc.isoformat(),
        )
        return ca.response_chain(certificate, self._signer, self._roots)

    def _limit_anonymous(self, call: Call) -> None:
        if call.peer is None and not self._anonymous.allow(_host(call), time.monotonic()):
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "request rate limit exceeded: try again in a second")

    # -- discovery

    async def state_of_the_world(self, call: Call) -> None:
        """The older form of discovery, which no ztunnel speaks."""
        del call
        raise GrpcError(StatusCode.UNIMPLEMENTED, "use DeltaAggregatedResources")

    async def delta(self, call: Call) -> None:
        """One discovery stream, until either side ends it."""
        self._limit_anonymous(call)
        try:
            caller = await trio.to_thread.run_sync(
                self._authenticator.for_stream, call.peer, call.metadata, time.time()
            )
        except auth.Refused as error:
            self._metrics.unauthenticated.labels("discovery").inc()
            _log.warning("discovery refused", reason=str(error), peer=_remote(call))
            raise GrpcError(StatusCode.UNAUTHENTICATED, "authentication failure") from None
        if not self._callers.allow(str(caller.identity), time.monotonic()):
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "request rate limit exceeded: try again in a second")
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
            stream = _Stream(stream_id, caller, node, subscriber, _remote(call), time.time(), scope)
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
            _log.warning("discovery refused", reason=str(error), peer=_remote(call))
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


def _remote(call: Call) -> str:
    address = call.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _host(call: Call) -> str:
    address = call.remote_address
    return str(address[0]) if isinstance(address, tuple) and address else str(address)
