"""The time of a log line."""

from __future__ import annotations

import time

__all__ = ["timestamp"]

_second = 0
_second_text = ""


def timestamp() -> str:
    """Now, in UTC with microseconds; the second's text is kept until the next."""
    global _second, _second_text
    microseconds = time.time_ns() // 1000
    second = microseconds // 1_000_000
    if second != _second:
        _second, _second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{_second_text}.{str(microseconds % 1_000_000).zfill(6)}Z"
