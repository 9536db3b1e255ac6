"""ZTUNNEL_BIND_ADDRESS is also where connections come from, so hosts that share a machine can be told apart."""

from __future__ import annotations

import socket

import pytest

from ztunnel.dataplane.sockets import SocketCalls, SocketOptions
from ztunnel.mesh import parse_ip


@pytest.mark.parametrize(
    ("own", "target", "seen"),
    [
        ("127.0.1.9", "127.0.0.1", "127.0.1.9"),
        (None, "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_connection_comes_from_the_own_address(own: str | None, target: str, seen: str) -> None:
    calls = SocketCalls(SocketOptions(source=parse_ip(own) if own else None))
    with socket.create_server((target, 0)) as listener:
        dialled = calls.dial((parse_ip(target), listener.getsockname()[1]))
        accepted, peer = listener.accept()
        assert peer[0] == seen
        accepted.close()
        dialled.close()


def test_an_own_address_of_the_other_family_is_left_out() -> None:
    calls = SocketCalls(SocketOptions(source=parse_ip("::1")))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = calls.dial((parse_ip("127.0.0.1"), listener.getsockname()[1]))
        listener.accept()[0].close()
        dialled.close()
