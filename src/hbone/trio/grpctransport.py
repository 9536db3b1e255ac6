"""TLS and gRPC over one Trio stream: what client and server share.

One task reads, one writes, one keeps time. The reader never waits for an application, so a call that nobody reads
stalls alone; only the writer sends on the transport. A lost connection is state: its calls raise, the tasks just end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import trio

from hbone.config import KIB
from hbone.errors import ConnectionLost, HboneError
from hbone.grpc import Call, GrpcConnection, GrpcError, StatusCode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hbone.tls import IoBuffer, TlsConnection

__all__ = ["CHUNK", "Transport"]

G = TypeVar("G", bound=GrpcConnection)

CHUNK: Final = 64 * KIB
"""Bytes read at once, and the size of the buffer."""
_LOW: Final = 64 * KIB
"""A sender waits while more than this of its call waits, in bytes."""
_FLUSH_SECONDS: Final = 1.0
"""For the last bytes of a connection: GOAWAY, an alert, close_notify."""


class Transport(Generic[G]):
    """TLS and gRPC over one Trio stream, and the tasks that drive them.

    Args:
        stream: the transport; owned from now on.
        tls: a new TLS connection.
        grpc: a new gRPC connection.
        buffer: for plaintext and ciphertext in passing; may be shared within a thread.
        on_call: server: called with each new call; must return at once.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        tls: TlsConnection,
        grpc: G,
        buffer: IoBuffer,
        on_call: Callable[[Call], None] | None = None,
    ) -> None:
        self.stream = stream
        self.tls = tls
        self.grpc = grpc
        self.failure: HboneError | None = None
        """Why the connection is over."""
        self._buffer = buffer
        self._on_call = on_call
        self._waiting: dict[Call, trio.lowlevel.ParkingLot] = {}
        self.scopes: dict[Call, trio.CancelScope] = {}
        """Of handlers; cancelled when their call is over."""
        self._wake = trio.Event()
        self._read_all = trio.Event()
        self._writing = trio.CancelScope()
        self._timing = trio.CancelScope()

    async def handshake(self) -> None:
        """Complete the TLS handshake.

        Raises:
            TlsError: it failed; the alert was sent.
            ConnectionLost: the peer went away, or took too long.
        """
        seconds = self.grpc.config.handshake_timeout
        try:
            with trio.fail_after(seconds):
                while True:
                    try:
                        done = self.tls.handshake()
                    finally:
                        await self._send_ciphertext()
                    if done:
                        break
                    data = await self.stream.receive_some(CHUNK)
                    if not data:
                        raise ConnectionLost("the peer closed the connection during the TLS handshake")
                    self.tls.receive_data(data)
        except trio.TooSlowError:
            raise ConnectionLost(f"the TLS handshake took longer than {seconds:g} seconds") from None
        except trio.BrokenResourceError as error:
            raise ConnectionLost(f"the connection broke during the TLS handshake: {_reason(error)}") from error
        self.grpc.start(trio.current_time())

    async def run(self) -> None:
        """Drive the connection until it is over, then close the transport. Never raises for what the peer does."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                nursery.start_soon(self._keep_time)
                await self._write()
                nursery.cancel_scope.cancel()
        finally:
            self.lose(ConnectionLost("it was closed by this end"))
            await trio.aclose_forcefully(self.stream)

    def wake(self) -> None:
        """Something is to be sent, or a deadline has moved."""
        self._wake.set()
        self._timing.deadline = self._deadline()

    def close(self) -> None:
        """End all calls; the last bytes have a second to leave."""
        self.grpc.close()
        self.lose(ConnectionLost("it was closed by this end"))

    def lose(self, reason: HboneError) -> None:
        """Note why the connection is over, and wake everybody."""
        if self.failure is None:
            self.failure = reason
            self._writing.deadline = trio.current_time() + _FLUSH_SECONDS
        self.grpc.connection_lost(reason)
        self._dispatch()
        self._wake.set()

    async def wait(self, call: Call) -> None:
        """Until something about `call` changes."""
        await self._waiting.setdefault(call, trio.lowlevel.ParkingLot()).park()

    def forget(self, call: Call) -> None:
        """Nobody waits for `call` again."""
        self._waiting.pop(call, None)

    async def receive(self, call: Call, limit: int | None) -> bytes | None:
        """The next message of `call`; None after the last."""
        await trio.lowlevel.checkpoint()
        while True:
            message = call.receive(limit)
            self.wake()
            if message is not None or call.ended:
                return message
            await self.wait(call)

    async def send(self, call: Call, message: bytes | Sequence[bytes]) -> None:
        """Queue `message`, and wait until the peer has taken nearly all of it."""
        await self._until_low(call)
        self.grpc.send_message(call, message)
        self.wake()
        await self._until_low(call)

    async def _until_low(self, call: Call) -> None:
        await trio.lowlevel.checkpoint()
        seconds = self.grpc.config.stall_timeout
        while call.unsent > _LOW:
            with trio.move_on_after(seconds):
                await self.wait(call)
                continue
            self.grpc.cancel(call)
            self.wake()
            raise GrpcError(StatusCode.UNAVAILABLE, f"the peer took nothing of a message for {seconds:g} seconds")
        if call.closed and call.failure is not None:
            raise call.failure

    def _dispatch(self) -> None:
        for call in self.grpc.take_changed():
            waiting = self._waiting.get(call)
            if waiting is not None:
                waiting.unpark_all()
            if call.closed and call in self.scopes:
                self.scopes[call].cancel()

    async def _read(self) -> None:
        grpc, tls, buffer = self.grpc, self.tls, self._buffer
        try:
            self._decrypt(tls, grpc, buffer)  # what came with the end of the handshake
            while data := await self.stream.receive_some(CHUNK):
                if not grpc.closed:
                    tls.receive_data(data)
                    self._decrypt(tls, grpc, buffer)
            tls.receive_eof()
            raise ConnectionLost("the peer closed the connection")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.lose(ConnectionLost(f"the connection broke: {_reason(error)}"))
        except HboneError as error:
            self.lose(error)
        finally:
            self._read_all.set()

    def _decrypt(self, tls: TlsConnection, grpc: GrpcConnection, buffer: IoBuffer) -> None:
        try:
            while nbytes := tls.read_into(buffer, 0, buffer.size):
                for call in grpc.receive_data(buffer.view[:nbytes], trio.current_time()):
                    if self._on_call is not None:
                        self._on_call(call)
            if tls.closed_by_peer:
                raise ConnectionLost("the peer closed the connection")
        finally:
            self._dispatch()
            self.wake()

    async def _write(self) -> None:
        with self._writing:
            try:
                while True:
                    plaintext = self.grpc.data_to_send()
                    self._dispatch()
                    if plaintext:
                        self.tls.write(plaintext)
                    if await self._send_ciphertext() or plaintext:
                        continue
                    if self.grpc.closed:
                        await self._finish()
                        return
                    await self._wake.wait()
                    self._wake = trio.Event()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.lose(ConnectionLost(f"the connection broke: {_reason(error)}"))
            except HboneError as error:
                self.lose(error)

    async def _finish(self) -> None:
        """Say close_notify. A server waits for the client to close: a reset could overtake the last statuses."""
        self.tls.shutdown()
        await self._send_ciphertext()
        if not self.grpc.client and isinstance(self.stream, trio.abc.HalfCloseableStream):
            await self.stream.send_eof()
            with trio.move_on_after(_FLUSH_SECONDS):
                await self._read_all.wait()

    async def _send_ciphertext(self) -> int:
        """Send what TLS has ready; the number of bytes."""
        sent = 0
        seconds = self.grpc.config.stall_timeout
        while nbytes := self.tls.data_to_send_into(self._buffer):
            chunk = bytes(self._buffer.view[:nbytes])  # the buffer is used by others while we wait
            try:
                with trio.fail_after(seconds):
                    await self.stream.send_all(chunk)
            except trio.TooSlowError:
                raise ConnectionLost(f"the peer read nothing for {seconds:g} seconds") from None
            sent += nbytes
        return sent

    async def _keep_time(self) -> None:
        while not self.grpc.closed:
            with trio.CancelScope(deadline=self._deadline()) as self._timing:
                await trio.sleep_forever()
            try:
                self.grpc.on_time(trio.current_time())
            except HboneError as error:
                self.lose(error)
            self._dispatch()
            self._wake.set()

    def _deadline(self) -> float:
        due = self.grpc.next_deadline()
        return math.inf if due is None else due


def _reason(error: BaseException) -> str:
    """The operating system's words for a broken stream."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return str(cause or error) or type(error).__name__
