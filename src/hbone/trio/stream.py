"""A CONNECT stream as a Trio stream."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import trio

from hbone.errors import ErrorCode, HboneError
from hbone.sessionstream import SessionStream

if TYPE_CHECKING:
    from types import TracebackType

    from hbone.connect import ConnectRequest
    from hbone.events import Headers
    from hbone.identity import SpiffeId
    from hbone.trio.connection import Connection

__all__ = ["HboneStream"]

_RECEIVE = 64 * 1024


class _OneAtATime:
    """Raises BusyResourceError where two tasks meet."""

    __slots__ = ("_busy", "_message")

    def __init__(self, message: str) -> None:
        self._busy = False
        self._message = message

    def __enter__(self) -> None:
        if self._busy:
            raise trio.BusyResourceError(self._message)
        self._busy = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._busy = False


class HboneStream(SessionStream, trio.abc.HalfCloseableStream):
    """One CONNECT stream of a tunnel.

    `peer` is who is at the other end, `request` the CONNECT request. On the server the first use answers 200;
    `accept` does so on its own, and `reject` answers with another status instead.

    Raises:
        trio.BrokenResourceError: from its methods, caused by StreamResetError when the peer reset the stream, or by
            ConnectionLost when the tunnel under it went away.

    Source: RFC 9113 §8.5.
    """

    def __init__(self, connection: Connection, request: ConnectRequest, peer: SpiffeId) -> None:
        super().__init__(connection, request, peer)  # type: ignore[arg-type]  # Session is invariant in its streams
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()
        self._answer = trio.lowlevel.ParkingLot()
        self._receiving = _OneAtATime("another task is receiving on this stream")
        self._sending = _OneAtATime("another task is sending on this stream")

    def __repr__(self) -> str:
        return f"<HboneStream {self.stream_id} to {self.request.authority} with {self.peer}>"

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive at least one byte; b"" at the peer's END_STREAM.

        Args:
            max_bytes: most bytes to return; by default 64 KiB.

        Raises:
            trio.BrokenResourceError: the stream was reset, or the tunnel lost; what came before was returned first.
            trio.ClosedResourceError: closed by us.
            trio.BusyResourceError: another task is receiving.
        """
        limit = _RECEIVE if max_bytes is None else operator.index(max_bytes)
        if limit < 1:
            raise ValueError(f"max_bytes is {limit}; it must be at least 1")
        with self._receiving:
            self._answer_200()
            if self._buffer or self.read_ended or self.closed or self.failure is not None:
                await trio.lowlevel.checkpoint()
            else:
                await self._readable.park()
            while True:
                self._check_open()
                try:
                    data = self.read(limit)
                except HboneError as error:
                    raise trio.BrokenResourceError(str(error)) from error
                if data is not None:
                    return data
                await self._readable.park()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`. On return it is queued for the tunnel's writer; the queue is bounded.

        Raises:
            trio.BrokenResourceError: the stream was reset, or the tunnel lost.
            trio.ClosedResourceError: closed by us, or `send_eof` was called.
            trio.BusyResourceError: another task is sending.
        """
        with self._sending:
            self._answer_200()
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            with memoryview(data) as given, given.cast("B") as view:
                start = 0
                while start < len(view):
                    with view[start:] as rest:
                        taken = self._write(rest)
                    start += taken
                    if not taken:
                        await self._writable.park()
                        self._check_sendable()
                    elif start < len(view) and len(self.session.streams) > 1:
                        await trio.lowlevel.checkpoint()  # the queue is shared; let others have their frames in it
                        self._check_sendable()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the windows and the queue have room.

        Raises:
            trio.BrokenResourceError: the stream was reset, or the tunnel lost.
            trio.ClosedResourceError: closed by us, or `send_eof` was called.
            trio.BusyResourceError: another task is sending.
        """
        with self._sending:
            self._answer_200()
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            while not self._has_room():
                await self._writable.park()
                self._check_sendable()

    async def send_eof(self) -> None:
        """Send END_STREAM; the peer's direction goes on. Calling it again does nothing.

        Raises:
            trio.BrokenResourceError: the stream was reset, or the tunnel lost.
            trio.ClosedResourceError: closed by us.
            trio.BusyResourceError: another task is sending.
        """
        with self._sending:
            self._answer_200()
            await trio.lowlevel.checkpoint()
            if self._write_ended and not self.closed:
                return
            self._check_sendable()
            self.end()

    async def aclose(self) -> None:
        """Send END_STREAM, then RST_STREAM if the peer is still sending."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """As `aclose`, without a checkpoint."""
        super().close()
        self._wake_all()

    def reset(self, code: ErrorCode = ErrorCode.CONNECT_ERROR) -> None:
        """End both directions abruptly, with RST_STREAM.

        Args:
            code: by default CONNECT_ERROR, which stands for a reset TCP connection. Source: RFC 9113 §8.5.
        """
        super().reset(code)
        self._wake_all()

    def reject(self, status: int, headers: Headers = ()) -> None:
        """Server: answer CONNECT with another status than 200, and close.

        Raises:
            LocalProtocolError: it was accepted before.
        """
        super().reject(status, headers)
        self._wake_all()

    async def wait_answer(self) -> None:
        """Client: wait for the answer to CONNECT; its outcome is in `opened` and `failure`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.opened and self.failure is None:
            await self._answer.park()

    async def wait_failure(self) -> HboneError:
        """Wait until the stream breaks: the peer resets it, or the tunnel is lost. For who is busy elsewhere."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.failure is None:
            await self._answer.park()
        return self.failure

    def on_readable(self) -> None:
        """Wake who receives."""
        self._readable.unpark_all()

    def on_writable(self) -> None:
        """Wake who sends."""
        self._writable.unpark_all()

    def on_answer(self) -> None:
        """Wake who asked for this stream, and who watches it."""
        self._answer.unpark_all()

    def _wake_all(self) -> None:
        self._readable.unpark_all()
        self._writable.unpark_all()
        self._answer.unpark_all()

    def _answer_200(self) -> None:
        if not self.opened and not self.closed and not self.session.client:
            self.accept()

    def _check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("the stream was closed")

    def _check_sendable(self) -> None:
        self._check_open()
        if self.failure is not None:
            raise trio.BrokenResourceError(str(self.failure)) from self.failure
        if self._write_ended:
            raise trio.ClosedResourceError("END_STREAM was sent")

    def _has_room(self) -> bool:
        try:
            return self.capacity() > 0
        except HboneError as error:
            raise trio.BrokenResourceError(str(error)) from error

    def _write(self, view: memoryview) -> int:
        try:
            return self.write(view)
        except HboneError as error:
            raise trio.BrokenResourceError(str(error)) from error
