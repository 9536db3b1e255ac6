"""Options of connections, as the kernel has them."""

from __future__ import annotations

import contextlib
import os
import socket

import attrs
import pytest
from tests.support.pair import fresh_ip

from ztunnel.dataplane.sockets import SocketCalls, SocketOptions
from ztunnel.mesh import parse_ip

OPTIONS = SocketOptions(keepalive_time=70, keepalive_interval=50, keepalive_retries=3, user_timeout=True)
SO_MARK = 36


def tcp(sock: socket.SocketType, option: int) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, option)


@pytest.mark.parametrize("options", [OPTIONS, attrs.evolve(OPTIONS, user_timeout=False), SocketOptions()])
def test_options_are_on_accepted_and_on_outgoing_connections(options: SocketOptions) -> None:
    calls = SocketCalls(options)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(calls.listen((parse_ip(fresh_ip()), 0))))
        dialled = stack.enter_context(contextlib.closing(calls.dial(calls.local_address(listener))))
        accepted = stack.enter_context(contextlib.closing(calls.accept(listener)[0]))
        for sock in (dialled, accepted):
            assert tcp(sock, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert tcp(sock, socket.TCP_KEEPIDLE) == options.keepalive_time
            assert tcp(sock, socket.TCP_KEEPINTVL) == options.keepalive_interval
            assert tcp(sock, socket.TCP_KEEPCNT) == options.keepalive_retries
            probes = options.keepalive_retries * options.keepalive_interval
            expected = (options.keepalive_time + probes) * 1000 if options.user_timeout else 0
            assert tcp(sock, socket.TCP_USER_TIMEOUT) == expected


def test_keepalive_can_be_off() -> None:
    calls = SocketCalls(SocketOptions(keepalive=False))
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(calls.listen((parse_ip(fresh_ip()), 0))))
        dialled = stack.enter_context(contextlib.closing(calls.dial(calls.local_address(listener))))
        accepted = stack.enter_context(contextlib.closing(calls.accept(listener)[0]))
        assert not any(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for sock in (dialled, accepted))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mark packets")
def test_outgoing_connections_carry_the_mark_and_accepted_ones_do_not() -> None:
    calls = SocketCalls(SocketOptions(mark=1337))
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(contextlib.closing(calls.listen((parse_ip(fresh_ip()), 0))))
        try:
            dialled = stack.enter_context(contextlib.closing(calls.dial(calls.local_address(listener))))
        except PermissionError:
            pytest.skip("this root may not mark packets")
        accepted = stack.enter_context(contextlib.closing(calls.accept(listener)[0]))
        assert dialled.getsockopt(socket.SOL_SOCKET, SO_MARK) == 1337
        assert accepted.getsockopt(socket.SOL_SOCKET, SO_MARK) == 0
