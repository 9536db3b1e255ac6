from __future__ import annotations

import pytest
from tests.support.mesh import at, hbone

from ztunnel import errors
from ztunnel.errors import DataplaneError, ResponseFlag
from ztunnel.mesh import parse_ip

A = at("10.0.0.1:80")


@pytest.mark.parametrize(
    ("error", "status", "flag", "text"),
    [
        (errors.PolicyRejected("x"), 401, "DENY", "connection closed due to policy rejection: x"),
        (errors.PolicyChanged(), 401, "DENY", "connection closed due to policy change"),
        (errors.CertificateRevoked(), 503, "CERT_REVOKED", "connection closed: peer certificate revoked by CRL"),
        (errors.Drained(), 503, "-", "connection closed due to connection drain"),
        (
            errors.ConnectTimedOut("x"),
            503,
            "NETWORK_POLICY",
            "connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: x",
        ),
        (errors.TunnelRejected(503), 503, "CONNECT", "http status: 503 Service Unavailable"),
        (errors.TunnelRejected(401), 503, "CONNECT", "http status: 401 Unauthorized"),
        (errors.TunnelRejected(799), 503, "CONNECT", "http status: 799 <unknown status code>"),
        (errors.AddressMismatch(A[0], parse_ip("::1")), 400, "CONNECT", "ip mismatch: 10.0.0.1 != ::1"),
        (errors.SelfCall(), 503, "CONNECT", "attempted recursive call to ourselves"),
        (errors.NoHealthyUpstream(A), 503, "CONNECT", "no healthy upstream: 10.0.0.1:80"),
        (errors.NoService(at("[::1]:80")), 503, "CONNECT", "no service for target address: [::1]:80"),
        (errors.UnknownWaypoint("x"), 503, "CONNECT", "unknown waypoint: x"),
        (
            errors.UnknownLocalWorkload("web-0", "shop", "web"),
            503,
            "CONNECT",
            "failed to fetch information about local workload: web.shop (web-0)",
        ),
        (errors.ConnectFailed("x"), 503, "CONNECT", "connection failed: x"),
        (errors.InvalidAuthority("x"), 400, "CONNECT", "invalid CONNECT address x"),
        (errors.IdentityUnavailable("x"), 503, "IDENTITY_ERROR", "identity error: x"),
        (errors.TlsFailed("x"), 503, "CONNECT", "tls error: x"),
        (errors.TlsSetupFailed("x"), 503, "TLS_FAILURE", "tls error: x"),
        (errors.Http2Failed("x"), 503, "H2_HANDSHAKE_FAILURE", "h2 failed: x"),
        (errors.SendFailed("x"), 503, "CONNECT", "send: x"),
        (errors.ReceiveFailed("x"), 503, "CONNECT", "receive: x"),
    ],
)
def test_status_flag_and_text(error: DataplaneError, status: int, flag: str, text: str) -> None:
    assert (error.status, error.flag, str(error)) == (status, ResponseFlag(flag), text)


def test_only_a_drained_connection_does_not_count_as_failed() -> None:
    assert [kind for kind in DataplaneError.__subclasses__() if not kind.failed] == [errors.Drained]


def test_unexpected_peer_names_both_sides() -> None:
    web, other = hbone("web").identity, hbone("other").identity
    text = str(errors.unexpected_peer(other, frozenset({web})))
    assert str(web) in text
    assert str(other) in text
