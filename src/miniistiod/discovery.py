"""One discovery stream: what its client has, and what it is owed. Pure.

Delta xDS. A client is sent policies before the workloads that refer to them, and loses policies after those workloads
do, so that no moment is without a policy that holds before and after.

Source: Envoy's incremental xDS; Istio's workload discovery (names, aliases, wildcard and on-demand).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from hbone.errors import HboneError
from miniistiod.snapshot import difference
from ztunnel.wire import discovery_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from miniistiod.snapshot import Entry, Snapshot

__all__ = ["ADDRESS", "AUTHORIZATION", "HEALTH", "Rejection", "Subscriber", "TooManyNamesError"]

ADDRESS = "type.googleapis.com/istio.workload.Address"
AUTHORIZATION = "type.googleapis.com/istio.security.Authorization"
HEALTH = "type.googleapis.com/istio.v1.HealthInformation"
HOLD_SECONDS = 1.0
"""How long the first addresses wait for the client to ask for policies too."""
MAX_NAMES = 50_000
"""Names that one client may subscribe to."""
MAX_NAME_LENGTH = 2048


class TooManyNamesError(HboneError):
    """The client subscribed to more than we keep."""


@attrs.frozen(kw_only=True)
class Rejection:
    """A NACK: what the client could not use of a response."""

    type_url: str
    nonce: str
    message: str


@attrs.define
class _Type:
    """What a client has of one type."""

    url: str
    wildcard: bool
    sent: dict[str, str] = attrs.Factory(dict)
    """Resource name to version, as far as the client holds it. On demand, names that were asked are in it too."""
    base: Mapping[str, Entry] | None = None
    """Wildcard: instead of `sent`, the set that the client has."""
    asked: set[str] = attrs.Factory(set)
    """On demand: names that the client subscribed to."""
    owed: bool = True
    """The next answer is due even if there is nothing in it."""
    again: set[str] = attrs.Factory(set)
    """On demand: names just asked, to be answered though the client has them."""
    nonce: str = ""
    acknowledged: str = ""


class Subscriber:
    """The state machine of one stream.

    Give it each request (`request`) and each snapshot (`offer`), then send what `take` returns, in order. Before the
    client has asked for both types, answers may be held back until `deadline`.
    """

    def __init__(self, stream_id: str, *, node: str = "") -> None:
        self._stream_id = stream_id
        self._node = node
        self._counter = 0
        self._types: dict[str, _Type] = {}
        self._snapshot: Snapshot | None = None
        self._settled = False
        self.deadline: float | None = None
        """When `take` must be called though nothing came."""
        self.rejections: dict[str, Rejection] = {}
        """The last response of each type that was rejected, until a later one is acknowledged."""

    def request(self, message: pb.DeltaDiscoveryRequest, now: float) -> Rejection | None:
        """Take in a request.

        Returns:
            What the client rejects, when it is a NACK.

        Raises:
            TooManyNamesError: more subscriptions than one client may have.
        """
        url = message.type_url
        if url not in (ADDRESS, AUTHORIZATION):
            return None
        state = self._types.get(url)
        if state is None:
            self._types[url] = self._first(message)
            if len(self._types) == 2:
                self._settled, self.deadline = True, None
            elif not self._settled and self.deadline is None:
                self.deadline = now + HOLD_SECONDS
            return None
        rejection = None
        if message.HasField("error_detail"):
            rejection = Rejection(
                type_url=url, nonce=message.response_nonce, message=message.error_detail.message[:2000]
            )
            self.rejections[url] = rejection
        elif message.response_nonce and message.response_nonce == state.nonce:
            state.acknowledged = state.nonce
            self.rejections.pop(url, None)
        self._resubscribe(state, message)
        return rejection

    def _first(self, message: pb.DeltaDiscoveryRequest) -> _Type:
        """The first request of a type says what the client has from an earlier stream."""
        subscribe = set(message.resource_names_subscribe)
        held = dict(message.initial_resource_versions)
        names = (subscribe | held.keys()) - set(message.resource_names_unsubscribe)
        wildcard = message.type_url == AUTHORIZATION or not subscribe or "*" in names
        if wildcard:
            return _Type(message.type_url, True, sent=held)
        state = _Type(message.type_url, False, sent=held)
        self._subscribe(state, names - {"*"})
        return state

    def _subscribe(self, state: _Type, names: Iterable[str]) -> None:
        for name in names:
            if len(name) > MAX_NAME_LENGTH or len(state.asked) >= MAX_NAMES:
                raise TooManyNamesError(f"more than {MAX_NAMES} names, or a name over {MAX_NAME_LENGTH} characters")
            state.asked.add(name)

    def _resubscribe(self, state: _Type, message: pb.DeltaDiscoveryRequest) -> None:
        """Later changes of the subscription count even in an answer to an older response: they are said once."""
        subscribe = set(message.resource_names_subscribe)
        unsubscribe = set(message.resource_names_unsubscribe)
        if not subscribe and not unsubscribe:
            return
        if state.wildcard:
            state.owed, state.base = True, None  # everything again, as istiod does
            state.sent = {}
            return
        if "*" in subscribe - unsubscribe:
            state.wildcard, state.owed = True, True
            state.asked, state.sent = set(), {}
            return
        state.asked -= unsubscribe
        for name in unsubscribe:
            state.sent.pop(name, None)
        added = subscribe - unsubscribe - {"*"}
        self._subscribe(state, added)
        state.again |= added
        state.owed = state.owed or bool(added)

    def offer(self, snapshot: Snapshot) -> None:
        """The mesh is now `snapshot`; offers that were not taken yet are passed over."""
        self._snapshot = snapshot

    def take(self, now: float) -> list[pb.DeltaDiscoveryResponse]:
        """Responses that are due, in the order in which they must be sent."""
        snapshot = self._snapshot
        if snapshot is None:
            return []
        if not self._settled:
            if self.deadline is None or now < self.deadline:
                return []
            self._settled, self.deadline = True, None
        policies, addresses = self._types.get(AUTHORIZATION), self._types.get(ADDRESS)
        responses: list[pb.DeltaDiscoveryResponse] = []
        late: list[str] = []
        if policies is not None:
            changed, late = self._wildcard(policies, snapshot.policies)
            if changed or (policies.owed and not late):
                responses.append(
                    self._response(
                        policies, [_resource(AUTHORIZATION, snapshot.policies[name]) for name in changed], []
                    )
                )
        if addresses is not None:
            if addresses.wildcard:
                changed, removed = self._wildcard(addresses, snapshot.addresses)
                resources = [_resource(ADDRESS, snapshot.addresses[name]) for name in changed]
            else:
                resources, removed = self._on_demand(addresses, snapshot)
            if resources or removed or addresses.owed:
                responses.append(self._response(addresses, resources, removed))
        if policies is not None and late:
            responses.append(self._response(policies, [], late))
        return responses

    def _wildcard(self, state: _Type, entries: Mapping[str, Entry]) -> tuple[list[str], list[str]]:
        if state.base is entries:
            return [], []
        if state.base is not None:
            found = difference(state.base, entries)
            changed, removed = list(found.changed), list(found.removed)
        else:
            changed = [name for name, item in entries.items() if state.sent.get(name) != item.version]
            removed = [name for name in state.sent if name not in entries]
            state.sent = {}
        state.base = entries
        return changed, removed

    def _on_demand(self, state: _Type, snapshot: Snapshot) -> tuple[list[pb.Resource], list[str]]:
        """What was asked for, under its canonical name and under the name that was asked.

        A ztunnel that waits for an address wakes up by the resource's name only.
        """
        wanted: dict[str, Entry] = {}
        missing: list[str] = []
        for asked in sorted(state.asked):
            names = snapshot.resolve(asked)
            if not names:
                if asked in state.again or asked in state.sent or state.owed:
                    missing.append(asked)
                continue
            for name in names:
                wanted[name] = snapshot.addresses[name]
            wanted[asked] = snapshot.addresses[names[0]]
        for name in snapshot.by_node.get(self._node, ()) if self._node else ():
            wanted[name] = snapshot.addresses[name]
        resources: list[pb.Resource] = []
        for name, item in wanted.items():
            if state.sent.get(name) != item.version or name in state.again:
                resources.append(_resource(ADDRESS, item, name=name, aliases=True))
                state.sent[name] = item.version
        gone = [name for name in state.sent if name not in wanted]
        removed = sorted({*missing, *(name for name in gone if name not in snapshot.addresses)})
        for name in gone:
            # Still there, but nobody asks for it any longer: the client may keep it, without news of it.
            del state.sent[name]
        state.again.clear()
        return resources, removed

    def _response(self, state: _Type, resources: list[pb.Resource], removed: list[str]) -> pb.DeltaDiscoveryResponse:
        self._counter += 1
        state.nonce = f"{self._stream_id}-{self._counter}"
        state.owed = False
        number = self._snapshot.number if self._snapshot is not None else 0
        return pb.DeltaDiscoveryResponse(
            system_version_info=str(number),
            type_url=state.url,
            nonce=state.nonce,
            resources=resources,
            removed_resources=removed,
        )

    def describe(self) -> dict[str, object]:
        """For the debug pages."""
        return {
            url: {
                "wildcard": state.wildcard,
                "names": sorted(state.asked),
                "has": len(state.base if state.base is not None else state.sent),
                "acknowledged": bool(state.nonce) and state.acknowledged == state.nonce,
                "rejected": self.rejections[url].message if url in self.rejections else None,
            }
            for url, state in self._types.items()
        }


def _resource(url: str, item: Entry, *, name: str | None = None, aliases: bool = False) -> pb.Resource:
    resource = pb.Resource(name=name or item.name, version=item.version, aliases=item.aliases if aliases else ())
    resource.resource.type_url = url
    resource.resource.value = item.body
    return resource
