"""What carrying bytes costs, counted where no kernel and no clock has a say: calls, copies, objects.

Two proxies are joined by memory, so every figure is of both together, and the same on each run and machine. A figure
that rises here costs CPU everywhere; one that falls should have its limit lowered.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.joined import Joined

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
DATA = bytes(MIB)
INTO = memoryview(bytearray(MIB))
ROUNDS = 8


@pytest.fixture
def joined() -> Joined:
    """A stream on which a few MiB went both ways, so windows have grown and every buffer is there."""
    joined = Joined()
    for _ in range(6):
        up(joined)
        down(joined)
    joined.calls.clear()
    return joined


def up(joined: Joined, data: bytes = DATA) -> None:
    """From the client's app to the server's."""
    joined.client.from_app.put(data)
    joined.settle()
    assert joined.server.to_app.get(INTO, len(data)) == len(data)


def down(joined: Joined, data: bytes = DATA) -> None:
    """And back."""
    joined.server.from_app.put(data)
    joined.settle()
    assert joined.client.to_app.get(INTO, len(data)) == len(data)


def round_trip(joined: Joined) -> None:
    up(joined, b"x")
    down(joined, b"y")


@contextlib.contextmanager
def profiled() -> Iterator[collections.Counter[str]]:
    """Calls of Python functions of ours, and objects of attrs classes made."""
    counts: collections.Counter[str] = collections.Counter()

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            name = frame.f_code.co_filename
            if "attrs generated init" in name:
                counts["objects"] += 1
            elif "/src/" in name:
                counts["calls"] += 1

    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(None)


def test_system_calls_of_a_mebibyte(joined: Joined) -> None:
    for _ in range(ROUNDS):
        up(joined)
    assert joined.calls["recv"] <= 26 * ROUNDS  # 16 of the app, the rest of the tunnel, which is read up to 256 KiB
    assert joined.calls["send"] <= 41 * ROUNDS  # 16 of the tunnel; of the app a frame that two reads cut costs two
    assert joined.calls.keys() == {"recv", "send"}
    joined.calls.clear()
    for _ in range(ROUNDS):
        down(joined)
    assert joined.calls["recv"] <= 26 * ROUNDS
    assert joined.calls["send"] <= 41 * ROUNDS


def test_system_calls_of_a_round_trip(joined: Joined) -> None:
    for _ in range(100):
        round_trip(joined)
    assert joined.calls == {"recv": 400, "send": 400}


def test_payload_is_never_copied_into_memory_that_is_made_for_it(joined: Joined) -> None:
    carried = made = 0
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(ROUNDS):
            joined.client.from_app.put(DATA)
            worked = True
            while worked:
                tracemalloc.reset_peak()
                before, _peak = tracemalloc.get_traced_memory()
                worked = joined.turn()
                made += tracemalloc.get_traced_memory()[1] - before
            carried += joined.server.to_app.get(INTO, MIB)
    finally:
        tracemalloc.stop()
    assert carried == ROUNDS * MIB
    assert made <= carried / 100  # bytes of Python's objects; a single copy of the payload would be `carried`


def test_no_object_is_made_for_a_frame(joined: Joined) -> None:
    with profiled() as counts:
        for _ in range(ROUNDS):
            up(joined)
        for _ in range(100):
            round_trip(joined)
    assert counts["objects"] == 0


def test_no_object_is_kept_for_a_frame(joined: Joined) -> None:
    for work in (up, round_trip):
        gc.collect()
        before = sys.getallocatedblocks()
        for _ in range(50):
            work(joined)
        assert sys.getallocatedblocks() - before < 50


def test_function_calls_of_a_mebibyte(joined: Joined) -> None:
    with profiled() as counts:
        for _ in range(ROUNDS):
            up(joined)
    assert counts["calls"] <= 470 * ROUNDS


def test_function_calls_of_a_round_trip(joined: Joined) -> None:
    with profiled() as counts:
        for _ in range(100):
            round_trip(joined)
    assert counts["calls"] <= 55 * 100


def test_waiting_streams_cost_nothing(joined: Joined) -> None:
    """A tunnel with many streams that are silent carries one at the same cost."""
    with profiled() as alone:
        for _ in range(50):
            round_trip(joined)
    joined.open(99)
    for _ in range(3):
        round_trip(joined)
    with profiled() as among:
        for _ in range(50):
            round_trip(joined)
    assert among["calls"] == alone["calls"]
