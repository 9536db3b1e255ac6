"""The calls of each turn in C: sockets and epoll as those of the library, and the tests of TLS once more on them."""

from __future__ import annotations

import errno
import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tools.native import build, compiler

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
HEADERS = Path(sysconfig.get_path("include"), "Python.h")
DONTWAIT = socket.MSG_DONTWAIT

pytestmark = pytest.mark.skipif(
    compiler() is None or not HEADERS.exists(), reason="there is no C compiler, or Python's headers are missing"
)

ON_NATIVE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("hbone._native", sys.argv[1])
sys.modules["hbone._native"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
import hbone.openssl
assert hbone.openssl.NATIVE
import pytest
raise SystemExit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""
"""The tests that it is given, in a process where the module is built."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def native(built: Path) -> Any:
    spec = importlib.util.spec_from_file_location("hbone._native", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def joined(native: Any) -> Iterator[tuple[Any, socket.socket]]:
    """A socket of the module's and an ordinary one at its other end."""
    one, other = socket.socketpair()
    with other:
        fast = native.Socket(one.family, one.type, 0, one.detach())
        yield fast, other
        fast.close()


@pytest.mark.parametrize(
    "tests", [("tests/hbone/test_tls.py",), ("tests/hbone/test_endpoint.py", "tests/ztunnel/dataplane/test_bytes.py")]
)
def test_the_tests_of_its_twins_pass_on_it(built: Path, tests: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", ON_NATIVE, str(built), *tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_bytes_go_both_ways(joined: tuple[Any, socket.socket]) -> None:
    fast, other = joined
    assert fast.send(b"hello", DONTWAIT) == 5
    assert fast.send(memoryview(bytearray(b"-there"))[1:], DONTWAIT) == 5
    assert other.recv(100) == b"hellothere"
    other.sendall(b"0123456789")
    buffer = bytearray(8)
    assert fast.recv_into(buffer, 4, DONTWAIT) == 4
    assert buffer == b"0123\0\0\0\0"
    assert fast.recv_into(memoryview(buffer)[2:], 0, DONTWAIT) == 6
    assert buffer == b"01456789"
    other.close()
    assert fast.recv_into(buffer, 8, DONTWAIT) == 0


def test_what_may_wait_is_the_librarys_own_call(joined: tuple[Any, socket.socket]) -> None:
    fast, other = joined
    fast.settimeout(30)
    assert fast.send(b"one") == 3
    assert fast.send(b"two", 0) == 3
    assert other.recv(6) == b"onetwo"
    other.sendall(b"abc")
    buffer = bytearray(3)
    assert fast.recv_into(buffer) == 3
    assert buffer == b"abc"
    fast.settimeout(0.01)
    with pytest.raises(TimeoutError):
        fast.recv_into(buffer, 3, 0)


@pytest.mark.parametrize("call", ["recv_into", "send"])
def test_errors_are_those_of_the_kernel(native: Any, call: str) -> None:
    def calls(sock: Any) -> None:
        if call == "send":
            while True:
                sock.send(bytes(1 << 16), DONTWAIT)
        sock.recv_into(bytearray(10), 10, DONTWAIT)

    one, other = socket.socketpair()
    fast = native.Socket(one.family, one.type, 0, one.detach())
    with pytest.raises(BlockingIOError):
        calls(fast)
    other.close()
    if call == "send":
        with pytest.raises(BrokenPipeError):
            calls(fast)
    fast.close()
    with pytest.raises(OSError, match="Bad file descriptor") as caught:  # never another's, that got its number
        calls(fast)
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((bytearray(4), 5, DONTWAIT), ValueError),
        ((bytearray(4), -1, DONTWAIT), ValueError),
        ((b"1234", 4, DONTWAIT), BufferError),
        (("text", 4, DONTWAIT), TypeError),
        ((bytearray(4), None, DONTWAIT), TypeError),
        ((bytearray(4), 1 << 80, DONTWAIT), OverflowError),
        ((bytearray(4), 4, 1 << 80), OverflowError),
        ((bytearray(4), 4, DONTWAIT, 0), TypeError),
        ((), TypeError),
    ],
)
def test_wrong_arguments_are_refused(
    joined: tuple[Any, socket.socket], arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        joined[0].recv_into(*arguments)


def test_poll_tells_what_epoll_does(native: Any) -> None:
    with select.epoll() as epoll:
        assert native.poll(epoll.fileno(), 0, 256) == []
        pairs = [socket.socketpair() for _ in range(300)]
        for one, other in pairs:
            epoll.register(one.fileno(), select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            other.send(b"x")
        pairs[0][1].close()
        assert native.poll(epoll.fileno(), -1, 1) == [(pairs[0][0].fileno(), select.EPOLLIN | 0x2000 | select.EPOLLHUP)]
        told = native.poll(epoll.fileno(), 0, 1 << 20)
        assert len(told) == 256  # at most, whatever is asked for
        told += native.poll(epoll.fileno(), 0, 256)
        assert sorted(told) == [(one.fileno(), select.EPOLLIN) for one, _ in pairs[1:]]
        for pair in pairs:
            for sock in pair:
                sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.poll(-1, 0, 256)
    for arguments in ((), (1, 2), (1, None, 3)):
        with pytest.raises(TypeError):
            native.poll(*arguments)


def test_poll_lets_others_run_and_signals_in(native: Any) -> None:
    reading, writing = os.pipe()
    with select.epoll() as epoll, open(reading, "rb"), open(writing, "wb", buffering=0) as end:
        epoll.register(reading, select.EPOLLIN)
        threading.Timer(0.05, end.write, [b"x"]).start()
        assert native.poll(epoll.fileno(), -1, 256) == [(reading, select.EPOLLIN)]
        epoll.unregister(reading)

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        def write(*_: object) -> None:
            end.write(b"y")
            epoll.register(reading, select.EPOLLIN)

        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]).start()
            with pytest.raises(KeyboardInterrupt):
                native.poll(epoll.fileno(), -1, 256)
            signal.signal(signal.SIGUSR1, write)
            threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]).start()
            assert native.poll(epoll.fileno(), -1, 256) == [(reading, select.EPOLLIN)]  # it waited on
        finally:
            signal.signal(signal.SIGUSR1, before)


def test_nothing_is_called_before_it_knows_where(native: Any) -> None:
    for call, arguments in {
        native.read_records: (1, 1, 1, 1),
        native.write_records: (1, 1, 1),
        native.write_small: (1, b"", 0),
        native.put: (1, 1, 1),
        native.take: (1, 1, 1),
        native.lend: (1, 1, 1, 1),
        native.pending: (1, 0),
    }.items():
        with pytest.raises(RuntimeError, match=r"use\(\)"):
            call(*arguments)
        with pytest.raises(TypeError):
            call()
    count = len(native.FUNCTIONS)
    for addresses, error in (((), TypeError), ((0,) * count, ValueError), (("a",) * count, TypeError)):
        with pytest.raises(error):
            native.use(*addresses)
