"""A client's end of a gRPC connection, without I/O.

Source: gRPC over HTTP2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, ResponseReceived, StreamEnded, TrailersReceived

from hbone.errors import ErrorCode, LocalProtocolError
from hbone.grpc.call import Call
from hbone.grpc.connection import CONTENT_TYPE, GrpcConnection
from hbone.grpc.metadata import Metadata, decode_metadata, encode_metadata, encode_timeout
from hbone.grpc.status import GrpcError, GrpcUnavailable, StatusCode, decode_message, status_from_http

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.engine.flow import WindowBudget
    from hbone.grpc.config import GrpcConfig

__all__ = ["ClientConnection"]

_LAST_STREAM: Final = 2**30
"""No stream is opened beyond; it is time for another connection."""
_USER_AGENT: Final = b"grpc-python-hbone/0.1"


class ClientConnection(GrpcConnection):
    """Makes calls.

    Args:
        authority: the server's name and port, as `:authority`.
        config: limits and times.
        peer: the server's name in error messages.
        budget: shared by connections: bytes of large messages that are being received.
    """

    client: ClassVar[bool] = True

    def __init__(
        self,
        *,
        authority: str = "localhost",
        config: GrpcConfig | None = None,
        peer: str = "the server",
        budget: WindowBudget | None = None,
    ) -> None:
        super().__init__(config=config, peer=peer, budget=budget)
        self._authority = authority
        self._handlers[ResponseReceived] = self._on_response
        self._handlers[TrailersReceived] = self._on_trailers
        self._handlers[ConnectionTerminated] = self._on_goaway

    def start_call(self, path: str, metadata: Metadata = (), *, timeout: float | None = None) -> Call:
        """Begin a call.

        Args:
            path: `/package.Service/Method`.
            metadata: sent with the request.
            timeout: seconds that the server is told it has.

        Raises:
            GrpcUnavailable: this connection takes no more calls; another one may.
            LocalProtocolError: unusable path or metadata; nothing was sent.
        """
        fields = encode_metadata(metadata)
        if not path.startswith("/") or path.count("/") != 2 or not path.isascii() or not path.isprintable():
            raise LocalProtocolError(f"{path!r} is not a method; write /package.Service/Method")
        if self.closed or self.draining:
            raise GrpcUnavailable(f"the connection to {self._peer} is closing", processed=False)
        if len(self.calls) >= self.peer_max_streams:
            raise GrpcUnavailable(
                f"{len(self.calls)} calls are open, which is all that {self._peer} allows", processed=False
            )
        stream_id = self._http2.get_next_available_stream_id()
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":path", path.encode()),
            (b":authority", self._authority.encode()),
            (b"content-type", CONTENT_TYPE),
            (b"te", b"trailers"),
            (b"user-agent", _USER_AGENT),
        ]
        if timeout is not None:
            headers.append((b"grpc-timeout", encode_timeout(timeout)))
        self._http2.send_headers(stream_id, headers + fields)
        call = Call(self, stream_id, path)
        call.headers_sent = True
        call.timeout = timeout
        self.calls[stream_id] = call
        self.draining = stream_id >= _LAST_STREAM
        return call

    def end(self, call: Call) -> None:
        """No more messages; the call goes on until the server's status."""
        if call._closing is None and not call.closed:
            call._closing = []
            self._mark_ready(call)

    def _before_message(self, call: Call) -> None:
        """The request's headers left when the call began."""

    def _send_closing(self, call: Call) -> None:
        if call._closing == []:
            call._closing = [(b"", b"")]
            self._http2.end_stream(call.stream_id)

    def _on_response(self, event: ResponseReceived, _: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if call is None:
            return
        fields = event.headers or []
        found = {bytes(name): bytes(value) for name, value in fields}
        given = found.get(b":status", b"")
        status = int(given) if given.isdigit() and len(given) == 3 else 0
        if b"grpc-status" in found:
            self._note_status(call, fields)
            return
        if status != 200:
            shown = given[:8].decode("ascii", "backslashreplace")
            problem = GrpcError(status_from_http(status), f"the server answered with HTTP status {shown or '(none)'}")
        elif not found.get(b"content-type", b"").startswith(CONTENT_TYPE):
            problem = GrpcError(StatusCode.UNKNOWN, "the server's answer is not gRPC")
        elif found.get(b"grpc-encoding", b"identity") != b"identity":
            problem = GrpcError(StatusCode.INTERNAL, "the server compresses, which we did not allow")
        else:
            try:
                call.metadata = decode_metadata(fields)
                call.opened = True
                self._changed[call] = None
                return
            except GrpcError as error:
                problem = GrpcError(StatusCode.INTERNAL, f"the server's answer: {error.message}")
        self._abandon(call, problem)

    def _on_trailers(self, event: TrailersReceived, _: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if call is not None:
            self._note_status(call, event.headers or [])

    def _note_status(self, call: Call, fields: Iterable[tuple[bytes, bytes]]) -> None:
        found = {bytes(name): bytes(value) for name, value in fields}
        if b"grpc-status" not in found:
            return
        code = StatusCode.from_wire(found[b"grpc-status"])
        try:
            call.trailers = decode_metadata(fields)
        except GrpcError:
            call.trailers = ()  # the status matters more
        call._status = GrpcError(code, decode_message(found.get(b"grpc-message", b"")), call.trailers)

    def _on_end(self, event: StreamEnded, now: float) -> None:
        call = self.calls.get(event.stream_id or 0)
        if call is None:
            return
        super()._on_end(event, now)
        status = call._status or GrpcError(StatusCode.UNKNOWN, "the server ended the call without a status")
        if call.unsent or not call._closing:
            self._reset(call.stream_id, ErrorCodes.CANCEL)  # we had more to say
        call._status = status
        self._finish_call(call, status if status.code != StatusCode.OK else None)

    def _abandon(self, call: Call, failure: GrpcError) -> None:
        self._reset(call.stream_id, ErrorCodes.CANCEL)
        self._finish_call(call, failure)

    def _on_goaway(self, event: ConnectionTerminated, _: float) -> None:
        self.draining = True
        code = ErrorCode.from_wire(int(event.error_code or 0))
        last = event.last_stream_id or 0
        debug = (event.additional_data or b"").decode("ascii", "replace")
        reason = f"{self._peer} is closing the connection (received prior goaway: {code.name}{debug and ', '}{debug})"
        for call in list(self.calls.values()):
            if call.stream_id > last:
                self._finish_call(call, GrpcUnavailable(reason, processed=False))
        self._close_if_drained()
