"""One call's state."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from hbone.engine.frames import DEFAULT_WINDOW

if TYPE_CHECKING:
    from hbone.grpc.connection import GrpcConnection
    from hbone.grpc.status import GrpcError

__all__ = ["Call"]


class Call:
    """One call, as one end sees it. Read its state; its verbs are those of the connection."""

    __slots__ = (
        "_budgeted",
        "_buffer",
        "_closing",
        "_connection",
        "_outstanding",
        "_queue",
        "_ready",
        "_status",
        "_wanted",
        "authority",
        "closed",
        "ended",
        "failure",
        "headers_sent",
        "metadata",
        "opened",
        "path",
        "stream_id",
        "timeout",
        "trailers",
        "unsent",
    )

    def __init__(self, connection: GrpcConnection, stream_id: int, path: str) -> None:
        self._connection = connection
        self.stream_id = stream_id
        self.path = path
        """`/package.Service/Method`."""
        self.authority = ""
        self.metadata: tuple[tuple[str, str | bytes], ...] = ()
        """The peer's: of the request at a server, of the response at a client."""
        self.trailers: tuple[tuple[str, str | bytes], ...] = ()
        """Client: metadata that came with the status."""
        self.timeout: float | None = None
        """Seconds that the client gave the call when it began."""
        self.opened = False
        """Client: response headers came."""
        self.headers_sent = False
        self.ended = False
        """The peer sends no more messages; those that came may still be taken."""
        self.closed = False
        """Nothing more goes either way."""
        self.failure: GrpcError | None = None
        """Why the call did not end well; at a client, also the status when it is not OK."""
        self.unsent = 0
        """Bytes of messages that are still ours to hand to the transport."""
        self._queue: collections.deque[bytes | memoryview] = collections.deque()
        self._closing: list[tuple[bytes, bytes]] | None = None
        self._ready = False
        self._buffer = bytearray()
        self._outstanding = DEFAULT_WINDOW
        self._wanted: int | None = None
        self._budgeted = 0
        self._status: GrpcError | None = None

    def __repr__(self) -> str:
        return f"<Call {self.path} on stream {self.stream_id}>"

    def receive(self, limit: int | None = None) -> bytes | None:
        """The next message; None when there is none yet, or no more (`ended`).

        Args:
            limit: the largest that is accepted, in bytes; by default that of the configuration.

        Raises:
            GrpcError: the message is too large or compressed, the call was cut, or at a client it failed.
        """
        return self._connection.receive(self, limit)
