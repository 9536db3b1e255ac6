"""Who waits for a handshake, and whose turn it is."""

from __future__ import annotations

import functools
import weakref

from hbone.admission import Admission, Line, Turn


class Server:
    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.line = Line(admission)
        self.turns: dict[str, Turn] = {}
        self.woken: list[str] = []

    def accept(self, address: str, name: str = "") -> Turn:
        name = name or address
        turn = self.line.join(address, lambda: self.woken.append(name))
        assert turn is not None
        self.turns[name] = turn
        return turn


def test_who_finds_room_enters_at_once() -> None:
    server = Server(Admission(2, 1))
    assert server.accept("10.0.0.1").entered
    assert (server.admission.count, server.line.waiting, server.woken) == (1, 0, [])


def test_who_waits_enters_when_another_of_its_address_leaves() -> None:
    server = Server(Admission(10, 1))
    first, second, third = (server.accept("10.0.0.1", name) for name in "abc")
    assert [turn.entered for turn in (first, second, third)] == [True, False, False]
    first.leave()
    assert [turn.entered for turn in (second, third)] == [True, False]
    assert server.woken == ["b"]
    second.leave()
    third.leave()
    assert (server.woken, server.admission.count, server.line.waiting) == (["b", "c"], 0, 0)


def test_addresses_take_turns() -> None:
    server = Server(Admission(1, 1))
    for name in ("a0", "a1", "a2", "b1", "c1"):
        server.accept(name[0], name)
    for name in ("a0", "a1", "b1", "c1"):
        server.turns[name].leave()
    assert server.woken == ["a1", "b1", "c1", "a2"]


def test_too_many_that_wait_are_turned_away() -> None:
    line = Line(Admission(1, 1, waiting=3, waiting_per_address=2))
    turns = [line.join("10.0.0.1", list) for _ in range(4)]
    assert [turn is not None for turn in turns] == [True, True, True, False]
    assert line.join("10.0.0.2", list) is not None
    assert line.join("10.0.0.3", list) is None
    assert line.waiting == 3


def test_who_gives_up_is_passed_over() -> None:
    server = Server(Admission(1, 1))
    first, second, third = (server.accept("10.0.0.1", name) for name in "abc")
    second.leave()
    assert server.line.waiting == 1
    first.leave()
    assert (server.woken, third.entered, server.admission.count) == (["c"], True, 1)


def test_an_address_keeps_its_place_when_one_of_it_gives_up() -> None:
    server = Server(Admission(1, 1))
    for name in ("a0", "b1", "b2", "c1"):
        server.accept(name[0], name)
    server.turns["b1"].leave()
    server.turns["a0"].leave()
    assert server.woken == ["b2"]


def test_a_turn_does_not_keep_whom_it_woke() -> None:
    line = Line(Admission(1, 1))
    first = line.join("10.0.0.1", list)
    woken: list[int] = []
    waits = line.join("10.0.0.1", wake := functools.partial(woken.append, 1))
    held = weakref.ref(wake)
    del wake
    assert first is not None
    first.leave()
    assert waits is not None
    assert (waits.entered, woken, held()) == (True, [1], None)


def test_a_turn_is_left_once() -> None:
    server = Server(Admission(3, 3))
    first, _ = server.accept("10.0.0.1"), server.accept("10.0.0.1")
    first.leave()
    first.leave()
    assert server.admission.count == 1


def test_nobody_waits_where_no_handshake_is_under_way_that_could_make_room() -> None:
    admission = Admission(1, 1)
    one, other = Line(admission), Line(admission)
    turn = one.join("10.0.0.1", list)
    assert turn is not None
    assert other.join("10.0.0.1", list) is None


def test_room_that_another_server_made_is_found_with_the_next_that_leaves() -> None:
    admission = Admission(3, 1)
    one, other = Server(admission), Server(admission)
    elsewhere = one.accept("10.0.0.1")
    here = other.accept("10.0.0.2")
    waits = other.accept("10.0.0.1", "waits")
    elsewhere.leave()
    assert not waits.entered
    here.leave()
    assert (waits.entered, other.woken) == (True, ["waits"])
