"""Two data paths in one process, over loopback, with real sockets: a client's host and a server's."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import attrs
import trio
import trio.lowlevel
import trio.testing
from tests.support.mesh import hbone

from hbone.testing.ca import TestCa
from ztunnel.config import Config, WorkloadInfo
from ztunnel.control.revocation import Revocations
from ztunnel.dataplane import Dataplane, Reactor, SocketCalls
from ztunnel.logs import AccessLog, AccessRecord
from ztunnel.mesh import Address, Store, Workload, parse_ip
from ztunnel.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from hbone.identity import Identity
    from ztunnel.errors import DataplaneError

__all__ = ["CountingCalls", "Host", "Lines", "Pair", "counts", "echo", "exactly", "open_pair", "reset"]

_hosts = itertools.count(1)
_ports = itertools.cycle(range(20_000, 30_000))
CA = TestCa()


def fresh_ip() -> str:
    """A loopback address that no other test uses, in this process or beside it."""
    number = next(_hosts)
    return f"127.{100 + os.getpid() % 100}.{number // 250}.{number % 250 + 1}"


def fresh_port() -> int:
    """A port for an application, below those that the kernel gives.

    Ztunnels under test have theirs of the kernel, and lead nobody to a port of their own on a loopback address.
    """
    return next(_ports)


class Lines(AccessLog):
    """An access log in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.completed: list[tuple[AccessRecord, int, int, BaseException | str | None]] = []
        self.denied: list[str] = []

    def complete(
        self, record: AccessRecord, *, received: int, sent: int, now: float, error: BaseException | str | None = None
    ) -> None:
        super().complete(record, received=received, sent=sent, now=now, error=error)
        self.completed.append((record, received, sent, error))

    def early_deny(
        self, direction: str, source: Address | None, destination: Address | None, error: DataplaneError | str
    ) -> None:
        super().early_deny(direction, source, destination, error)
        self.denied.append(str(error))

    @property
    def errors(self) -> list[str]:
        return [str(error) for *_, error in self.completed if error is not None]


counts: collections.Counter[str] = collections.Counter()


class CountingSocket(socket.SocketType):
    """Counts the calls of the data path."""

    def recv_into(self, *args: Any) -> int:
        counts["recv"] += 1
        return super().recv_into(*args)

    def send(self, *args: Any) -> int:
        counts["send"] += 1
        return super().send(*args)

    def shutdown(self, how: int, /) -> None:
        counts["shutdown"] += 1
        super().shutdown(how)

    def setsockopt(self, *args: Any) -> None:
        counts["setsockopt"] += 1
        super().setsockopt(*args)

    def getsockopt(self, *args: Any) -> Any:
        counts["getsockopt"] += 1
        return super().getsockopt(*args)

    def connect_ex(self, *args: Any) -> int:
        counts["connect"] += 1
        return super().connect_ex(*args)


class CountingCalls(SocketCalls):
    """Socket calls with a destination that the test says, since nothing captures connections here."""

    def __init__(self) -> None:
        super().__init__(socket_class=CountingSocket)
        self.destination: Address | None = None

    def accept(self, listener: socket.SocketType) -> tuple[socket.SocketType, Address]:
        counts["accept"] += 1
        return super().accept(listener)

    def original_destination(self, sock: socket.SocketType, peer: Any) -> Address:
        return self.destination or super().original_destination(sock, peer)


@attrs.define
class Identities:
    """An identity that is there, or comes."""

    identity: Identity | None

    def current(self) -> Identity | None:
        return self.identity

    async def fetch(self) -> Identity:
        if self.identity is None:
            await trio.lowlevel.checkpoint()
            raise LookupError("the CA is away")
        return self.identity


@attrs.define(eq=False)
class Host:
    """One workload with its data path."""

    name: str
    ip: str
    workload: Workload
    plane: Dataplane
    calls: CountingCalls
    log: Lines
    metrics: Metrics
    identities: Identities
    revocations: Revocations

    @property
    def outbound(self) -> tuple[str, int]:
        return self.ip, self.plane.listeners["outbound"].address[1]

    @property
    def inbound(self) -> tuple[str, int]:
        return self.ip, self.plane.listeners["inbound"].address[1]

    @property
    def socks5(self) -> tuple[str, int]:
        return self.ip, self.plane.listeners["socks5"].address[1]


@attrs.define(eq=False)
class Pair:
    """A client's and a server's host, and what both are told."""

    reactor: Reactor
    store: Store
    client: Host
    server: Host
    nursery: trio.Nursery
    app_port: int = 0

    async def connect(self) -> trio.SocketStream:
        """What the client's application does: connect to the server's, captured."""
        self.client.calls.destination = (parse_ip(self.server.ip), self.app_port)
        return await trio.open_tcp_stream(*self.client.outbound)

    async def serve(self, handler: Callable[[trio.SocketStream], Awaitable[object]]) -> int:
        """The server's application."""
        listeners = await trio.open_tcp_listeners(fresh_port(), host=self.server.ip)

        async def guarded(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async with stream:
                    await handler(stream)

        self.app_port = listeners[0].socket.getsockname()[1]
        self.nursery.start_soon(trio.serve_listeners, guarded, listeners)
        return self.app_port

    @contextlib.asynccontextmanager
    async def looking_away(self) -> AsyncIterator[None]:
        """The client's end of the tunnel reads nothing meanwhile, and afterwards in one read what came."""
        (tunnel,) = self.client.plane.dialer.tunnels
        self.reactor.remove(tunnel._sock.fileno())
        yield
        await trio.testing.wait_all_tasks_blocked()
        self.reactor.add(tunnel._sock.fileno(), tunnel)

    async def settle(self, done: Callable[[], bool]) -> None:
        """Wait until `done`, five seconds at most."""
        with trio.fail_after(30):
            while not done():
                await trio.sleep(0.005)


def make_host(
    reactor: Reactor, store: Store, name: str, *, identity: Identity | None = None, ip: str = "", **config: Any
) -> Host:
    """A host whose workload is in the store."""
    ip = ip or fresh_ip()
    workload = hbone(name, ip, workload_name=name, canonical_name=name)
    store.apply_addresses([workload], [])
    calls, log, metrics = CountingCalls(), Lines(), Metrics()
    identities = Identities(identity or CA.identity("default", name))
    revocations = Revocations()
    settings = {"outbound_port": 0, "inbound_port": 0, "socks5_port": 0, "socks5_enabled": True, **config}
    plane = Dataplane(
        reactor,
        Config(
            workload=WorkloadInfo(namespace="default", name=name, service_account=name),
            bind_address=parse_ip(ip),
            original_source=False,
            drain_deadline=2.0,
            **settings,
        ),
        store,
        identities,
        metrics,
        log,
        revocations=revocations,
        calls=calls,
    )
    plane.bind()
    return Host(name, ip, workload, plane, calls, log, metrics, identities, revocations)


async def echo(stream: trio.SocketStream) -> None:
    """Send back what comes, then end."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def exactly(stream: trio.SocketStream, nbytes: int) -> bytes:
    """So many bytes; fewer when it ends before."""
    data = b""
    while len(data) < nbytes and (chunk := await stream.receive_some(nbytes - len(data))):
        data += chunk
    return data


@contextlib.asynccontextmanager
async def open_pair(*, poller: Any = None, **config: Any) -> AsyncIterator[Pair]:
    """Two hosts on one reactor, as a task of the test's own Trio."""
    reactor = Reactor(poller=poller)
    store = Store()
    client = make_host(reactor, store, "client", **config)
    server = make_host(reactor, store, "server", **config)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: reactor.run_in_trio(task_status=task_status))
        client.plane.start()
        server.plane.start()
        try:
            yield Pair(reactor, store, client, server, nursery)
        finally:
            client.plane.close()
            server.plane.close()
            nursery.cancel_scope.cancel()


def reset(stream: trio.SocketStream) -> None:
    """Close with RST."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()
