"""HBONE under Trio: tunnels and their streams for applications.

`ConnectionPool` and `open_tunnel` dial, `serve` accepts; both give `HboneStream`, a `trio.abc.HalfCloseableStream`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hbone.lazy import names_at_first_use

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
    "Connection": "hbone.trio.connection",
    "ConnectionPool": "hbone.trio.pool",
    "HboneStream": "hbone.trio.stream",
    "open_tunnel": "hbone.trio.client",
    "serve": "hbone.trio.server",
    "serve_listeners": "hbone.trio.server",
    "serve_transport": "hbone.trio.server",
}


__getattr__ = names_at_first_use(__name__, _HOME)  # a daemon may want one module of this package only


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
