"""HBONE under asyncio: the verbs of `hbone.trio`, with asyncio's StreamReader and StreamWriter."""

from hbone.asyncio.connection import Tunnel
from hbone.asyncio.pool import ConnectionPool
from hbone.asyncio.server import serve
from hbone.asyncio.stream import HboneTransport

__all__ = ["ConnectionPool", "HboneTransport", "Tunnel", "serve"]
