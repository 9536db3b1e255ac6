"""What the client does to a pair of proxies, one function a workload."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from bench.measure import Cpu, cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = memoryview(bytes(256 << 10))
SETTLE = 0.05
"""Seconds in which the proxies end what a turn began; the CPU of it counts, the time doesn't."""


class Target:
    """How to reach the application: directly (captured or not), or through a SOCKS5 port."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.address = (job["host"], job["port"])
        self.proxy = (job["proxy"][0], job["proxy"][1]) if job.get("proxy") else None
        self.source = job.get("source")
        self.pids: list[int] = job.get("pids", [])
        self.until: str = job.get("until", "")
        """A file that ends a turn before its time."""

    def connect(self) -> socket.socket:
        """A connected socket."""
        source = (self.source, 0) if self.source else None
        sock = socket.create_connection(self.proxy or self.address, timeout=30, source_address=source)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.proxy:
            host, port = self.address
            sock.sendall(b"\x05\x01\x00\x05\x01\x00\x01" + socket.inet_aton(host) + port.to_bytes(2, "big"))
            exactly(sock, 12)
        return sock

    def connect_many(self, count: int) -> list[socket.socket]:
        """Connected sockets that echo, each tried once.

        Raises:
            RuntimeError: one was lost.
        """
        if self.proxy or count == 1:
            socks = [self.connect() for _ in range(count)]
            for sock in socks:
                sock.sendall(b"Ey")
                exactly(sock, 1)
            return socks
        socks = []
        for sock, _ in _opened(self, count, 32):
            sock.setblocking(True)
            sock.settimeout(30)
            socks.append(sock)
        return socks


class Meter:
    """Units done, seconds taken, CPU of the proxies, and the latency of each unit where there is one."""

    def __init__(self, target: Target) -> None:
        self.pids = target.pids
        self.units = 0
        self.latencies: list[float] = []
        self.started = 0.0
        self.seconds = 0.0
        self.cpu = Cpu()

    def start(self) -> None:
        """Everything is set up; measure from here."""
        self._before = cpu(self.pids)
        self.started = time.perf_counter()

    def stop(self) -> None:
        """All units are done; measure up to here, and let the proxies settle."""
        self.seconds = time.perf_counter() - self.started
        time.sleep(SETTLE)
        self.cpu = cpu(self.pids).since(self._before)

    def going(self, seconds: float) -> bool:
        """Whether the turn is not over yet."""
        return time.perf_counter() - self.started < seconds


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    """Receive `nbytes`.

    Raises:
        RuntimeError: the connection ended before.
    """
    data = b""
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        if not part:
            raise RuntimeError("a connection was lost")
        data += part
    return data


def bulk_up(target: Target, meter: Meter, seconds: float, streams: int) -> None:
    """Bytes from client to application, which counts them."""
    socks = {}
    for _ in range(streams):
        sock = target.connect()
        sock.sendall(b"B")
        socks[sock.fileno()] = sock
    meter.start()
    if streams == 1:
        sock = next(iter(socks.values()))
        while meter.going(seconds):
            sock.sendall(BLOCK)
            meter.units += len(BLOCK)
    else:
        piece = BLOCK[: 64 << 10]
        with select.epoll() as epoll:
            for fd, sock in socks.items():
                sock.setblocking(False)
                epoll.register(fd, select.EPOLLOUT)
            while meter.going(seconds):
                for fd, _ in epoll.poll(1):
                    with contextlib.suppress(BlockingIOError):
                        meter.units += socks[fd].send(piece)
    arrived = 0
    for sock in socks.values():
        sock.setblocking(True)
        sock.settimeout(60)
        sock.shutdown(socket.SHUT_WR)
    for sock in socks.values():
        arrived += int.from_bytes(exactly(sock, 8), "big")
        sock.close()
    meter.stop()
    if arrived != meter.units:
        raise RuntimeError(f"{meter.units} bytes were sent, {arrived} arrived")


def bulk_down(target: Target, meter: Meter, seconds: float, streams: int) -> None:
    """Bytes from application to client; all that were sent are read and counted."""
    socks = {}
    with select.epoll() as epoll:
        for _ in range(streams):
            sock = target.connect()
            socks[sock.fileno()] = sock
            epoll.register(sock.fileno(), select.EPOLLIN)
        buffer = bytearray(1 << 20)
        meter.start()
        for sock in socks.values():
            sock.sendall(b"D")
        ending = False
        while socks:
            if not ending and not meter.going(seconds):
                ending = True
                for sock in socks.values():
                    sock.shutdown(socket.SHUT_WR)
            ready = epoll.poll(60 if ending else 1)
            if ending and not ready:
                raise RuntimeError("the application's end did not arrive within 60 s")
            for fd, _ in ready:
                nbytes = socks[fd].recv_into(buffer)
                meter.units += nbytes
                if not nbytes:
                    epoll.unregister(fd)
                    socks.pop(fd).close()
        meter.stop()


def round_trips(target: Target, meter: Meter, seconds: float, connections: int, nbytes: int) -> None:
    """Small messages there and back, one in flight on each connection."""
    message = b"m" * nbytes
    socks = {sock.fileno(): sock for sock in target.connect_many(connections)}
    if connections == 1:
        sock = next(iter(socks.values()))
        clock = time.perf_counter
        meter.start()
        sent = meter.started
        while sent - meter.started < seconds:
            sent = clock()
            sock.sendall(message)
            if nbytes == 1:
                if not sock.recv(1):
                    raise RuntimeError("a connection was lost")
            else:
                exactly(sock, nbytes)
            meter.latencies.append(clock() - sent)
        meter.units = len(meter.latencies)
        meter.stop()
    else:
        _many_round_trips(meter, seconds, socks, message)
    for sock in socks.values():
        sock.close()


def _many_round_trips(meter: Meter, seconds: float, socks: dict[int, socket.socket], message: bytes) -> None:
    with select.epoll() as epoll:
        for fd in socks:
            epoll.register(fd, select.EPOLLIN)
        began: dict[int, float] = {}
        missing: dict[int, int] = {}
        meter.start()
        for fd, sock in socks.items():
            began[fd] = time.perf_counter()
            missing[fd] = len(message)
            sock.sendall(message)
        under_way = len(socks)
        while under_way:
            ready = epoll.poll(30)
            if not ready:
                raise RuntimeError(f"{under_way} answers did not arrive within 30 s")
            more = meter.going(seconds)
            for fd, _ in ready:
                sock = socks[fd]
                nbytes = len(sock.recv(65536))
                if not nbytes:
                    raise RuntimeError("a connection was lost")
                missing[fd] -= nbytes
                if missing[fd]:
                    continue
                now = time.perf_counter()
                meter.latencies.append(now - began[fd])
                if more:
                    began[fd] = now
                    missing[fd] = len(message)
                    sock.sendall(message)
                else:
                    under_way -= 1
        meter.units = len(meter.latencies)
        meter.stop()


def connects(target: Target, meter: Meter, seconds: float, in_flight: int) -> None:
    """New connections, a byte there and back on each, closed."""
    meter.start()
    if in_flight == 1 or target.proxy:
        while meter.going(seconds):
            began = time.perf_counter()
            sock = target.connect()
            sock.sendall(b"Ey")
            exactly(sock, 1)
            sock.close()
            meter.latencies.append(time.perf_counter() - began)
    else:
        for sock, took in _opened(target, None, in_flight, lambda: meter.going(seconds)):
            sock.close()
            meter.latencies.append(took)
    meter.units = len(meter.latencies)
    meter.stop()


def handshakes(target: Target, meter: Meter, seconds: float, most: int = 800) -> None:
    """New connections that stay until the turn ends: where a tunnel carries one stream, each is a TLS handshake."""
    held: list[socket.socket] = []
    meter.start()
    if target.proxy:
        while meter.going(seconds) and len(held) < most:
            held += target.connect_many(1)
    else:
        for sock, _ in _opened(target, most, 8, lambda: meter.going(seconds)):
            held.append(sock)
    meter.units = len(held)
    meter.stop()
    for sock in held:
        sock.close()


def _opened(
    target: Target, count: int | None, in_flight: int, going: Any = lambda: True
) -> Iterator[tuple[socket.socket, float]]:
    """Sockets on which a byte went there and back, and how long that took; `in_flight` of them are under way.

    Ends when `count` were opened, or when `going` says no and those under way are done.
    """
    epoll = select.epoll()
    pending: dict[int, tuple[socket.socket, float, bool]] = {}
    started = 0

    def start() -> None:
        nonlocal started
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.source:
            sock.bind((target.source, 0))
        sock.connect_ex(target.address)
        pending[sock.fileno()] = (sock, time.perf_counter(), False)
        epoll.register(sock.fileno(), select.EPOLLOUT)
        started += 1

    def more() -> bool:
        return (count is None or started < count) and bool(going())

    try:
        while len(pending) < in_flight and more():
            start()
        while pending:
            ready = epoll.poll(30)
            if not ready:
                raise RuntimeError(f"{len(pending)} connections did not answer within 30 s")
            for fd, _ in ready:
                sock, began, asked = pending[fd]
                if not asked:
                    sock.send(b"Ey")
                    pending[fd] = (sock, began, True)
                    epoll.modify(fd, select.EPOLLIN)
                    continue
                if not sock.recv(16):
                    raise RuntimeError("a connection was lost")
                epoll.unregister(fd)
                del pending[fd]
                yield sock, time.perf_counter() - began
                if more():
                    start()
    finally:
        epoll.close()
        for sock, _, _ in pending.values():
            sock.close()


def paced(target: Target, meter: Meter, seconds: float, connections: int, per_second: float) -> None:
    """A steady number of 100-byte round trips a second, spread over the connections.

    Latency counts from the moment that a message was due, so a stall counts for all that it delayed.
    """
    message = b"m" * 100
    socks = target.connect_many(connections)
    by_fd = {sock.fileno(): sock for sock in socks}
    due: dict[int, list[float]] = {fd: [] for fd in by_fd}
    missing = dict.fromkeys(by_fd, 0)
    order = list(by_fd)
    turn = 0
    with select.epoll() as epoll:
        for fd in order:
            epoll.register(fd, select.EPOLLIN)
        meter.start()
        following = meter.started
        end = meter.started + seconds
        check = meter.started
        while following < end or any(due.values()):
            now = time.perf_counter()
            if target.until and now >= check:
                check = now + 0.05
                if os.path.exists(target.until):
                    end = min(end, now)
            if following < end and now >= following:
                fd = order[turn % len(order)]
                turn += 1
                due[fd].append(following)
                missing[fd] += len(message)
                by_fd[fd].sendall(message)
                following += 1 / per_second
                continue
            if now > end + 30:
                raise RuntimeError("answers did not arrive within 30 s")
            wait = following - now if following < end else 1.0
            for fd, _ in epoll.poll(max(0.0, min(wait, 0.05))):
                nbytes = len(by_fd[fd].recv(65536))
                if not nbytes:
                    raise RuntimeError("a connection was lost")
                missing[fd] -= nbytes
                now = time.perf_counter()
                while due[fd] and missing[fd] <= (len(due[fd]) - 1) * len(message):
                    meter.latencies.append(now - due[fd].pop(0))
        meter.units = len(meter.latencies)
        meter.stop()
    for sock in socks:
        sock.close()


@contextlib.contextmanager
def neighbour(target: Target, streams: int) -> Iterator[None]:
    """Bulk towards the application, from a process of its own, as long as the body runs.

    Raises:
        RuntimeError: it ended on its own.
    """
    socks = [target.connect() for _ in range(streams)]
    pid = os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with select.epoll() as epoll:
                by_fd = {sock.fileno(): sock for sock in socks}
                for fd, sock in by_fd.items():
                    sock.sendall(b"B")
                    sock.setblocking(False)
                    epoll.register(fd, select.EPOLLOUT)
                while True:
                    for fd, _ in epoll.poll():
                        with contextlib.suppress(BlockingIOError):
                            by_fd[fd].send(BLOCK)
        except BaseException:
            os._exit(1)
    for sock in socks:
        sock.close()
    time.sleep(0.1)
    try:
        yield
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            pid = 0
            raise RuntimeError("the bulk neighbour lost its connection")
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def beside_bulk(target: Target, meter: Meter, seconds: float, connections: int, per_second: float) -> None:
    """Steady round trips while one stream carries bulk."""
    with neighbour(target, 1):
        paced(target, meter, seconds, connections, per_second)


HELD: list[socket.socket] = []
"""Connections that stay open between jobs."""


def hold(target: Target, meter: Meter, _: float, count: int) -> None:
    """Open `count` connections and keep them until `release`."""
    meter.start()
    HELD.extend(target.connect_many(count))
    meter.units = count
    meter.stop()


def release(_: Target, meter: Meter, __: float) -> None:
    """Close what is held."""
    meter.start()
    for sock in HELD:
        sock.close()
    HELD.clear()
    time.sleep(0.5)
    meter.stop()


RUNNERS: dict[str, Any] = {
    function.__name__: function
    for function in (bulk_up, bulk_down, round_trips, connects, handshakes, paced, beside_bulk, hold, release)
}

if __name__ == "__main__":
    sys.exit("bench.load drives these")
