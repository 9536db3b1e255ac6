"""How much of it: `make test` uses the smaller sizes, `make test-long` those that the project promises."""

from __future__ import annotations

import os

__all__ = ["FULL", "size"]

FULL = os.environ.get("HBONE_TEST_SIZES") == "full"


def size(full: int, short: int) -> int:
    """`full` in the long run, `short` otherwise."""
    return full if FULL else short
