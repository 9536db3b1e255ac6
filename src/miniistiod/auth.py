"""Who is asking, and which identity they may have. Decides; reads no socket and no clock.

A caller is what its verified client certificate says, else what its token stands for. What is wrong with either goes
to our log; the caller hears only that it was refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

from hbone.errors import HboneError, IdentityError
from hbone.identity import SpiffeId
from miniistiod import tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from miniistiod.store import IssuedCertificate, Redemption, TokenRecord
    from ztunnel.wire import discovery_pb2

__all__ = [
    "Authenticator",
    "BadNode",
    "Caller",
    "Node",
    "Presented",
    "RateLimiter",
    "Refused",
    "TokenStore",
    "Verifier",
    "check_node",
    "parse_node_id",
    "problem",
    "read_node",
]


class Refused(HboneError):
    """The caller is not believed. The message is for our log."""


@attrs.frozen(kw_only=True)
class Presented:
    """The client certificate that a caller showed, its chain verified."""

    identity: SpiffeId
    serial: str = ""
    """As the register has it."""
    not_before: float = 0.0
    """Seconds since 1970."""


@attrs.frozen(kw_only=True)
class Caller:
    """Somebody whose identity is known."""

    identity: SpiffeId
    how: str
    """`certificate`, `one-time token ID`, `reusable token ID` or `JWT of ISSUER`."""
    name: str | None = None
    """The workload that its one-time token named; its renewals keep it."""
    enrolled: bool = False
    """A host that has just turned a one-time token into an identity."""
    serial: str = ""
    """Of its certificate."""
    token: str = ""
    """Id of the token that it shows, or that its certificate goes back to."""
    node: str = ""
    """The node whose proxy it is; it may ask for the identities of the workloads there."""
    group: str = ""
    """The WorkloadGroup that its host registers in."""
    since: float = 0.0
    """When what it shows was made, as far as no list of ours says so; seconds since 1970."""

    @property
    def namespace(self) -> str:
        """The namespace of its identity."""
        return self.identity.namespace or ""

    @property
    def service_account(self) -> str:
        """The service account of its identity."""
        return self.identity.service_account or ""

    @property
    def kind(self) -> str:
        """`how` without what is told apart there; for metrics."""
        return self.how.partition(" of ")[0].removesuffix(f" {self.token}")


class TokenStore(Protocol):
    """What is asked of the state."""

    trust_domain: str
    token_key: bytes

    def redeem(self, secret: str, key_sha256: str | None, now: float) -> Redemption:
        """Spend a one-time token; without a key, look whether it could be."""
        ...

    def reusable(self, text: str, token: tokens.ReusableToken, now: float) -> str:
        """Why a reusable token is worthless; empty when it is good."""
        ...

    def token(self, token_id: str) -> TokenRecord | None:
        """A token by its id."""
        ...

    def certificate(self, serial: str) -> IssuedCertificate | None:
        """A certificate of the register."""
        ...

    def identity_revoked(self, spiffe_id: str) -> float | None:
        """When an identity was revoked."""
        ...


class Verifier(Protocol):
    """Knows tokens that others issue."""

    def verify(self, text: str, now: float) -> tuple[str, str, str, float]:
        """Issuer, namespace, service account and time of issue; raises `tokens.BadToken`."""
        ...


def problem(store: TokenStore, caller: Caller) -> str:
    """Why a caller that was believed is so no longer; empty while it is."""
    if caller.serial:
        record = store.certificate(caller.serial)
        if record is not None:
            return f"the certificate {caller.serial} is revoked" if record.revoked is not None else ""
    elif caller.token:
        token = store.token(caller.token)
        if token is None or token.revoked is not None:
            return f"the token {caller.token} is revoked"
        return ""
    at = store.identity_revoked(str(caller.identity))
    if at is not None and caller.since <= at:
        return f"{caller.identity} was revoked after what was presented for it was made"
    return ""


class Authenticator:
    """Finds out who is asking."""

    def __init__(self, store: TokenStore, issuers: Verifier | None = None) -> None:
        self._store = store
        self._issuers = issuers

    def for_stream(self, peer: Presented | None, metadata: Iterable[tuple[str, str | bytes]], now: float) -> Caller:
        """Who opens a discovery stream: by certificate, or a token that is good for more than one use.

        Raises:
            Refused: neither is good.
        """
        if peer is not None:
            return self._certificate(peer)
        token = _bearer(metadata)
        if tokens.split_secret(token) is not None:
            raise Refused("a one-time token was presented for discovery; it is good for the first certificate only")
        return self._lasting(token, now)

    def for_certificate(
        self, peer: Presented | None, metadata: Iterable[tuple[str, str | bytes]], key_sha256: str | None, now: float
    ) -> Caller:
        """Who asks for a certificate: by certificate, or a token; a one-time token is spent by this.

        Args:
            peer: the certificate that was shown.
            metadata: of the call.
            key_sha256: hash of the key that the certificate is for; None, before the request was judged, spends no
                token.
            now: seconds since 1970.

        Raises:
            Refused: none of them is good.
        """
        if peer is not None:
            return self._certificate(peer)
        token = _bearer(metadata)
        if tokens.split_secret(token) is None:
            return self._lasting(token, now)
        redemption = self._store.redeem(token, key_sha256, now)
        record = redemption.token
        if record is None:
            raise Refused(redemption.reason)
        return Caller(
            identity=SpiffeId.istio(self._store.trust_domain, record.namespace, record.service_account),
            how=f"one-time token {record.id}",
            name=record.name,
            enrolled=True,
            token=record.id,
            node=record.node,
            group=record.group,
        )

    def _certificate(self, peer: Presented) -> Caller:
        identity = peer.identity
        if identity.trust_domain != self._store.trust_domain or identity.namespace is None:
            raise Refused(f"the certificate is for {identity}, which is not a workload of {self._store.trust_domain}")
        record = self._store.certificate(peer.serial) if peer.serial else None
        if record is not None and record.spiffe_id != str(identity):
            raise Refused(f"the certificate {peer.serial} is for {identity}, and was issued for {record.spiffe_id}")
        caller = Caller(
            identity=identity,
            how="certificate",
            name=(record.name or None) if record is not None else None,
            serial=peer.serial,
            token=record.token if record is not None else "",
            node=record.node if record is not None else "",
            group=record.group if record is not None else "",
            since=peer.not_before,
        )
        if why := problem(self._store, caller):
            raise Refused(why)
        return caller

    def _lasting(self, text: str, now: float) -> Caller:
        if self._issuers is not None and not tokens.is_ours(text):
            return self._foreign(text, now)
        try:
            token = tokens.verify_reusable(text, self._store.token_key, self._store.trust_domain, now)
            identity = SpiffeId.istio(token.trust_domain, token.namespace, token.service_account)
        except (tokens.BadToken, IdentityError) as error:
            raise Refused(str(error)) from None
        if reason := self._store.reusable(text, token, now):
            raise Refused(reason)
        record = self._store.token(token.id)
        return Caller(
            identity=identity,
            how=f"reusable token {token.id}",
            token=token.id,
            node=record.node if record is not None else "",
            group=record.group if record is not None else "",
        )

    def _foreign(self, text: str, now: float) -> Caller:
        assert self._issuers is not None
        try:
            issuer, namespace, account, issued = self._issuers.verify(text, now)
            identity = SpiffeId.istio(self._store.trust_domain, namespace, account)
        except (tokens.BadToken, IdentityError) as error:
            raise Refused(str(error)) from None
        caller = Caller(identity=identity, how=f"JWT of {issuer}", since=issued)
        if why := problem(self._store, caller):
            raise Refused(why)
        return caller


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
    ip: str = ""
    addresses: tuple[str, ...] = ()
    network: str = ""
    locality: str = ""
    group: str = ""
    """The WorkloadGroup that it wants to be registered in."""
    labels: Mapping[str, str] = attrs.Factory(dict)


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
        ip=parts[1],
        name=metadata.get("NAME", ""),
        namespace=metadata.get("NAMESPACE") or parts[3].partition(".")[0],
        service_account=metadata.get("SERVICE_ACCOUNT", ""),
        node_name=metadata.get("NODE_NAME", ""),
    )


def read_node(message: discovery_pb2.Node) -> Node:
    """What the first request of a stream says of its sender.

    Raises:
        BadNode: the node id cannot be parsed.

    Source: istiod's node metadata (INSTANCE_IPS, NETWORK, LABELS, AUTO_REGISTER_GROUP).
    """
    fields = message.metadata.fields
    texts = {key: value.string_value for key, value in fields.items()}
    place = message.locality
    locality = "/".join((place.region, place.zone, place.sub_zone)).rstrip("/")
    labels = fields["LABELS"].struct_value.fields if "LABELS" in fields else {}
    return attrs.evolve(
        parse_node_id(message.id, texts),
        addresses=tuple(filter(None, (text.strip() for text in texts.get("INSTANCE_IPS", "").split(",")[:16]))),
        network=texts.get("NETWORK", ""),
        locality=locality if locality.count("/") <= 2 and len(locality) <= 253 else "",
        group=texts.get("AUTO_REGISTER_GROUP", ""),
        labels={key: value.string_value for key, value in labels.items() if value.HasField("string_value")},
    )


def check_node(node: Node, caller: Caller) -> None:
    """Does what a client says of itself fit who it is? It need not say anything: a stock ztunnel without POD_NAMESPACE.

    Raises:
        Refused: it claims another namespace or service account.
    """
    if node.namespace and node.namespace != caller.namespace:
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
