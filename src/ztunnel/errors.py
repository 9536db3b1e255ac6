"""Why a connection was refused or ended: each error knows its CONNECT status, its response flag and its text.

The texts are the ones that operators and tools already match in ztunnel's access log.
"""

from __future__ import annotations

import enum
import functools
import http
from typing import TYPE_CHECKING, ClassVar

from hbone.enums import plain_members

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from hbone.identity import SpiffeId

__all__ = [
    "AddressMismatch",
    "CertificateRevoked",
    "ConnectFailed",
    "ConnectTimedOut",
    "DataplaneError",
    "Drained",
    "GatewayRefused",
    "Http2Failed",
    "IdentityUnavailable",
    "InvalidAuthority",
    "NoHealthyUpstream",
    "NoService",
    "PolicyChanged",
    "PolicyRejected",
    "ReceiveFailed",
    "RemoteNetwork",
    "ResolutionFailed",
    "ResponseFlag",
    "SelfCall",
    "SendFailed",
    "TlsFailed",
    "TlsSetupFailed",
    "TunnelRejected",
    "UnknownGateway",
    "UnknownLocalWorkload",
    "UnknownWaypoint",
    "UnusableDestination",
    "address_text",
    "unexpected_peer",
]


@plain_members
class ResponseFlag(enum.StrEnum):
    """Value of the metric label `response_flags`. Source: Istio, ztunnel's response flags."""

    NONE = "-"
    """It ended as it should, or the drain cut it."""
    DENY = "DENY"
    """Authorization refused it, at the start or after a change of policy."""
    CONNECT = "CONNECT"
    """The upstream could not be reached, or the copying failed."""
    TLS_FAILURE = "TLS_FAILURE"
    """TLS could not be set up."""
    H2_HANDSHAKE_FAILURE = "H2_HANDSHAKE_FAILURE"
    """HTTP/2 was broken by the peer, or never began."""
    NETWORK_POLICY = "NETWORK_POLICY"
    """TCP to an HBONE peer timed out."""
    IDENTITY_ERROR = "IDENTITY_ERROR"
    """Our own certificate could not be had."""
    CERT_REVOKED = "CERT_REVOKED"
    """A certificate revocation list names the peer's certificate."""


def address_text(address: tuple[IPv4Address | IPv6Address, int]) -> str:
    """`a.b.c.d:port` or `[v6]:port`, as authorities and logs write it."""
    ip, port = address
    text = _text(ip)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


_text = functools.lru_cache(maxsize=4096)(str)  # a connection writes the same few addresses several times


class DataplaneError(Exception):
    """Root of the family. `str()` is the text of the access log's `error`."""

    status: ClassVar[int] = 503
    """Status of the answer to CONNECT, where the error happens before the 200."""
    flag: ClassVar[ResponseFlag] = ResponseFlag.CONNECT
    """Response flag of the metrics."""
    failed: ClassVar[bool] = True
    """Whether the connection counts as failed."""


class SelfCall(DataplaneError):
    """The destination is one of our own listeners."""

    def __init__(self) -> None:
        super().__init__("attempted recursive call to ourselves")


class UnusableDestination(DataplaneError):
    """The destination address is none that the mesh may connect to, such as loopback or multicast."""

    status = 400

    def __init__(self, destination: tuple[IPv4Address | IPv6Address, int], why: str) -> None:
        super().__init__(f"destination {address_text(destination)} is refused: {why}")


class UnknownLocalWorkload(DataplaneError):
    """The control plane did not tell us about the workload that we serve."""

    def __init__(self, name: str, namespace: str, service_account: str) -> None:
        super().__init__(f"failed to fetch information about local workload: {service_account}.{namespace} ({name})")


class NoHealthyUpstream(DataplaneError):
    """A service is known, but no endpoint of it can be used."""

    def __init__(self, destination: tuple[IPv4Address | IPv6Address, int]) -> None:
        super().__init__(f"no healthy upstream: {address_text(destination)}")


class NoService(DataplaneError):
    """No service answers for the target, or it does not declare the port."""

    def __init__(self, target: tuple[IPv4Address | IPv6Address, int] | str) -> None:
        text = target if isinstance(target, str) else address_text(target)
        super().__init__(f"no service for target address: {text}")


class DiscoveryTooSlow(DataplaneError):
    """The control plane was asked what an address is, and did not say. Whether plaintext is right is not known."""

    def __init__(self, address: IPv4Address | IPv6Address, seconds: float) -> None:
        super().__init__(f"the control plane did not say within {seconds:g} s what {address} is")


class UnknownWaypoint(DataplaneError):
    """A waypoint is named, but neither a workload nor an endpoint of it is known. Never bypassed."""

    def __init__(self, waypoint: str) -> None:
        super().__init__(f"unknown waypoint: {waypoint}")


class RemoteNetwork(DataplaneError):
    """The destination is on another network, and the control plane names no gateway to there."""

    def __init__(self, destination: tuple[IPv4Address | IPv6Address, int], network: str) -> None:
        super().__init__(
            f"no valid destination: {address_text(destination)} is on network {network!r}, and no gateway to there"
            " is known"
        )


class UnknownGateway(DataplaneError):
    """A network's gateway is named, but neither a workload nor an endpoint of it is known."""

    def __init__(self, gateway: str, name: str = "") -> None:
        super().__init__(f"unknown network gateway: {gateway}")
        self.name = name
        """What it is called in discovery."""


class ResolutionFailed(DataplaneError):
    """The host name of a workload or of a SOCKS5 request has no usable address."""

    def __init__(self, hostname: str, why: str = "no addresses resolved") -> None:
        super().__init__(f"dns lookup of {hostname}: {why}")


class AddressMismatch(DataplaneError):
    """CONNECT asked for an address that is not the workload's."""

    status = 400

    def __init__(self, asked: IPv4Address | IPv6Address, local: IPv4Address | IPv6Address) -> None:
        super().__init__(f"ip mismatch: {asked} != {local}")


class InvalidAuthority(DataplaneError):
    """The `:authority` of a CONNECT cannot be read."""

    status = 400

    def __init__(self, authority: str) -> None:
        super().__init__(f"invalid CONNECT address {authority}")


class PolicyRejected(DataplaneError):
    """Authorization refused the connection."""

    status = 401
    flag = ResponseFlag.DENY

    def __init__(self, reason: str) -> None:
        super().__init__(f"connection closed due to policy rejection: {reason}")


class PolicyChanged(DataplaneError):
    """A change of policy closed a connection that lived."""

    status = 401
    flag = ResponseFlag.DENY

    def __init__(self) -> None:
        super().__init__("connection closed due to policy change")


class CertificateRevoked(DataplaneError):
    """The peer's certificate was revoked."""

    flag = ResponseFlag.CERT_REVOKED

    def __init__(self) -> None:
        super().__init__("connection closed: peer certificate revoked by CRL")


class Drained(DataplaneError):
    """The drain's deadline cut the connection. Logged as an error, but not counted as failed."""

    flag = ResponseFlag.NONE
    failed = False

    def __init__(self) -> None:
        super().__init__("connection closed due to connection drain")


class ConnectFailed(DataplaneError):
    """TCP to the upstream failed."""

    def __init__(self, why: str) -> None:
        super().__init__(f"connection failed: {why}")


class ConnectTimedOut(DataplaneError):
    """TCP to an HBONE peer timed out."""

    flag = ResponseFlag.NETWORK_POLICY

    def __init__(self, why: str) -> None:
        super().__init__(f"connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {why}")


class TunnelRejected(DataplaneError):
    """The peer answered CONNECT with another status than 200."""

    def __init__(self, http_status: int) -> None:
        try:
            phrase = f" {http.HTTPStatus(http_status).phrase}"
        except ValueError:
            phrase = " <unknown status code>"
        super().__init__(f"http status: {http_status}{phrase}")
        self.http_status = http_status


class GatewayRefused(TunnelRejected):
    """The gateway of a network answered CONNECT with another status than 200."""

    def __init__(self, http_status: int, gateway: tuple[IPv4Address | IPv6Address, int]) -> None:
        super().__init__(http_status)
        self.args = (f"{self}, from the network gateway {address_text(gateway)}",)


class IdentityUnavailable(DataplaneError):
    """Our own certificate could not be had from the CA."""

    flag = ResponseFlag.IDENTITY_ERROR

    def __init__(self, why: str) -> None:
        super().__init__(f"identity error: {why}")

    @staticmethod
    def because(error: Exception) -> DataplaneError:
        """What a source of certificates raised, as the end of a connection: its own errors are of many kinds."""
        return error if isinstance(error, DataplaneError) else IdentityUnavailable(str(error) or type(error).__name__)


class TlsFailed(DataplaneError):
    """The TLS handshake with a peer failed, or a record could not be read."""

    def __init__(self, why: str) -> None:
        super().__init__(f"tls error: {why}")


class PeerRevoked(TlsFailed):
    """The handshake with a peer was refused because its certificate was revoked."""

    flag = ResponseFlag.CERT_REVOKED


class TlsSetupFailed(DataplaneError):
    """TLS could not be configured from our certificate and roots."""

    flag = ResponseFlag.TLS_FAILURE

    def __init__(self, why: str) -> None:
        super().__init__(f"tls error: {why}")


class Http2Failed(DataplaneError):
    """The peer broke HTTP/2 on the tunnel, or reset the stream."""

    flag = ResponseFlag.H2_HANDSHAKE_FAILURE

    def __init__(self, why: str) -> None:
        super().__init__(f"h2 failed: {why}")


class SendFailed(DataplaneError):
    """Copying from the downstream peer to the upstream failed."""

    def __init__(self, why: str) -> None:
        super().__init__(f"send: {why}")


class ReceiveFailed(DataplaneError):
    """Copying from the upstream to the downstream peer failed."""

    def __init__(self, why: str) -> None:
        super().__init__(f"receive: {why}")


def unexpected_peer(peer: SpiffeId, expected: frozenset[SpiffeId]) -> TlsFailed:
    """The error for a server that proves another identity than the route expects."""
    wanted = ", ".join(sorted(map(str, expected))) or "none"
    return TlsFailed(f"identity verification error: peer did not present the expected SAN ({wanted}), got {peer}")
