"""One discovery stream: what its client has, and what it is owed. Pure.

Delta xDS. A client is sent policies before the workloads that refer to them, and loses policies after those workloads
do, so that no moment is without a policy that holds before and after. `World` is the older form of discovery, in which
every response has everything.

Source: Envoy's incremental xDS; Istio's workload discovery (names, aliases, wildcard and on-demand).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from hbone.errors import HboneError
from miniistiod.catalog import ADDRESS, AUTHORIZATION
from miniistiod.ondemand import OnDemand
from ztunnel.wire import discovery_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from miniistiod.catalog import Catalog

__all__ = [
    "ADDRESS",
    "AUTHORIZATION",
    "HEALTH",
    "FellBehindError",
    "Rejection",
    "Response",
    "Subscriber",
    "TooManyNamesError",
    "World",
]

HEALTH = "type.googleapis.com/istio.v1.HealthInformation"
HOLD_SECONDS = 1.0
"""How long the first addresses wait for the client to ask for policies too."""
MAX_NAMES = 50_000
"""Names that one client may subscribe to."""
MAX_NAME_LENGTH = 2048


class TooManyNamesError(HboneError):
    """The client subscribed to more than we keep."""


class FellBehindError(HboneError):
    """The client took so long that what it lacks is not known any longer; it must connect again."""


@attrs.frozen(kw_only=True)
class Rejection:
    """A NACK: what the client could not use of a response."""

    type_url: str
    nonce: str
    message: str


@attrs.frozen(kw_only=True)
class Response:
    """A response, ready to be sent."""

    type_url: str
    nonce: str
    parts: Sequence[bytes]
    """The message; its resources are those of the catalog, encoded once for all subscribers."""
    resources: int
    """How many it carries."""
    removed: int

    @property
    def data(self) -> bytes:
        """The message in one piece."""
        return b"".join(self.parts)


@attrs.define
class _Type:
    """What a client has of one type."""

    url: str
    held: dict[str, str] | None
    """Wildcard: name to version of what it said to have, until the first answer."""
    demand: OnDemand | None = None
    """Instead of everything: what it asked for."""
    number: int = -1
    """The change up to which the client has everything that it wants."""
    owed: bool = True
    """The next answer is due even if there is nothing in it."""
    nonce: str = ""
    acknowledged: str = ""

    @property
    def wildcard(self) -> bool:
        return self.demand is None


class Subscriber:
    """The state machine of one stream.

    Give it each request (`request`), then send what `take` returns, in order; `take` again after each change of the
    catalog. Before the client has asked for both types, answers may be held back until `deadline`.
    """

    def __init__(self, stream_id: str, catalog: Catalog, *, node: str = "") -> None:
        self._stream_id = stream_id
        self._catalog = catalog
        self._node = node
        self._counter = 0
        self._types: dict[str, _Type] = {}
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
        if message.type_url == AUTHORIZATION or not subscribe or "*" in names:
            return _Type(message.type_url, held)
        demand = OnDemand(self._catalog, self._node, held)
        self._subscribe(demand, names - {"*"}, held=held)
        return _Type(message.type_url, None, demand)

    def _subscribe(self, demand: OnDemand, names: Iterable[str], *, held: Container[str] = ()) -> None:
        for name in sorted(names):
            if len(name) > MAX_NAME_LENGTH or len(demand.asked) >= MAX_NAMES:
                raise TooManyNamesError(f"more than {MAX_NAMES} names, or a name over {MAX_NAME_LENGTH} characters")
            demand.ask(name, again=name not in held)

    def _resubscribe(self, state: _Type, message: pb.DeltaDiscoveryRequest) -> None:
        """Later changes of the subscription count even in an answer to an older response: they are said once."""
        subscribe = set(message.resource_names_subscribe)
        unsubscribe = set(message.resource_names_unsubscribe)
        if not subscribe and not unsubscribe:
            return
        if state.demand is None or "*" in subscribe - unsubscribe:
            # Everything, once more where it was everything before: as istiod does.
            state.demand, state.held, state.number, state.owed = None, {}, -1, True
            return
        for name in unsubscribe:
            state.demand.give_up(name)
        added = subscribe - unsubscribe - {"*"}
        self._subscribe(state.demand, added)
        state.owed = state.owed or bool(added)

    def take(self, now: float) -> list[Response]:
        """Responses that are due, in the order in which they must be sent.

        Raises:
            FellBehindError: it is not known any longer what the client lacks.
        """
        if not self._settled:
            if self.deadline is None or now < self.deadline:
                return []
            self._settled, self.deadline = True, None
        policies, addresses = self._types.get(AUTHORIZATION), self._types.get(ADDRESS)
        responses: list[Response] = []
        late: list[str] = []
        if policies is not None:
            resources, late = self._wildcard(policies)
            if resources or (policies.owed and not late):
                responses.append(self._response(policies, resources, []))
        if addresses is not None:
            resources, removed = self._wildcard(addresses) if addresses.wildcard else self._on_demand(addresses)
            if resources or removed or addresses.owed:
                responses.append(self._response(addresses, resources, removed))
        if policies is not None and late:
            responses.append(self._response(policies, [], late))
        return responses

    def _wildcard(self, state: _Type) -> tuple[list[bytes], list[str]]:
        collection = self._catalog.of[state.url]
        entries = collection.entries
        if state.held is not None:
            held = state.held
            resources = [item.wire for name, item in entries.items() if held.get(name) != item.version]
            removed = [name for name in held if name not in entries]
            state.held = None
        else:
            names = self._since(state)
            resources = [entries[name].wire for name in names if name in entries]
            removed = [name for name in names if name not in entries]
        state.number = self._catalog.number
        return resources, removed

    def _since(self, state: _Type) -> list[str]:
        if state.number == self._catalog.number:
            return []
        names = self._catalog.of[state.url].since(state.number)
        if names is None:
            raise FellBehindError("too much changed since the last answer was taken; connect again")
        return names

    def _on_demand(self, state: _Type) -> tuple[list[bytes], list[str]]:
        assert state.demand is not None
        changed = self._since(state) if state.number >= 0 else []
        state.number = self._catalog.number
        return state.demand.answer(changed)

    def _response(self, state: _Type, resources: list[bytes], removed: list[str]) -> Response:
        self._counter += 1
        state.nonce = f"{self._stream_id}-{self._counter}"
        state.owed = False
        head = pb.DeltaDiscoveryResponse(
            system_version_info=str(self._catalog.number),
            type_url=state.url,
            nonce=state.nonce,
            removed_resources=removed,
        )
        # Fields of a message may come in any order, so resources that were encoded once are appended as they are.
        return Response(
            type_url=state.url,
            nonce=state.nonce,
            parts=(head.SerializeToString(), *resources),
            resources=len(resources),
            removed=len(removed),
        )

    def describe(self) -> dict[str, object]:
        """For the debug pages."""
        return {
            url: {
                "wildcard": state.wildcard,
                "names": sorted(state.demand.asked) if state.demand is not None else [],
                "has": len(state.demand.sent if state.demand is not None else self._catalog.of[url].entries),
                "number": state.number,
                "acknowledged": bool(state.nonce) and state.acknowledged == state.nonce,
                "rejected": self.rejections[url].message if url in self.rejections else None,
            }
            for url, state in self._types.items()
        }


class World:
    """The state machine of a stream of the older form: every response lists all that the client wants of a type.

    Such a client cannot be told what is gone, so it gets everything again after each change.
    """

    def __init__(self, stream_id: str, catalog: Catalog) -> None:
        self._stream_id = stream_id
        self._catalog = catalog
        self._counter = 0
        self._types: dict[str, _WorldType] = {}
        self.deadline: float | None = None
        self.rejections: dict[str, Rejection] = {}

    def request(self, message: pb.DiscoveryRequest, now: float) -> Rejection | None:
        """Take in a request; as `Subscriber.request`."""
        del now
        url = message.type_url
        if url not in (ADDRESS, AUTHORIZATION):
            return None
        names = frozenset(message.resource_names)
        if len(names) > MAX_NAMES or any(len(name) > MAX_NAME_LENGTH for name in names):
            raise TooManyNamesError(f"more than {MAX_NAMES} names, or a name over {MAX_NAME_LENGTH} characters")
        state = self._types.get(url)
        if state is None:
            self._types[url] = _WorldType(url, names)
            return None
        if message.response_nonce and message.response_nonce != state.nonce:
            return None  # about a response that another one has followed
        rejection = None
        if message.HasField("error_detail"):
            text = message.error_detail.message[:2000]
            rejection = self.rejections[url] = Rejection(type_url=url, nonce=message.response_nonce, message=text)
        elif message.response_nonce:
            state.acknowledged = state.nonce
            self.rejections.pop(url, None)
        if names != state.names:
            state.names, state.number = names, -1
        return rejection

    def take(self, now: float) -> list[Response]:
        """Responses that are due; policies before addresses."""
        del now
        found = (self._types.get(url) for url in (AUTHORIZATION, ADDRESS))
        return [response for state in found if state is not None and (response := self._due(state)) is not None]

    def _due(self, state: _WorldType) -> Response | None:
        collection, number = self._catalog.of[state.url], self._catalog.number
        if state.number == number:
            return None
        changed = collection.since(state.number) if state.number >= 0 else None
        state.number = number
        if changed is not None and not changed:
            return None
        self._counter += 1
        state.nonce = f"{self._stream_id}-{self._counter}"
        entries = collection.entries.values()
        if state.names and "*" not in state.names:
            wanted = dict.fromkeys(found for name in sorted(state.names) for found in self._resolve(state.url, name))
            entries = {name: collection.entries[name] for name in wanted}.values()
        head = pb.DiscoveryResponse(version_info=str(number), type_url=state.url, nonce=state.nonce)
        parts = (head.SerializeToString(), *(item.any(state.url) for item in entries))
        return Response(type_url=state.url, nonce=state.nonce, parts=parts, resources=len(entries), removed=0)

    def _resolve(self, url: str, name: str) -> tuple[str, ...]:
        if url == ADDRESS:
            return self._catalog.resolve(name)
        return (name,) if name in self._catalog.policies else ()

    def describe(self) -> dict[str, object]:
        """For the debug pages."""
        return {
            url: {
                "wildcard": not state.names,
                "names": sorted(state.names),
                "has": len(self._catalog.of[url].entries),
                "number": state.number,
                "acknowledged": bool(state.nonce) and state.acknowledged == state.nonce,
                "rejected": self.rejections[url].message if url in self.rejections else None,
            }
            for url, state in self._types.items()
        }


@attrs.define
class _WorldType:
    url: str
    names: frozenset[str]
    """None, or `*` among them: everything."""
    number: int = -1
    nonce: str = ""
    acknowledged: str = ""
