"""The application behind every pair of proxies: a process that echoes, swallows or pours out bytes.

    python -m bench.application ADDRESS PORT...

The first byte of a connection says what it is to do: `E` echo, `B` swallow and answer with the count, `D` pour out
until the client ends, `I` do nothing. One epoll, so that a thousand connections cost it little.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys

POUR = memoryview(bytes(256 << 10))
READ, WRITE = select.EPOLLIN | select.EPOLLRDHUP, select.EPOLLOUT


class Connection:
    """One connection of the application."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.kind = b""
        self.count = 0
        self.pending = b""


def serve(address: str, ports: list[int]) -> None:
    """Serve until killed."""
    epoll = select.epoll()
    listeners = {}
    for port in ports:
        listener = socket.create_server((address, port), backlog=4096)
        listener.setblocking(False)
        listeners[listener.fileno()] = listener
        epoll.register(listener.fileno(), select.EPOLLIN)
    connections: dict[int, Connection] = {}
    buffer = bytearray(1 << 20)
    print("ready", flush=True)
    while True:
        for fd, events in epoll.poll():
            if fd in listeners:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sock, _ = listeners[fd].accept()
                        sock.setblocking(False)
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        connections[sock.fileno()] = Connection(sock)
                        epoll.register(sock.fileno(), READ)
                continue
            connection = connections[fd]
            try:
                alive = _step(connection, events, buffer, epoll)
            except BlockingIOError:
                alive = True
            except OSError:
                alive = False
            if not alive:
                epoll.unregister(fd)
                connection.sock.close()
                del connections[fd]


def _step(connection: Connection, events: int, buffer: bytearray, epoll: select.epoll) -> bool:
    sock = connection.sock
    if not connection.kind:
        connection.kind = sock.recv(1)
        if connection.kind == b"D":
            epoll.modify(sock.fileno(), READ | WRITE)
        return bool(connection.kind)
    if connection.kind == b"D":
        if events & select.EPOLLRDHUP:
            return False
        sock.send(POUR)
        return True
    if connection.pending:
        sent = sock.send(connection.pending)
        connection.pending = connection.pending[sent:]
        if not connection.pending:
            epoll.modify(sock.fileno(), READ)
        return True
    nbytes = sock.recv_into(buffer)
    if not nbytes:
        if connection.kind == b"B":
            sock.send(connection.count.to_bytes(8, "big"))
        return False
    if connection.kind == b"B":
        connection.count += nbytes
    elif connection.kind == b"E":
        sent = sock.send(memoryview(buffer)[:nbytes])
        if sent < nbytes:
            connection.pending = bytes(buffer[sent:nbytes])
            epoll.modify(sock.fileno(), WRITE)
    return True


if __name__ == "__main__":
    serve(sys.argv[1], [int(argument) for argument in sys.argv[2:]])
