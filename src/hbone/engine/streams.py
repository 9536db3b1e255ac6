"""One stream of a tunnel: its state, and the table of what changes it.

A CONNECT stream lives like this: the client sends the request (`REQUESTED`), the server has it (`RECEIVED`) until it
accepts (`OPEN`) or rejects (`CLOSED`). Each side ends its direction once (`HALF_CLOSED_*`). The `*_ENDED` states
are a direction that ended before the answer. DATA without END_STREAM changes no state and does not ask the table:
`sink` is set while payload may be handed over, `writable` while it may be sent.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from hbone.engine.flow import ReceiveWindow
from hbone.enums import plain_members
from hbone.errors import ErrorCode

__all__ = ["FAULTS", "NEXT", "TRANSITIONS", "Input", "Sink", "Stream", "StreamState"]

Sink = Callable[[memoryview], int]
"""Takes the payload of DATA. It keeps or writes every byte before it returns, since the view is valid during the call
only, and returns how many of them may be credited to the stream at once; the rest waits for `release_capacity`. It
must not raise."""


@plain_members
class StreamState(enum.IntEnum):
    """Where a stream is. Source: RFC 9113 §5.1."""

    IDLE = 0
    REQUESTED = 1
    """Client: the request is sent, no answer yet."""
    REQUESTED_ENDED = 2
    """Client: the same, and we ended our direction."""
    RECEIVED = 3
    """Server: the request is here, not answered yet."""
    RECEIVED_ENDED = 4
    """Server: the same, and the client ended its direction."""
    OPEN = 5
    HALF_CLOSED_LOCAL = 6
    HALF_CLOSED_REMOTE = 7
    CLOSED = 8


@plain_members
class Input(enum.IntEnum):
    """What happens to a stream."""

    SEND_CONNECT = 0
    RECEIVE_CONNECT = 1
    SEND_ACCEPT = 2
    RECEIVE_ACCEPT = 3
    SEND_REFUSAL = 4
    RECEIVE_REFUSAL = 5
    RECEIVE_INTERIM = 6
    """A 1xx answer."""
    RECEIVE_DATA = 7
    SEND_END = 8
    RECEIVE_END = 9
    RECEIVE_TRAILERS = 10
    SEND_RESET = 11
    RECEIVE_RESET = 12


_S, _I = StreamState, Input

TRANSITIONS: Final[dict[tuple[StreamState, Input], tuple[StreamState, str]]] = {
    (_S.IDLE, _I.SEND_CONNECT): (_S.REQUESTED, "RFC 9113 §8.5"),
    (_S.IDLE, _I.RECEIVE_CONNECT): (_S.RECEIVED, "RFC 9113 §8.5"),
    (_S.REQUESTED, _I.RECEIVE_INTERIM): (_S.REQUESTED, "RFC 9113 §8.1"),
    (_S.REQUESTED, _I.RECEIVE_ACCEPT): (_S.OPEN, "RFC 9113 §8.5"),
    (_S.REQUESTED, _I.RECEIVE_REFUSAL): (_S.CLOSED, "RFC 9110 §9.3.6"),
    (_S.REQUESTED, _I.SEND_END): (_S.REQUESTED_ENDED, "RFC 9113 §5.1"),
    (_S.REQUESTED, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.REQUESTED, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.REQUESTED_ENDED, _I.RECEIVE_INTERIM): (_S.REQUESTED_ENDED, "RFC 9113 §8.1"),
    (_S.REQUESTED_ENDED, _I.RECEIVE_ACCEPT): (_S.HALF_CLOSED_LOCAL, "RFC 9113 §8.5"),
    (_S.REQUESTED_ENDED, _I.RECEIVE_REFUSAL): (_S.CLOSED, "RFC 9110 §9.3.6"),
    (_S.REQUESTED_ENDED, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.REQUESTED_ENDED, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.RECEIVED, _I.RECEIVE_DATA): (_S.RECEIVED, "RFC 9113 §8.5"),
    (_S.RECEIVED, _I.RECEIVE_END): (_S.RECEIVED_ENDED, "RFC 9113 §5.1"),
    (_S.RECEIVED, _I.SEND_ACCEPT): (_S.OPEN, "RFC 9113 §8.5"),
    (_S.RECEIVED, _I.SEND_REFUSAL): (_S.CLOSED, "RFC 9113 §8.1"),
    (_S.RECEIVED, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.RECEIVED, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.RECEIVED_ENDED, _I.SEND_ACCEPT): (_S.HALF_CLOSED_REMOTE, "RFC 9113 §8.5"),
    (_S.RECEIVED_ENDED, _I.SEND_REFUSAL): (_S.CLOSED, "RFC 9113 §8.1"),
    (_S.RECEIVED_ENDED, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.RECEIVED_ENDED, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.OPEN, _I.RECEIVE_DATA): (_S.OPEN, "RFC 9113 §8.5"),
    (_S.OPEN, _I.SEND_END): (_S.HALF_CLOSED_LOCAL, "RFC 9113 §5.1"),
    (_S.OPEN, _I.RECEIVE_END): (_S.HALF_CLOSED_REMOTE, "RFC 9113 §5.1"),
    (_S.OPEN, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.OPEN, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.HALF_CLOSED_LOCAL, _I.RECEIVE_DATA): (_S.HALF_CLOSED_LOCAL, "RFC 9113 §5.1"),
    (_S.HALF_CLOSED_LOCAL, _I.RECEIVE_END): (_S.CLOSED, "RFC 9113 §5.1"),
    (_S.HALF_CLOSED_LOCAL, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.HALF_CLOSED_LOCAL, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.HALF_CLOSED_REMOTE, _I.SEND_END): (_S.CLOSED, "RFC 9113 §5.1"),
    (_S.HALF_CLOSED_REMOTE, _I.SEND_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
    (_S.HALF_CLOSED_REMOTE, _I.RECEIVE_RESET): (_S.CLOSED, "RFC 9113 §6.4"),
}
"""What may happen, what it leads to, and who says so. Anything else is misuse of ours, or a fault of the peer's."""

FAULTS: Final[dict[tuple[StreamState, Input], tuple[ErrorCode, str]]] = {
    (_S.RECEIVED_ENDED, _I.RECEIVE_DATA): (ErrorCode.STREAM_CLOSED, "RFC 9113 §5.1"),
    (_S.RECEIVED_ENDED, _I.RECEIVE_END): (ErrorCode.STREAM_CLOSED, "RFC 9113 §5.1"),
    (_S.RECEIVED_ENDED, _I.RECEIVE_TRAILERS): (ErrorCode.STREAM_CLOSED, "RFC 9113 §5.1"),
    (_S.HALF_CLOSED_REMOTE, _I.RECEIVE_DATA): (ErrorCode.STREAM_CLOSED, "RFC 9113 §5.1"),
    (_S.HALF_CLOSED_REMOTE, _I.RECEIVE_END): (ErrorCode.STREAM_CLOSED, "RFC 9113 §5.1"),
    (_S.HALF_CLOSED_REMOTE, _I.RECEIVE_TRAILERS): (ErrorCode.STREAM_CLOSED, "RFC 9113 §5.1"),
    (_S.REQUESTED, _I.RECEIVE_DATA): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.1"),
    (_S.REQUESTED, _I.RECEIVE_END): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.1"),
    (_S.REQUESTED_ENDED, _I.RECEIVE_DATA): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.1"),
    (_S.REQUESTED_ENDED, _I.RECEIVE_END): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.1"),
    (_S.RECEIVED, _I.RECEIVE_TRAILERS): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.5"),
    (_S.OPEN, _I.RECEIVE_TRAILERS): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.5"),
    (_S.HALF_CLOSED_LOCAL, _I.RECEIVE_TRAILERS): (ErrorCode.PROTOCOL_ERROR, "RFC 9113 §8.5"),
}
"""What the peer may not do, and the code with which its stream ends."""

NEXT: Final[tuple[tuple[StreamState | None, ...], ...]] = tuple(
    tuple(TRANSITIONS.get((state, how), (None,))[0] for how in Input) for state in StreamState
)
"""The table by numbers, `NEXT[state][how]`, for every stream's way through it."""
_WRITABLE: Final = tuple(state in (_S.REQUESTED, _S.OPEN, _S.HALF_CLOSED_REMOTE) for state in StreamState)
_READABLE: Final = tuple(state in (_S.OPEN, _S.HALF_CLOSED_LOCAL) for state in StreamState)


class Stream(ReceiveWindow):
    """One CONNECT stream. It is its own receive window, so that a DATA frame finds all it needs on one object."""

    __slots__ = ("batch", "early", "id", "interim", "reader", "send_window", "sink", "state", "waiting", "writable")

    def __init__(self, stream_id: int, *, size: int, limit: int, send_window: int, now: float) -> None:
        super().__init__(size, limit, now)
        self.id = stream_id
        self.state = StreamState.IDLE
        self.reader: Sink | None = None
        """Where payload goes once it may."""
        self.sink: Sink | None = None
        """`reader` while the state lets payload through, else None."""
        self.early: bytearray | None = None
        """Payload that came before `accept`."""
        self.send_window = send_window
        self.writable = False
        self.waiting = False
        """`send_capacity` said 0 for want of this stream's window."""
        self.batch = 0
        """The call of `receive_data` that announced this stream, to take it back when the same call resets it."""
        self.interim = 0
        """1xx answers so far."""

    def enter(self, state: StreamState) -> None:
        """Set the state, and what follows from it."""
        self.state = state
        self.writable = _WRITABLE[state]
        self.sink = self.reader if _READABLE[state] else None

    @property
    def answered(self) -> bool:
        """CONNECT was answered with 200."""
        return self.state >= StreamState.OPEN

    @property
    def used(self) -> bool:
        """The peer sent payload on it."""
        return self.updates > 0 or self.credit < self.size
