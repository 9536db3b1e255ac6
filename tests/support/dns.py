"""A resolver with a few names, a DNS proxy in front of it, and clients that ask both."""

from __future__ import annotations

import contextlib
import random
import socket
from typing import TYPE_CHECKING, Any

import attrs
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import trio
from tests.support.mesh import store_of, tcp

from ztunnel.dns.resolvconf import ResolvConf, Resolvers
from ztunnel.dns.server import DnsProxy
from ztunnel.mesh import parse_ip
from ztunnel.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from ztunnel.dns.answer import Zone
    from ztunnel.mesh import Address, Store, Workload

CLIENT = tcp("client", "10.0.0.1", namespace="ns1", uid="c//Pod/ns1/client", canonical_name="client")


@attrs.define(eq=False)
class Resolver:
    """A resolver on a loopback address that knows `zone`, name and type to records as text.

    With `like_resolved` it behaves like the stub of systemd-resolved: only queries, only with RD, only from loopback.
    """

    zone: Mapping[tuple[str, str], list[str]]
    like_resolved: bool = False
    script: Callable[[bytes, bool], list[bytes] | None] | None = None
    """What is sent back for a message, before the zone is looked at; an empty list is silence."""
    heard: list[tuple[bytes, bool, Any]] = attrs.field(factory=list)
    """Every message with whether it was a datagram, and its sender."""
    address: Address | None = None
    _sockets: list[trio.socket.SocketType] = attrs.field(factory=list)

    def server(self) -> Address:
        assert self.address is not None
        return self.address

    async def serve(
        self, host: str, port: int = 0, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        udp, tcp_socket = both(host, port)
        self.address = (parse_ip(host), udp.getsockname()[1])
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._udp, udp)
                nursery.start_soon(trio.serve_listeners, self._tcp, [trio.SocketListener(tcp_socket)])
                task_status.started()
        finally:
            udp.close()
            tcp_socket.close()

    async def _udp(self, sock: trio.socket.SocketType) -> None:
        while True:
            data, peer = await sock.recvfrom(65_535)
            for reply in self.replies(data, True, peer):
                await sock.sendto(reply, peer)

    async def _tcp(self, stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    head = await exactly(stream, 2)
                    if len(head) < 2:
                        return
                    data = await exactly(stream, int.from_bytes(head, "big"))
                    for reply in self.replies(data, False, stream.socket.getpeername()):
                        await stream.send_all(len(reply).to_bytes(2, "big") + reply)

    def replies(self, data: bytes, datagram: bool, peer: Any) -> list[bytes]:
        self.heard.append((data, datagram, peer))
        if self.script is not None:
            scripted = self.script(data, datagram)
            if scripted is not None:
                return scripted
        try:
            query = dns.message.from_wire(data)
        except dns.exception.DNSException:
            return []
        if self.like_resolved:
            if query.opcode() != dns.opcode.QUERY or not peer[0].startswith("127."):
                return []
            if not query.flags & dns.flags.RD:
                reply = dns.message.make_response(query, recursion_available=True)
                reply.set_rcode(dns.rcode.REFUSED)
                return [reply.to_wire()]
        reply = dns.message.make_response(query, recursion_available=True, our_payload=1232)
        if query.opcode() != dns.opcode.QUERY:
            return [reply.to_wire()]
        self._fill(query, reply)
        limit = max(512, query.payload if query.edns >= 0 else 512) if datagram else 65_535
        return [reply.to_wire(max_size=limit, prefer_truncation=True)]

    def _fill(self, query: dns.message.Message, reply: dns.message.Message) -> None:
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.rdtype)
        records = self.zone.get((name, kind))
        if records is not None:
            for record in records:  # one by one, or dnspython would shuffle them
                reply.answer.append(dns.rrset.from_text(question.name, 300, "IN", kind, record))
        elif not any(owner == name for owner, _ in self.zone):
            reply.set_rcode(dns.rcode.NXDOMAIN)
            reply.authority.append(dns.rrset.from_text(".", 60, "IN", "SOA", "ns. hostmaster. 1 2 3 4 60"))


def both(host: str, port: int = 0) -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    """A datagram socket and a listener on one port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.bind((host, port))
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.bind(udp.getsockname()[:2])
        except OSError:
            udp.close()
            listener.close()
            if port:
                raise
            continue
        listener.listen()
        return trio.socket.from_stdlib_socket(udp), trio.socket.from_stdlib_socket(listener)


async def exactly(stream: trio.abc.ReceiveStream, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = await stream.receive_some(nbytes - len(data))
        if not more:
            break
        data += more
    return data


@attrs.define
class Someone:
    """The workload that asks; None is one that the mesh has not told of."""

    current: Workload | None = CLIENT
    told: trio.Event = attrs.field(factory=trio.Event)

    async def wait(self) -> Workload:
        while self.current is None:
            await self.told.wait()
        return self.current

    def tell(self, workload: Workload) -> None:
        self.current = workload
        self.told.set()


class Asked(Resolvers):
    """The resolvers to ask, as a test has them."""

    def __init__(self, *servers: Address) -> None:
        super().__init__(trio.current_time, path="/nonexistent")
        self.servers = servers

    def current(self) -> ResolvConf:
        return ResolvConf(servers=self.servers)


@attrs.define(eq=False)
class Running:
    """A proxy under test."""

    proxy: DnsProxy
    resolver: Resolver
    metrics: Metrics
    client: Someone
    nursery: trio.Nursery

    async def raw(self, data: bytes, *, tcp: bool = False) -> bytes:
        """Send a message to the proxy; what comes back."""
        return await exchange(self.proxy.addresses[0], data, tcp=tcp)

    async def ask(self, name: str, kind: str = "A", *, tcp: bool = False, **options: Any) -> dns.message.Message:
        query = dns.message.make_query(name, kind, **options)
        reply = dns.message.from_wire(await self.raw(query.to_wire(), tcp=tcp))
        assert reply.id == query.id
        assert reply.question == query.question
        return reply

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """Values of a metric by the values of its labels."""
        return {
            tuple(sample.labels.values()): sample.value
            for family in self.metrics.collect()
            for sample in family.samples
            if sample.name == name
        }


async def exchange(address: Address, data: bytes, *, tcp: bool = False) -> bytes:
    ip, port = address
    if tcp:
        stream = await trio.open_tcp_stream(str(ip), port)
        async with stream:
            await stream.send_all(len(data).to_bytes(2, "big") + data)
            head = await exactly(stream, 2)
            return await exactly(stream, int.from_bytes(head, "big"))
    with trio.socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        await sock.connect((str(ip), port))
        await sock.send(data)
        reply: bytes = await sock.recv(65_535)
        return reply


@contextlib.asynccontextmanager
async def open_proxy(
    store: Store | None = None,
    *,
    zone: Mapping[tuple[str, str], list[str]] | None = None,
    resolver: Resolver | None = None,
    host: str = "127.0.0.1",
    resolver_host: str = "127.0.0.53",
    conf: Path | str = "/nonexistent",
    client: Someone | None = None,
    known: bool = True,
    settings: Zone | None = None,
    **options: Any,
) -> AsyncIterator[Running]:
    """Start a resolver and a proxy that asks it."""
    found = resolver or Resolver(zone or {})
    metrics = Metrics()
    someone = client or Someone()
    async with trio.open_nursery() as nursery:
        await nursery.start(found.serve, resolver_host)
        servers = options.pop("servers", None) or [found.server()]
        resolvers = options.pop("resolvers", None) or Resolvers(trio.current_time, path=conf, servers=servers)
        proxy = DnsProxy(
            store or store_of(),
            someone,
            metrics,
            addresses=[(parse_ip(host), 0)],
            resolvers=resolvers,
            zone=settings,
            rng=random.Random(1),
            **options,
        )
        proxy.bind()
        await nursery.start(proxy.run)
        if known:
            proxy.start()
        try:
            with trio.fail_after(20):
                yield Running(proxy, found, metrics, someone, nursery)
        finally:
            nursery.cancel_scope.cancel()


def records(message: dns.message.Message) -> list[str]:
    """The answer section: `name type value`, in order of values."""
    return sorted(
        f"{rrset.name.to_text(omit_final_dot=True)} {dns.rdatatype.to_text(rrset.rdtype)} {rdata.to_text()}"
        for rrset in message.answer
        for rdata in rrset
    )


def ask_from(
    make: Callable[[Callable[[], socket.socket]], socket.socket], server: str, name: str, *, tcp: bool, port: int = 53
) -> list[str]:
    """What an application hears that asks `server`, on the host where `make` makes sockets: addresses, or an rcode."""
    query = dns.message.make_query(name, "A")
    kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
    with make(lambda: socket.socket(socket.AF_INET, kind)) as sock:
        sock.settimeout(20)
        sock.connect((server, port))
        wire = query.to_wire()
        if tcp:
            sock.sendall(len(wire).to_bytes(2, "big") + wire)
            reply = b""
            while len(reply) < 2 or len(reply) < 2 + int.from_bytes(reply[:2], "big"):
                part = sock.recv(65_535)
                assert part
                reply += part
            reply = reply[2:]
        else:
            sock.send(wire)
            reply = sock.recv(65_535)
    answer = dns.message.from_wire(reply)
    if answer.rcode() != dns.rcode.NOERROR:
        return [dns.rcode.to_text(answer.rcode())]
    return [record.to_text() for rrset in answer.answer for record in rrset]
