"""The lines that `ztunnel status` prints."""

from __future__ import annotations

from typing import Any

__all__ = ["REACH", "line"]

REACH: dict[str, Any] = {"inboundCaptured": None, "outboundCaptured": None, "why": "not looked at", "ports": []}
"""What the command found of this host, if it looked at nothing."""


def line(lines: list[str], name: str) -> str:
    """The one of that name, without the name."""
    (found,) = [text for text in lines if text.startswith(f"{name} ")]
    return found[15:]
