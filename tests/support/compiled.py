"""Whether the data path under test is compiled, for the tests that change its classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ztunnel.dataplane import reactor

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COMPILED", "plain_only", "stand_in"]

COMPILED = (reactor.__file__ or "").endswith(".so")
REASON = "the classes of a compiled data path cannot be changed"
plain_only = pytest.mark.skipif(COMPILED, reason=REASON)


def stand_in(owner: object, name: str, method: Callable[..., Any]) -> None:
    """Put `method` in the place of one of `owner`'s, for a peer that behaves in a way that ours never does.

    Where the data path is compiled, the test is skipped.
    """
    if COMPILED:
        pytest.skip(REASON)
    setattr(owner, name, method)
