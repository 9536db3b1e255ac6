"""Who answers at an address: what it presents in TLS, and its first SETTINGS. No I/O.

Two looks. `Look()` has no certificate and checks nothing: it sends no request, only takes what a server shows to
everybody. `SettingsReader` reads the SETTINGS of a tunnel whose TLS an identity has made and checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from OpenSSL import SSL

from hbone.engine.frames import Setting
from hbone.errors import IdentityError, TlsError
from hbone.identity import SpiffeId

if TYPE_CHECKING:
    from cryptography import x509

__all__ = ["Look", "Presented", "read_settings", "spiffe_ids"]

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


def _name(code: int) -> str:
    try:
        return Setting(code).name
    except ValueError:
        return f"0x{code:x}"


def _reason(error: SSL.Error) -> str:
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][-1][-1])
    return str(error) or "the peer broke it off"
