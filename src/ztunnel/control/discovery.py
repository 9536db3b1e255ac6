"""The discovery stream: what the mesh looks like, kept up to date and kept when the control plane goes away.

Delta xDS, two types, both wildcard (addresses one by one where they are asked for on demand), and where they are wanted
the revocation lists of the mesh. A response is validated resource by resource in slices, then becomes visible at once:
the data path sees the state before it or the state after it. What is said on a stream is in `conversation`.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import HboneError, IdentityError
from hbone.grpc import GrpcError, GrpcUnavailable, StatusCode
from ztunnel.control.apply import apply
from ztunnel.control.conversation import NAMES_AT_ONCE, TYPES, Conversation
from ztunnel.control.pace import Pace, settle
from ztunnel.control.response import read
from ztunnel.control.revocation import REVOCATION_NAME, REVOCATION_TYPE
from ztunnel.control.transport import REMEDY, refusal, request_metadata
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hbone.identity import Identity
    from ztunnel.control.demand import Demand
    from ztunnel.control.response import Response
    from ztunnel.control.transport import Dial, MessageStream, TokenSource
    from ztunnel.mesh import RejectedResource, Store

__all__ = ["DELTA", "DiscoveryClient", "DiscoveryMetrics", "DiscoveryStatus", "make_node", "nobody_else"]

DELTA = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"

BACKOFF_FIRST = 0.010
BACKOFF_QUICK = 1.0
BACKOFF_LIMIT = 15.0
MAX_NACK = 16 * 1024
"""Characters of one rejection's message."""
LARGE_OPENING = 64 * 1024
"""Bytes of the opening requests from which on a server that has had enough may have had enough of them."""
SETTLE_STEP = 0.05
"""Seconds between two looks whether a large push was worked in."""

log = get_logger("ztunnel.control.discovery")


class DiscoveryMetrics(Protocol):
    """What is counted about the stream."""

    def xds_message(self, url: str, nbytes: int, /) -> None:
        """One response of type `url` with `nbytes` of resources arrived."""
        ...

    def xds_terminated(self, reason: str, /) -> None:
        """A stream ended: ConnectionError, Error, Reconnect or Complete."""
        ...


@attrs.frozen(kw_only=True)
class DiscoveryStatus:
    """What `status` shows of the control plane. Times are seconds since 1970."""

    connected: bool
    synced: bool
    """Both types have been accepted on the present stream."""
    connected_since: float | None
    last_update: float | None
    stale_since: float | None
    """Since when what we hold may be out of date; None while connected and synced."""
    last_error: str | None
    rejected: int
    """Resources that were refused since the start."""
    addresses: int
    policies: int


def make_node(
    *,
    name: str,
    namespace: str,
    ip: str,
    node_name: str,
    metadata: Mapping[str, str],
    json_metadata: Mapping[str, Any],
) -> discovery_pb2.Node:
    """Who we say we are; a hint only, the control plane goes by token or certificate.

    Source: Istio's ztunnel, xDS node.
    """
    node = discovery_pb2.Node(id=f"ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local")
    fields: dict[str, Any] = {"NAME": name, "NAMESPACE": namespace, "INSTANCE_IPS": ip, "NODE_NAME": node_name}
    fields.update(metadata)
    fields.update(json_metadata)
    node.metadata.update(fields)
    return node


class RevocationSink(Protocol):
    """Who acts on revocation lists."""

    async def received(self, body: bytes | None) -> None:
        """Put them in force; None: there are none any more. Raises IdentityError: they cannot be used."""
        ...


async def nobody_else(_: bytes, __: int) -> None:
    """Nobody else has a store of the same mesh."""


class DiscoveryClient:
    """Subscribes, applies, acknowledges, reconnects. What was accepted stays in force until it is replaced."""

    def __init__(
        self,
        dial: Dial,
        store: Store,
        *,
        node: discovery_pb2.Node,
        metrics: DiscoveryMetrics,
        identity: Callable[[], Identity | None] = lambda: None,
        token: TokenSource | None = None,
        cluster_id: str = "Kubernetes",
        headers: Sequence[tuple[str, str]] = (),
        applied: Callable[[], None] = lambda: None,
        spread: Callable[[bytes, int], Awaitable[None]] = nobody_else,
        revocations: RevocationSink | None = None,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        remedy: str = REMEDY,
        pace: Pace | None = None,
        demand: Demand | None = None,
    ) -> None:
        """Remember how to ask.

        Args:
            dial: Opens a channel to the control plane.
            store: Gets what is accepted.
            node: Sent with the first request of each type.
            metrics: Counts responses and ends of streams.
            identity: The certificate to present where there is no token.
            token: Where the bearer token comes from.
            cluster_id: Sent with a token.
            headers: `XDS_HEADER_*`.
            applied: Called after each response that changed something and when the stream is lost; must not wait.
            spread: Gets each response that was applied, and the number of its resources, before it is acknowledged.
            revocations: Gets revocation lists; None: they are not asked for.
            wall: Wall clock, seconds since 1970.
            rng: Spreads reconnects.
            remedy: How this host gets a certificate when it has nothing to show; for people.
            pace: Cuts the work of large responses.
            demand: Which addresses are subscribed to; None: all.
        """
        self.demand = demand
        """Which addresses are subscribed to; None: all."""
        self.needed = TYPES if demand is None else (AUTHORIZATION_TYPE,)
        """Types of which a first answer is awaited."""
        self.pace = pace or Pace()
        """Cuts the work of large responses."""
        self._told = 0  # bytes of the opening requests
        self._untold = False  # the next stream is opened without what we hold
        self._whole: set[str] = set()  # types of which the next response lists all that there is
        self._remedy = remedy
        self._dial = dial
        self._store = store
        self._node = node
        self._metrics = metrics
        self._identity = identity
        self._token = token
        self._cluster_id = cluster_id
        self._headers = tuple(headers)
        self._applied = applied
        self._spread = spread
        self._revocations = revocations
        self._wall = wall
        self._rng = rng or random.Random()  # jitter, no secret
        self._versions: dict[str, dict[str, str]] = {url: {} for url in TYPES}  # of what was accepted, by name
        self._acknowledged: set[str] = set()  # since the start
        self._synced: set[str] = set()  # on the present stream
        self._answered: set[str] = set()  # on the present stream
        self._connected_since: float | None = None
        self._last_update: float | None = None
        self._stale_since: float | None = None
        self._last_error: str | None = None
        self._rejected = 0
        self._settling = False
        self.ready = trio.Event()
        """Set once both types have been accepted without a rejection; on demand, once the policies have."""

    # state

    def status(self) -> DiscoveryStatus:
        """A view for people."""
        return DiscoveryStatus(
            connected=self._connected_since is not None,
            synced=self.in_sync,
            connected_since=self._connected_since,
            last_update=self._last_update,
            stale_since=self._stale_since,
            last_error=self._last_error,
            rejected=self._rejected,
            addresses=len(self._versions[ADDRESS_TYPE]),
            policies=len(self._versions[AUTHORIZATION_TYPE]),
        )

    @property
    def in_sync(self) -> bool:
        """Connected, and both types accepted on this stream: what we hold is what the control plane says."""
        return self._synced.issuperset(self.needed)

    async def snapshot(self) -> list[bytes]:
        """What is in force, to be kept on disk, in pieces; made in slices, from the state at one moment."""
        while self._settling and self._store.unsettled:  # noqa: ASYNC110 - it may begin anew in between
            await trio.sleep(SETTLE_STEP)
        work = self._store.snapshot_in_slices(self._versions[ADDRESS_TYPE], self._versions[AUTHORIZATION_TYPE])
        copied = False
        while True:
            try:
                next(work)
            except StopIteration as done:
                pieces: list[bytes] = done.value
                return pieces
            if not copied:
                copied = True
                self.pace.pass_over(len(self._versions[ADDRESS_TYPE]))
            await trio.lowlevel.checkpoint()

    def restore(self, data: bytes, saved_at: float) -> None:
        """Put a snapshot in force; its versions are told to the server, which then sends what differs.

        Args:
            data: From `snapshot`.
            saved_at: When it was last known to be current, seconds since 1970.

        Raises:
            SnapshotError: it cannot be read; nothing was changed.
        """
        restored = self._store.restore(data)
        self._versions = {
            ADDRESS_TYPE: dict(restored.address_versions),
            AUTHORIZATION_TYPE: dict(restored.policy_versions),
        }
        self._stale_since = self._last_update = saved_at

    # the stream

    async def run(self) -> None:
        """Keep a stream open until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(settle, self._store, self.pace)
            self._settling = True
            try:
                await self._keep_open()
            finally:
                self._settling = False

    async def _keep_open(self) -> None:
        backoff = BACKOFF_FIRST
        while True:
            self._answered.clear()
            reason, text = await self._attempt()
            if self._answered:
                backoff = BACKOFF_FIRST  # it worked; a failure now is the first
            longer = min(BACKOFF_LIMIT, backoff * 2)
            if reason in ("Reconnect", "Complete"):
                # A server that ends every stream before it answers must not be called without pause.
                wait = BACKOFF_FIRST if self._answered else min(BACKOFF_QUICK, longer)
                backoff = BACKOFF_FIRST if self._answered else longer
            else:
                wait = backoff = longer
            self._lost(text)
            self._metrics.xds_terminated(reason)
            wait *= self._rng.uniform(0.8, 1.2)  # many hosts must not return in step
            if text:
                log.warning("control plane lost", error=text, retry_in=f"{wait:.2f}s")
            else:
                log.info("discovery stream ended; opening it again")
            await trio.sleep(wait)

    async def _attempt(self) -> tuple[str, str]:
        """One stream, from dial to end: the reason as the metric names it, and what to say."""
        opened = False
        presented = None
        try:
            metadata = request_metadata(self._token, self._cluster_id, self._headers)
            presented = self._identity() if self._token is None else None
            async with self._dial(presented) as channel, channel.stream(DELTA, metadata) as stream:
                opened = True
                await self._converse(stream)
        except GrpcError as error:
            if error.code is StatusCode.RESOURCE_EXHAUSTED and self._told >= LARGE_OPENING and not self._answered:
                # The server does not take so large a request: have it send all, and see ourselves what is gone.
                self._untold = True
            text = refusal(error, presented is not None or self._token is not None, self._remedy)
            if opened and _is_reconnect(error):
                return "Reconnect", text
            return ("Error" if opened else "ConnectionError"), text
        except (HboneError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            return ("Error" if opened else "ConnectionError"), str(error) or type(error).__name__
        except Exception as error:  # a fault of ours costs the stream, and what is in force stays in force
            log.exception("the discovery stream failed")
            return "Error", f"internal error: {type(error).__name__}"
        return "Complete", ""

    async def _converse(self, stream: MessageStream) -> None:
        untold, self._untold, self._told = self._untold, False, 0
        self._whole.clear()
        for url in TYPES:
            opening = await self._opening(url, untold=untold)
            self._told += len(opening)
            await stream.send(opening)
        if self._revocations is not None:
            # By name, which a server that does not know the type passes over.
            request = discovery_pb2.DeltaDiscoveryRequest(
                node=self._node, type_url=REVOCATION_TYPE, resource_names_subscribe=[REVOCATION_NAME]
            )
            await stream.send(request.SerializeToString())
        self._connected_since = self._wall()
        log.info("discovery stream open")
        await Conversation(self, stream).run()

    async def _opening(self, url: str, *, untold: bool) -> bytes:
        """The first request of a type, with all that we hold."""
        request = discovery_pb2.DeltaDiscoveryRequest(node=self._node, type_url=url)
        demand = self.demand if url == ADDRESS_TYPE else None
        if demand is not None:
            # To nothing. Source: Istio's ztunnel, on demand.
            request.resource_names_subscribe.append("*")
            request.resource_names_unsubscribe.append("*")
            asked = demand.opening(untold=self._versions[url] if untold else ())
            request.initial_resource_versions.update(dict.fromkeys(asked, ""))
        if untold:
            if demand is None:
                self._whole.add(url)
            return request.SerializeToString()
        # Serialized messages may be joined: the entries of their maps add up.
        pieces = [request.SerializeToString()]
        versions = self._versions[url]  # nobody changes it before there is a stream
        names = iter(versions)
        while some := list(itertools.islice(names, NAMES_AT_ONCE)):
            request = discovery_pb2.DeltaDiscoveryRequest(
                initial_resource_versions={name: versions[name] for name in some}
            )
            pieces.append(request.SerializeToString())
            await trio.lowlevel.checkpoint()
        return b"".join(pieces)

    async def put_in_force(self, raw: bytes, response: Response) -> discovery_pb2.DeltaDiscoveryRequest:
        """Apply a response of one of the two types; returns what to answer."""
        url = response.type_url
        answer = discovery_pb2.DeltaDiscoveryRequest(type_url=url, response_nonce=response.nonce)
        names: list[str] = []
        refused = await self._apply(response, names)
        await self._spread(raw, response.count)  # what is acknowledged is in force everywhere
        if self.demand is not None:
            self.demand.answered(names)  # who waits looks at a store that has it, in a worker too
        if refused:
            self._rejected += len(refused)
            text = "; ".join(f"{error.name}: {error.reason}" for error in refused[:MAX_NACK])
            answer.error_detail.message = text if len(text) <= MAX_NACK else text[:MAX_NACK] + "; ..."
            log.warning("resources rejected", type_url=url, count=len(refused), error=text[:1024])
        self._last_update = self._wall()
        self._answered.add(url)
        return answer

    def answered(self, answer: discovery_pb2.DeltaDiscoveryRequest) -> None:
        """The answer to a response that is in force left."""
        url = answer.type_url
        self._synced.add(url)
        if not answer.HasField("error_detail"):
            self._acknowledged.add(url)
        if self._acknowledged.issuperset(self.needed):
            self.ready.set()
        if self.in_sync:
            self._stale_since = None
            self._applied()  # not before: workloads without their policies are no picture to start from

    async def other_type(self, raw: bytes, url: str, nonce: str) -> discovery_pb2.DeltaDiscoveryRequest:
        """Take a response of another type; returns what to answer."""
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(raw)
        self._metrics.xds_message(url, sum(len(item.resource.value) for item in response.resources))
        answer = discovery_pb2.DeltaDiscoveryRequest(type_url=url, response_nonce=nonce)
        if url == REVOCATION_TYPE and self._revocations is not None:
            await self._take_revocations(response, answer, self._revocations)
        else:
            # Acknowledged as the Rust ztunnel does: a refusal would not make the server stop either.
            log.error("response of a type that we did not ask for", type_url=url)
        return answer

    async def completed(self, raw: bytes, response: Response) -> tuple[bytes, Response]:
        """The response, with what it does not list taken away where it lists all that there is."""
        url = response.type_url
        if url not in self._whole:
            return raw, response
        self._whole.discard(url)
        listed: set[str] = set()
        slices = self.pace.begin()
        for item in response.resources():
            listed.add(item.name)
            if slices.due():
                await slices.rest()
        gone = discovery_pb2.DeltaDiscoveryResponse()
        for name in tuple(self._versions[url]):
            if name not in listed:
                gone.removed_resources.append(name)
            if slices.due():
                await slices.rest()
        raw += gone.SerializeToString()
        return raw, await read(raw, self.pace)

    async def _take_revocations(
        self,
        response: discovery_pb2.DeltaDiscoveryResponse,
        answer: discovery_pb2.DeltaDiscoveryRequest,
        sink: RevocationSink,
    ) -> None:
        """Put lists in force, or say in `answer` why not."""
        body: bytes | None = None
        for item in response.resources:
            if item.name == REVOCATION_NAME:
                body = item.resource.value
        if body is None and REVOCATION_NAME not in response.removed_resources:
            return  # nothing new in it
        try:
            await sink.received(body)
        except IdentityError as error:
            self._rejected += 1
            answer.error_detail.message = f"{REVOCATION_NAME}: {error}"[:MAX_NACK]
            log.warning("revocation lists rejected; those before stay in force", error=str(error))

    async def _apply(self, response: Response, names: list[str]) -> Sequence[RejectedResource]:
        """Put in force what is good; returns what was refused. On demand `names` gets everything that was told of."""
        applied = await apply(self._store, response, self.pace)
        self._metrics.xds_message(response.type_url, applied.nbytes)
        accepted = self._versions[response.type_url]
        # In force already; a name that is cancelled before its version is here will only be sent again.
        slices = self.pace.begin()
        for name in applied.gone:
            accepted.pop(name, None)
            if slices.due():
                await slices.rest()
        versions = applied.versions
        if self.demand is not None:
            names += (*versions, *applied.gone, *applied.aliases, *(error.name for error in applied.refused))
        while versions:
            name, version = versions.popitem()
            accepted[name] = version
            if slices.due():
                await slices.rest()
        for error in applied.refused:
            accepted.setdefault(error.name, "")  # in force as a refusal, so the server must say when it is gone
        return applied.refused

    def _lost(self, text: str) -> None:
        was_in_sync = self.in_sync
        self._connected_since = None
        self._synced.clear()
        self._last_error = text or None
        if was_in_sync:
            self._stale_since = self._wall()
            self._applied()  # so that the disk knows since when, too


def _is_reconnect(error: GrpcError) -> bool:
    """Whether the stream ended as streams do: the server drains, restarts, or a deadline passed."""
    name = error.code.name
    if isinstance(error, GrpcUnavailable):
        return True  # the connection, not the call: the server went away, as it does to be restarted
    if name in ("UNKNOWN", "CANCELLED", "DEADLINE_EXCEEDED"):
        return True
    message = (error.message or "").lower()
    return name == "UNAVAILABLE" and ("transport is closing" in message or "received prior goaway" in message)
