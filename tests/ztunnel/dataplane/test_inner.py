"""Tunnels inside tunnels, with no kernel and no task: windows, ends, and bytes in every split."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.compiled import stand_in
from tests.support.nested import Nested

from hbone.config import ConnectionConfig
from hbone.errors import ErrorCode

if TYPE_CHECKING:
    from tests.support.joined import Wire

MIB = 1 << 20
SMALL = ConnectionConfig(stream_window=65_535, initial_stream_window=65_535, connection_window=65_535)
INTO = memoryview(bytearray(4 * MIB))


def taken(wire: Wire) -> bytes:
    return bytes(INTO[: wire.get(INTO, len(INTO))]) if wire.waiting else b""


def carry(nested: Nested, data: bytes, *, up: bool) -> bytes:
    """Push `data` in at one app, as it takes it, and give what came out at the other."""
    here, there = (nested.client, nested.far) if up else (nested.far, nested.client)
    came = bytearray()
    sent = 0
    while len(came) < len(data):
        before = sent, len(came)
        if sent < len(data) and here.from_app.has_room:
            sent += here.from_app.put(data[sent:])
        nested.settle()
        came += taken(there.to_app)
        assert (sent, len(came)) != before, "it stands still"
    return bytes(came)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize(
    ("inner", "outer"), [(None, None), (SMALL, None), (None, SMALL), (SMALL, SMALL)], ids=["wide", "in", "out", "both"]
)
def test_bytes_arrive_whole_whichever_window_is_the_narrow_one(
    up: bool, inner: ConnectionConfig | None, outer: ConnectionConfig | None
) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    came = carry(Nested(inner=inner, outer=outer), data, up=up)
    assert hashlib.sha256(came).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("between", [1, 7, 1000])
def test_bytes_arrive_whole_however_the_gateway_splits_them(between: int) -> None:
    nested = Nested(between=between)
    size = 30 * between
    data = random.Random(2).randbytes(size)
    assert carry(nested, data, up=True) == data
    assert carry(nested, data, up=False) == data


@pytest.mark.parametrize("up", [True, False])
def test_a_sleeping_reader_bounds_what_is_taken_in(up: bool) -> None:
    """Windows inside are the bound; the outer one is given back at once, so nothing waits in between."""
    narrow = ConnectionConfig(stream_window=256 * 1024)
    nested = Nested(inner=narrow, room=MIB)
    here, there = (nested.client, nested.far) if up else (nested.far, nested.client)
    offered = 0
    while here.from_app.has_room:
        offered += here.from_app.put(bytes(MIB))
        nested.settle()
    room = MIB  # of the socket of the app that sleeps
    in_flight = offered - here.from_app.waiting
    assert in_flight <= room + 256 * 1024 + 64 * 1024
    assert not nested.inner.blocked
    assert nested.gateway.to_app.waiting == nested.gateway.from_app.waiting == 0
    for tunnel in (nested.outer, nested.inner, nested.far.tunnel, nested.gateway.tunnel):
        assert len(tunnel.engine.out) < 1024
    woken = len(taken(there.to_app))
    nested.settle()
    woken += len(taken(there.to_app))
    assert woken > room


def test_a_gateway_that_stops_reading_bounds_what_is_taken_in() -> None:
    """Nobody takes bytes from the gateway: the outer window is used up, and then the app is not read any more."""
    nested = Nested(room=MIB, outer=ConnectionConfig(stream_window=256 * 1024), between=64 * 1024)
    nested.sockets.remove(nested.far.tunnel_socket)
    offered = 0
    while nested.client.from_app.has_room and offered < 64 * MIB:
        offered += nested.client.from_app.put(bytes(MIB))
        nested.settle()
    assert nested.inner.blocked
    assert offered - nested.client.from_app.waiting <= 256 * 1024 + 2 * 64 * 1024 + 64 * 1024
    nested.sockets.append(nested.far.tunnel_socket)
    nested.far.tunnel.receive()
    rest = offered - len(taken(nested.far.to_app))
    for _ in range(100):
        nested.settle()
        rest -= len(taken(nested.far.to_app))
    assert rest == 0


def test_closing_says_so_inside_and_outside() -> None:
    nested = Nested()
    nested.inner.close()
    nested.settle()
    assert nested.client.lost == [None]
    assert nested.far.lost == [None] or "closed" in str(nested.far.lost[0])
    assert nested.outer.streams == {} or all(end.sent_end for end in nested.outer.streams.values())
    assert not nested.outer.closed


def test_bytes_under_way_leave_before_a_tunnel_is_closed() -> None:
    nested = Nested(outer=SMALL, between=1000)
    nested.sockets.remove(nested.far.tunnel_socket)
    data = random.Random(3).randbytes(200_000)
    nested.client.from_app.put(data)
    nested.settle()
    assert nested.inner.blocked
    taken_in = len(data) - nested.client.from_app.waiting
    assert taken_in
    nested.inner.close_when_sent()
    assert nested.client.lost == []
    nested.sockets.append(nested.far.tunnel_socket)
    nested.far.tunnel.receive()
    nested.settle()
    assert nested.client.lost == [None]
    assert taken(nested.far.to_app) == data[: len(data) - nested.client.from_app.waiting]


def test_what_is_not_complete_does_not_look_so() -> None:
    nested = Nested()
    nested.inner.on_fault()
    nested.settle()
    assert nested.gateway.codes == [ErrorCode.CANCEL]


def test_a_reset_of_the_outer_stream_comes_after_the_bytes_before_it() -> None:
    nested = Nested()
    nested.far.from_app.put(b"last words")
    nested.turn()
    nested.settle()
    assert taken(nested.client.to_app) == b"last words"
    (end,) = nested.gateway.tunnel.streams.values()
    end.reset(ErrorCode.INTERNAL_ERROR)
    nested.settle()
    assert nested.inner.closed
    assert "reset the stream: INTERNAL_ERROR" in str(nested.client.lost[0])
    assert not nested.outer.closed


def test_garbage_of_the_gateway_ends_the_inner_tunnel_alone() -> None:
    nested = Nested()
    nested.gateway.from_app.put(b"\x17\x03\x03\x00\x20" + bytes(32))
    nested.settle()
    assert nested.inner.closed
    assert "tls error" in str(nested.client.lost[0])
    assert not nested.outer.closed


def test_a_turn_costs_no_task_and_no_timer() -> None:
    nested = Nested()
    timers = len(nested.reactor._timers)
    carry(nested, bytes(MIB), up=True)
    assert len(nested.reactor._timers) == timers
    assert nested.reactor._nursery is None


def test_system_calls_of_a_mebibyte_are_those_of_a_plain_tunnel() -> None:
    nested = Nested()
    for _ in range(6):
        carry(nested, bytes(MIB), up=True)
    nested.outer_calls.clear()
    carry(nested, bytes(4 * MIB), up=True)
    assert nested.outer_calls["send"] <= 4 * 20
    nested.outer_calls.clear()
    carry(nested, bytes(4 * MIB), up=False)
    assert nested.outer_calls["recv"] <= 4 * 30


def test_a_peer_behind_the_gateway_that_falls_silent_ends_its_tunnel_alone() -> None:
    """The outer tunnel's answers say nothing of who is behind."""
    nested = Nested()
    nested.sockets.remove(nested.far.tunnel_socket)
    nested.inner.on_time(10.0)
    nested.settle()
    nested.inner.on_time(29.0)
    assert nested.client.lost == []
    nested.inner.on_time(31.0)
    nested.settle()
    assert "PING not answered" in str(nested.client.lost[0])
    assert not nested.outer.closed


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_gateway_makes_of_the_bytes_nothing_false_arrives(seed: int) -> None:
    """It flips, drops, repeats and adds bytes; what the app got is a beginning of what was said, and no end of it."""
    rng = random.Random(seed)
    nested = Nested(between=64 * 1024)
    said = rng.randbytes(50_000)
    nested.far.from_app.put(said)
    wire = nested.gateway.from_app
    honest = wire.put
    after = rng.randrange(2, 12)
    count = 0

    def spoil(data: Any) -> int:
        nonlocal count
        count += 1
        if count != after:
            return honest(data)
        spoilt = bytearray(data)
        where = rng.randrange(len(spoilt))
        match seed % 4:
            case 0:
                spoilt[where] ^= 1 << rng.randrange(8)
            case 1:
                del spoilt[where]
            case 2:
                spoilt[where:where] = rng.randbytes(rng.randrange(1, 40))
            case _:
                spoilt += spoilt[where:]
        honest(spoilt)
        return len(data)

    stand_in(wire, "put", spoil)
    came = bytearray()
    for _ in range(20):
        nested.settle()
        came += taken(nested.client.to_app)
        nested.far.from_app.put(b"more")
    said += b"more" * 20
    assert said.startswith(bytes(came))
    if count >= after:
        assert len(came) < len(said)
        # A length that was made larger is waited for.
        assert len(nested.client.lost) == len(nested.client.ended) == int(nested.inner.closed)
    assert not nested.outer.closed
