"""Sockets that have still to deliver what was written to them, on real ones."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest
from tests.support.dataplane import FakeFar, RelayOwner, scripted_reactor

from hbone.errors import ErrorCode
from ztunnel.dataplane.farewell import close_when_delivered
from ztunnel.dataplane.reactor import READ, Reactor
from ztunnel.dataplane.relay import Relay
from ztunnel.dataplane.sockets import SocketCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 400_000  # more than a reader that sleeps is sent, less than a writer may leave to the kernel


@pytest.fixture
def ends() -> Iterator[tuple[socket.SocketType, socket.socket]]:
    """Ours, and the other's, which reads late."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        ours = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SIZE)
        ours.connect(listener.getsockname())
        other, _ = listener.accept()
    other.settimeout(30)
    with other, contextlib.closing(ours):
        yield ours, other


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65_536), b""))


def until(done: Callable[[], bool]) -> None:
    """Wait for the kernel, which confirms what came some milliseconds later."""
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.002)


def turn(reactor: Reactor) -> None:
    """The next turn."""
    reactor.turn(())


def test_what_was_delivered_needs_no_farewell(ends: tuple[socket.SocketType, socket.socket]) -> None:
    ours, other = ends
    reactor = scripted_reactor()
    ours.send(b"short")
    other.send(b"unread")
    until(lambda: SocketCalls().unsent(ours) == 0)
    close_when_delivered(reactor, SocketCalls(), ours)
    assert not reactor.farewells
    turn(reactor)
    assert ours.fileno() == -1
    assert other.recv(5) == b"short"


def test_bytes_that_nobody_reads_destroy_none_that_were_written(
    ends: tuple[socket.SocketType, socket.socket],
) -> None:
    ours, other = ends
    reactor = scripted_reactor()
    data = bytes(range(256)) * (SIZE // 256)
    assert ours.send(data) == len(data)
    other.send(b"unread")
    close_when_delivered(reactor, SocketCalls(), ours)
    turn(reactor)
    (farewell,) = reactor.farewells
    other.send(b"late")
    assert read_all(other) == data
    reactor.turn([(ours.fileno(), READ)])
    until(lambda: SocketCalls().unsent(ours) == 0)
    farewell.on_time(1.0)
    assert not reactor.farewells
    turn(reactor)
    assert ours.fileno() == -1


def test_the_other_end_ends_it(ends: tuple[socket.SocketType, socket.socket]) -> None:
    ours, other = ends
    reactor = scripted_reactor()
    ours.send(bytes(SIZE))
    close_when_delivered(reactor, SocketCalls(), ours)
    turn(reactor)
    assert reactor.farewells
    other.shutdown(socket.SHUT_WR)
    reactor.turn([(ours.fileno(), READ)])
    assert not reactor.farewells
    assert len(read_all(other)) == SIZE  # the kernel goes on without us


def test_who_takes_nothing_is_waited_for_thirty_seconds(ends: tuple[socket.SocketType, socket.socket]) -> None:
    ours, other = ends
    reactor = scripted_reactor()
    ours.send(bytes(SIZE))
    close_when_delivered(reactor, SocketCalls(), ours)
    (farewell,) = reactor.farewells
    farewell.on_time(29.0)
    assert reactor.farewells
    before = SocketCalls().unsent(ours)
    other.recv(SIZE // 4, socket.MSG_WAITALL)
    until(lambda: SocketCalls().unsent(ours) < before)
    farewell.on_time(31.0)
    farewell.on_time(60.0)
    assert reactor.farewells
    farewell.on_time(61.0)
    assert not reactor.farewells
    turn(reactor)


def test_the_end_of_the_reactor_ends_farewells(ends: tuple[socket.SocketType, socket.socket]) -> None:
    ours, _ = ends
    reactor = scripted_reactor()
    ours.send(bytes(SIZE))
    close_when_delivered(reactor, SocketCalls(), ours)
    assert reactor.farewells
    reactor.dispose()
    assert ours.fileno() == -1


def test_an_app_gets_all_of_an_answer_that_came_before_it_had_asked_all(
    ends: tuple[socket.SocketType, socket.socket],
) -> None:
    ours, other = ends
    reactor = scripted_reactor()
    owner = RelayOwner()
    relay = Relay(reactor, SocketCalls(), ours, owner)
    relay.start(FakeFar(window=0))
    other.send(b"question")  # for which the stream has no room
    reactor.turn([(ours.fileno(), READ)])
    assert relay.deliver(memoryview(bytes(SIZE))) == SIZE
    relay.finish()
    relay.end_after_reset(ErrorCode.NO_ERROR, None)  # Source: RFC 9113 §8.1
    assert owner.ended == 1
    turn(reactor)
    assert len(read_all(other)) == SIZE
    reactor.dispose()
