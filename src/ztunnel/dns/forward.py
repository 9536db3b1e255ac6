"""Asks the host's resolver, byte for byte: what comes back is handed on as it came.

Each try has a socket of its own, so a port that the kernel draws at random, connected, so that only the server's
datagrams arrive; of these only one with the query's ID and question is taken. Nothing is cached: a forged answer
would reach no one but who asked. The client's own ID is kept, as a signature (SIG(0)) may cover it.

A further server is asked when one fails or is slow. Over UDP what is too long comes back truncated, and the client
asks again over TCP, which goes over TCP to the resolver too.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

import trio

from ztunnel.dns.wire import MAX_MESSAGE, Query, rcode_of, replies_to, take_framed
from ztunnel.errors import address_text
from ztunnel.mesh.address import is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Sequence

    from ztunnel.dns.resolvconf import ResolvConf, Resolvers
    from ztunnel.mesh.address import Address, IpAddress

__all__ = ["Forwarder", "Unanswered"]

CONNECT_SECONDS: Final = 5.0
TRANSFER_IDLE_SECONDS: Final = 5.0
STAGGER_SECONDS: Final = 1.0
MAX_SECONDS: Final = 15.0
_STRAYS: Final = 32  # datagrams that are no answer, after which a try is given up
_ASK_ANOTHER: Final = frozenset({2, 4, 5})  # SERVFAIL, NOTIMP, REFUSED: as the C library


class Unanswered(Exception):
    """No resolver answered; says why."""


class Forwarder:
    """Asks.

    Args:
        resolvers: Whom.
        mark: SO_MARK of the sockets, by which rules that capture DNS let them pass.
        source: Address of the sockets, where the server can be reached from it.
        own: Addresses that the proxy itself has, which are never asked.
    """

    def __init__(
        self,
        resolvers: Resolvers,
        *,
        mark: int | None = None,
        source: IpAddress | None = None,
        own: Container[Address] = (),
    ) -> None:
        self._resolvers = resolvers
        self._mark = mark
        self._source = source
        self._own = own
        self._asking: dict[tuple[int, bool], bytes] = {}

    def servers(self) -> tuple[Address, ...]:
        """Whom to ask, best first."""
        return tuple(server for server in self._resolvers.current().servers if server not in self._own)

    def is_ours(self, port: int, query: bytes, *, datagram: bool) -> bool:
        """Whether `query` from `port` is one that we just sent: a rule has led it back to us."""
        return self._asking.get((port, datagram)) == query

    async def ask(self, query: Query, *, datagram: bool) -> bytes:
        """The resolver's answer.

        Raises:
            Unanswered: there is none.
        """
        conf, servers = self._resolvers.current(), self.servers()
        if not servers:
            raise Unanswered(self._resolvers.error or "this host has no resolver but this proxy")
        return await _Race(self, query, datagram=datagram).run(conf, servers)

    async def transfer(self, query: Query, send: Callable[[bytes], Awaitable[None]]) -> None:
        """Hand on all messages of a zone, until the server ends or falls silent.

        Raises:
            Unanswered: there is none.
        """
        for server in self.servers():
            some = False
            with contextlib.suppress(OSError, trio.BrokenResourceError, trio.TooSlowError):
                async with await self._connect(server) as connection:
                    await connection.send(query.wire)
                    while (reply := await _soon(connection)) is not None:
                        if replies_to(query, reply) or some:  # only the first need repeat the question
                            some = True
                            await send(reply)
            if some:
                return
        raise Unanswered("no resolver sends the zone")

    async def exchange(self, server: Address, query: Query, *, datagram: bool) -> bytes:
        """One try with one server.

        Raises:
            OSError: it cannot be reached.
            trio.BrokenResourceError: it hung up.
            Unanswered: what it sends is no answer.
        """
        if datagram:
            return await self._datagram(server, query)
        async with await self._connect(server) as connection:
            await connection.send(query.wire)
            for _ in range(_STRAYS):
                reply = await connection.receive()
                if reply is None:
                    raise Unanswered(f"{address_text(server)} hung up")
                if replies_to(query, reply):
                    return reply
        raise Unanswered(f"{address_text(server)} answers other questions")

    async def _datagram(self, server: Address, query: Query) -> bytes:
        with self._socket(server, socket.SOCK_DGRAM) as sock:
            sock.connect((str(server[0]), server[1]))
            key = (sock.getsockname()[1], True)
            self._asking[key] = query.wire
            try:
                sock.send(query.wire)
                for _ in range(_STRAYS):
                    await trio.lowlevel.wait_readable(sock)
                    try:
                        reply = sock.recv(MAX_MESSAGE)
                    except BlockingIOError:
                        continue  # its checksum was wrong
                    if replies_to(query, reply):
                        return reply
            finally:
                del self._asking[key]
        raise Unanswered(f"{address_text(server)} answers other questions")

    async def _connect(self, server: Address) -> _Connection:
        sock = trio.socket.from_stdlib_socket(self._socket(server, socket.SOCK_STREAM))
        try:
            with trio.fail_after(CONNECT_SECONDS):
                await sock.connect((str(server[0]), server[1]))
        except BaseException:
            sock.close()
            raise
        return _Connection(trio.SocketStream(sock), self._asking)

    def _socket(self, server: Address, kind: socket.SocketKind) -> socket.socket:
        ip, _ = server
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if self._mark is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self._mark)
            source = self._source
            # A resolver on loopback hears only loopback, and one elsewhere can't answer there.
            if source is not None and source.version == ip.version and is_loopback(source) == is_loopback(ip):
                sock.bind((str(source), 0))
        except BaseException:
            sock.close()
            raise
        return sock


async def _soon(connection: _Connection) -> bytes | None:
    with trio.fail_after(TRANSFER_IDLE_SECONDS):
        return await connection.receive()


class _Connection:
    """A connection to a server, and the port that it comes from."""

    def __init__(self, stream: trio.SocketStream, asking: dict[tuple[int, bool], bytes]) -> None:
        self._stream = stream
        self._asking = asking
        self._key = (stream.socket.getsockname()[1], False)
        self._kept = bytearray()

    async def __aenter__(self) -> _Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._asking.pop(self._key, None)
        self._stream.socket.close()

    async def send(self, query: bytes) -> None:
        """Send a query."""
        self._asking[self._key] = query
        await self._stream.send_all(len(query).to_bytes(2, "big") + query)

    async def receive(self) -> bytes | None:
        """The next message; None at the end."""
        kept = self._kept
        while (message := take_framed(kept)) is None:
            data = await self._stream.receive_some(MAX_MESSAGE)
            if not data:
                return None
            kept += data
        return message


class _Race:
    """The tries of one query: servers in their order, the next one when the last fails or is slow."""

    def __init__(self, forwarder: Forwarder, query: Query, *, datagram: bool) -> None:
        self._forwarder = forwarder
        self._query = query
        self._datagram = datagram
        self._reply: bytes | None = None
        self._refusal: bytes | None = None
        self._why = "no resolver answered in time"

    async def run(self, conf: ResolvConf, servers: Sequence[Address]) -> bytes:
        """The first good answer; of none, the last refusal.

        Raises:
            Unanswered: neither.
        """
        # What may change something at the server is not sent to two at once.
        stagger = STAGGER_SECONDS if self._query.opcode == 0 else conf.timeout
        with trio.move_on_after(min(conf.timeout * conf.attempts, MAX_SECONDS)):
            for _ in range(conf.attempts):
                silent: list[Address] = []
                async with trio.open_nursery() as nursery:
                    for server in servers:
                        done = trio.Event()
                        nursery.start_soon(self._try, server, conf.timeout, done, silent, nursery.cancel_scope)
                        with trio.move_on_after(stagger):
                            await done.wait()
                servers = silent
                if self._reply is not None or not servers:
                    break
        if self._reply is not None:
            return self._reply
        if self._refusal is not None:
            return self._refusal
        raise Unanswered(self._why)

    async def _try(
        self, server: Address, timeout: float, done: trio.Event, silent: list[Address], race: trio.CancelScope
    ) -> None:
        try:
            with trio.fail_after(timeout):
                reply = await self._forwarder.exchange(server, self._query, datagram=self._datagram)
        except trio.TooSlowError:
            silent.append(server)
        except (OSError, trio.BrokenResourceError) as error:
            reason = getattr(error, "strerror", None) or "the connection broke"
            self._why = f"{address_text(server)}: {reason.lower()}"
        except Unanswered as error:
            self._why = str(error)
        else:
            if rcode_of(reply) in _ASK_ANOTHER:
                self._refusal = reply
            else:
                self._reply = reply
                race.cancel()
        finally:
            done.set()
