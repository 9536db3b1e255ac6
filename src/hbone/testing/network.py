"""A network in memory, for Trio: programs under test dial and listen as on TCP, with no socket and no sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
import trio.testing

from hbone.errors import ConnectionLost

if TYPE_CHECKING:
    from collections.abc import Callable

    Stapled = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]

__all__ = ["Link", "MemoryListener", "Network"]


class Link:
    """One connection of a `Network`, seen from outside."""

    def __init__(self, address: tuple[str, int], client: Stapled, server: Stapled) -> None:
        self.address = address
        self.client = client
        self.server = server

    def cut(self) -> None:
        """Both ends find the connection closed, with no goodbye, as after a crash of the host between them."""
        for end in (self.client, self.server):
            end.send_stream.close()
            end.receive_stream.close()


class MemoryListener(trio.abc.Listener[trio.abc.Stream]):
    """What `Network.listen` gives to `hbone.trio.serve_listeners`."""

    def __init__(self, on_close: Callable[[], object]) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](1024)
        self._on_close = on_close

    async def accept(self) -> trio.abc.Stream:
        """The next connection."""
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise trio.ClosedResourceError("the listener was closed") from None

    async def aclose(self) -> None:
        """Listen no more."""
        self._on_close()
        self._send.close()
        await self._receive.aclose()

    def offer(self, stream: trio.abc.Stream) -> None:
        """A connection arrives."""
        self._send.send_nowait(stream)


class Network:
    """Addresses that listen, and links between them.

    ```python
    network = Network()
    nursery.start_soon(partial(serve_listeners, handler, svid, [network.listen("b", 15008)], authorize=...))
    async with ConnectionPool(svid, open_transport=network.open_transport) as pool: ...
    ```
    """

    def __init__(self) -> None:
        self._listeners: dict[tuple[str, int], MemoryListener] = {}
        self.links: list[Link] = []
        """Every connection that was made, in order."""
        self.dials: list[tuple[str, int]] = []
        """Every attempt, in order."""
        self.silent: set[tuple[str, int]] = set()
        """Addresses that swallow connections, as behind a firewall that drops."""

    def listen(self, host: str, port: int) -> MemoryListener:
        """Take connections to an address."""
        address = (host, port)
        listener = MemoryListener(lambda: self._listeners.pop(address, None))
        self._listeners[address] = listener
        return listener

    async def open_transport(self, host: str, port: int) -> trio.abc.Stream:
        """Connect; for `ConnectionPool(open_transport=...)`.

        Raises:
            ConnectionLost: nobody listens there.
        """
        await trio.lowlevel.checkpoint()
        address = (host, port)
        self.dials.append(address)
        if address in self.silent:
            await trio.sleep_forever()
        listener = self._listeners.get(address)
        if listener is None:
            raise ConnectionLost(f"cannot connect to {host}:{port}: connection refused")
        client, server = trio.testing.memory_stream_pair()
        self.links.append(Link(address, client, server))
        listener.offer(server)
        return client
