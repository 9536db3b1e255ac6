"""The version of the distribution.

It is written here, and not looked up, because `importlib.metadata` brings four megabytes of modules that a daemon
would keep for good.
"""

from __future__ import annotations

__all__ = ["VERSION"]

VERSION = "0.1.0"
