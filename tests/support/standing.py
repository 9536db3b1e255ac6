"""The lines that `ztunnel status` prints."""

from __future__ import annotations

import time
from typing import Any

from ztunnel.statustext import status_lines

__all__ = ["line", "printed"]

REACH: dict[str, Any] = {"inboundCaptured": None, "outboundCaptured": None, "why": "not looked at", "ports": []}
"""What the command found of this host, if it looked at nothing."""


def printed(status: dict[str, Any], now: float | None = None) -> list[str]:
    """What `ztunnel status` prints of the daemon's answer."""
    return status_lines(status | {"reach": REACH}, time.time() if now is None else now)


def line(lines: list[str], name: str) -> str:
    """The one of that name, without the name."""
    (found,) = [text for text in lines if text.startswith(f"{name} ")]
    return found[15:]
