"""Connections that wait for their turn to shake hands."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.dataplane import ScriptedSocket, scripted_reactor
from tests.support.mesh import at

from hbone.admission import Admission
from ztunnel.dataplane.waitingroom import WaitingRoom

if TYPE_CHECKING:
    import socket

    from hbone.admission import Turn
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.mesh.address import Address

PEER = at("10.0.0.1:1")


class Room:
    def __init__(self, admission: Admission) -> None:
        self.reactor: Reactor = scripted_reactor()
        self.admission = admission
        self.begun: list[str] = []
        self.room = WaitingRoom(self.reactor, admission, self._begin)
        self._turns: list[Turn] = []

    def _begin(self, _: socket.SocketType, __: Address, turn: Turn) -> None:
        self.begun.append(turn.address)
        self._turns.append(turn)

    def come(self, source: str) -> ScriptedSocket:
        sock: Any = ScriptedSocket()
        self.room.enter(sock, PEER, source)
        self.reactor.turn(())
        closed: ScriptedSocket = sock
        return closed

    def leave_now(self, source: str) -> None:
        turn = next(turn for turn in self._turns if turn.address == source)
        self._turns.remove(turn)
        turn.leave()

    def leave(self, source: str) -> None:
        self.leave_now(source)
        self.reactor.turn(())


def test_what_is_over_the_limit_waits_and_comes_in_its_turn() -> None:
    here = Room(Admission(limit=10, per_address=2))
    sockets = [here.come("a") for _ in range(5)]
    assert here.begun == ["a", "a"]
    assert not any(sock.closed for sock in sockets)
    here.leave("a")
    assert (len(here.begun), here.room.count) == (3, 2)
    here.leave("a")
    here.leave("a")
    assert (len(here.begun), here.room.count) == (5, 0)


def test_others_do_not_wait_for_an_address_that_is_over_its_limit() -> None:
    here = Room(Admission(limit=10, per_address=1))
    for source in ("a", "a", "b"):
        here.come(source)
    assert here.begun == ["a", "b"]


def test_addresses_take_turns_when_all_are_too_many() -> None:
    here = Room(Admission(limit=2, per_address=2))
    for source in ("a", "a", "a", "a", "b", "b"):
        here.come(source)
    for _ in range(3):
        here.leave("a")
    assert here.begun == ["a", "a", "a", "b", "a"]


@pytest.mark.parametrize("limits", [{"waiting": 2}, {"waiting_per_address": 2}])
def test_what_waits_is_bounded(limits: dict[str, int]) -> None:
    here = Room(Admission(limit=10, per_address=1, **limits))
    sockets = [here.come("a") for _ in range(5)]
    assert [sock.closed for sock in sockets] == [False, False, False, True, True]


def test_who_waited_ten_seconds_is_closed() -> None:
    here = Room(Admission(limit=10, per_address=1))
    sockets = [here.come("a") for _ in range(3)]
    here.room.on_time(9.9)
    here.reactor.turn(())
    assert not any(sock.closed for sock in sockets)
    here.room.on_time(10.0)
    here.reactor.turn(())
    assert [sock.closed for sock in sockets] == [False, True, True]
    here.leave("a")
    assert here.begun == ["a"]


def test_closing_leaves_nobody_waiting() -> None:
    here = Room(Admission(limit=10, per_address=1))
    sockets = [here.come("a"), here.come("a"), here.come("b"), here.come("b")]
    here.room.close()
    here.reactor.turn(())
    assert [sock.closed for sock in sockets] == [False, True, False, True]
    assert here.room.count == 0


def test_what_waited_begins_in_the_next_turn_and_not_within_the_leaving() -> None:
    here = Room(Admission(limit=10, per_address=1))
    here.come("a")
    here.come("a")
    here.leave_now("a")
    assert (here.begun, here.room.count) == (["a"], 1)
    here.reactor.turn(())
    assert (here.begun, here.room.count) == (["a", "a"], 0)


def test_closing_before_the_turn_begins_nothing_and_keeps_no_place() -> None:
    here = Room(Admission(limit=10, per_address=1))
    sockets = [here.come("a") for _ in range(3)]
    here.leave_now("a")
    here.room.close()
    here.reactor.turn(())
    assert [sock.closed for sock in sockets] == [False, True, True]
    assert (here.begun, here.room.count, here.admission.count) == (["a"], 0, 0)


def test_what_waited_is_freed_without_the_collector_of_cycles() -> None:
    gc.disable()
    try:
        here = Room(Admission(limit=10, per_address=1))
        sockets = [weakref.ref(here.come("a")) for _ in range(3)]
        here.leave("a")
        here.room.close()
        here.leave("a")
        assert [sock() for sock in sockets] == [None, None, None]
    finally:
        gc.enable()
