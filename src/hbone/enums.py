"""Enumerations that the data path names many times a connection."""

from __future__ import annotations

import enum
from typing import TypeVar

__all__ = ["plain_members"]

E = TypeVar("E", bound=type[enum.Enum])


def plain_members(cls: E) -> E:
    """Make the members attributes of their class, as Python 3.12 does: 3.11 finds each by a call of a function."""
    for name, member in cls.__members__.items():
        type.__setattr__(cls, name, member)
    return cls
