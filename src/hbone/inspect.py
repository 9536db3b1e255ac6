"""Who answers at an address: what it presents in TLS, its first SETTINGS, and how that is told. No I/O.

Two looks. `Look()` has no certificate and checks nothing: it sends no request, only takes what a server shows to
everybody. `SettingsReader` reads the SETTINGS of a tunnel whose TLS an identity has made and checked.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import attrs
from OpenSSL import SSL

from hbone.commandline import printable
from hbone.engine.frames import Setting
from hbone.errors import IdentityError, TlsError
from hbone.identity import SpiffeId

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Look", "Presented", "read_settings", "report_of", "spiffe_ids", "told"]

_MAX = 64 * 1024
_SETTINGS = 4


@attrs.frozen(kw_only=True)
class Presented:
    """What a server shows to everybody."""

    chain: tuple[x509.Certificate, ...]
    version: str
    cipher: str
    group: str
    alpn: str | None


class Look:
    """The client's half of a handshake that checks nothing, for looking only."""

    def __init__(self) -> None:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        context.set_verify(SSL.VERIFY_NONE)
        context.set_alpn_protos([b"h2"])
        self._connection = SSL.Connection(context, None)
        self._connection.set_connect_state()
        self.presented: Presented | None = None
        """Set once the server has shown it."""
        self._shake_hands()

    def receive_data(self, data: bytes) -> None:
        """Take what the server sent.

        Raises:
            TlsError: it does not speak TLS, or refuses us before it shows anything.
        """
        self._connection.bio_write(data)
        self._shake_hands()

    def data_to_send(self) -> bytes:
        """What to send to the server."""
        try:
            return self._connection.bio_read(_MAX)
        except SSL.WantReadError:
            return b""

    def _shake_hands(self) -> None:
        connection = self._connection
        try:
            connection.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            chain = connection.get_peer_cert_chain(as_cryptography=True)
            if not chain:
                raise TlsError(f"the TLS handshake failed: {_reason(error)}") from None
        chain = connection.get_peer_cert_chain(as_cryptography=True) or []
        alpn = connection.get_alpn_proto_negotiated().decode("ascii", "replace")
        self.presented = Presented(
            chain=tuple(chain),
            version=connection.get_protocol_version_name(),
            cipher=connection.get_cipher_name() or "",
            group=connection.get_group_name() or "",
            alpn=alpn or None,
        )


def spiffe_ids(certificate: x509.Certificate) -> list[str]:
    """The URI names of a certificate that are SPIFFE IDs by the letter; whether it is an SVID is not checked."""
    from cryptography import x509 as x

    try:
        names = certificate.extensions.get_extension_for_class(x.SubjectAlternativeName).value
    except (x.ExtensionNotFound, ValueError):
        return []
    found: list[str] = []
    for uri in names.get_values_for_type(x.UniformResourceIdentifier):
        try:
            found.append(str(SpiffeId.parse(uri)))
        except IdentityError:
            continue
    return found


def read_settings(data: bytes | bytearray) -> dict[str, int] | None:
    """The settings of a server's first frame, by name; None while it is not complete.

    Raises:
        TlsError: the first frame is another one.

    Source: RFC 9113 §3.4, §6.5.
    """
    if len(data) < 9:
        return None
    length = int.from_bytes(data[:3], "big")
    if data[3] != _SETTINGS or length % 6 or length > 6 * 64:
        raise TlsError("the peer's first frame is not SETTINGS; it does not speak HTTP/2 here")
    if len(data) < 9 + length:
        return None
    settings: dict[str, int] = {}
    for start in range(9, 9 + length, 6):
        code = int.from_bytes(data[start : start + 2], "big")
        settings[_name(code)] = int.from_bytes(data[start + 2 : start + 6], "big")
    return settings


def report_of(
    address: tuple[str, int],
    presented: Presented,
    verified: bool | None,
    problem: str | None,
    settings: dict[str, int] | None,
) -> dict[str, Any]:
    """What was found at an address, for programs. `verified` is None where nothing was checked."""
    ids = spiffe_ids(presented.chain[0]) if presented.chain else []
    return {
        "address": f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}",
        "tls": {"version": presented.version, "cipher": presented.cipher, "group": presented.group},
        "alpn": presented.alpn,
        "spiffe_id": ids[0] if len(ids) == 1 else None,
        "verified": verified,
        "problem": problem,
        "chain": [_certificate(each) for each in presented.chain],
        "settings": settings,
    }


def _certificate(certificate: x509.Certificate) -> dict[str, Any]:
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial": f"{certificate.serial_number:x}",
        "spiffe_ids": spiffe_ids(certificate),
        "not_before": f"{certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
        "not_after": f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "expired": certificate.not_valid_after_utc <= datetime.datetime.now(datetime.UTC),
    }


def told(report: dict[str, Any]) -> list[str]:
    """A report in lines for people."""
    tls = report["tls"]
    verified = {None: "not checked: no certificate given", True: "yes", False: f"no: {report['problem']}"}
    lines = [
        report["address"],
        f"  TLS       {tls['version']}, {tls['cipher']}, {tls['group']}",
        f"  ALPN      {report['alpn'] or 'none; a tunnel needs h2'}",
        f"  identity  {report['spiffe_id'] or 'no SPIFFE ID'}",
        f"  verified  {verified[report['verified']]}",
    ]
    for number, each in enumerate(report["chain"], 1):
        subject = each["subject"] or ", ".join(each["spiffe_ids"]) or "no subject"
        until = f"{'expired' if each['expired'] else 'valid until'} {each['not_after']}"
        lines.append(f"  chain {number}   {subject}, by {each['issuer']}, serial {each['serial']}, {until}")
    if report["settings"] is not None:
        lines.append("  SETTINGS  " + ", ".join(f"{name} {value}" for name, value in report["settings"].items()))
    return [printable(line) for line in lines]  # the names in a certificate are the other end's own


def _name(code: int) -> str:
    try:
        return Setting(code).name
    except ValueError:
        return f"0x{code:x}"


def _reason(error: SSL.Error) -> str:
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][-1][-1])
    return str(error) or "the peer broke it off"
