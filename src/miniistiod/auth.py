"""Who is asking, and which identity they may have. Decides; reads no socket and no clock.

A caller is what its verified client certificate says, else what its token stands for. Either way it gets that one
identity: `ImpersonatedIdentity` for another is refused, whoever asks. What is wrong goes to our log; the caller hears
only that it was refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

from hbone.errors import HboneError, IdentityError
from hbone.identity import SpiffeId
from miniistiod import tokens

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miniistiod.store import Redemption

__all__ = [
    "Authenticator",
    "BadNode",
    "Caller",
    "Node",
    "RateLimiter",
    "Refused",
    "TokenStore",
    "check_node",
    "parse_node_id",
]


class Refused(HboneError):
    """The caller is not believed. The message is for our log."""


@attrs.frozen(kw_only=True)
class Caller:
    """Somebody whose identity is known."""

    identity: SpiffeId
    how: str
    """`certificate`, `one-time token ID` or `reusable token ID`."""
    name: str | None = None
    """The WorkloadEntry that a one-time token is bound to."""
    enrolled: bool = False
    """A host that has just turned a one-time token into an identity."""

    @property
    def namespace(self) -> str:
        """The namespace of its identity."""
        return self.identity.namespace or ""

    @property
    def service_account(self) -> str:
        """The service account of its identity."""
        return self.identity.service_account or ""


class TokenStore(Protocol):
    """What is asked of the state."""

    trust_domain: str
    token_key: bytes

    def redeem(self, secret: str, key_sha256: str, now: float) -> Redemption:
        """Spend a one-time token."""
        ...

    def reusable(self, text: str, token: tokens.ReusableToken, now: float) -> str:
        """Why a reusable token is worthless; empty when it is good."""
        ...


class Authenticator:
    """Finds out who is asking."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store

    def for_stream(self, peer: SpiffeId | None, metadata: Iterable[tuple[str, str | bytes]], now: float) -> Caller:
        """Who opens a discovery stream: by certificate or reusable token.

        Raises:
            Refused: neither is good.
        """
        caller, token = self._certificate_or_token(peer, metadata)
        if caller is not None:
            return caller
        assert token is not None
        if tokens.split_secret(token) is not None:
            raise Refused("a one-time token was presented for discovery; it is good for the first certificate only")
        return self._reusable(token, now)

    def for_certificate(
        self, peer: SpiffeId | None, metadata: Iterable[tuple[str, str | bytes]], key_sha256: str, now: float
    ) -> Caller:
        """Who asks for a certificate: by certificate, reusable token, or a one-time token, which is spent by this.

        Raises:
            Refused: none of them is good.
        """
        caller, token = self._certificate_or_token(peer, metadata)
        if caller is not None:
            return caller
        assert token is not None
        if tokens.split_secret(token) is None:
            return self._reusable(token, now)
        redemption = self._store.redeem(token, key_sha256, now)
        record = redemption.token
        if record is None:
            raise Refused(redemption.reason)
        return Caller(
            identity=SpiffeId.istio(self._store.trust_domain, record.namespace, record.service_account),
            how=f"one-time token {record.id}",
            name=record.name,
            enrolled=True,
        )

    def _certificate_or_token(
        self, peer: SpiffeId | None, metadata: Iterable[tuple[str, str | bytes]]
    ) -> tuple[Caller | None, str | None]:
        if peer is not None:
            if peer.trust_domain != self._store.trust_domain or peer.namespace is None:
                raise Refused(f"the certificate is for {peer}, which is not a workload of {self._store.trust_domain}")
            return Caller(identity=peer, how="certificate"), None
        return None, _bearer(metadata)

    def _reusable(self, text: str, now: float) -> Caller:
        try:
            token = tokens.verify_reusable(text, self._store.token_key, self._store.trust_domain, now)
            identity = SpiffeId.istio(token.trust_domain, token.namespace, token.service_account)
        except (tokens.BadToken, IdentityError) as error:
            raise Refused(str(error)) from None
        if reason := self._store.reusable(text, token, now):
            raise Refused(reason)
        return Caller(identity=identity, how=f"reusable token {token.id}")


def _bearer(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    values = [value for name, value in metadata if name == "authorization"]
    if not values:
        raise Refused("neither a client certificate nor a token")
    if len(values) > 1:
        raise Refused(f"{len(values)} authorization headers")
    value = values[0]
    if not isinstance(value, str) or not value.startswith("Bearer ") or not value[7:].isascii():
        raise Refused("an authorization header without a bearer token")
    return value[7:]


@attrs.frozen(kw_only=True)
class Node:
    """What a client of discovery says of itself: hints, checked against who it is."""

    id: str
    kind: str
    name: str = ""
    namespace: str = ""
    service_account: str = ""
    node_name: str = ""


class BadNode(HboneError):
    """A node id that cannot be parsed; the message is for the caller."""


_KINDS = frozenset(("sidecar", "router", "waypoint", "ztunnel", "agentgateway"))


def parse_node_id(node_id: str, metadata: dict[str, str]) -> Node:
    """Take `type~ip~name.namespace~namespace.svc.domain` apart.

    Raises:
        BadNode: another form.

    Source: istiod's node id.
    """
    parts = node_id.split("~")
    if len(parts) != 4:
        raise BadNode(f"missing parts in the service node {node_id[:200]!r}")
    if parts[0] not in _KINDS:
        raise BadNode(f"invalid node type (valid types: ztunnel) in the service node {node_id[:200]!r}")
    return Node(
        id=node_id,
        kind=parts[0],
        name=metadata.get("NAME", ""),
        namespace=metadata.get("NAMESPACE") or parts[3].partition(".")[0],
        service_account=metadata.get("SERVICE_ACCOUNT", ""),
        node_name=metadata.get("NODE_NAME", ""),
    )


def check_node(node: Node, caller: Caller) -> None:
    """Does what a client says of itself fit who it is?

    Raises:
        Refused: it claims another namespace or service account.
    """
    if node.namespace != caller.namespace:
        raise Refused(f"the node claims the namespace {node.namespace!r:.100} and is {caller.identity}")
    if node.service_account and node.service_account != caller.service_account:
        raise Refused(f"the node claims the service account {node.service_account!r:.100} and is {caller.identity}")


class RateLimiter:
    """Token buckets by key; the table is bounded, the longest unused key is forgotten first."""

    def __init__(self, *, per_second: float, burst: int, keys: int = 10_000) -> None:
        self._per_second = per_second
        self._burst = burst
        self._keys = keys
        self._buckets: dict[str, tuple[float, float]] = {}

    def allow(self, key: str, now: float) -> bool:
        """Whether `key` may go on now; a call that may is counted."""
        level, since = self._buckets.pop(key, (float(self._burst), now))
        level = min(float(self._burst), level + max(0.0, now - since) * self._per_second)
        allowed = level >= 1.0
        self._buckets[key] = (level - 1.0 if allowed else level, now)
        if len(self._buckets) > self._keys:
            del self._buckets[next(iter(self._buckets))]
        return allowed
