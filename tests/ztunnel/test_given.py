"""Sockets that somebody else made: which is used for what, and which is refused."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from hbone.errors import ConfigurationError
from ztunnel.dataplane import SocketCalls
from ztunnel.dataplane.listener import open_listeners
from ztunnel.given import Given, GivenSocket, from_systemd
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Iterator

from tests.support.daemon import settings

LOOPBACK = parse_ip("127.0.0.1")


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def listening(
    stack: contextlib.ExitStack, host: str = "127.0.0.1", *, share: bool = False, port: int = 0
) -> socket.socket:
    sock = stack.enter_context(socket.socket())
    if share:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    sock.listen()
    return sock


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def test_a_socket_is_taken_once_by_its_name_or_its_port(stack: contextlib.ExitStack) -> None:
    named, nameless = listening(stack), listening(stack)
    given = Given([GivenSocket("hbone", named), GivenSocket("ztunnel.socket", nameless)], strict=False)
    assert given.take("outbound", (LOOPBACK, port_of(nameless))) == [nameless]
    assert given.take("outbound", (LOOPBACK, port_of(nameless))) == []
    assert given.take("outbound", (LOOPBACK, port_of(named))) == []
    assert given.take("hbone", (LOOPBACK, port_of(named)), socket.SOCK_DGRAM) == []
    assert given.take("hbone", (LOOPBACK, port_of(named))) == [named]


def test_a_ztunnel_that_listens_elsewhere_does_not_use_the_old_sockets(stack: contextlib.ExitStack) -> None:
    sock = listening(stack)
    given = Given([GivenSocket("hbone", sock)])
    assert given.take("hbone", (LOOPBACK, port_of(sock) ^ 1)) == []
    assert given.take("hbone", (parse_ip("127.0.0.2"), port_of(sock))) == []
    given.reject_rest()
    assert sock.fileno() == -1


def test_a_socket_that_nothing_asked_for_is_told_by_its_address(stack: contextlib.ExitStack) -> None:
    sock = listening(stack)
    with pytest.raises(ConfigurationError, match=rf"127.0.0.1:{port_of(sock)} \(mine\), which no setting names"):
        Given([GivenSocket("mine", sock)], strict=False).reject_rest()


def test_the_admin_pages_are_not_opened_to_others(stack: contextlib.ExitStack) -> None:
    sock = listening(stack, "0.0.0.0")
    given = Given([GivenSocket("admin", sock)], strict=False)
    with pytest.raises(ConfigurationError, match="must be a loopback address"):
        given.take("admin", (LOOPBACK, port_of(sock)))


def test_variables_of_socket_activation_are_for_the_process_they_name() -> None:
    environ = {"LISTEN_PID": "7", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b", "PATH": "/bin"}
    from_systemd(environ, pid=8).reject_rest()
    assert environ == {"PATH": "/bin"}
    for bad in ("x", "-1", "99999"):
        with pytest.raises(ConfigurationError, match="LISTEN_FDS"):
            from_systemd({"LISTEN_PID": "8", "LISTEN_FDS": bad}, pid=8)


@pytest.mark.parametrize(
    ("had", "workers", "share"),
    [(1, 1, False), (1, 3, False), (1, 3, True), (3, 1, True), (3, 2, True), (2, 3, True)],
)
def test_every_given_socket_has_a_worker_whatever_their_number(
    stack: contextlib.ExitStack, had: int, workers: int, share: bool
) -> None:
    first = listening(stack, share=share)
    more = [listening(stack, share=True, port=port_of(first)) for _ in range(had - 1)]
    names = {sock.fileno() for sock in (first, *more)}
    given = Given([GivenSocket("outbound", sock) for sock in (first, *more)])
    found = open_listeners(SocketCalls(), settings(ZTUNNEL_OUTBOUND_PORT=str(port_of(first))), workers, given)
    try:
        assert len(found.shares) == max(had, workers)
        assert ("outbound" in found.shared) is (not share and workers > had)
        sockets = [each["outbound"] for each in found.shares]
        assert names <= {sock.fileno() for sock in sockets}
        assert {sock.getsockname() for sock in sockets} == {sockets[0].getsockname()}
        if share:
            assert len({sock.fileno() for sock in sockets}) == max(had, workers)
        assert all({"hbone", "inbound", "outbound"} <= set(each) for each in found.shares[:workers])
    finally:
        for each in found.shares:
            for sock in each.values():
                sock.close()
