"""What can go wrong with a bench."""

from __future__ import annotations

from hbone.errors import HboneError

__all__ = ["BenchError"]


class BenchError(HboneError):
    """The bench could not be set up, or its load not be driven."""
