"""The DNS proxy's listeners, UDP and TCP.

What the mesh owns is answered in the turn that reads the question. Everything else becomes a task that asks the
host's resolver, and everything of that is bounded: at most `MAX_PENDING` questions wait, of which the oldest gives
way to a new one, so that whoever asks for names that never resolve crowds out their own; a connection that rests
gives way to a new one in the same manner.

Until the mesh and the client's workload are known, questions wait for five seconds, and fail then: answered by the
outside, a name of the mesh would lead past it. Names of the control plane are asked at once, as nothing becomes
known without them.

Source: Istio's ztunnel, DNS proxy; RFC 1035, RFC 7766.

One class, and so one long file: its bounds (questions, connections, readiness) are shared by UDP and TCP.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

import attrs
import dns.rcode
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from ztunnel.dns.answer import Result, Zone, decide, zone_of
from ztunnel.dns.forward import Forwarder, Unanswered
from ztunnel.dns.names import normal, strip_domain
from ztunnel.dns.pending import Connection, Pending
from ztunnel.dns.resolvconf import Resolvers
from ztunnel.dns.wire import (
    MAX_MESSAGE,
    Query,
    Signed,
    failure,
    is_transfer,
    rcode_of,
    read,
    render,
    type_name,
)
from ztunnel.errors import DataplaneError, address_text
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from ztunnel.config import Config
    from ztunnel.given import Given
    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload
    from ztunnel.metrics import Metrics

    _Send = Callable[[bytes], Awaitable[None]]

__all__ = ["Client", "DnsProxy", "loopback_hosts", "make_proxy"]

MAX_CONNECTIONS: Final = 256
WAIT_SECONDS: Final = 5.0
DRAIN_SECONDS: Final = 1.0
_DRAIN_STEP: Final = 0.01  # seconds between two looks whether all is done
_BATCH: Final = 8  # datagrams a turn, and
_TURNS: Final = 4  # messages of all connections a turn: Trio runs what is runnable before bytes move again
_REST_SECONDS: Final = 0.2
_WARN_SECONDS: Final = 60.0
_IP_PKTINFO: Final = 8  # socket has it from Python 3.14 on
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_DISABLE_IPV6: Final = "/proc/sys/net/ipv6/conf/lo/disable_ipv6"

log = get_logger("dns")

_Ancillary = list[tuple[int, int, bytes]]


class Client(Protocol):
    """The workload whose programs ask."""

    @property
    def current(self) -> Workload | None:
        """It, if the mesh told of it."""

    async def wait(self) -> Workload:
        """It, as soon as the mesh tells.

        Raises:
            DataplaneError: the mesh does not.
        """


def loopback_hosts(wanted: Sequence[IpAddress], *, disabled: str = _DISABLE_IPV6) -> list[IpAddress]:
    """`wanted` without ::1 where the kernel has no IPv6 on loopback."""
    try:
        with open(disabled) as file:
            off = file.read().strip() == "1"
    except OSError:  # no such kernel, or no such file
        try:
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
            off = False
        except OSError:
            off = True
    return [ip for ip in wanted if not (off and ip == parse_ip("::1"))]


def make_proxy(config: Config, store: Store, client: Client, metrics: Metrics) -> DnsProxy:
    """The proxy of a configuration; nothing listens yet."""
    servers = (urlsplit(url).hostname for url in (config.xds_address, config.ca_address))
    return DnsProxy(
        store,
        client,
        metrics,
        addresses=[(ip, config.dns_port) for ip in loopback_hosts(config.dns_hosts)],
        resolvers=Resolvers(time.monotonic, servers=config.dns_servers),
        zone=zone_of(config),
        mark=config.packet_mark,
        source=config.bind_address,
        bootstrap=[normal(host) for host in servers if host],
    )


class DnsProxy:
    """Answers DNS on some addresses.

    ```python
    proxy = DnsProxy(store, client, metrics, addresses=[(ip, 15053)], resolvers=Resolvers(trio.current_time))
    proxy.bind()
    await nursery.start(proxy.run)   # questions wait
    proxy.start()                    # the mesh is known
    await proxy.drain()
    ```

    Args:
        store: The mesh.
        client: The workload served.
        metrics: Counters.
        addresses: Where to listen; port 0 is any.
        resolvers: Who knows everything else.
        zone: Settings of look-ups; search domains come from `resolvers`.
        mark: SO_MARK of questions to resolvers.
        source: Address they come from.
        bootstrap: Names that are asked before the mesh is known.
        rng: Shuffles addresses.
    """

    def __init__(
        self,
        store: Store,
        client: Client,
        metrics: Metrics,
        *,
        addresses: Sequence[Address],
        resolvers: Resolvers,
        zone: Zone | None = None,
        mark: int | None = None,
        source: IpAddress | None = None,
        bootstrap: Collection[str] = (),
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._client = client
        self._metrics = metrics
        self._wanted = tuple(addresses)
        self._resolvers = resolvers
        self._zone = zone or Zone()
        self._bootstrap = frozenset(bootstrap)
        self._rng = rng or random.Random()
        self.addresses: list[Address] = []
        """Where it listens, each for both UDP and TCP."""
        self._forwarder = Forwarder(resolvers, mark=mark, source=source, own=self.addresses)
        self._datagram_sockets: list[socket.socket] = []
        self._listeners: list[socket.socket] = []
        self._known = trio.Event()
        self._listening = trio.CancelScope()
        self._stopped: trio.Event | None = None
        self._draining = trio.Event()
        self._released = False
        self._pending = Pending()
        self._connections: OrderedDict[Connection, None] = OrderedDict()
        self._warned = float("-inf")
        self._buffer = bytearray(MAX_MESSAGE)
        self._turns = trio.Semaphore(_TURNS)

    # life

    def bind(self, given: Given | None = None) -> None:
        """Listen; questions wait in the kernel before `run`.

        Args:
            given: sockets to be used instead of new ones.

        Raises:
            ConfigurationError: an address cannot be had.
        """
        try:
            for address in self._wanted:
                if given is None or not self._adopt(given, address):
                    self._bind(address)
        except OSError as error:
            self.close()
            reason = (error.strerror or str(error)).lower()
            raise ConfigurationError(
                f"cannot listen on {address_text(address)} for dns: {reason};"
                " set ISTIO_META_DNS_CAPTURE=false to do without, or ZTUNNEL_DNS_PORT to another port"
            ) from None
        if not self._forwarder.servers():
            why = self._resolvers.error or "it names nobody but this proxy"
            log.warning("names outside the mesh cannot be resolved", error=why)

    def _adopt(self, given: Given, address: Address) -> bool:
        """Use what was given for `address`: one for datagrams and one for connections, or none."""
        datagrams = given.take("dns", address, socket.SOCK_DGRAM)
        listeners = given.take("dns", address, socket.SOCK_STREAM)
        self._datagram_sockets += datagrams
        self._listeners += listeners
        if not datagrams and not listeners:
            return False
        if not (datagrams and listeners):
            raise ConfigurationError(
                f"of the DNS proxy's sockets on {address_text(address)} only one was given; give one for UDP"
                " (ListenDatagram=) and one for TCP (ListenStream=)"
            )
        if address[0].is_unspecified:
            for sock in datagrams:
                _tell_destinations(sock, address[0])
        self.addresses.append((address[0], listeners[0].getsockname()[1]))
        return True

    def sockets(self) -> list[tuple[str, socket.socket]]:
        """What it listens on, all under the name `dns`."""
        return [("dns", sock) for sock in (*self._datagram_sockets, *self._listeners)]

    def _bind(self, address: Address) -> None:
        ip, port = address
        host = str(ip)
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        for _ in range(1 if port else 20):  # a free port of UDP may be taken for TCP
            datagrams = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._datagram_sockets.append(datagrams)
            if ip.is_unspecified:  # the reply has to come from where the question went
                _tell_destinations(datagrams, ip)
            datagrams.bind((host, port))
            bound = datagrams.getsockname()[1]
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((host, bound))
                listener.listen(128)
            except OSError as error:
                if port or error.errno != errno.EADDRINUSE:
                    raise
                self._datagram_sockets.pop().close()
                self._listeners.pop().close()
                continue
            self.addresses.append((ip, bound))
            return
        raise OSError(errno.EADDRINUSE, "no port is free for both UDP and TCP")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled, or drained."""
        self._stopped = trio.Event()
        try:
            async with trio.open_nursery() as work:
                with self._listening:
                    async with trio.open_nursery() as listening:
                        for sock in self._datagram_sockets:
                            listening.start_soon(self._datagrams, sock, work)
                        for sock in self._listeners:
                            listening.start_soon(self._accept, sock, work)
                        task_status.started()
                if self._released:
                    await self._finish()
                for connection in self._connections:
                    connection.reading.cancel()
                work.cancel_scope.deadline = trio.current_time() + DRAIN_SECONDS
        finally:
            self.close()
            self._stopped.set()

    def start(self) -> None:
        """The mesh is known: answer by it."""
        self._known.set()

    def release(self) -> None:
        """Leave what waits, and what comes, to the process that has the sockets as well; `drain` comes next."""
        self._released = True
        self._listening.cancel()

    async def _finish(self) -> None:
        """Close the listeners, and let connections be, until the drain and then for a second."""
        self.close()
        await self._draining.wait()
        with trio.move_on_after(DRAIN_SECONDS):
            while self._connections:  # noqa: ASYNC110 - this is the end, and lasts a second
                await trio.sleep(_DRAIN_STEP)

    async def drain(self) -> None:
        """Take no further questions, and answer those that were asked, for a second."""
        self._draining.set()
        self._listening.cancel()
        if self._stopped is not None:
            await self._stopped.wait()

    def close(self) -> None:
        """Close the listeners."""
        for sock in (*self._datagram_sockets, *self._listeners):
            sock.close()

    # questions

    def _own(self, query: Query, *, datagram: bool) -> bytes | None:
        """The reply that can be given at once; None when somebody else has to be asked, or waited for."""
        if query.malformed:
            self._count(query, datagram, self._client.current)
            return failure(query, dns.rcode.FORMERR)
        workload = self._client.current
        if workload is None or not self._known.is_set() or query.name is None or not query.internet:
            return None
        return self._decide(query, workload, datagram=datagram)

    def _decide(self, query: Query, workload: Workload, *, datagram: bool) -> bytes | None:
        assert query.name is not None
        search = self._resolvers.current().search
        if search != self._zone.search:
            self._zone = attrs.evolve(self._zone, search=search)
        answer = decide(self._store, workload, query.name, query.version, self._zone, self._rng)
        if answer is None:
            return None
        try:
            reply = render(query, answer, datagram=datagram)
        except Signed:
            return None
        self._count(query, datagram, workload)
        self._log(query, workload, answer.result, answer.records)
        return reply

    async def _ask(self, query: Query, *, datagram: bool, send: _Send | None = None) -> bytes | None:
        """The reply to a question that `_own` left; None when all was handed to `send`, a message at a time."""
        workload = self._client.current
        unknown = workload is None or not self._known.is_set()
        if unknown and query.internet and query.name is not None and not self._is_bootstrap(query.name):
            workload = await self._wait()
            if workload is None:
                self._count(query, datagram, None)
                return failure(query, dns.rcode.SERVFAIL)
            reply = self._decide(query, workload, datagram=datagram)
            if reply is not None:
                return reply
        self._count(query, datagram, workload)
        return await self._forward(query, workload, datagram=datagram, send=send)

    def _is_bootstrap(self, name: str) -> bool:
        """Whether nothing becomes known without this name; a resolver may have put a search domain behind it."""
        short = (strip_domain(name, domain) for domain in self._resolvers.current().search)
        return name in self._bootstrap or any(each in self._bootstrap for each in short)

    async def _wait(self) -> Workload | None:
        with trio.move_on_after(WAIT_SECONDS):
            await self._known.wait()
            with contextlib.suppress(DataplaneError):
                return await self._client.wait()
        return None

    async def _forward(
        self, query: Query, workload: Workload | None, *, datagram: bool, send: _Send | None
    ) -> bytes | None:
        if self._pending.has_too_many(query):
            self._warn("a question is waited for too often; does the host's resolver ask this proxy?", query)
            return failure(query, dns.rcode.SERVFAIL)
        began = trio.current_time()
        result, reply, records = Result.FORWARDED.value, None, 0
        failed = True
        try:
            if send is not None and is_transfer(query):
                await self._forwarder.transfer(query, send)
                failed = False
            else:
                reply = await self._forwarder.ask(query, datagram=datagram)
                failed = rcode_of(reply) != dns.rcode.NOERROR
                records = int.from_bytes(reply[6:8], "big")
                if failed:
                    result = f"forwarding failed ({dns.rcode.to_text(dns.rcode.Rcode(rcode_of(reply)))})"
        except Unanswered as error:
            result = f"forwarding failed ({error})"
            reply = failure(query, dns.rcode.SERVFAIL)
        finally:
            seconds = trio.current_time() - began
            self._metrics.dns_forwarded(type_name(query), _protocol(datagram), workload, seconds, failed=failed)
        self._log(query, workload, result, records)
        return reply

    def _count(self, query: Query, datagram: bool, workload: Workload | None) -> None:
        self._metrics.dns_request(type_name(query), _protocol(datagram), workload)

    def _log(self, query: Query, workload: Workload | None, result: str, records: int) -> None:
        if log.debugs:
            fields: dict[str, Any] = {}
            if workload is not None:
                fields = {"src.workload": workload.name, "src.namespace": workload.namespace}
            log.debug(
                "query", **fields, query=type_name(query), domain=query.name or "", result=result, endpoints=records
            )

    def _warn(self, event: str, query: Query) -> None:
        now = trio.current_time()
        if now - self._warned >= _WARN_SECONDS:
            self._warned = now
            log.warning(event, domain=query.name or "", query=type_name(query))

    def _read(self, data: bytes, port: int, *, datagram: bool) -> Query | bytes | None:
        """A question; the reply to one that is refused; None for what is none."""
        query = read(data)
        if query is None:
            return None
        if self._forwarder.is_ours(port, data, datagram=datagram):
            self._warn("what this proxy asks the resolver is led back to it; exempt its own traffic", query)
            return failure(query, dns.rcode.SERVFAIL)
        return query

    # UDP

    async def _datagrams(self, sock: socket.socket, work: trio.Nursery) -> None:
        buffer, view = [self._buffer], memoryview(self._buffer)
        while True:
            await trio.lowlevel.wait_readable(sock)
            for _ in range(_BATCH):
                try:
                    nbytes, ancillary, _, peer = sock.recvmsg_into(buffer, 64)
                except OSError:  # nothing more for now
                    break
                self._datagram(sock, bytes(view[:nbytes]), ancillary, peer, work)

    def _datagram(self, sock: socket.socket, data: bytes, ancillary: _Ancillary, peer: Any, work: trio.Nursery) -> None:
        try:
            query = self._read(data, peer[1], datagram=True)
            reply = self._own(query, datagram=True) if isinstance(query, Query) else query
        except Exception:
            log.exception("a question could not be answered")
            return
        if reply is not None:
            _send_datagram(sock, reply, ancillary, peer)
        elif isinstance(query, Query):
            work.start_soon(self._slow_datagram, sock, query, ancillary, peer)

    async def _slow_datagram(self, sock: socket.socket, query: Query, ancillary: _Ancillary, peer: Any) -> None:
        reply: bytes | None = None
        try:
            with self._pending.enter(query):
                reply = await self._ask(query, datagram=True)
        except Exception:
            log.exception("a question could not be answered")
        _send_datagram(sock, reply or failure(query, dns.rcode.SERVFAIL), ancillary, peer)

    # TCP

    async def _accept(self, listener: socket.socket, work: trio.Nursery) -> None:
        accept = trio.socket.from_stdlib_socket(listener).accept
        while True:
            try:
                sock, peer = await accept()
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:
                    log.warning("no connection can be accepted for now", error=str(error))
                    await trio.sleep(_REST_SECONDS)
                continue
            if len(self._connections) >= MAX_CONNECTIONS:
                self._connections.popitem(last=False)[0].scope.cancel()
            connection = Connection(trio.SocketStream(sock), peer[1])
            self._connections[connection] = None
            work.start_soon(self._connection, connection)

    async def _connection(self, connection: Connection) -> None:
        try:
            with connection.scope:
                async with trio.open_nursery() as nursery:
                    with connection.reading:
                        while (data := await connection.receive()) is not None:
                            if connection in self._connections:
                                self._connections.move_to_end(connection)
                            await self._message(connection, data, nursery)
        except Exception:
            log.exception("a question could not be answered")
        finally:
            self._connections.pop(connection, None)
            connection.close()

    async def _message(self, connection: Connection, data: bytes, nursery: trio.Nursery) -> None:
        async with self._turns:
            query = self._read(data, connection.port, datagram=False)
            reply = self._own(query, datagram=False) if isinstance(query, Query) else query
        if reply is not None:
            await connection.send(reply)
        elif isinstance(query, Query):
            await connection.slots.acquire()
            nursery.start_soon(self._slow_message, connection, query)

    async def _slow_message(self, connection: Connection, query: Query) -> None:
        reply: bytes | None = None
        try:
            with self._pending.enter(query) as scope:
                reply = await self._ask(query, datagram=False, send=connection.send)
                if reply is not None:
                    self._pending.keep(scope, len(reply))
                    await connection.send(reply)
            if scope.cancelled_caught and reply is None:
                await connection.send(failure(query, dns.rcode.SERVFAIL))
        finally:
            connection.slots.release()


def _tell_destinations(sock: socket.socket, ip: IpAddress) -> None:
    if ip.version == 4:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)


def _protocol(datagram: bool) -> str:
    return "udp" if datagram else "tcp"


def _send_datagram(sock: socket.socket, reply: bytes, ancillary: _Ancillary, peer: Any) -> None:
    with contextlib.suppress(OSError):  # what cannot be sent at once is lost, as datagrams are
        sock.sendmsg([reply], [(level, kind, _source(kind, data)) for level, kind, data in ancillary], 0, peer)


def _source(kind: int, info: bytes) -> bytes:
    """The source address of a reply, out of where the question arrived; the route chooses the interface."""
    return bytes(4) + info[4:] if kind == _IP_PKTINFO else info
