from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from ztunnel.jsonstream import CHUNK, ENTRIES, Rows, collect, in_order, with_rows, write

ENTRY = {"name": 'a "b"\n\u2028', "list": [1, "x", [], {}], "none": None, "deep": {"b": 1.5, "a": True}}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": 1},
        ENTRY,
        {"list": [ENTRY, []], "none": None, "object": {"z": {}, "a": ENTRY}},
        {"path": {"a": {"b": []}}},
    ],
)
async def test_the_text_is_that_of_the_standard_library(value: dict[str, Any]) -> None:
    assert (await collect(value)).decode() == json.dumps(value, indent=2, sort_keys=True) + "\n"


async def test_lists_that_become_rows_give_the_same_text() -> None:
    value = {
        "tunnels": [{"peer": "a", "streams": []}, {"peer": None}],
        "mesh": {"policies": 1},
        "pending": [],
        "pid": 7,
    }
    found = with_rows(value)
    assert isinstance(found["tunnels"], Rows)
    assert (await collect(found)).decode() == json.dumps(value, indent=2, sort_keys=True) + "\n"


async def test_rows_are_lists_or_objects_of_what_is_made_of_each() -> None:
    found = await collect(
        {
            "list": Rows(in_order([3, 1, 2], lambda item: item), lambda item: {"number": item} if item != 2 else None),
            "object": Rows(["b", "a"], lambda item: (item, Rows([item], str)), named=True),
            "empty": Rows([], str),
            "nothing": Rows([1], lambda _: None, named=True),
        }
    )
    assert json.loads(found) == {
        "list": [{"number": 1}, {"number": 3}],
        "object": {"b": ["b"], "a": ["a"]},
        "empty": [],
        "nothing": {},
    }


async def test_long_lists_are_sorted_as_the_standard_library_does() -> None:
    items = [(number * 7919 % 10_007, number) for number in range(5000)]
    found = json.loads(await collect({"rows": Rows(in_order(items, lambda item: item[0]), list)}))
    assert found["rows"] == [list(item) for item in sorted(items)]


class Turns(trio.abc.Instrument):
    """Counts what is made between two turns of the loop."""

    def __init__(self) -> None:
        self.made = 0
        self.most = 0
        self.turns = 0

    def before_task_step(self, _: trio.lowlevel.Task) -> None:
        self.most = max(self.most, self.made)
        self.made = 0
        self.turns += 1

    def make(self, item: int) -> tuple[str, dict[str, Any]]:
        self.made += 1
        return str(item), {"number": item}


async def test_between_two_turns_a_bounded_number_of_entries_is_made() -> None:
    turns = Turns()
    trio.lowlevel.add_instrument(turns)
    try:
        one = Rows(in_order(range(20_000), lambda item: item), turns.make, named=True)
        await collect({"a": Rows([0], lambda _: {"nested": one}), "b": Rows(range(1000), turns.make, named=True)})
    finally:
        trio.lowlevel.remove_instrument(turns)
    assert 0 < turns.most <= ENTRIES
    assert turns.turns >= 21_000 / ENTRIES


async def test_a_reader_that_stands_still_stops_the_making() -> None:
    turns = Turns()
    read = trio.Event()
    parts: list[bytes] = []

    async def send(part: bytes) -> None:
        parts.append(part)
        await read.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, {"rows": Rows(range(100_000), turns.make, named=True)}, send)
        while not parts:
            await trio.lowlevel.checkpoint()
        made = turns.made
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert turns.made == made < 100_000
        assert len(parts[0]) < 2 * CHUNK
        read.set()
    assert len(json.loads(b"".join(parts))["rows"]) == 100_000
