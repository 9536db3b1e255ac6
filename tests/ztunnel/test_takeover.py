"""What two ztunnels say to each other when one takes over: who is given the sockets, and who is not."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio

from hbone.daemon.http import unix_socket
from ztunnel.mesh.address import parse_ip
from ztunnel.takeover import TakeOver, TakeOverFailed, serve_takeover

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Running:
    """A ztunnel that gives one socket, on `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.released: list[int] = []
        self.ended = trio.Event()

    async def serve(self) -> None:
        with unix_socket(self.path, kind=socket.SOCK_SEQPACKET) as listener, self.sock:
            await serve_takeover(listener, lambda: [("outbound", self.sock)], self.release)
        self.ended.set()

    async def release(self, pid: int) -> int | None:
        self.released.append(pid)
        await trio.lowlevel.checkpoint()
        return None


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    running = Running(tmp_path / "takeover.sock")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.serve)
        with trio.fail_after(10):
            while not running.path.exists():
                await trio.sleep(0.01)
        yield running
        nursery.cancel_scope.cancel()


async def raw(path: Path, *messages: bytes) -> list[dict[str, Any]]:
    """Say something, and hear until the end."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    await sock.connect(str(path))
    answers = []
    with sock, trio.fail_after(10), contextlib.suppress(OSError):
        for message in messages:
            await sock.send(message)
        while data := await sock.recv(4096):
            answers.append(json.loads(data))
    return answers


async def test_the_socket_is_the_same_one(running: Running) -> None:
    new = TakeOver(running.path)
    given = await new.take()
    assert given is not None
    (sock,) = given.take("outbound", address_of(running.sock))
    with sock:
        assert os.fstat(sock.fileno()).st_ino == os.fstat(running.sock.fileno()).st_ino
        assert not os.get_inheritable(sock.fileno())
        assert running.released == []
        assert await new.serving() is None
        assert running.released == [os.getpid()]
        with trio.fail_after(10):
            await running.ended.wait()


def address_of(sock: socket.socket) -> Any:
    host, port = sock.getsockname()
    return parse_ip(host), port


async def test_where_none_runs_there_is_nothing_to_take(tmp_path: Path) -> None:
    assert await TakeOver(tmp_path / "takeover.sock").take() is None
    unix_socket(tmp_path / "takeover.sock", kind=socket.SOCK_SEQPACKET).close()
    assert await TakeOver(tmp_path / "takeover.sock").take() is None


async def test_garbage_changes_nothing(running: Running) -> None:
    assert await raw(running.path, b"\xff") == []
    assert await raw(running.path, b"[]") == []
    assert await raw(running.path, b"{" + b" " * 5000 + b"}") == []
    assert "version 1" in (await raw(running.path, b'{"take": 2}'))[0]["error"]
    assert len(await raw(running.path, b'{"take": 1}', b'{"serving": "me"}')) == 2
    assert running.released == []
    new = TakeOver(running.path)
    given = await new.take()
    assert given is not None
    given.close()
    await new.serving()
    assert running.released == [os.getpid()]


async def test_one_that_ends_before_it_serves_leaves_the_sockets(running: Running) -> None:
    for _ in range(3):
        new = TakeOver(running.path)
        given = await new.take()
        assert given is not None
        given.close()
        new.close()
    assert running.released == []
    assert running.sock.fileno() > 0


async def test_another_user_gets_nothing(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the end that has the sockets, and from the end that wants them."""
    own = os.geteuid()
    monkeypatch.setattr("ztunnel.takeover.os.geteuid", lambda: own + 1)
    assert await raw(running.path, b'{"take": 1}') == [{"error": "the running ztunnel is another user's"}]
    with pytest.raises(TakeOverFailed, match=f"a process of user {own}"):
        await TakeOver(running.path).take()
