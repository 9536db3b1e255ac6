"""What HTTP/2 lets the value of a header field be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hbone.events import Headers

__all__ = ["malformed_value"]

_NUL: Final = 0x00
_TAB: Final = 0x09
_LF: Final = 0x0A
_CR: Final = 0x0D
_SPACE: Final = 0x20


def malformed_value(headers: Headers) -> bytes | None:
    """The name of the first field whose value holds NUL, CR or LF, or begins or ends with a space or tab.

    Source: RFC 9113 §8.2.1.
    """
    together = b"".join([value for _, value in headers])
    forbidden = _has_forbidden(together)  # one look at all of them is cheap
    for name, value in headers:
        if not value:
            continue
        if value[0] in (_SPACE, _TAB) or value[-1] in (_SPACE, _TAB) or (forbidden and _has_forbidden(value)):
            return name
    return None


def _has_forbidden(value: bytes) -> bool:
    return _LF in value or _CR in value or _NUL in value  # Python first asks of anything else whether it is a number
