"""OpenSSL's own functions, through the handles that pyOpenSSL holds; and buffers that they write to.

They are not pyOpenSSL's public interface, so each name is looked for at import. `DIRECT` says whether all are there;
where not, `hbone.tls` goes through pyOpenSSL's methods.

Those of each read and write are here twice: in Python, through cffi, and in C (`_native.c`), which a compiled wheel
has. A pointer is a cffi handle for the first and a number for the second; `pointer` makes either.
"""

from __future__ import annotations

import functools
import importlib
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from OpenSSL import SSL

try:
    from hbone import _native as native
except ImportError:
    native = None  # type: ignore[assignment]  # not built: everything has its twin in Python

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DIRECT",
    "NATIVE",
    "NOWHERE",
    "IoBuffer",
    "drain_error_queue",
    "ffi",
    "info_callback",
    "lend",
    "lib",
    "peer_certificates",
    "pending",
    "pointer",
    "put",
    "read_records",
    "take",
    "verify_callback",
    "write_records",
    "write_small",
]

lib: Final[Any] = getattr(SSL, "_lib", None)
ffi: Final[Any] = getattr(SSL, "_ffi", None)

_FUNCTIONS = (
    "BIO_free",
    "BIO_get_mem_data",
    "BIO_new",
    "BIO_new_mem_buf",
    "BIO_read",
    "BIO_s_mem",
    "BIO_set_mem_eof_return",
    "BIO_write",
    "ERR_clear_error",
    "ERR_get_error",
    "ERR_reason_error_string",
    "SSL_CTX_set_verify",
    "SSL_clear_mode",
    "SSL_get0_param",
    "SSL_get0_verified_chain",
    "SSL_get_error",
    "SSL_get_ex_data_X509_STORE_CTX_idx",
    "SSL_get_peer_certificate",
    "SSL_peek",
    "SSL_read",
    "SSL_set_bio",
    "SSL_set_info_callback",
    "SSL_set_mode",
    "SSL_write",
    "X509_STORE_CTX_get_current_cert",
    "X509_STORE_CTX_get_error",
    "X509_STORE_CTX_get_error_depth",
    "X509_STORE_CTX_get_ex_data",
    "X509_STORE_CTX_set_error",
    "X509_VERIFY_PARAM_set1_host",
    "X509_VERIFY_PARAM_set1_ip",
    "X509_VERIFY_PARAM_set_hostflags",
    "X509_free",
    "X509_verify_cert_error_string",
    "i2d_X509_bio",
    "sk_X509_num",
    "sk_X509_value",
)
_CONSTANTS = (
    "SSL_ERROR_WANT_READ",
    "SSL_ERROR_ZERO_RETURN",
    "SSL_MODE_AUTO_RETRY",
    "SSL_MODE_ENABLE_PARTIAL_WRITE",
    "SSL_MODE_RELEASE_BUFFERS",
    "X509_CHECK_FLAG_NEVER_CHECK_SUBJECT",
    "X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS",
    "X509_V_ERR_CERT_REJECTED",
)
_HANDLES = ("_ssl", "_into_ssl", "_from_ssl", "_reverse_mapping")


def has_everything(library: Any, connection: Any) -> bool:
    """Whether `library`, and a `connection` on memory buffers, have all that is called directly."""
    return all(hasattr(library, name) for name in _FUNCTIONS + _CONSTANTS) and all(
        getattr(connection, name, None) is not None for name in _HANDLES
    )


DIRECT: Final[bool] = ffi is not None and has_everything(lib, SSL.Connection(SSL.Context(SSL.TLS_METHOD), None))
"""Whether OpenSSL's functions can be called directly."""

_RECORD: Final = 1 << 14  # payload of a TLS record at most. RFC 8446 §5.1
_PARSED: Final = 256  # certificates that are kept parsed
_PARSED_SIZE: Final = 4096  # bytes of each of them at most: what a stranger shows may be kept, too


def _use_native() -> bool:
    """Give `_native` its functions: of the same OpenSSL that pyOpenSSL calls. False: it cannot have them."""
    if native is None or not DIRECT:
        return False
    try:
        binding: Any = importlib.import_module("cryptography.hazmat.bindings._rust")._openssl
        if binding.ffi is not ffi:
            return False
        native.use(*(_address(binding.ffi.addressof(binding.lib, name)) for name in native.FUNCTIONS))
    except (ImportError, AttributeError):
        return False
    return True


def _address(handle: Any) -> int:
    return int(ffi.cast("uintptr_t", handle))


NATIVE: Final[bool] = _use_native()
"""Whether those of each read and write are the ones in C."""


def _handle(handle: Any) -> Any:
    return handle


def _read_records(ssl: Any, into: Any, where: Any, room: int) -> int:
    lib.ERR_clear_error()  # SSL_get_error looks at this thread's queue, whoever left something there
    total = 0
    while True:
        nbytes: int = lib.SSL_read(ssl, where + total, room - total)
        if nbytes <= 0:
            error = lib.SSL_get_error(ssl, nbytes) if total else 0
            if error == lib.SSL_ERROR_WANT_READ:
                return total
            return -1 - total if error == lib.SSL_ERROR_ZERO_RETURN else nbytes
        total += nbytes
        if room - total < _RECORD or not lib.BIO_get_mem_data(into, ffi.NULL):
            return total


def _lend(ssl: Any, where: Any, nbytes: int, out: Any) -> Any:
    into = lib.BIO_new_mem_buf(where, nbytes)
    if into == ffi.NULL:
        raise MemoryError
    lib.BIO_set_mem_eof_return(into, -1)  # its end is no end of the connection
    lib.SSL_set_bio(ssl, into, out)
    return into


pointer: Final[Any] = _address if NATIVE else _handle
"""What the functions below take, of a handle of cffi's."""
read_records: Final[Any] = native.read_records if NATIVE else _read_records
"""Decrypt (ssl, into, where, room): as many records as are in the BIO `into` and fit whole; of one, if none does.

Bytes; -1 - bytes when the peer said close_notify behind them; or what SSL_read said when there were none, or when
OpenSSL failed.
"""
write_records: Final[Any] = native.write_records if NATIVE else getattr(lib, "SSL_write", None)
"""Encrypt (ssl, where, nbytes). What SSL_write said."""
write_small: Final[Any] = native.write_small if NATIVE else getattr(lib, "SSL_write", None)
"""The same of a bytes object (ssl, data, nbytes)."""
put: Final[Any] = native.put if NATIVE else getattr(lib, "BIO_write", None)
"""Copy ciphertext in (into, where, nbytes)."""
lend: Final[Any] = native.lend if NATIVE else _lend
"""Let the connection read ciphertext where it stands (ssl, where, nbytes, out): the BIO that it reads from now.

The one before is freed; `out`, which it writes to, stays. Raises MemoryError.
"""
take: Final[Any] = native.take if NATIVE else getattr(lib, "BIO_read", None)
"""Copy ciphertext out (out, where, room): bytes, or -1 when there are none."""
pending: Final[Any] = native.pending if NATIVE else getattr(lib, "BIO_get_mem_data", None)
"""Bytes of ciphertext in a BIO (bio, `NOWHERE`)."""
NOWHERE: Final[Any] = pointer(ffi.NULL) if DIRECT else None


_LARGE: Final = 64 * 1024


class IoBuffer:
    """A reused buffer that sockets and OpenSSL read and write without a copy.

    Args:
        size: bytes that `body` holds.
        headroom: bytes before them, for a header to be written in place.
    """

    __slots__ = ("array", "body", "c", "handle", "headroom", "size", "view")

    def __init__(self, size: int, headroom: int = 0) -> None:
        self.size = size
        """Bytes without the headroom."""
        self.headroom = headroom
        nbytes = headroom + size
        # A page that nothing was read into yet takes no memory; a bytearray writes zeros over all of them.
        self.array: bytearray | mmap = (
            mmap(-1, nbytes, MAP_PRIVATE | MAP_ANONYMOUS) if nbytes >= _LARGE else bytearray(nbytes)
        )
        self.view = memoryview(self.array)
        """All of it."""
        self.body = self.view[headroom:]
        """What stands behind the headroom."""
        self.handle: Any = ffi.from_buffer(self.array) if ffi is not None else None
        """All of it, for cffi."""
        self.c: Any = pointer(self.handle) if ffi is not None else None
        """All of it, for the functions of each read and write."""

    def tail(self, start: int) -> IoBuffer:
        """What stands from byte `start` on, as a buffer of its own over the same memory."""
        tail = IoBuffer(0)
        tail.size = len(self.array) - start
        tail.array = self.array
        tail.view = tail.body = self.view[start:]
        if self.handle is not None:
            tail.handle, tail.c = self.handle + start, self.c + start
        return tail


def drain_error_queue() -> str:
    """OpenSSL's reason for what just failed, as text; its queue is empty afterwards."""
    reasons = []
    while code := lib.ERR_get_error():
        text = lib.ERR_reason_error_string(code)
        if text != ffi.NULL:
            reasons.append(ffi.string(text).decode("ascii", "replace"))
    return reasons[0] if reasons else "unknown reason"


@functools.lru_cache(_PARSED)
def _parsed(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def _certificate(handle: Any) -> x509.Certificate:
    """A certificate of OpenSSL's. The same bytes give the same object, so its extensions are parsed once.

    Raises:
        ValueError: it cannot be parsed.
    """
    bio, start = lib.BIO_new(lib.BIO_s_mem()), ffi.new("char **")
    try:
        if bio == ffi.NULL or lib.i2d_X509_bio(bio, handle) != 1:
            raise ValueError(f"the certificate cannot be encoded: {drain_error_queue()}")
        nbytes = lib.BIO_get_mem_data(bio, start)
        der: bytes = ffi.buffer(start[0], nbytes)[:]
    finally:
        lib.BIO_free(bio)
    return _parsed(der) if len(der) <= _PARSED_SIZE else x509.load_der_x509_certificate(der)


def peer_certificates(ssl: Any) -> tuple[x509.Certificate | None, tuple[x509.Certificate, ...]]:
    """What the peer presented, and the path from there to a root that OpenSSL verified; None and () where it did not.

    Raises:
        ValueError: one of them cannot be parsed.
    """
    handle = lib.SSL_get_peer_certificate(ssl)
    if handle == ffi.NULL:
        return None, ()
    try:
        leaf = _certificate(handle)
    finally:
        lib.X509_free(handle)
    chain = lib.SSL_get0_verified_chain(ssl)
    if chain == ffi.NULL:
        return leaf, ()
    return leaf, tuple([_certificate(lib.sk_X509_value(chain, at)) for at in range(lib.sk_X509_num(chain))])


def verify_callback(judge: Callable[[SSL.Connection, x509.Certificate, int, int, bool], bool]) -> Any:
    """What OpenSSL calls for each certificate of a peer's path, from the root to the leaf.

    Unlike pyOpenSSL's own, it makes a refusal of ours the alert bad_certificate, where OpenSSL's default would be an
    internal error. Keep the result for as long as a context uses it. `judge` gets the connection, the certificate,
    OpenSSL's error number and depth, and whether OpenSSL is content; it must not raise.
    """

    def called(ok: int, store: Any) -> int:
        handle = lib.X509_STORE_CTX_get_current_cert(store)
        if handle == ffi.NULL:  # an error of the whole path
            return 0
        certificate = _certificate(handle)
        number = lib.X509_STORE_CTX_get_error(store)
        depth = lib.X509_STORE_CTX_get_error_depth(store)
        ssl = lib.X509_STORE_CTX_get_ex_data(store, lib.SSL_get_ex_data_X509_STORE_CTX_idx())
        if judge(SSL.Connection._reverse_mapping[ssl], certificate, number, depth, bool(ok)) and ok:
            return 1
        if ok:
            lib.X509_STORE_CTX_set_error(store, lib.X509_V_ERR_CERT_REJECTED)
        return 0

    # An exception in `called`, which a certificate that cannot be parsed may raise, counts as 0: refused.
    return ffi.callback("int (*)(int, X509_STORE_CTX *)", called, error=0, onerror=lambda *_: None)


def info_callback(tell: Callable[[SSL.Connection, int], None]) -> Any:
    """What OpenSSL calls as a handshake goes on: one for all connections, where pyOpenSSL makes each its own.

    Keep the result for as long as a connection uses it. `tell` gets the connection and what happened; an exception in
    it is ignored.
    """

    def called(ssl: Any, where: int, _: int) -> None:
        tell(SSL.Connection._reverse_mapping[ssl], where)

    return ffi.callback("void (*)(const SSL *, int, int)", called, onerror=lambda *_: None)
