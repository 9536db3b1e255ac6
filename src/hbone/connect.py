"""CONNECT requests: header fields to `ConnectRequest` and back. One strict parser; what it accepts has one meaning.

The method and `:authority` decide where bytes go, so any oddity there is `BadConnect`. The other fields (`baggage`,
`forwarded`, `traceparent`, `x-forwarded-network`) are telemetry: a malformed one is as good as absent, and none of
them may ever decide whether a connection is allowed.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
from typing import TYPE_CHECKING, Final

import attrs

from hbone.errors import HboneError
from hbone.fields import malformed_value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.events import Headers

__all__ = [
    "Authority",
    "AuthorityError",
    "BadConnect",
    "Baggage",
    "ConnectRequest",
    "new_traceparent",
    "response_headers",
]

MAX_AUTHORITY: Final = 253 + 1 + 5
"""Bytes of `:authority`: a DNS name, a colon and a port."""
MAX_BAGGAGE: Final = 8192
"""Bytes of all `baggage` fields together; more is ignored."""
MAX_TELEMETRY: Final = 1024
"""Bytes of `forwarded` and of `x-forwarded-network`; more is ignored."""

_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_IPV4: Final = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}")
_IPV6: Final = re.compile(r"[0-9a-fA-F:]{2,39}")
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_NAME: Final = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+")
_VISIBLE: Final = re.compile(rb"[\t\x20-\x7e]*")
_TRACEPARENT: Final = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_FORWARDED_VALUE: Final = re.compile(r"[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]+")  # visible, but none of " , ; \
_FORWARDED_FOR: Final = re.compile(rb'for="([0-9a-f.:\[\]]+)"')  # as it mostly is: an address alone
_BAGGAGE_VALUE: Final = re.compile(r"[\x21-\x2b\x2d-\x3c\x3e-\x7e]+")  # visible, but neither , nor =
_REFUSED: Final = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""Fields that have no place in a CONNECT over HTTP/2. Source: RFC 9113 §8.2.2, §8.5; RFC 9110 §9.3.6."""
_REPEATED: Final = b"\n"
"""In place of values that contradict each other: no value is this, so nobody believes it."""


class AuthorityError(HboneError, ValueError):
    """Text that is not `address:port`, `[address]:port` or `name:port`."""


class BadConnect(HboneError):
    """A request that is not a well-formed CONNECT; answer it with `status`."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(f"malformed CONNECT: {reason}")
        self.reason = reason
        self.status = status


def _shown(text: str | bytes) -> str:
    shown = repr(text[:100]) if isinstance(text, str) else repr(bytes(text[:100]))[1:]
    return shown if len(text) <= 100 else shown + " (cut)"


def _parse_host(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that `host` is, without brackets; None for a DNS name.

    Raises:
        AuthorityError: neither.
    """
    if _IPV4.fullmatch(host):
        try:
            return ipaddress.IPv4Address(host)
        except ValueError as error:
            raise AuthorityError(f"{_shown(host)} is not an IPv4 address of four decimal parts up to 255") from error
    if ":" in host:
        if not _IPV6.fullmatch(host):
            raise AuthorityError(f"{_shown(host)} is not an IPv6 address; zones and dotted parts are not allowed")
        try:
            address = ipaddress.IPv6Address(host)
        except ValueError as error:
            raise AuthorityError(f"{_shown(host)} is not an IPv6 address") from error
        if address.ipv4_mapped is not None:
            raise AuthorityError(f"{_shown(host)} is an IPv4 address in IPv6 form; write {address.ipv4_mapped}")
        return address
    if len(host) > 253:
        raise AuthorityError(f"the name {_shown(host)} has {len(host)} characters; at most 253 are allowed")
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise AuthorityError(
            f"{_shown(host)} is neither an IPv4 address, nor an IPv6 address in brackets, nor a DNS name in lower case"
        )
    if _NUMBER.fullmatch(labels[-1]):
        # Some readers take 2130706433, 0x7f.1 and 127.1 for addresses.
        raise AuthorityError(f"{_shown(host)} ends in a number and is not an IPv4 address of four decimal parts")
    return None


@attrs.frozen(cache_hash=True)
class Authority:
    """Where a CONNECT leads to.

    Raises:
        AuthorityError: host or port is malformed.

    Source: RFC 9113 §8.5; RFC 3986 §3.2, without user information, percent-encoding and empty ports.
    """

    host: str
    """An address without brackets, or a DNS name in lower case."""
    port: int
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    """The address; None for a DNS name. Follows from `host`."""

    def __attrs_post_init__(self) -> None:
        ip = _parse_host(self.host)
        if not 1 <= self.port <= 65535:
            raise AuthorityError(f"port {self.port} is not from 1 to 65535")
        if self.ip is not None and self.ip != ip:
            raise AuthorityError(f"the address {self.ip} is not that of {_shown(self.host)}")
        object.__setattr__(self, "ip", ip)
        if ip is not None:
            object.__setattr__(self, "host", str(ip))

    @staticmethod
    def parse(text: str | bytes) -> Authority:
        """The authority that `text` spells: `10.0.0.7:8080`, `[fd00::7]:8080` or `orders.shop.svc:80`.

        Raises:
            AuthorityError: another form. The port is required, decimal, without a leading zero.
        """
        return _parse_authority(text)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@functools.lru_cache(maxsize=4096)
def _parse_authority(text: str | bytes) -> Authority:
    if isinstance(text, bytes):
        try:
            text = text.decode("ascii")
        except UnicodeDecodeError as error:
            raise AuthorityError(f"the authority {_shown(text)} is not ASCII") from error
    if len(text) > MAX_AUTHORITY:
        raise AuthorityError(f"the authority {_shown(text)} has {len(text)} characters; the limit is {MAX_AUTHORITY}")
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
        raise AuthorityError(f"the authority {_shown(text)} has no port from 1 to 65535; write it as host:port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise AuthorityError(f"the authority {_shown(text)} has brackets around what is no IPv6 address")
    elif ":" in host:
        raise AuthorityError(f"the authority {_shown(text)} has two ports, or an IPv6 address without brackets")
    return Authority(host, int(port))


_WORKLOAD_TYPES: Final = {f"k8s.{kind}.name": kind for kind in ("deployment", "cronjob", "pod", "job")}
_BAGGAGE_FIELDS: Final = {
    "k8s.cluster.name": "cluster",
    "k8s.namespace.name": "namespace",
    "service.name": "service_name",
    "service.version": "service_version",
    "cloud.region": "region",
    "cloud.availability_zone": "zone",
}


@attrs.frozen(kw_only=True, cache_hash=True)
class Baggage:
    """What a workload says of itself. Telemetry: anyone can write anything here.

    Source: ztunnel's `baggage` field.
    """

    cluster: str | None = None
    namespace: str | None = None
    workload_type: str | None = None
    """`deployment`, `cronjob`, `pod` or `job`."""
    workload_name: str | None = None
    service_name: str | None = None
    """The canonical service."""
    service_version: str | None = None
    """The canonical revision."""
    region: str | None = None
    zone: str | None = None

    @classmethod
    def parse(cls, fields: Iterable[bytes]) -> Baggage | None:
        """What all `baggage` fields of a message say together; None when that cannot be trusted to be text.

        Members without `=` and unknown keys are passed over, a later member wins over an earlier one, and an empty
        value takes it back. Nothing is trimmed or unescaped.
        """
        return _parse_baggage(tuple(fields))

    def __str__(self) -> str:
        kind = self.workload_type or "deployment"
        members = (
            ("k8s.cluster.name", self.cluster),
            ("k8s.namespace.name", self.namespace),
            (f"k8s.{kind}.name", self.workload_name),
            ("service.name", self.service_name),
            ("service.version", self.service_version),
            ("cloud.region", self.region),
            ("cloud.availability_zone", self.zone),
        )
        # There is no escaping: a value that would read as something else is left out.
        return ",".join(
            f"{key}={value}" for key, value in members if value and _BAGGAGE_VALUE.fullmatch(value) and "=" not in key
        )


@functools.lru_cache(maxsize=1024)
def _baggage_field(baggage: Baggage | None) -> tuple[bytes, bytes]:
    return (b"baggage", b"" if baggage is None else str(baggage).encode("ascii"))


@functools.lru_cache(maxsize=1024)
def _parse_baggage(fields: tuple[bytes, ...]) -> Baggage | None:
    if sum(map(len, fields)) > MAX_BAGGAGE or not all(_VISIBLE.fullmatch(field) for field in fields):
        return None
    found: dict[str, str | None] = {}
    for field in fields:
        for member in field.decode("ascii").split(","):
            parts = member.split("=")
            if len(parts) < 2:
                continue
            value = parts[1] or None
            kind = _WORKLOAD_TYPES.get(parts[0])
            if kind is not None:
                found["workload_name"] = value
                found["workload_type"] = kind if value else None
            elif (name := _BAGGAGE_FIELDS.get(parts[0])) is not None:
                found[name] = value
    return Baggage(**found)


def new_traceparent() -> str:
    """A random `traceparent`, unsampled: one for each connection of an application. Source: W3C Trace Context 3.2."""
    ids = os.urandom(24).hex()
    return f"00-{ids[:32]}-{ids[32:]}-00"


def _is_believed(value: bytes) -> bool:
    return len(value) <= MAX_TELEMETRY and _VISIBLE.fullmatch(value) is not None


def _forwarded(field: bytes | None) -> tuple[str | None, str | None]:
    """`for=` and `host=` of a `forwarded` field, each without its quotes. Source: RFC 7239 §4; ztunnel's subset."""
    if field is None or len(field) > MAX_TELEMETRY:
        return None, None
    if alone := _FORWARDED_FOR.fullmatch(field):
        return alone[1].decode("ascii"), None
    if not _is_believed(field):
        return None, None
    found: dict[str, str] = {}
    for part in field.decode("ascii").split(";"):
        key, equals, value = part.strip().partition("=")
        if equals and key in ("for", "host") and key not in found:
            quoted = len(value) > 1 and value[0] == value[-1] == '"'
            found[key] = value[1:-1] if quoted else value
    return _clean(found.get("for")), _clean(found.get("host"))


def _clean(value: str | None) -> str | None:
    return value if value is not None and _FORWARDED_VALUE.fullmatch(value) else None


@attrs.frozen(kw_only=True, slots=False)  # slots would double what it takes to make one
class ConnectRequest:
    """One CONNECT: where to, and what the client says about it."""

    authority: Authority
    baggage: Baggage | None = None
    """The source workload, by its own words."""
    forwarded_for: str | None = None
    """`address:port` of the application behind the client; an IPv6 address in brackets."""
    forwarded_host: str | None = None
    """The service that the application meant."""
    traceparent: str | None = None
    network: str | None = None
    """`x-forwarded-network`: the network that a gateway forwards from. Double HBONE only."""

    @classmethod
    def from_headers(cls, headers: Headers) -> ConnectRequest:
        """The request that a header list makes.

        Raises:
            BadConnect: not exactly one `:method` CONNECT and one well-formed `:authority`; another pseudo-header; a
                pseudo-header after another field; a malformed name or value; a Host of another value; a field that
                frames a body, or belongs to a connection.

        Source: RFC 9113 §8.2, §8.3, §8.5; ztunnel's request parsing.
        """
        faulty = malformed_value(headers)
        if faulty is not None:
            raise BadConnect(f"the value of {_shown(faulty)} holds NUL, CR or LF, or begins or ends with a space")
        method: bytes | None = None
        authority: bytes | None = None
        host: bytes | None = None
        members: tuple[bytes, ...] = ()  # all of baggage counts; of the other telemetry, nothing that is repeated
        forwarded: bytes | None = None
        traceparent: bytes | None = None
        network: bytes | None = None
        regular = False
        for name, value in headers:
            if name[:1] == b":":
                if regular:
                    raise BadConnect(f"the pseudo-header {_shown(name)} stands after another field")
                if name == b":method" and method is None:
                    method = value
                elif name == b":authority" and authority is None:
                    authority = value
                else:
                    raise BadConnect(f"the pseudo-header {_shown(name)} is repeated, or has no place here")
                continue
            regular = True
            if name == b"baggage":
                members += (value,)
            elif name == b"forwarded":
                forwarded = value if forwarded is None else _REPEATED
            elif name == b"traceparent":
                traceparent = value if traceparent is None else _REPEATED
            elif name == b"x-forwarded-network":
                network = value if network is None else _REPEATED
            elif not _NAME.fullmatch(name):
                raise BadConnect(f"the field name {_shown(name)} is malformed; only a token in lower case is allowed")
            elif name in _REFUSED:
                raise BadConnect(f"the field {_shown(name)} has no place in a CONNECT over HTTP/2")
            elif name == b"host":
                if host is not None:
                    raise BadConnect("the field 'host' is repeated")
                host = value
        if method != b"CONNECT":
            raise BadConnect(f"the method is {_shown(method)}, not CONNECT" if method else "there is no :method")
        if authority is None:
            raise BadConnect("there is no :authority")
        if host is not None and host != authority:
            raise BadConnect(f"the field 'host' is {_shown(host)} and differs from :authority")
        try:
            where = _parse_authority(authority)
        except AuthorityError as error:
            raise BadConnect(str(error)) from error
        forwarded_for, forwarded_host = _forwarded(forwarded)
        return cls(
            authority=where,
            baggage=_parse_baggage(members) if members else None,
            forwarded_for=forwarded_for,
            forwarded_host=forwarded_host,
            traceparent=traceparent.decode() if traceparent and _TRACEPARENT.fullmatch(traceparent) else None,
            network=None if network is None or not _is_believed(network) else network.decode(),
        )

    def to_headers(self) -> Headers:
        """The header list of this request, in ztunnel's order: baggage always, the others where there is a value.

        A value that would read as something else, or not at all, is left out.
        """
        headers = [
            (b":method", b"CONNECT"),
            (b":authority", str(self.authority).encode("ascii")),
            _baggage_field(self.baggage),
        ]
        forwarded = []
        if self.forwarded_for is not None and _FORWARDED_VALUE.fullmatch(self.forwarded_for):
            forwarded.append(f'for="{self.forwarded_for}"')
        if self.forwarded_host is not None and _FORWARDED_VALUE.fullmatch(self.forwarded_host):
            forwarded.append(f"host={self.forwarded_host}")
        if forwarded:
            headers.append((b"forwarded", ";".join(forwarded).encode("ascii")))
        if self.traceparent is not None and self.traceparent.isascii():
            traceparent = self.traceparent.encode("ascii")
            if _TRACEPARENT.fullmatch(traceparent):
                headers.append((b"traceparent", traceparent))
        if self.network is not None and self.network.isascii():
            network = self.network.encode("ascii")
            if _VISIBLE.fullmatch(network) and network == network.strip():
                headers.append((b"x-forwarded-network", network))
        return tuple(headers)

    def is_from_gateway(self, network: str) -> bool:
        """Did a gateway of another network than `network`, ours, send this? Telemetry, as all of it."""
        return self.network is not None and self.network.lower() != network.lower()


def response_headers(baggage: Baggage | None = None) -> Headers:
    """What a 200 carries beside `:status`: the destination's baggage, where it is known."""
    return () if baggage is None else (_baggage_field(baggage),)
