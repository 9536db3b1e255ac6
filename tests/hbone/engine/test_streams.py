"""The table of stream states."""

import pytest

from hbone.engine.streams import FAULTS, TRANSITIONS, Input, Stream, StreamState
from hbone.errors import ErrorCode

LIVE = [state for state in StreamState if state not in (StreamState.IDLE, StreamState.CLOSED)]


def make_stream() -> Stream:
    return Stream(1, size=65_535, limit=65_535, send_window=65_535, now=0.0)


def test_every_row_names_its_rfc() -> None:
    for _, source in [*TRANSITIONS.values(), *FAULTS.values()]:
        assert source.startswith("RFC 91")
        assert "§" in source


def test_no_row_is_both_allowed_and_a_fault() -> None:
    assert not set(TRANSITIONS) & set(FAULTS)


def test_every_state_can_be_reached_and_left() -> None:
    reached = {StreamState.IDLE}
    while True:
        more = {row[0] for (state, _), row in TRANSITIONS.items() if state in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(StreamState)
    assert {state for state, _ in TRANSITIONS} == set(StreamState) - {StreamState.CLOSED}


@pytest.mark.parametrize(
    "state", [state for state in StreamState if state not in (StreamState.IDLE, StreamState.CLOSED)]
)
def test_a_reset_from_either_side_closes_any_live_stream(state: StreamState) -> None:
    for reset in (Input.SEND_RESET, Input.RECEIVE_RESET):
        assert TRANSITIONS[state, reset][0] is StreamState.CLOSED


@pytest.mark.parametrize(
    "state", [state for state in StreamState if state not in (StreamState.IDLE, StreamState.CLOSED)]
)
@pytest.mark.parametrize("received", [Input.RECEIVE_DATA, Input.RECEIVE_END])
def test_payload_is_either_allowed_or_has_its_fault(state: StreamState, received: Input) -> None:
    assert ((state, received) in TRANSITIONS) != ((state, received) in FAULTS)


def test_payload_after_the_peers_end_is_stream_closed() -> None:
    for state in (StreamState.HALF_CLOSED_REMOTE, StreamState.RECEIVED_ENDED):
        assert FAULTS[state, Input.RECEIVE_DATA][0] is ErrorCode.STREAM_CLOSED


@pytest.mark.parametrize("state", list(StreamState))
def test_sink_is_set_exactly_where_the_peer_may_send_an_answered_stream(state: StreamState) -> None:
    stream = make_stream()
    stream.reader = len
    stream.enter(state)
    assert (stream.sink is not None) == (state in (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL))
    assert stream.writable == ((state, Input.SEND_END) in TRANSITIONS)
