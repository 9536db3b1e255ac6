"""TLS ends in memory: joined, raw ones of pyOpenSSL's, and one whose records a test writes byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL, crypto

from hbone.errors import TlsError
from hbone.tls import IoBuffer, TlsConnection

if TYPE_CHECKING:
    from cryptography import x509

    from hbone.identity import Identity

__all__ = ["RawClient", "exchange", "join", "raw_context", "read", "take"]

_BUFFER = IoBuffer(256 * 1024)

APPLICATION_DATA = 23
HANDSHAKE = 22


def take(tls: TlsConnection) -> bytes:
    """The ciphertext that `tls` has to send."""
    parts = []
    while nbytes := tls.data_to_send_into(_BUFFER):
        parts.append(bytes(_BUFFER.view[:nbytes]))
    return b"".join(parts)


def read(tls: TlsConnection) -> bytes:
    """The plaintext that `tls` can give now."""
    parts = []
    while nbytes := tls.read_into(_BUFFER, 0, _BUFFER.size):
        parts.append(bytes(_BUFFER.view[:nbytes]))
    return b"".join(parts)


def join(client: TlsConnection, server: TlsConnection) -> tuple[BaseException | None, BaseException | None]:
    """Shake hands; the error of each end, or None. A client's includes what its first read tells."""
    errors: dict[TlsConnection, BaseException] = {}
    for _ in range(8):
        moved = False
        for one, other in ((client, server), (server, client)):
            if one not in errors:
                try:
                    one.handshake()
                except Exception as error:
                    errors[one] = error
            data = take(one)
            moved = moved or bool(data)
            other.receive_data(data)
        if not moved:
            break
    if client not in errors:
        try:
            assert read(client) == b""
        except TlsError as error:
            errors[client] = error
    return errors.get(client), errors.get(server)


def exchange(one: TlsConnection, other: TlsConnection, data: bytes) -> bytes:
    """Send `data` from one end to the other; what arrives."""
    one.write(data)
    other.receive_data(take(one))
    return read(other)


def raw_context(
    identity: Identity | None = None, roots: tuple[x509.Certificate, ...] = (), *, alpn: list[bytes] | None = None
) -> SSL.Context:
    """A context of pyOpenSSL's that checks nothing, allows everything, and keeps sessions."""
    context = SSL.Context(SSL.TLS_METHOD)
    if identity is not None:
        context.use_certificate(identity.svid.chain[0])
        context.use_privatekey(identity.svid.key)
        for certificate in identity.svid.chain[1:]:
            context.add_extra_chain_cert(certificate)
    store = context.get_cert_store()
    assert store is not None
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    if alpn:
        context.set_alpn_protos(alpn)
    return context


class RawClient:
    """A client of pyOpenSSL's, which after the handshake can send records that no library would.

    Source: RFC 8446 §5.2, §7.1 to §7.3.
    """

    def __init__(self, context: SSL.Context, server: TlsConnection | None = None, session: Any = None) -> None:
        self.secret = b""
        context.set_keylog_callback(self._keep)
        # One hash and one key size are enough here.
        context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
        self.connection = SSL.Connection(context, None)
        self.connection.set_connect_state()
        if session is not None:
            self.connection.set_session(session)
        self.sequence = 0
        self.server = server

    def _keep(self, _: SSL.Connection, line: bytes) -> None:
        label, _random, secret = line.split(b" ")
        if label == b"CLIENT_TRAFFIC_SECRET_0":
            self.secret = bytes.fromhex(secret.decode())

    def output(self) -> bytes:
        parts = []
        while True:
            try:
                parts.append(self.connection.bio_read(65536))
            except SSL.WantReadError:
                return b"".join(parts)

    def join(self, server: TlsConnection) -> None:
        """Shake hands with `server`.

        Raises:
            TlsError: the server refuses.
            SSL.Error: the client does.
        """
        self.server = server
        done = [False, False]
        for _ in range(8):
            if not done[0]:
                try:
                    self.connection.do_handshake()
                    done[0] = True
                except SSL.WantReadError:
                    pass
            server.receive_data(self.output())
            try:
                done[1] = server.handshake()
            finally:
                data = take(server)
                if data:
                    self.connection.bio_write(data)
            if all(done):
                return
        raise AssertionError("the handshake did not end")

    def _expand(self, label: bytes, length: int) -> bytes:
        info = length.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\x00"
        return HKDFExpand(hashes.SHA256(), length, info).derive(self.secret)

    def record(self, content: bytes, kind: int = APPLICATION_DATA, padding: int = 0) -> bytes:
        """One encrypted record."""
        inner = content + bytes([kind]) + bytes(padding)
        header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        nonce = (int.from_bytes(self._expand(b"iv", 12), "big") ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return header + AESGCM(self._expand(b"key", 16)).encrypt(nonce, inner, header)

    def key_update(self, *, requested: bool = False) -> bytes:
        """A KeyUpdate record; the following records use the next key. Source: RFC 8446 §4.6.3."""
        record = self.record(b"\x18\x00\x00\x01" + bytes([requested]), HANDSHAKE)
        self.secret = self._expand(b"traffic upd", 32)
        self.sequence = 0
        return record
