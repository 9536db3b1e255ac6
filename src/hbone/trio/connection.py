"""A tunnel connection over any Trio stream: one task reads, one writes, one keeps time.

The reader never waits for an application, so a slow stream stalls alone. Only the writer sends on the transport, so
nobody's cancellation can tear a TLS record. A lost connection is state: the streams raise, the tasks just end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from hbone.errors import ConnectionLost, ErrorCode, HboneError
from hbone.session import FLUSH_TIMEOUT, Session, as_request
from hbone.trio.stream import HboneStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.connect import Authority, ConnectRequest
    from hbone.endpoint import Endpoint
    from hbone.identity import SpiffeId

__all__ = ["Connection"]

_RECEIVE = 128 * 1024


class Connection(Session[HboneStream]):
    """One tunnel. Made by `open_tunnel`, `ConnectionPool` and `serve`; `run` drives it.

    Args:
        transport: what carries the ciphertext; the connection owns it from now on.
        endpoint: a new endpoint, on the clock of `trio.current_time`.
        client: whether we dialled.
        on_request: as Session's, and so are the others.
        on_unusable: its.
        on_stream_end: its.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        endpoint: Endpoint,
        *,
        client: bool,
        on_request: Callable[[HboneStream], None] | None = None,
        on_unusable: Callable[[Connection], None] | None = None,
        on_stream_end: Callable[[Connection], None] | None = None,
    ) -> None:
        super().__init__(
            endpoint, client=client, on_request=on_request, on_unusable=on_unusable, on_stream_end=on_stream_end
        )
        self.transport = transport
        self._to_send = trio.lowlevel.ParkingLot()
        self._settled = trio.Event()
        self._ended = trio.Event()
        self._pong = trio.Event()
        self._scope = trio.CancelScope()
        self._timer = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the connection until it is over, then close the transport; `started` after the handshake.

        Raises:
            HboneError: there was no tunnel: the handshake failed, the peer is not authorized, or it went away.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._receive)
                    nursery.start_soon(self._send)
                    nursery.start_soon(self._keep_time)
                    await self._settled.wait()
                    if self.endpoint.established:
                        task_status.started(self)
        finally:
            self.lose(ConnectionLost("the tunnel was closed by this end"))
            self._ended.set()
            await trio.aclose_forcefully(self.transport)
        if not self.endpoint.established and self.failure is not None:
            raise self.failure

    async def connect(self, target: str | Authority | ConnectRequest) -> HboneStream:
        """Client: open a stream to `target` and wait for the answer. Bring a deadline.

        Raises:
            ConnectRejected: the answer was not 200.
            StreamResetError: the peer reset the stream instead.
            ConnectionLost: the tunnel is over.
            LocalProtocolError: the tunnel takes no stream now.
        """
        stream = self.open(as_request(target))
        try:
            await stream.wait_answer()
        except BaseException:
            stream.reset(ErrorCode.CANCEL)
            raise
        if stream.failure is not None and not stream.opened:
            raise stream.failure
        return stream

    async def ping(self) -> None:
        """Send PING and wait for its answer. Bring a deadline.

        Raises:
            ConnectionLost: the tunnel is over.
        """
        self.check()
        self.engine.ping(trio.current_time())
        self.wake_writer()
        await self._pong.wait()
        self.check()

    async def aclose(self) -> None:
        """`close`, and wait until the last bytes have left, at most a second; at once when cancelled."""
        self.close()
        try:
            await self._ended.wait()
        finally:
            self._scope.cancel()

    # What the session tells

    def now(self) -> float:
        """Trio's clock."""
        return trio.current_time()

    def wake_writer(self) -> None:
        """There is something to send."""
        self._to_send.unpark_all()

    def rearm(self) -> None:
        """Bring the timer forward if need be."""
        deadline = self.endpoint.next_deadline()
        if deadline is not None and deadline < self._timer.deadline:
            self._timer.deadline = deadline

    def make_stream(self, request: ConnectRequest, peer: SpiffeId) -> HboneStream:
        """A Trio stream."""
        return HboneStream(self, request, peer)

    def on_established(self) -> None:
        """The handshake is complete."""
        self._settled.set()

    def on_pong(self) -> None:
        """The peer answered a PING."""
        self._pong.set()
        self._pong = trio.Event()

    def on_lost(self) -> None:
        """The connection is over: what is queued may still leave, for a moment."""
        self._settled.set()
        self._pong.set()
        self._scope.deadline = min(self._scope.deadline, trio.current_time() + FLUSH_TIMEOUT)
        self.wake_writer()

    # Tasks

    async def _receive(self) -> None:
        endpoint = self.endpoint
        while self.failure is None:
            try:
                data = await self.transport.receive_some(_RECEIVE)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._lose("the transport broke", error)
                return
            now = trio.current_time()
            try:
                events = endpoint.receive_data(data, now) if data else endpoint.receive_eof(now)
            except HboneError as error:
                self.lose(error)
                return
            if events:
                self.dispatch(events)
            if not data:
                self._lose("the peer closed the connection", None)
                return
            if endpoint.wants_flush:
                self.wake_writer()
            self.rearm()

    async def _send(self) -> None:
        endpoint = self.endpoint
        while True:
            data = endpoint.data_to_send()
            if data:
                try:
                    await self.transport.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self._lose("the transport broke", error)
                    break
                self.unblock()
            elif self.failure is not None:
                break
            else:
                await self._to_send.park()
        self._scope.cancel()

    async def _keep_time(self) -> None:
        while self.failure is None:
            deadline = self.endpoint.next_deadline()
            with trio.CancelScope(deadline=math.inf if deadline is None else deadline) as self._timer:
                await trio.sleep_forever()
            self.dispatch(self.endpoint.on_time(trio.current_time()))
            if self.endpoint.wants_flush:
                self.wake_writer()

    def _lose(self, what: str, cause: BaseException | None) -> None:
        lost = ConnectionLost(f"{what}: {cause}" if cause is not None and str(cause) else what)
        lost.__cause__ = cause
        self.lose(lost)
