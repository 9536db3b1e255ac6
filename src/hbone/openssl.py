"""OpenSSL's own functions, through the handles that pyOpenSSL holds; and buffers that they write to.

They are not pyOpenSSL's public interface, so each name is looked for at import. `DIRECT` says whether all are there;
where not, `hbone.tls` goes through pyOpenSSL's methods.
"""

from __future__ import annotations

from typing import Any

from OpenSSL import SSL

__all__ = ["DIRECT", "IoBuffer", "drain_error_queue", "ffi", "lib"]

lib: Any = getattr(SSL, "_lib", None)
ffi: Any = getattr(SSL, "_ffi", None)

_FUNCTIONS = (
    "BIO_get_mem_data",
    "BIO_new",
    "BIO_read",
    "BIO_s_mem",
    "BIO_write",
    "ERR_clear_error",
    "ERR_get_error",
    "ERR_reason_error_string",
    "SSL_clear_mode",
    "SSL_get0_param",
    "SSL_get_error",
    "SSL_read",
    "SSL_set_bio",
    "SSL_write",
    "X509_VERIFY_PARAM_set1_host",
    "X509_VERIFY_PARAM_set1_ip",
    "X509_VERIFY_PARAM_set_hostflags",
    "X509_verify_cert_error_string",
)
_CONSTANTS = (
    "SSL_ERROR_WANT_READ",
    "SSL_ERROR_ZERO_RETURN",
    "SSL_MODE_AUTO_RETRY",
    "SSL_MODE_ENABLE_PARTIAL_WRITE",
    "X509_CHECK_FLAG_NEVER_CHECK_SUBJECT",
    "X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS",
)
_HANDLES = ("_ssl", "_into_ssl", "_from_ssl", "set_info_callback")


def has_everything(library: Any, connection: Any) -> bool:
    """Whether `library`, and a `connection` on memory buffers, have all that is called directly."""
    return all(hasattr(library, name) for name in _FUNCTIONS + _CONSTANTS) and all(
        getattr(connection, name, None) is not None for name in _HANDLES
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


def drain_error_queue() -> str:
    """OpenSSL's reason for what just failed, as text; its queue is empty afterwards."""
    reasons = []
    while code := lib.ERR_get_error():
        text = lib.ERR_reason_error_string(code)
        if text != ffi.NULL:
            reasons.append(ffi.string(text).decode("ascii", "replace"))
    return reasons[0] if reasons else "unknown reason"
