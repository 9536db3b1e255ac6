"""HBONE under Trio: tunnels and their streams for applications.

`ConnectionPool` and `open_tunnel` dial, `serve` accepts; both give `HboneStream`, a `trio.abc.HalfCloseableStream`.
"""

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
