"""HBONE under Trio: tunnels and their streams for applications.

`ConnectionPool` and `open_tunnel` dial, `serve` accepts; both give `HboneStream`, a `trio.abc.HalfCloseableStream`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hbone.trio.client import open_tunnel
    from hbone.trio.connection import Connection
    from hbone.trio.pool import ConnectionPool
    from hbone.trio.server import serve, serve_listeners, serve_transport
    from hbone.trio.stream import HboneStream

__all__ = [
    "Connection",
    "ConnectionPool",
    "HboneStream",
    "open_tunnel",
    "serve",
    "serve_listeners",
    "serve_transport",
]

_HOME = {
    "Connection": "connection",
    "ConnectionPool": "pool",
    "HboneStream": "stream",
    "open_tunnel": "client",
    "serve": "server",
    "serve_listeners": "server",
    "serve_transport": "server",
}


def __getattr__(name: str) -> Any:
    """Import what `name` needs when it is first used: a daemon may want one module of this package only."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'hbone.trio' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"hbone.trio.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
