"""Hostile peers, and the mesh that they meet: one real ztunnel process, and an application that counts who comes.

The mesh and the application live in a thread with a Trio loop of its own, for all tests of a module. A test brings
its attack and a well-behaved neighbour, whose every byte is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import struct
from typing import TYPE_CHECKING, Any

import attrs
import trio
from OpenSSL import SSL
from tests.support.background import background, mesh_ca
from tests.support.shop import ECHO, WORKLOADS, descriptors
from tests.support.tls import RawClient, raw_context

import hbone.trio
from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode
from hbone.identity import Identity, SpiffeId, StaticSource
from hbone.testing import frames
from hbone.testing.mesh import Mesh, Ztunnel, mesh
from ztunnel.control.ca import CaClient
from ztunnel.control.transport import RootSource, ServerAddress, TokenSource, grpc_dialer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from hbone.testing.ca import TestCa

__all__ = ["SILENT", "Application", "HostilePeer", "Neighbour", "Siege", "exchange", "is_closed", "rss", "siege"]

SILENT = 9001
"""Port of an application that accepts and never reads; 9002 is one that sends a MiB at once and reads nothing."""
TALKS = 9002
ESTABLISHED = 1
"""A state of TCP_INFO."""
_networks = itertools.count(20 + os.getpid() % 50)


def rss(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


class Application:
    """What listens on the attacked host, and how many connections came to it."""

    def __init__(self) -> None:
        self.accepted = 0
        self.open: list[int] = []

    def listening(self, port: int) -> int:
        """Connections to `port` that are open."""
        return self.open.count(port)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Echo, or say nothing, or say too much: by port."""
        self.accepted += 1
        port = stream.socket.getsockname()[1]
        self.open.append(port)
        try:
            async with stream:
                if port == ECHO:
                    async for data in stream:
                        await stream.send_all(data)
                    await stream.send_eof()
                else:
                    async with trio.open_nursery() as nursery:
                        if port == TALKS:
                            nursery.start_soon(_say, stream, bytes(1 << 20))
                        # Whatever came before the end stays unread, so the end cannot be read either.
                        while stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO) & 0xFF == ESTABLISHED:
                            await trio.sleep(0.05)
                        nursery.cancel_scope.cancel()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self.open.remove(port)


async def _say(stream: trio.SocketStream, data: bytes) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(data)


@attrs.define(eq=False)
class Siege:
    """A running mesh, seen from a test's own thread."""

    mesh: Mesh
    application: Application
    address: str
    """Where the attacked ztunnel is."""
    elsewhere: str
    """Another host of the mesh, with a ztunnel and nothing hostile about it."""
    control: str
    """Where miniistiod is."""
    spare: str
    """A host with nothing on it."""
    friend: Identity
    """Certificate of the neighbour."""
    hostile: Identity
    """A valid certificate of the attacker."""

    @property
    def victim(self) -> Ztunnel:
        return self.mesh.ztunnels["beta"]

    @property
    def pid(self) -> int:
        return self.victim.pid

    @property
    def accepted(self) -> int:
        return self.application.accepted

    def authority(self, port: int = ECHO) -> str:
        return f"{self.address}:{port}"

    def ca(self) -> TestCa:
        """The mesh's own root, key and all, so that a test can sign what the control plane never would."""
        return mesh_ca(self.mesh)

    async def peer(self, identity: Identity | None = None, **options: Any) -> HostilePeer:
        """A hostile peer with TLS done."""
        found = await HostilePeer.connect(self.address, identity or self.hostile, **options)
        await found.handshake()
        return found

    @contextlib.asynccontextmanager
    async def neighbour(self) -> AsyncIterator[Neighbour]:
        """A well-behaved peer that echoes all the time, before, during and after the attack."""
        pool = hbone.trio.ConnectionPool(StaticSource(self.friend.svid, self.friend.bundles))
        async with pool:
            stream = await pool.connect(self.authority(), via=(self.address, 15008), peer=None)
            async with trio.open_nursery() as nursery:
                neighbour = Neighbour(stream)
                await nursery.start(neighbour.run)
                yield neighbour
                await neighbour.turns_more(3)
                # A further stream, and so a further dial, is served too.
                async with await pool.connect(self.authority(), via=(self.address, 15008), peer=None) as further:
                    await further.send_all(b"still there?")
                    assert await further.receive_some() == b"still there?"
                nursery.cancel_scope.cancel()
            await trio.aclose_forcefully(stream)
        assert self.victim.running

    async def at_rest(self, wanted: int) -> int:
        """Wait until the process has no more than `wanted` descriptors; how many it has."""
        found = descriptors(self.pid)
        with trio.move_on_after(30):
            while found > wanted:
                await trio.sleep(0.05)
                found = descriptors(self.pid)
        return found


async def exchange(
    address: str, port: int, data: bytes, *, source: str | None = None, seconds: float = 15.0, eof: bool = True
) -> bytes:
    """Send `data`, perhaps the end, and read to the other one's end; a reset counts as that too."""
    answer = b""
    with trio.fail_after(seconds):
        stream = await trio.open_tcp_stream(address, port, local_address=source)
        async with stream, trio.open_nursery() as nursery:

            async def send() -> None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await stream.send_all(data)
                    if eof:
                        await stream.send_eof()

            nursery.start_soon(send)
            try:
                while part := await stream.receive_some():
                    answer += part
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()
    return answer


async def is_closed(stream: trio.SocketStream, *, seconds: float = 20.0) -> bool:
    """Whether the other end closes in time; what it says before is dropped."""
    with trio.move_on_after(seconds):
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass
        return True
    return False


class Neighbour:
    """Echoes numbered blocks on one stream; a byte that is lost or wrong fails the test."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.turns = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        for turn in itertools.count():
            block = hashlib.sha256(b"%d" % turn).digest() * 32
            with trio.fail_after(30):
                await self.stream.send_all(block)
                back = b""
                while len(back) < len(block):
                    part = await self.stream.receive_some()
                    assert part, f"the neighbour was cut off in turn {turn}"
                    back += part
            assert back == block
            self.turns = turn + 1
            if turn == 0:
                task_status.started()
            await trio.sleep(0.002)

    async def turns_more(self, count: int) -> None:
        """Wait for that many further turns."""
        wanted = self.turns + count
        with trio.fail_after(30):
            while self.turns < wanted:
                await trio.sleep(0.01)


class HostilePeer:
    """TLS and whatever bytes one likes within it."""

    def __init__(self, stream: trio.SocketStream, client: RawClient) -> None:
        self.stream = stream
        self.client = client
        self.received = bytearray()
        self.ended = False
        """The other end closed or reset the connection."""

    @classmethod
    async def connect(
        cls,
        address: str,
        identity: Identity | None,
        *,
        port: int = 15008,
        alpn: list[bytes] | None = None,
        buffers: int = 0,
        source: str | None = None,
        version: int | None = None,
        like: HostilePeer | None = None,
    ) -> HostilePeer:
        """TCP.

        Args:
            address: where to.
            identity: what to present.
            port: where to.
            alpn: protocols to offer; h2 alone when None.
            buffers: size of the socket's receive buffer, in bytes.
            source: address to come from.
            version: the newest TLS to speak.
            like: resume the session of this peer.
        """
        sock = trio.socket.socket()
        if buffers:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source:
            await sock.bind((source, 0))
        await sock.connect((address, port))
        roots = tuple(root for bundle in identity.bundles.values() for root in bundle.roots) if identity else ()
        context = raw_context(identity, roots, alpn=[b"h2"] if alpn is None else alpn)
        if version is not None:
            context.set_max_proto_version(version)
        client = RawClient(context)
        if like is not None:  # a session goes with its context
            client.connection = SSL.Connection(like.client.connection.get_context(), None)
            client.connection.set_connect_state()
            session = like.client.connection.get_session()
            assert session is not None
            client.connection.set_session(session)
        return cls(trio.SocketStream(sock), client)

    async def __aenter__(self) -> HostilePeer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await trio.aclose_forcefully(self.stream)

    async def handshake(self) -> None:
        """Complete TLS, as far as a client can tell.

        Raises:
            SSL.Error: refused.
        """
        with trio.fail_after(10):
            while True:
                try:
                    self.client.connection.do_handshake()
                    break
                except SSL.WantReadError:
                    await self.push()
                    data = await self.stream.receive_some()
                    if not data:
                        raise SSL.Error("closed in the handshake") from None
                    self.client.connection.bio_write(data)
            await self.push()

    async def push(self) -> None:
        """Send the ciphertext that is ready."""
        await self.raw(self.client.output())

    async def raw(self, data: bytes) -> None:
        """Send bytes as they are; once the other end is gone, nothing happens."""
        try:
            if data:
                await self.stream.send_all(data)
        except trio.BrokenResourceError:
            self.ended = True

    async def start(self, settings: bytes | None = None) -> None:
        """The preface and SETTINGS; waits for the server's own."""
        await self.send(frames.PREFACE + (frames.settings() if settings is None else settings))
        await self.until(lambda: any(kind == FrameType.SETTINGS for kind, *_ in self.frames()))
        await self.send(frames.settings_ack())

    async def send(self, *records: bytes) -> None:
        """Send plaintext, each argument in records of its own."""
        parts = []
        for data in records:
            for position in range(0, len(data), 16_384):
                self.client.connection.send(data[position : position + 16_384])
            parts.append(self.client.output())
        await self.raw(b"".join(parts))

    async def burst(self, pieces: Iterable[bytes], *, at_once: int = 1) -> int:
        """Send many pieces, each in a record of its own, `at_once` to a write, until the end; how many were sent."""
        sent = 0
        pending: list[bytes] = []
        for piece in pieces:
            pending.append(piece)
            if len(pending) >= at_once:
                await self.send(*pending)
                sent += len(pending)
                pending.clear()
            if self.ended:
                return sent
        if pending:
            await self.send(*pending)
        return sent + len(pending)

    async def read(self) -> bool:
        """Read once; False at the end."""
        try:
            data = await self.stream.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            data = b""
        if not data:
            self.ended = True
            return False
        self.client.connection.bio_write(data)
        while True:
            try:
                self.received += self.client.connection.recv(65_536)
            except SSL.WantReadError:
                return True
            except (SSL.ZeroReturnError, SSL.Error):
                return True  # close_notify or an alert; the end of TCP follows

    async def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        """Read until `condition` holds, or fail."""
        with trio.fail_after(seconds):
            while not condition():
                assert await self.read(), "the connection ended too early"

    async def until_closed(self, seconds: float = 20.0) -> None:
        """Read until the other end closes."""
        with trio.fail_after(seconds):
            while await self.read():
                pass

    async def closes_within(self, seconds: float) -> bool:
        """Read, and say whether the other end closes in time."""
        with trio.move_on_after(seconds):
            await self.until_closed(seconds + 1)
        return self.ended

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """Whole frames received so far."""
        data = bytes(self.received)
        position = 0
        while len(data) - position >= 9:
            size = 9 + (struct.unpack_from(">I", data, position)[0] >> 8)
            if position + size > len(data):
                break
            position += size
        return frames.split(data[:position])

    @property
    def goaway(self) -> ErrorCode | None:
        """Code of the last GOAWAY."""
        codes = [payload[4:8] for kind, _, _, payload in self.frames() if kind == FrameType.GOAWAY]
        return ErrorCode.from_wire(int.from_bytes(codes[-1], "big")) if codes else None

    def status(self, stream: int) -> bytes | None:
        """Header block of the answer on a stream."""
        for kind, _, stream_id, payload in self.frames():
            if kind == FrameType.HEADERS and stream_id == stream:
                return payload
        return None

    def reset_code(self, stream: int) -> ErrorCode | None:
        """Code of RST_STREAM on a stream."""
        for kind, _, stream_id, payload in self.frames():
            if kind == FrameType.RST_STREAM and stream_id == stream:
                return ErrorCode.from_wire(int.from_bytes(payload, "big"))
        return None

    async def gone_for(self, code: ErrorCode = ErrorCode.ENHANCE_YOUR_CALM, seconds: float = 20.0) -> None:
        """The other end said why, and closed.

        A GOAWAY may be lost when the kernel resets a connection with data that nobody read.
        """
        await self.until_closed(seconds)
        assert self.goaway in (code, None), self.goaway


async def _certificate(running: Mesh, account: str, directory: Path) -> Identity:
    """A certificate of miniistiod's, for a reusable token, as any host gets it."""
    token = directory / f"{account}.token"
    identity = ("--namespace", "shop", "--service-account", account)
    running.cli("token", "create", "--state", str(directory / "state"), *identity, "--reusable", "--out", str(token))
    address = ServerAddress(host=running.server, port=15012)
    roots = RootSource(str(directory / "state" / "root-cert.pem"), default=directory, variable="CA_ROOT_CA")
    client = CaClient(grpc_dialer(address, roots), lifetime=3600, token=TokenSource.from_setting(str(token), directory))
    return await client.create(SpiffeId.istio("cluster.local", "shop", account), None)


@contextlib.asynccontextmanager
async def _besieged(directory: Path) -> AsyncIterator[Siege]:
    started = mesh(
        directory,
        ["alpha", "beta", "gamma"],
        namespaces=False,
        documents={"shop": WORKLOADS},
        loopback=f"127.{os.getpid() % 200 + 20}.{next(_networks)}",
    )
    application = Application()
    async with started as running, trio.open_nursery() as nursery:
        for port in (ECHO, SILENT, TALKS):
            listener = await running.hosts["beta"].listen(port)
            nursery.start_soon(trio.serve_listeners, application.serve, [listener])
        async with trio.open_nursery() as starting:
            for host, name in (("alpha", "client"), ("beta", "orders")):
                starting.start_soon(running.add_ztunnel, host, ("shop", name, name))
        yield Siege(
            running,
            application,
            running.hosts["beta"].address,
            running.hosts["alpha"].address,
            running.server,
            running.hosts["gamma"].address,
            await _certificate(running, "client", directory),
            await _certificate(running, "mallory", directory),
        )
        nursery.cancel_scope.cancel()


def siege(directory: Path) -> AbstractContextManager[Siege]:
    """Run a mesh of two hosts for the body, in a thread."""
    return background(lambda: _besieged(directory))
