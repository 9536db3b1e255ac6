"""TLS 1.3 over memory buffers: ciphertext in, plaintext out, and back. No sockets.

The data path calls OpenSSL's `SSL_read`, `SSL_write`, `BIO_read` and `BIO_write` on reused buffers: no exception for
each WANT_READ, no object and no copy for each record.

A long file, because the same connection by pyOpenSSL's public methods alone stands beside it, and may take its place.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

from OpenSSL import SSL

from hbone.errors import ConfigurationError, PeerIdentityError, PeerRevokedError, TlsError
from hbone.openssl import (
    DIRECT,
    NOWHERE,
    IoBuffer,
    drain_error_queue,
    ffi,
    lend,
    lib,
    peer_certificates,
    pending,
    pointer,
    put,
    read_records,
    take,
    write_records,
    write_small,
)
from hbone.tlscontext import NoSharedProtocol, TlsContext, reason_of
from hbone.tlspeer import ON_INFO, PeerCheck

if TYPE_CHECKING:
    from cryptography import x509

    from hbone.identity.spiffe import SpiffeId
    from hbone.tlspeer import Authorize, Peer

__all__ = ["MAX_READS_WITHOUT_DATA", "IoBuffer", "TlsConnection", "TlsContext"]

MAX_READS_WITHOUT_DATA: Final = 50
"""Records in a row that carry no data (KeyUpdate, tickets, empty ones) at which the connection is cut."""

_RECORD_HEADER: Final = 5
_MAX_WRITE: Final = 1 << 30
_SMALL_WRITE: Final = 1 << 14
_BULK: Final = 1 << 13  # ciphertext from here on has a buffer kept to read it into
_LENT: Final = 1 << 15  # and from here on is read where it stands

_ABOUT_CERTIFICATES: Final = (
    "bad certificate",
    "unsupported certificate",
    "certificate revoked",
    "certificate expired",
    "certificate unknown",
    "certificate required",
    "unknown ca",
    "access denied",
)

_PEEKED: Final[Any] = ffi.new("char[1]") if DIRECT else None


def _shared(name: str | None) -> str | None:
    return None if name is None else sys.intern(name)


class TlsConnection:
    """One TLS connection.

    ```text
    tls.receive_data(ciphertext)            # at most 256 KiB, then read all of it
    tls.handshake()                         # until True
    while n := tls.read_into(buffer, 0, buffer.size): ...
    tls.write(plaintext)
    while n := tls.data_to_send_into(buffer): ...   # ciphertext to send; after a TlsError too: that is the alert
    ```

    Not for two threads at once.

    Args:
        context: certificate, roots and parameters.
        server: which end this is; must be the context's.
        authorize: says whether the verified peer may go on. Asked during the handshake, so that a peer who may not
            is told by an alert.
    """

    __slots__ = (
        "__weakref__",
        "_check",
        "_connection",
        "_done",
        "_failure",
        "_into",
        "_keeps_buffer",
        "_lent",
        "_out",
        "_peer",
        "_shut",
        "_ssl",
        "alpn",
        "cipher",
        "closed_by_peer",
        "context",
        "group",
        "lost",
        "peer_chain",
        "peer_id",
        "peer_root",
    )

    def __init__(self, context: TlsContext, *, server: bool, authorize: Authorize | None = None) -> None:
        if server != context.is_server:
            ends = ("client", "server")
            raise ConfigurationError(f"a {ends[server]}'s connection was given a {ends[context.is_server]}'s context")
        self.context = context
        self._check = PeerCheck(context.expectation, authorize)
        self._connection = context.connection()
        self._connection.set_app_data(self._check)
        self._done = False
        self._failure: TlsError | None = None
        self._shut = False
        self._peer: Peer | None = None  # so that the next connection to it finds it
        self.closed_by_peer = False
        """The peer said close_notify: what it sent is complete. Source: RFC 8446 §6.1."""
        self.lost = False
        """The transport ended without close_notify: what came may have been cut short."""
        self.peer_id: SpiffeId | None = None
        """Who the peer is; None before the handshake is done, and for one without an SVID."""
        self.peer_chain: tuple[x509.Certificate, ...] = ()
        """The verified path from the peer's certificate up to, without, the root."""
        self.peer_root: x509.Certificate | None = None
        """Where that path ended."""
        self.alpn: str | None = None
        self.cipher: str | None = None
        self.group: str | None = None
        """What was negotiated; None before the handshake is done."""
        self._open()

    def _open(self) -> None:
        connection = self._connection
        self._ssl: Any = pointer(connection._ssl)
        self._into: Any = pointer(connection._into_ssl)
        self._out: Any = pointer(connection._from_ssl)
        self._lent: IoBuffer | None = None  # whose memory `_into` reads, so that it stays
        self._keeps_buffer = False
        # Else one read would work through any number of records that carry nothing.
        lib.SSL_clear_mode(connection._ssl, lib.SSL_MODE_AUTO_RETRY)

    # Handshake

    @property
    def verified_path(self) -> tuple[x509.Certificate, ...]:
        """The peer's certificates up to and with the root; none before the handshake is done."""
        return self.peer_chain if self.peer_root is None else (*self.peer_chain, self.peer_root)

    @property
    def refused_id(self) -> SpiffeId | None:
        """Who it was that `authorize` refused, to say so."""
        return self._check.peer_id if not self._check.accepted else None

    def handshake(self) -> bool:
        """Go on with the handshake as far as the received ciphertext leads.

        Returns:
            Whether it is complete. A client's is so before the server has judged the client's certificate; a
            refusal comes from the first `read_into`.

        Raises:
            PeerIdentityError: the peer's certificate is refused.
            TlsError: anything else; either way an alert is left to send.
        """
        if self._done:
            return True
        if self._failure is not None:
            raise self._failure
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        except NoSharedProtocol as error:
            self._fail(TlsError(f"{error}; a tunnel needs h2"))
        except SSL.Error as error:
            if self._check.fault is not None:
                self._failure = TlsError("the peer could not be judged")
                raise self._check.fault from None
            self._fail(self._handshake_error(reason_of(error)))
        except BaseException:
            self._failure = TlsError("the handshake was broken off")
            raise
        self._complete()
        return True

    def _fail(self, error: TlsError) -> NoReturn:
        self._failure = error
        raise error

    def _refuse(self, error: TlsError) -> NoReturn:
        """Refuse after OpenSSL's handshake succeeded: there is no alert of its own, so the peer gets close_notify."""
        self.shutdown()
        self._fail(error)

    def _handshake_error(self, reason: str) -> TlsError:
        if self._check.problem is not None:
            return (PeerRevokedError if self._check.revoked else PeerIdentityError)(self._check.problem)
        if reason == "certificate verify failed":
            return PeerIdentityError("the peer's certificate cannot be parsed")
        if reason == "peer did not return a certificate":
            return PeerIdentityError("the client presented no certificate; one that our roots signed is required")
        if reason.endswith("no application protocol"):
            return TlsError("the peer refused the protocol h2, so it does not speak HTTP/2 here")
        if reason in ("wrong version number", "http request", "https proxy request"):
            return TlsError(f"the peer does not speak TLS ({reason}); is this its TLS port?")
        if reason in ("unsupported protocol", "tlsv1 alert protocol version"):
            return TlsError(f"the peer does not speak TLS 1.3 ({reason}), and nothing older is allowed")
        return self._read_error(reason, "the TLS handshake failed")

    def _read_error(self, reason: str, otherwise: str) -> TlsError:
        """TLS 1.3: a server's refusal of a client's certificate is the first thing that the client reads."""
        for alert in _ABOUT_CERTIFICATES:
            if reason.endswith(f"alert {alert}"):
                return TlsError(f"the peer refused our certificate: {alert}{self._own_certificate()}")
        return TlsError(f"{otherwise}: {reason}")

    def _own_certificate(self) -> str:
        context = self.context
        if context.own_expiry is None:
            return " (we have none to present)"
        return (
            f" (we are {context.own_id or 'without a SPIFFE ID'}, valid until {context.own_expiry:%Y-%m-%dT%H:%M:%SZ})"
        )

    def _complete(self) -> None:
        """What OpenSSL does not insist on."""
        connection, check, context = self._connection, self._check, self.context
        alpn = connection.get_alpn_proto_negotiated().decode("ascii", "replace")
        if alpn != "h2":
            self._refuse(TlsError("the peer agreed on no protocol by ALPN; h2 is required"))
        leaf, path = self._certificates()
        if leaf is None:
            if context.needs_peer:
                self._refuse(PeerIdentityError("the peer presented no certificate"))
        else:
            if not check.accepted or not path or path != check.path or path[0] != leaf:
                self._refuse(PeerIdentityError("the peer's certificate was not verified in this handshake"))
            self._peer = peer = check.settle()
            self.peer_id, self.peer_chain, self.peer_root = peer.id, peer.chain, peer.root
        self.alpn = alpn
        self.cipher = _shared(connection.get_cipher_name())
        self.group = _shared(connection.get_group_name())
        self._watch()
        self._done = True

    def _certificates(self) -> tuple[x509.Certificate | None, tuple[x509.Certificate, ...]]:
        """The peer's, and the path from there that was verified."""
        return peer_certificates(self._connection._ssl)

    def _watch(self) -> None:
        lib.SSL_set_info_callback(self._connection._ssl, ON_INFO)

    # Receiving

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take ciphertext. At most 256 KiB, then read: what is not read stays in memory."""
        if data:
            if self._lent is not None:
                self._take_back()
            if len(data) >= _BULK and self._done and not self._keeps_buffer:
                self._keep_read_buffer()
            with ffi.from_buffer(data) as source:
                put(self._into, pointer(source), len(data))

    def receive_from(self, buffer: IoBuffer, nbytes: int) -> None:
        """Take the first `nbytes` of ciphertext in `buffer`; read all of it before the buffer is used again. Hot path.

        Raises:
            TlsError: what was taken before was not read.
        """
        if nbytes >= _BULK and self._done:
            if not self._keeps_buffer:
                self._keep_read_buffer()
            if nbytes >= _LENT and not self.has_ciphertext():
                # A copy to OpenSSL's own memory, which it clears before, would cost more than this.
                self._into = lend(self._ssl, buffer.c, nbytes, self._out)
                if self._lent is None:
                    self._connection._into_ssl = None  # that one is gone
                self._lent = buffer
                return
        if self._lent is not None:
            self._take_back()
        put(self._into, buffer.c, nbytes)

    def _take_back(self) -> None:
        """Read from OpenSSL's own memory again."""
        if self.has_ciphertext():
            self._fail(TlsError("ciphertext was received before what came earlier was read"))
        into = lib.BIO_new(lib.BIO_s_mem())
        if into == ffi.NULL:
            raise MemoryError
        connection = self._connection
        lib.SSL_set_bio(connection._ssl, into, connection._from_ssl)  # frees the one before
        connection._into_ssl = into
        self._into = pointer(into)
        self._lent = None

    def receive_eof(self) -> None:
        """The transport ended; call it when all was read. Sets `lost` where no close_notify came before."""
        self.lost = not self.closed_by_peer

    def read_into(self, buffer: IoBuffer, offset: int, limit: int) -> int:
        """Decrypt into `buffer` from `offset` on. Hot path.

        Returns:
            Bytes, up to `limit`, of as many records as fit whole (of one, if none does). 0: there is no more until
            more ciphertext comes, or the peer said close_notify (`closed_by_peer`).

        Raises:
            TlsError: a broken record, an alert of the peer's, or too many records without data.
        """
        nbytes: int = read_records(self._ssl, self._into, buffer.c + offset, limit)
        if nbytes > 0:
            self._check.idle = 0
            return nbytes
        if nbytes < -1:
            return self._read_last(nbytes)
        return self._read_nothing(buffer, offset, limit, nbytes)

    def has_ciphertext(self) -> bool:
        """Whether there is more to decrypt. Hot path: asking costs less than a `read_into` that gives 0."""
        return bool(pending(self._into, NOWHERE))

    def _read_nothing(self, buffer: IoBuffer, offset: int, limit: int, nbytes: int) -> int:
        check = self._check
        while True:
            error = lib.SSL_get_error(self._connection._ssl, nbytes)
            if error != lib.SSL_ERROR_WANT_READ:
                closed = error == lib.SSL_ERROR_ZERO_RETURN
                return self._read_end(closed, "" if closed else drain_error_queue())
            if check.idle >= MAX_READS_WITHOUT_DATA:
                self._flooded()
            if not self.has_ciphertext():
                return 0
            # A record without data was before the rest.
            told = check.idle
            nbytes = read_records(self._ssl, self._into, buffer.c + offset, limit)
            if nbytes > 0:
                check.idle = 0
                return nbytes
            if nbytes < -1:
                return self._read_last(nbytes)
            if check.idle == told and self.has_ciphertext():
                check.idle += 1

    def _read_last(self, nbytes: int) -> int:
        """The peer said close_notify behind these."""
        self.closed_by_peer = True
        return -1 - nbytes

    def _read_end(self, closed: bool, reason: str) -> int:
        if closed:
            self.closed_by_peer = True
            return 0
        if self._failure is not None:
            raise self._failure
        self._fail(self._read_error(reason, "the TLS connection broke"))

    def _flooded(self) -> NoReturn:
        self.shutdown()
        self._fail(
            TlsError(
                f"the peer was cut off for TLS records without data: the limit is {MAX_READS_WITHOUT_DATA} in a row,"
                " and a KeyUpdate that we must answer counts twice"
            )
        )

    # Sending

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt `data`; the ciphertext is taken with `data_to_send_into`.

        Raises:
            TlsError: the connection has failed, or was shut down.
        """
        size = len(data)
        if 0 < size <= _SMALL_WRITE:
            if write_small(self._ssl, bytes(data), size) != size:  # the copy is cheaper than a handle on a bytearray
                self._write_failed()
            return
        if not data:
            return
        with ffi.from_buffer(data) as source:
            self._encrypt(pointer(source), 0, len(data))

    def write_from(self, buffer: IoBuffer, start: int, nbytes: int) -> None:
        """Encrypt `nbytes` of `buffer` from `start` on, where they stand. Hot path.

        Raises:
            TlsError: the connection has failed, or was shut down.
        """
        done: int = write_records(self._ssl, buffer.c + start, nbytes)
        if done != nbytes and nbytes:
            self._write_failed()

    def _encrypt(self, source: Any, start: int, end: int) -> None:
        while start < end:
            done = write_records(self._ssl, source + start, min(end - start, _MAX_WRITE))
            if done <= 0:
                self._write_failed()
            start += done

    def _write_failed(self, reason: str = "") -> NoReturn:
        reason = reason or drain_error_queue()
        if self._failure is not None:
            raise self._failure
        if not self._done:
            raise TlsError("nothing can be sent before the TLS handshake is complete")
        if self._shut:
            raise TlsError("nothing can be sent after the TLS connection was shut down")
        self._fail(TlsError(f"nothing more can be sent on the TLS connection: {reason}"))

    def data_to_send_into(self, buffer: IoBuffer) -> int:
        """Put ciphertext that is to be sent into `buffer`, from its first byte on. Hot path.

        Returns:
            Bytes; less than `buffer.size` means that there is no more, 0 that there was none.
        """
        nbytes: int = take(self._out, buffer.c, buffer.size)
        return nbytes if nbytes > 0 else 0

    def shutdown(self) -> None:
        """Queue close_notify; nothing can be written afterwards, reading goes on. Source: RFC 8446 §6.1."""
        if self._shut:
            return
        self._shut = True
        try:
            self._connection.shutdown()
        except SSL.Error:
            pass  # before the handshake is complete there is nothing to shut down

    def trim(self) -> None:
        """Give back the memory that bursts left behind; for a connection that idles. Without effect on data."""
        connection = self._connection
        if self.has_ciphertext() or pending(self._out, NOWHERE):
            return
        into, out = lib.BIO_new(lib.BIO_s_mem()), lib.BIO_new(lib.BIO_s_mem())
        if into == ffi.NULL or out == ffi.NULL:
            lib.BIO_free(into)
            lib.BIO_free(out)
            return
        lib.SSL_set_bio(connection._ssl, into, out)  # frees the old ones
        connection._into_ssl, connection._from_ssl = into, out
        self._into, self._out = pointer(into), pointer(out)
        self._lent = None
        ssl = connection._ssl
        if self._keeps_buffer:
            lib.SSL_set_mode(ssl, lib.SSL_MODE_RELEASE_BUFFERS)
            self._keeps_buffer = False
        # OpenSSL gives up the 17 KiB that it reads records into once a read finds none; the last one may have had some.
        lib.ERR_clear_error()
        lib.SSL_peek(ssl, _PEEKED, 1)

    def _keep_read_buffer(self) -> None:
        """For bulk, where a new one for each record would cost; one for a few bytes costs nothing that shows."""
        self._keeps_buffer = True
        ssl = self._connection._ssl
        lib.SSL_clear_mode(ssl, lib.SSL_MODE_RELEASE_BUFFERS)
        lib.SSL_set_mode(ssl, 0)  # clearing alone does not reach the part of OpenSSL that reads


class PortableTlsConnection(TlsConnection):
    """The same by pyOpenSSL's public methods alone: what `TlsConnection` is where `DIRECT` is false."""

    __slots__ = ("_ciphertext",)

    def _open(self) -> None:
        self._ciphertext = bytearray()

    def _certificates(self) -> tuple[x509.Certificate | None, tuple[x509.Certificate, ...]]:
        leaf = self._connection.get_peer_certificate(as_cryptography=True)
        return leaf, tuple(self._connection.get_verified_chain(as_cryptography=True) or ())

    def _watch(self) -> None:
        pass  # records are counted as they are fed

    def handshake(self) -> bool:
        while not self._done:
            if super().handshake():
                break
            if not self._feed():
                return False
        return True

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        self._ciphertext += data

    def receive_from(self, buffer: IoBuffer, nbytes: int) -> None:
        self._ciphertext += buffer.view[:nbytes]

    def _feed(self) -> bool:
        """Hand OpenSSL one whole record, so that each read answers for one."""
        data = self._ciphertext
        if len(data) < _RECORD_HEADER:
            return False
        if not 20 <= data[0] <= 23 or data[1] != 3:  # no TLS at all: OpenSSL says so
            self._connection.bio_write(bytes(data))
            data.clear()
            return True
        length = _RECORD_HEADER + int.from_bytes(data[3:5], "big")
        if len(data) < length and length <= _RECORD_HEADER + (1 << 14) + 256:
            return False
        self._connection.bio_write(bytes(data[:length]))
        del data[:length]
        return True

    def read_into(self, buffer: IoBuffer, offset: int, limit: int) -> int:
        while True:
            try:
                nbytes = self._connection.recv_into(buffer.view[offset : offset + limit], limit)
            except SSL.WantReadError:
                if self._check.idle >= MAX_READS_WITHOUT_DATA:
                    self._flooded()
                if not self._feed():
                    return 0
                self._check.idle += 1
                continue
            except SSL.ZeroReturnError:
                return self._read_end(closed=True, reason="")
            except SSL.Error as error:
                return self._read_end(closed=False, reason=reason_of(error))
            self._check.idle = 0
            return nbytes

    def has_ciphertext(self) -> bool:
        return True  # a read finds out

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        try:
            while view:
                sent = self._connection.send(view)
                view = view[sent:]
        except SSL.Error:
            self._write_failed("the connection failed before")

    def write_from(self, buffer: IoBuffer, start: int, nbytes: int) -> None:
        self.write(buffer.view[start : start + nbytes])

    def data_to_send_into(self, buffer: IoBuffer) -> int:
        try:
            data = self._connection.bio_read(buffer.size)
        except SSL.WantReadError:
            return 0
        buffer.view[: len(data)] = data
        return len(data)

    def trim(self) -> None:
        pass  # pyOpenSSL does not let go of its buffers


if not DIRECT:
    TlsConnection = PortableTlsConnection  # type: ignore[misc]  # the same interface
