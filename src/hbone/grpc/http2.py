"""hyper-h2, with three things changed that a control plane needs.

- GOAWAY does not end the connection: open streams go on in both directions, and nothing that waits to be sent is lost.
- A stream over the limit does not end the connection; it is seen, so that it can be refused alone.
- A DATA frame's payload is not spelled out in hexadecimal for a log that nobody reads, which is most of its cost.

Source: RFC 9113 §6.8, §5.1.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, ConnectionState, H2Connection, H2ConnectionStateMachine
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hyperframe.frame import DataFrame

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hyperframe.frame import Frame

__all__ = ["Http2"]

_STAYS_OPEN: Final = {
    (state, given): (None, state)
    for state in (ConnectionState.IDLE, ConnectionState.CLIENT_OPEN, ConnectionState.SERVER_OPEN)
    for given in (ConnectionInputs.SEND_GOAWAY, ConnectionInputs.RECV_GOAWAY)
}


class _DrainableStates(H2ConnectionStateMachine):
    """GOAWAY keeps the state; which streams may still open is decided above."""

    _transitions = {**H2ConnectionStateMachine._transitions, **_STAYS_OPEN}  # noqa: RUF012  # as in the base class


class _QuietData(DataFrame):
    """A DATA frame with a short name."""

    def _body_repr(self) -> str:
        return f"{len(self.data)} bytes"


class _QuietFrames(FrameBuffer):
    """Frames as they are parsed, DATA in its quiet form."""

    def __next__(self) -> Frame:
        frame = super().__next__()
        if frame.__class__ is DataFrame:
            frame.__class__ = _QuietData
        return frame


class Http2(H2Connection):
    """One HTTP/2 connection.

    Args:
        client: which end this is.
        settings: ours, in force from the start.
    """

    MAX_CLOSED_STREAMS = 1024  # remembered, to tell late frames from wrong ones

    def __init__(self, *, client: bool, settings: Mapping[SettingCodes, int]) -> None:
        super().__init__(H2Configuration(client_side=client, header_encoding=None))
        self.state_machine = _DrainableStates()
        self.local_settings = Settings(client=client, initial_values=dict(settings))
        self.decoder.max_header_list_size = settings[SettingCodes.MAX_HEADER_LIST_SIZE]
        self.max_inbound_frame_size = settings[SettingCodes.MAX_FRAME_SIZE]
        self.incoming_buffer = _QuietFrames(server=not client)
        table: dict[type[Frame], Any] = self._frame_dispatch_table
        table[_QuietData] = table[DataFrame]

    @property
    def open_inbound_streams(self) -> int:
        """Never more than allowed, so that one too many reaches us instead of ending the connection."""
        return min(super().open_inbound_streams, self.local_settings.max_concurrent_streams - 1)

    def clear_outbound_data_buffer(self) -> None:
        """Keep what waits to be sent: GOAWAY does not take it back."""
