"""The client: a process that takes a job a line (JSON) on standard input and answers with what it measured.

It runs where the client of the mesh would run, so it may stand in a network namespace of its own.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

HERTZ = os.sysconf("SC_CLK_TCK")
BLOCK = memoryview(bytes(256 << 10))


class Target:
    """How to reach the application: directly (captured or not), or through a SOCKS5 port."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.address = (job["host"], job["port"])
        self.proxy = (job["proxy"][0], job["proxy"][1]) if job.get("proxy") else None
        self.source = job.get("source")

    def connect(self) -> socket.socket:
        """A connected socket."""
        source = (self.source, 0) if self.source else None
        sock = socket.create_connection(self.proxy or self.address, timeout=30, source_address=source)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.proxy:
            host, port = self.address
            sock.sendall(b"\x05\x01\x00\x05\x01\x00\x01" + socket.inet_aton(host) + port.to_bytes(2, "big"))
            answer = b""
            while len(answer) < 12:
                part = sock.recv(12 - len(answer))
                if not part:
                    raise ConnectionError("the SOCKS5 port closed the connection")
                answer += part
        return sock


class Result:
    """Units done, seconds taken, and the latency of each where there is one."""

    def __init__(self) -> None:
        self.units = 0
        self.latencies: list[float] = []
        self.started = time.perf_counter()
        self.seconds = 0.0


def bulk_up(target: Target, seconds: float, streams: int) -> Result:
    """Bytes from client to application."""
    socks = {}
    epoll = select.epoll()
    for _ in range(streams):
        sock = target.connect()
        sock.sendall(b"B")
        socks[sock.fileno()] = sock
    result = Result()
    if streams == 1:
        sock = next(iter(socks.values()))
        while time.perf_counter() - result.started < seconds:
            sock.sendall(BLOCK)
            result.units += len(BLOCK)
    else:
        piece = BLOCK[: 64 << 10]
        for fd, sock in socks.items():
            sock.setblocking(False)
            epoll.register(fd, select.EPOLLOUT)
        while time.perf_counter() - result.started < seconds:
            for fd, _ in epoll.poll(1):
                try:
                    result.units += socks[fd].send(piece)
                except BlockingIOError:
                    continue
    arrived = 0
    for sock in socks.values():
        sock.setblocking(True)
        sock.shutdown(socket.SHUT_WR)
        arrived += int.from_bytes(_exactly(sock, 8), "big")
        sock.close()
    result.seconds = time.perf_counter() - result.started
    if arrived != result.units:
        raise RuntimeError(f"{result.units} bytes were sent, {arrived} arrived")
    return result


def bulk_down(target: Target, seconds: float, streams: int) -> Result:
    """Bytes from application to client."""
    epoll = select.epoll()
    socks = {}
    for _ in range(streams):
        sock = target.connect()
        sock.sendall(b"D")
        socks[sock.fileno()] = sock
        epoll.register(sock.fileno(), select.EPOLLIN)
    buffer = bytearray(1 << 20)
    result = Result()
    while time.perf_counter() - result.started < seconds:
        for fd, _ in epoll.poll(1):
            result.units += socks[fd].recv_into(buffer)
    result.seconds = time.perf_counter() - result.started
    for sock in socks.values():
        sock.close()
    return result


def round_trips(target: Target, seconds: float, connections: int, nbytes: int) -> Result:
    """Small messages there and back, one in flight on each connection."""
    message = b"m" * nbytes
    if connections == 1:
        sock = target.connect()
        sock.sendall(b"E")
        result = Result()
        clock = time.perf_counter
        while True:
            sent = clock()
            if sent - result.started >= seconds:
                break
            sock.sendall(message)
            if nbytes == 1:
                sock.recv(1)
            else:
                _exactly(sock, nbytes)
            result.latencies.append(clock() - sent)
            result.units += 1
        result.seconds = clock() - result.started
        sock.close()
        return result
    epoll = select.epoll()
    socks: dict[int, socket.socket] = {}
    for _ in range(connections):
        sock = target.connect()
        sock.sendall(b"E")
        epoll.register(sock.fileno(), select.EPOLLIN)
        socks[sock.fileno()] = sock
    result = Result()
    began = {}
    for fd, sock in socks.items():
        began[fd] = time.perf_counter()
        sock.sendall(message)
    while time.perf_counter() - result.started < seconds:
        for fd, _ in epoll.poll(1):
            sock = socks[fd]
            sock.recv(65536)
            now = time.perf_counter()
            result.latencies.append(now - began[fd])
            result.units += 1
            began[fd] = now
            sock.sendall(message)
    result.seconds = time.perf_counter() - result.started
    for sock in socks.values():
        sock.close()
    return result


def connects(target: Target, seconds: float, in_flight: int) -> Result:
    """New connections, a byte there and back on each, closed."""
    result = Result()
    if in_flight == 1 or target.proxy:
        while time.perf_counter() - result.started < seconds:
            began = time.perf_counter()
            sock = target.connect()
            sock.sendall(b"Ey")
            if not sock.recv(1):
                raise RuntimeError("a connection was lost")
            sock.close()
            result.latencies.append(time.perf_counter() - began)
            result.units += 1
        result.seconds = time.perf_counter() - result.started
        return result
    epoll = select.epoll()
    pending: dict[int, tuple[socket.socket, float, bool]] = {}

    def start() -> None:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(target.address)
        pending[sock.fileno()] = (sock, time.perf_counter(), False)
        epoll.register(sock.fileno(), select.EPOLLOUT)

    for _ in range(in_flight):
        start()
    while time.perf_counter() - result.started < seconds:
        for fd, _ in epoll.poll(1):
            sock, began, asked = pending[fd]
            if not asked:
                sock.send(b"Ey")
                pending[fd] = (sock, began, True)
                epoll.modify(fd, select.EPOLLIN)
                continue
            if not sock.recv(16):
                raise RuntimeError("a connection was lost")
            result.latencies.append(time.perf_counter() - began)
            result.units += 1
            epoll.unregister(fd)
            del pending[fd]
            sock.close()
            start()
    result.seconds = time.perf_counter() - result.started
    for sock, _, _ in pending.values():
        sock.close()
    return result


WORKLOADS: dict[str, Callable[[Target, float], Result]] = {
    "bulk_up_1": lambda target, seconds: bulk_up(target, seconds, 1),
    "bulk_up_16": lambda target, seconds: bulk_up(target, seconds, 16),
    "bulk_down_1": lambda target, seconds: bulk_down(target, seconds, 1),
    "bulk_down_16": lambda target, seconds: bulk_down(target, seconds, 16),
    "rr_1": lambda target, seconds: round_trips(target, seconds, 1, 1),
    "rr_1k": lambda target, seconds: round_trips(target, seconds, 1, 1024),
    "rr_64": lambda target, seconds: round_trips(target, seconds, 64, 100),
    "rr_1000": lambda target, seconds: round_trips(target, seconds, 1000, 100),
    "connect_1": lambda target, seconds: connects(target, seconds, 1),
    "connect_32": lambda target, seconds: connects(target, seconds, 32),
}


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = sock.recv(nbytes - len(data))
        if not part:
            raise RuntimeError("a connection was lost")
        data += part
    return data


def cpu(pids: list[int]) -> tuple[float, float]:
    """User and system seconds of processes, all their threads, from the kernel."""
    user = system = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
        user += int(fields[11])
        system += int(fields[12])
    return user / HERTZ, system / HERTZ


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the sorted `values` lie."""
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def main() -> None:
    """Answer jobs until standard input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        before = cpu(job["pids"])
        try:
            result = WORKLOADS[job["workload"]](Target(job), job["seconds"])
        except (OSError, RuntimeError) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        time.sleep(0.05)  # what the proxies still do for these bytes counts too
        after = cpu(job["pids"])
        latencies = sorted(result.latencies)
        answer = {
            "units": result.units,
            "seconds": result.seconds,
            "user": after[0] - before[0],
            "system": after[1] - before[1],
            "p50": percentile(latencies, 0.5),
            "p99": percentile(latencies, 0.99),
            "p999": percentile(latencies, 0.999),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
