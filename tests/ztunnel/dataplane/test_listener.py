"""Listeners: how much they accept, what they do without descriptors, and what they say when they cannot be had."""

from __future__ import annotations

import errno
import os
import select
import socket
from typing import TYPE_CHECKING

import pytest
from tests.support.dataplane import ScriptedPoller, scripted_reactor
from tests.support.pair import fresh_ip

from hbone.errors import ConfigurationError
from ztunnel.dataplane import Reactor
from ztunnel.dataplane.listener import Listener, bind, keeps_sources
from ztunnel.dataplane.sockets import SocketCalls, SocketOptions
from ztunnel.mesh import parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.mesh import Address

PEER = (parse_ip("10.0.0.9"), 4000)


class Sock:
    """A socket as far as a listener looks."""

    def __init__(self, number: int = 70_000) -> None:
        self.number = number
        self.closed = False

    def fileno(self) -> int:
        return self.number

    def close(self) -> None:
        self.closed = True


class Calls(SocketCalls):
    """Accepts what the script says: that many connections, or an error."""

    def __init__(self, *script: int | OSError) -> None:
        super().__init__()
        self.script = list(script)
        self.accepts = 0

    def local_address(self, sock: object) -> Address:
        return parse_ip("127.0.0.1"), 1

    def accept(self, listener: object) -> tuple[socket.SocketType, Address]:
        self.accepts += 1
        head = self.script[0] if self.script else 0
        if isinstance(head, OSError):
            del self.script[0]
            raise head
        if not head:
            raise BlockingIOError
        self.script[0] = head - 1
        return Sock(), PEER  # type: ignore[return-value]


def listener_on(calls: Calls) -> tuple[Listener, list[object], ScriptedPoller]:
    reactor = scripted_reactor()
    taken: list[object] = []
    listener = Listener(reactor, calls, Sock(50_000), lambda sock, peer: taken.append(sock))  # type: ignore[arg-type]
    listener.start()
    poller = reactor._poller
    assert isinstance(poller, ScriptedPoller)
    return listener, taken, poller


def test_a_lone_connection_costs_one_accept() -> None:
    calls = Calls(100)
    listener, taken, _ = listener_on(calls)
    for _ in range(5):
        listener._reactor.turn([(50_000, select.EPOLLIN)])
        listener._reactor.turn(())  # something else happens in between
    assert len(taken) == calls.accepts == 5


def test_a_queue_is_taken_twice_as_fast_each_turn_up_to_64() -> None:
    listener, taken, _ = listener_on(Calls(1000))
    seen = []
    for _ in range(9):
        before = len(taken)
        listener._reactor.turn([(50_000, select.EPOLLIN)])
        seen.append(len(taken) - before)
    assert seen == [1, 2, 4, 8, 16, 32, 64, 64, 64]


def test_without_descriptors_it_rests_and_begins_again() -> None:
    calls = Calls(OSError(errno.EMFILE, "Too many open files"), 1)
    listener, taken, poller = listener_on(calls)
    listener._reactor.turn([(50_000, select.EPOLLIN)])
    assert 50_000 not in poller.masks
    listener.start()  # what the timer calls
    assert 50_000 in poller.masks
    listener._reactor.turn([(50_000, select.EPOLLIN)])
    assert len(taken) == 1


def test_who_took_a_connection_from_a_shared_socket_steps_aside_for_the_others() -> None:
    ip = fresh_ip()
    sock = SocketCalls().listen((parse_ip(ip), 0))
    taken = [0, 0, 0]
    listeners = []
    clients = []

    def accepted_by(number: int) -> Callable[[socket.SocketType, Address], None]:
        def accepted(connection: socket.SocketType, peer: Address) -> None:
            taken[number] += 1
            connection.close()

        return accepted

    for number in range(3):
        own = socket.SocketType(fileno=os.dup(sock.fileno()))
        reactor = Reactor(clock=lambda: 0.0)
        listener = Listener(reactor, SocketCalls(), own, accepted_by(number), shared=True)
        listener.start()
        listeners.append((reactor, listener))
    for _ in range(4):
        for _ in range(3):
            clients.append(socket.create_connection(sock.getsockname()))
            for reactor, _listener in listeners:
                reactor.turn(reactor._poller.poll(0, 16))
        assert len(set(taken)) == 1
        for _reactor, listener in listeners:
            listener.start()  # what the timer calls
    for client in clients:
        client.close()
    for reactor, listener in listeners:
        listener.close()
        reactor.dispose()
    sock.close()


def test_a_drain_takes_what_waits_and_a_paused_listener_nothing() -> None:
    calls = Calls(5)
    listener, taken, poller = listener_on(calls)
    listener.pause()
    assert 50_000 not in poller.masks
    listener.start()
    listener.drain()
    assert len(taken) == 5
    assert not listener._listening
    paused, none, _ = listener_on(Calls(5))
    paused.pause()
    paused.drain()
    assert not none


def test_a_connection_that_cannot_be_taken_does_not_end_the_listener() -> None:
    calls = Calls(2)
    reactor = scripted_reactor()
    taken: list[object] = []

    def take(sock: object, peer: object) -> None:
        taken.append(sock)
        if len(taken) == 1:
            raise ValueError("a fault of ours")

    listener = Listener(reactor, calls, Sock(50_000), take)  # type: ignore[arg-type]
    listener.start()
    reactor.turn([(50_000, select.EPOLLIN)])
    assert isinstance(taken[0], Sock)
    assert taken[0].closed
    reactor.turn([(50_000, select.EPOLLIN)])
    assert len(taken) == 2


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server((fresh_ip(), 0)) as other:
        ip, port = other.getsockname()
        with pytest.raises(ConfigurationError, match=rf"cannot listen on {ip}:{port} \(hbone\).*another program"):
            bind(SocketCalls(), (parse_ip(ip), port), "hbone", transparent=False)


def test_an_address_of_another_host_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="no address of this host"):
        bind(SocketCalls(), (parse_ip("192.0.2.7"), 0), "hbone", transparent=False)


def test_accepted_connections_inherit_their_options() -> None:
    calls = SocketCalls(SocketOptions(keepalive_time=77))
    ip = fresh_ip()
    listener = calls.listen((parse_ip(ip), 0))
    with socket.create_connection((ip, calls.local_address(listener)[1])):
        sock, peer = calls.accept(listener)
        assert peer[0] == parse_ip("127.0.0.1") or str(peer[0]).startswith("127.")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        # Not captured: the destination is the socket's own address, as with TPROXY.
        assert calls.original_destination(sock, peer[0]) == calls.local_address(listener)
        sock.close()
    listener.close()


def test_a_listener_on_every_address_takes_both_families_as_plain_addresses() -> None:
    calls = SocketCalls()
    try:
        listener = calls.listen((parse_ip("::"), 0))
    except OSError:
        pytest.skip("this host has no IPv6")
    port = calls.local_address(listener)[1]
    with socket.create_connection(("127.0.0.1", port)):
        sock, peer = calls.accept(listener)
        assert peer[0] == parse_ip("127.0.0.1")
        assert calls.local_address(sock) == (parse_ip("127.0.0.1"), port)
        sock.close()
    listener.close()


def test_sources_are_kept_only_where_it_was_seen_to_work() -> None:
    ip = parse_ip(fresh_ip())
    assert keeps_sources(SocketCalls(), ip, wanted=False) is False
    # From a loopback address a reply to another host's can never come back.
    assert keeps_sources(SocketCalls(), ip, wanted=None) is False
    with pytest.raises(ConfigurationError, match="ENABLE_ORIG_SRC is true"):
        keeps_sources(SocketCalls(), ip, wanted=True)
    assert len(os.listdir("/proc/self/fd")) < 200
