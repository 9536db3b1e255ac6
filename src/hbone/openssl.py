"""OpenSSL's own functions, through the handles that pyOpenSSL holds; and buffers that they write to.

They are not pyOpenSSL's public interface, so each name is looked for at import. `DIRECT` says whether all are there;
where not, `hbone.tls` goes through pyOpenSSL's methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from OpenSSL import SSL, crypto

if TYPE_CHECKING:
    from collections.abc import Callable

    from cryptography import x509

__all__ = ["DIRECT", "IoBuffer", "drain_error_queue", "ffi", "info_callback", "lib", "verify_callback"]

lib: Any = getattr(SSL, "_lib", None)
ffi: Any = getattr(SSL, "_ffi", None)

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
    "SSL_get_error",
    "SSL_get_ex_data_X509_STORE_CTX_idx",
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
    "X509_up_ref",
    "X509_verify_cert_error_string",
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
    return (
        all(hasattr(library, name) for name in _FUNCTIONS + _CONSTANTS)
        and all(getattr(connection, name, None) is not None for name in _HANDLES)
        and hasattr(crypto.X509, "_from_raw_x509_ptr")
    )


DIRECT: bool = ffi is not None and has_everything(lib, SSL.Connection(SSL.Context(SSL.TLS_METHOD), None))
"""Whether OpenSSL's functions can be called directly."""


class IoBuffer:
    """A reused buffer that sockets and OpenSSL read and write without a copy.

    Args:
        size: bytes that `body` holds.
        headroom: bytes before them, for a header to be written in place.
    """

    __slots__ = ("array", "body", "c", "headroom", "size", "view")

    def __init__(self, size: int, headroom: int = 0) -> None:
        self.size = size
        """Bytes without the headroom."""
        self.headroom = headroom
        self.array = bytearray(headroom + size)
        self.view = memoryview(self.array)
        """All of it."""
        self.body = self.view[headroom:]
        """What stands behind the headroom."""
        self.c: Any = ffi.from_buffer(self.array) if ffi is not None else None
        """All of it, as OpenSSL wants it."""

    def tail(self, start: int) -> IoBuffer:
        """What stands from byte `start` on, as a buffer of its own over the same memory."""
        tail = IoBuffer(0)
        tail.size = len(self.array) - start
        tail.array = self.array
        tail.view = tail.body = self.view[start:]
        tail.c = self.c + start if self.c is not None else None
        return tail


def drain_error_queue() -> str:
    """OpenSSL's reason for what just failed, as text; its queue is empty afterwards."""
    reasons = []
    while code := lib.ERR_get_error():
        text = lib.ERR_reason_error_string(code)
        if text != ffi.NULL:
            reasons.append(ffi.string(text).decode("ascii", "replace"))
    return reasons[0] if reasons else "unknown reason"


def verify_callback(judge: Callable[[SSL.Connection, x509.Certificate, int, int, bool], bool]) -> Any:
    """What OpenSSL calls for each certificate of a peer's path, from the root to the leaf.

    Unlike pyOpenSSL's own, it makes a refusal of ours the alert bad_certificate, where OpenSSL's default would be an
    internal error. Keep the result for as long as a context uses it. `judge` gets the connection, the certificate,
    OpenSSL's error number and depth, and whether OpenSSL is content; it must not raise.
    """

    def called(ok: int, store: Any) -> int:
        pointer = lib.X509_STORE_CTX_get_current_cert(store)
        if pointer == ffi.NULL:  # an error of the whole path
            return 0
        lib.X509_up_ref(pointer)
        certificate = crypto.X509._from_raw_x509_ptr(pointer).to_cryptography()
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
