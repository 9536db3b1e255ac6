"""A server's end of a gRPC connection, without I/O.

Source: gRPC over HTTP2.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, ClassVar, Final

from h2.errors import ErrorCodes
from h2.events import PingAckReceived, RequestReceived
from h2.exceptions import H2Error

from hbone.engine.frames import MAX_STREAM_ID
from hbone.engine.guard import Flood
from hbone.grpc.call import Call
from hbone.grpc.connection import CONTENT_TYPE, GrpcConnection
from hbone.grpc.metadata import Metadata, decode_metadata, decode_timeout, encode_metadata
from hbone.grpc.status import GrpcError, GrpcUnavailable, StatusCode, encode_message

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.engine.flow import WindowBudget
    from hbone.grpc.config import GrpcConfig

__all__ = ["ServerConnection"]

_DRAIN_PING: Final = b"draining"
_OPENING: Final = [(b":status", b"200"), (b"content-type", CONTENT_TYPE)]


class ServerConnection(GrpcConnection):
    """Answers calls; `receive_data` returns those that begin.

    Args:
        config: limits and times.
        peer: the client's name in error messages.
        budget: shared by connections: bytes of large messages that are being received.
    """

    client: ClassVar[bool] = False

    def __init__(
        self, *, config: GrpcConfig | None = None, peer: str = "the client", budget: WindowBudget | None = None
    ) -> None:
        super().__init__(config=config, peer=peer, budget=budget)
        self._refuse_above = MAX_STREAM_ID
        self._drain_ping_due: float | None = None
        self._drain_due: float | None = None
        self._handlers[RequestReceived] = self._on_request
        self._handlers[PingAckReceived] = self._on_ping_ack

    # Time

    def next_deadline(self) -> float | None:
        """When `on_time` is wanted next."""
        due = [super().next_deadline(), self._drain_ping_due, self._drain_due]
        return None if self.closed else min((at for at in due if at is not None), default=None)

    def on_time(self, now: float) -> None:
        """Do what is due; see the base class for what it raises."""
        if self._drain_ping_due is not None and now >= self._drain_ping_due:
            self._drain_finally()
        if self._drain_due is not None and now >= self._drain_due:
            self._drain_due = None
            for call in list(self.calls.values()):
                self._cut(call)
            self._close_if_drained()
        super().on_time(now)

    def drain(self, now: float) -> None:
        """Take no new calls, in two steps so that none in flight is lost; open ones have `drain_grace` seconds.

        Source: RFC 9113 §6.8.
        """
        if self.draining or self.closed:
            return
        self.draining = True
        self._drain_due = now + self.config.drain_grace
        self._drain_ping_due = now + min(1.0, self.config.drain_grace)
        self._http2.close_connection(last_stream_id=MAX_STREAM_ID)
        self._http2.ping(_DRAIN_PING)

    def _drain_finally(self) -> None:
        self._drain_ping_due = None
        self._refuse_above = self._http2.highest_inbound_stream_id
        self._http2.close_connection(last_stream_id=self._refuse_above)
        self._close_if_drained()

    def _close_if_drained(self) -> None:
        if self._drain_ping_due is None:
            super()._close_if_drained()

    def _on_ping_ack(self, event: PingAckReceived, _: float) -> None:
        if event.ping_data == _DRAIN_PING and self._drain_ping_due is not None:
            self._drain_finally()

    # Calls

    def send_headers(self, call: Call, metadata: Metadata = ()) -> None:
        """Response headers, once; the first message sends them otherwise."""
        if not call.headers_sent and not call.closed and call._closing is None:
            fields = encode_metadata(metadata)
            call.headers_sent = True
            self._http2.send_headers(call.stream_id, [*_OPENING, *fields])

    def finish(self, call: Call, code: StatusCode = StatusCode.OK, message: str = "", trailers: Metadata = ()) -> None:
        """The call's status, after the messages that were queued. Without effect on one that is over."""
        if call.closed or call._closing is not None:
            return
        fields = encode_metadata(trailers)
        closing = [(b"grpc-status", b"%d" % code)]
        if message:
            closing.append((b"grpc-message", encode_message(message)))
        call._closing = closing + fields
        call._wanted = None
        self._mark_ready(call)

    def _before_message(self, call: Call) -> None:
        self.send_headers(call)

    def _cut(self, call: Call) -> None:
        """End a call whose time is over, whatever waits to be sent."""
        call._queue.clear()
        call.unsent = 0
        call._closing = None
        # A ztunnel that reads these words calls again at once.
        self.finish(call, StatusCode.UNAVAILABLE, "the connection has reached its age: transport is closing")
        self._send_closing(call)
        call.failure = GrpcUnavailable("the connection has drained")

    def _send_closing(self, call: Call) -> None:
        closing = call._closing
        fields: Iterable[tuple[bytes, bytes]] = closing or []
        if not call.headers_sent:
            fields = [*_OPENING, *fields]
            call.headers_sent = True
        self._http2.send_headers(call.stream_id, fields, end_stream=True)
        if not call.ended:  # it need not go on sending. Source: RFC 9113 §8.1
            self._reset(call.stream_id, ErrorCodes.NO_ERROR)
        self._finish_call(call, None)

    def _on_request(self, event: RequestReceived, now: float) -> None:
        stream_id, fields = event.stream_id, event.headers or []
        assert stream_id is not None
        if stream_id > self._refuse_above or len(self.calls) >= self.config.max_concurrent_streams:
            self._guard.floods.count(Flood.REFUSAL, now)
            self._reset(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        found = {bytes(name): bytes(value) for name, value in fields}
        if found.get(b":method") != b"POST":
            self._reject(stream_id, b"405")
            return
        content_type = found.get(b"content-type", b"")
        if not content_type.startswith(CONTENT_TYPE) or content_type[16:17] not in (b"", b"+", b";"):
            self._reject(stream_id, b"415")
            return
        call = Call(self, stream_id, found.get(b":path", b"").decode("latin-1"))
        call.authority = found.get(b":authority", found.get(b"host", b"")).decode("latin-1")
        self.calls[stream_id] = call
        try:
            if found.get(b"grpc-encoding", b"identity") != b"identity":
                raise GrpcError(StatusCode.UNIMPLEMENTED, "compressed messages are not supported")
            if b"grpc-timeout" in found:
                call.timeout = decode_timeout(found[b"grpc-timeout"])
            call.metadata = decode_metadata(fields)
        except GrpcError as error:
            self.finish(call, error.code, error.message)
            return
        self._received.append(call)

    def _reject(self, stream_id: int, status: bytes) -> None:
        """Answer what is no gRPC request."""
        with contextlib.suppress(H2Error):
            self._http2.send_headers(stream_id, [(b":status", status)], end_stream=True)
            self._http2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
