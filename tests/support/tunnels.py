"""What the tests of the adapters share: identities, an admission that is watched, and two connections of `hbone.trio`
joined in memory.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import trio
import trio.testing

from hbone.admission import Admission
from hbone.endpoint import Endpoint
from hbone.errors import HboneError
from hbone.testing.ca import TestCa
from hbone.tls import TlsContext
from hbone.trio import Connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from hbone.config import ConnectionConfig
    from hbone.identity import Identity
    from hbone.trio import HboneStream


@functools.cache
def ca() -> TestCa:
    """One CA for all tests of these adapters."""
    return TestCa()


@functools.cache
def who(name: str) -> Identity:
    """An identity of namespace shop."""
    return ca().identity("shop", name)


class Watched(Admission):
    """Counts whom it did not let in at once."""

    kept_out = 0

    def enter(self, address: str) -> bool:
        entered = super().enter(address)
        self.kept_out += not entered
        return entered


class Tunnels:
    """A client's and a server's connection."""

    def __init__(self, client_config: ConnectionConfig | None, server_config: ConnectionConfig | None) -> None:
        self.transports = trio.testing.memory_stream_pair()
        self._send, self._receive = trio.open_memory_channel["HboneStream"](1000)
        now = trio.current_time()
        self.client = Connection(
            self.transports[0],
            Endpoint(
                TlsContext.client(who("web")), client=True, authorize=lambda _: True, config=client_config, now=now
            ),
            client=True,
        )
        self.server = Connection(
            self.transports[1],
            Endpoint(
                TlsContext.server(who("orders")), client=False, authorize=lambda _: True, config=server_config, now=now
            ),
            client=False,
            on_request=self._send.send_nowait,
        )

    async def requested(self) -> HboneStream:
        """The next stream that the client asked for."""
        return await self._receive.receive()

    async def pair(self, authority: str = "10.0.0.7:8080") -> tuple[HboneStream, HboneStream]:
        """An accepted stream, from both ends."""
        ends: list[HboneStream] = []

        async def accept() -> None:
            stream = await self.requested()
            stream.accept()
            ends.append(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            client = await self.client.connect(authority)
        return client, ends[0]

    def cut(self) -> None:
        """The transport goes away without a goodbye."""
        for transport in self.transports:
            transport.send_stream.close()
            transport.receive_stream.close()


@contextlib.asynccontextmanager
async def open_tunnels(
    client_config: ConnectionConfig | None = None, server_config: ConnectionConfig | None = None
) -> AsyncIterator[Tunnels]:
    """Both connections, running."""
    tunnels = Tunnels(client_config, server_config)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_run, tunnels.server)
        await nursery.start(tunnels.client.run)
        yield tunnels
        tunnels.client.close()
        tunnels.server.close()


async def clog(stream: HboneStream) -> int:
    """Send until the peer's window is full; the bytes that took."""
    sent = 0
    while True:
        while nbytes := stream.capacity():
            await stream.send_all(bytes(nbytes))
            sent += nbytes
        await trio.testing.wait_all_tasks_blocked()
        if not stream.capacity():
            return sent


async def _run(connection: Connection) -> None:
    with contextlib.suppress(HboneError):
        await connection.run()
