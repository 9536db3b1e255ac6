"""The mesh inside a program: connect and listen with an identity, without a proxy process, root, or captured traffic.

Routes and policies are decided by the same functions as in the daemon; the bytes go through `hbone.trio`.

One class, and so one long file: both directions share certificate, live connections and the re-check of policies.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from typing import TYPE_CHECKING, Any, Self

import attrs
import trio

from hbone.connect import Authority, AuthorityError, Baggage, ConnectRequest, response_headers
from hbone.daemon.logs import get_logger
from hbone.endpoint import Endpoint
from hbone.engine.flow import WindowBudget
from hbone.errors import (
    ConfigurationError,
    ConnectionLost,
    ConnectRejected,
    ErrorCode,
    HboneError,
    IdentityError,
    PeerRevokedError,
    StreamResetError,
    TlsError,
)
from hbone.identity import same_trust_domain
from hbone.recall import Recall
from hbone.tls import TlsContext
from hbone.trio import ConnectionPool, serve_listeners
from hbone.trio.client import dial
from hbone.trio.nursery import open_quiet_nursery
from ztunnel.books import Books, Entry, PlainStream
from ztunnel.control.cache import StateDir
from ztunnel.control.enroll import settings
from ztunnel.control.svids import NoCertificate
from ztunnel.dataplane.local import LocalWorkload
from ztunnel.dataplane.names import resolve
from ztunnel.dataplane.plan import baggage_of
from ztunnel.dns.answer import locate, zone_of
from ztunnel.errors import (
    ConnectFailed,
    DataplaneError,
    IdentityUnavailable,
    PeerRevoked,
    PolicyChanged,
    ResolutionFailed,
    TlsFailed,
    TunnelRejected,
    address_text,
)
from ztunnel.logs import INBOUND
from ztunnel.membership import Membership
from ztunnel.mesh import Connection, decide, parse_ip
from ztunnel.mesh.inbound import inbound
from ztunnel.mesh.route import Refused, Resolve, Tunnel, route
from ztunnel.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from types import TracebackType

    from hbone.identity import Identity
    from hbone.trio import HboneStream
    from ztunnel.config import Config
    from ztunnel.control.ca import CertificateAuthority
    from ztunnel.control.transport import Dial
    from ztunnel.mesh import Address, Change, Workload
    from ztunnel.mesh.route import Inner

    Handler = Callable[[HboneStream], Awaitable[object]]

__all__ = ["Ztunnel"]

CONNECT_TIMEOUT = 20.0
"""Seconds from `connect` to the answer: picture of the mesh, certificate, dial and the far side's own dial."""

log = get_logger("ztunnel.embed")


class _Certificate:
    """The certificate for `hbone.trio`, which asks a source that raises where there is none."""

    def __init__(self, mesh: Membership) -> None:
        self._svids = mesh.svids
        self.subscribe = mesh.svids.subscribe

    def current(self) -> Identity:
        identity = self._svids.current()
        if identity is None:
            raise NoCertificate("there is no valid certificate for this workload now")
        return identity


@attrs.define(eq=False)
class _Live:
    """A stream that policies allowed."""

    stream: HboneStream
    facts: Connection
    entry: Entry
    cut: bool = False
    """Closed because a change of policy withdrew the permission."""


class Ztunnel:
    """This program as a workload of the mesh.

    ```python
    async with ztunnel.Ztunnel() as mesh:            # settings from the environment, as the daemon's
        stream = await mesh.connect("orders.shop.internal", 8080)
        await mesh.listen(9000, handler)
    ```

    Nothing listens before `listen` is called. Leaving the block closes every stream.

    Each connection has its line in the access log when it ends, as the daemon's: of the standard library's logger
    `access` (level INFO, ERROR for one that failed), unless the program configured `hbone.daemon.logs`.

    Args:
        config: settings; from the environment when None.
        on_connection: called with the fields of that line as well, when a connection ended.
        xds: another way to discovery, for tests.
        authority: another CA, for tests.

    Raises:
        ConfigurationError: a setting cannot be used.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        on_connection: Callable[[Mapping[str, Any]], object] | None = None,
        xds: Dial | None = None,
        authority: CertificateAuthority | None = None,
    ) -> None:
        self.config = config if config is not None else settings(os.environ)
        self.config.served  # noqa: B018 - a missing workload is named at once
        self._xds = xds
        self._authority = authority
        self._rng = random.Random()  # draws among endpoints, no secret
        self._stack = contextlib.AsyncExitStack()
        self._handlers: dict[int, Handler] = {}
        self._live: dict[_Live, None] = {}
        self._address: Address | None = None
        self._budget = WindowBudget(self.config.window_budget)
        self._ready = trio.Event()
        self._mesh: Membership | None = None
        self.metrics = Metrics(self.config.istio_version)
        """The counters of the daemon: a collector for prometheus_client, or a page by `metrics.exposition()`."""
        self._books = Books(self.config, self.metrics, on_connection)

    # life

    async def __aenter__(self) -> Self:
        if self._mesh is not None:
            raise ConfigurationError("a Ztunnel is entered once; make another")
        async with contextlib.AsyncExitStack() as stack:
            state = None
            if self.config.state_dir is not None:
                state = StateDir.open(self.config.state_dir)
                stack.callback(state.release)
            self._mesh = mesh = Membership(
                self.config,
                self.metrics,
                state,
                xds=self._xds,
                authority=self._authority,
                check_revocations=True,
            )
            self._recall = Recall(TlsContext.client, mesh.revocations, lambda error: self._refused("source", error))
            stack.callback(self._recall.close)
            self._local = LocalWorkload(mesh.store, self.config.served, self.config.node_name)
            stack.callback(self._local.close)
            stack.callback(mesh.store.subscribe(self._recheck))
            mesh.restore()
            self._nursery = await stack.enter_async_context(_nursery())
            self._nursery.start_soon(mesh.run)
            self._nursery.start_soon(self._wait_ready)
            self._source = _Certificate(mesh)
            self._pool = await stack.enter_async_context(
                ConnectionPool(
                    self._source,
                    config=self.config.connection,
                    budget=self._budget,
                    max_streams=self.config.pool_max_streams,
                    idle_timeout=self.config.pool_idle,
                    revocations=mesh.revocations,
                    refused=lambda error: self._refused("source", error),
                )
            )
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    async def _wait_ready(self) -> None:
        await self._known().first_picture()
        self._ready.set()

    def _known(self) -> Membership:
        if self._mesh is None:
            raise ConfigurationError("a Ztunnel is used inside its 'async with' block")
        return self._mesh

    async def ready(self) -> None:
        """Wait for a picture of the mesh. Bring a deadline."""
        self._known()
        await self._ready.wait()

    def status(self) -> dict[str, Any]:
        """Identity, control plane and mesh, as `ztunnel status --json` has them."""
        return self._known().status()

    def _refused(self, reporter: str, error: HboneError) -> None:
        """A handshake failed, or a tunnel was cut by the revocation lists."""
        if isinstance(error, PeerRevokedError):
            self.metrics.crl_rejected(reporter)
            log.warning("tunnel closed by the revocation lists", reporter=reporter, reason=str(error))
        elif reporter == "destination":
            log.info("tunnel refused", error=str(error))

    # out

    async def connect(self, host: str, port: int) -> trio.abc.HalfCloseableStream:
        """Connect to a service or workload of the mesh through a tunnel, and to anything else by plain TCP.

        Args:
            host: an address, a service's host name, or a name that this host resolves.
            port: of the service.

        Returns:
            An `HboneStream`, whose `peer` is who answered, or outside the mesh a TCP connection with Trio's `socket`.
            What is known to take tunnels is never reached in plaintext.

        Raises:
            DataplaneError: why there is no connection; each kind is a class in `ztunnel.errors`.
            ConfigurationError: `host` and `port` are no destination.
        """
        mesh = self._known()
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await self._ready.wait()
                return await self._connect(mesh, host, port)
        except trio.TooSlowError:
            raise ConnectFailed(f"{host}:{port} did not answer within {CONNECT_TIMEOUT:g} s") from None

    async def _connect(self, mesh: Membership, host: str, port: int) -> trio.abc.HalfCloseableStream:
        source = await self._local.wait()
        destination = await self._destination(mesh, source, host, port)
        found = route(mesh.store, source, destination, network=self.config.network, rng=self._rng)
        if isinstance(found, Resolve):
            found = found.then(await resolve(found.hostname, found.hint))
        if isinstance(found, Refused):
            raise found.error
        if isinstance(found, Tunnel):
            # Behind a gateway it shows only in the end who answers.
            entry = self._books.outbound(source, found) if found.inner is None else None
            with _closing_on_error(entry or (lambda: self._books.outbound(source, found))):
                stream = await self._tunnel(mesh, source, found)
            if entry is None:
                said = Baggage.parse(value for name, value in stream.response if name == b"baggage")
                entry = self._books.outbound(source, found, answered=stream.peer, baggage=said)
            entry.follow(stream)
            return stream
        ip, plain_port = found.address
        entry = self._books.outbound(source, found)
        with _closing_on_error(entry):
            try:
                plain = PlainStream(await trio.open_tcp_stream(str(ip), plain_port))
            except OSError as error:
                raise ConnectFailed(f"{address_text(found.address)}: {_reason(error)}") from error
        entry.follow(plain)
        return plain

    async def _destination(self, mesh: Membership, source: Workload, host: str, port: int) -> Address:
        bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
        try:
            authority = Authority.parse(f"{bracketed}:{port}")
        except AuthorityError as error:
            raise ConfigurationError(f"{host!r} and port {port} are no destination: {error}") from None
        if authority.ip is not None:
            return authority.ip, port
        hint = source.addresses[0] if source.addresses else parse_ip("0.0.0.0")
        found = locate(mesh.store, source, authority.host, zone_of(self.config), self._rng, hint.version)
        if found is not None:
            if not found:
                raise ResolutionFailed(authority.host, "its service has no address on this network")
            return found[0], port
        return await resolve(authority.host, hint), port

    async def _tunnel(self, mesh: Membership, source: Workload, found: Tunnel) -> HboneStream:
        ip, port = found.next_hop
        request = ConnectRequest(
            authority=Authority.parse(found.authority),
            baggage=baggage_of(source),
            forwarded_host=found.service.hostname if found.service is not None else None,
        )
        try:
            await mesh.svids.fetch()
            stream = await self._pool.connect(request, via=(str(ip), port), peer=found.expected)
            if found.inner is None:
                return stream
            inside = attrs.evolve(request, network=self.config.network)
            return await self._inside(stream, found.inner, inside)
        except ConnectRejected as error:
            raise TunnelRejected(error.status) from error
        except IdentityError as error:
            raise IdentityUnavailable(str(error)) from error
        except PeerRevokedError as error:
            self._refused("source", error)
            raise PeerRevoked(str(error)) from error
        except TlsError as error:
            raise TlsFailed(str(error)) from error
        except (ConnectionLost, StreamResetError, HboneError) as error:
            raise ConnectFailed(str(error)) from error

    async def _inside(self, outer: HboneStream, inner: Inner, request: ConnectRequest) -> HboneStream:
        """A tunnel of its own inside a stream that a gateway took. Source: Istio, double HBONE."""
        identity = self._source.current()

        async def transport(*_: object) -> trio.abc.Stream:
            return outer

        def make_endpoint() -> Endpoint:
            return Endpoint(
                self._recall.of(identity),
                client=True,
                authorize=lambda peer: peer in inner.expected,
                config=self.config.connection,
                budget=self._budget,
                now=trio.current_time(),
            )

        tunnel = await dial(
            self._nursery,
            (str(request.authority), 0),
            make_endpoint,
            open_transport=transport,
            on_stream_end=lambda tunnel: tunnel.close(),
        )
        try:
            if not self._recall.admit(tunnel) and tunnel.failure is not None:
                raise tunnel.failure
            return await tunnel.connect(request)
        except BaseException:
            tunnel.close()
            raise

    # in

    async def listen(self, port: int, handler: Handler) -> None:
        """Have `handler` called for each stream to `port` of this workload that the policies allow.

        The first call begins to listen for tunnels, on 15008 or `ZTUNNEL_HBONE_PORT`. A stream whose permission is
        withdrawn while it lives is reset. The handler's stream is closed when it returns.

        Args:
            port: that peers connect to; it need not be free, as no socket is bound to it.
            handler: gets the stream; `stream.peer` is who connects.

        Raises:
            ConfigurationError: the port is taken by another `listen`, or the tunnel port cannot be listened on.
        """
        self._known()
        if not 1 <= port <= 65_535:
            raise ConfigurationError(f"port is {port}; it must be from 1 to 65535")
        if port in self._handlers:
            raise ConfigurationError(f"port {port} has a handler already")
        if self._address is None:
            listener = await self._open_listener()
            self._address = _address(listener.socket.getsockname())
            await self._nursery.start(self._serve, [listener])
        else:
            await trio.lowlevel.checkpoint()
        self._handlers[port] = handler

    @property
    def tunnel_address(self) -> Address | None:
        """Where peers bring their tunnels; None before `listen`."""
        return self._address

    async def _open_listener(self) -> trio.SocketListener:
        host = self.config.listen_host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            await sock.bind((host, self.config.hbone_port))
            sock.listen(1024)
        except OSError as error:
            sock.close()
            reason = (error.strerror or str(error)).lower()
            raise ConfigurationError(
                f"cannot listen on {host} port {self.config.hbone_port} for tunnels: {reason}"
            ) from None
        except BaseException:
            sock.close()
            raise
        return trio.SocketListener(sock)

    async def _serve(
        self, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await serve_listeners(
            self._take,
            self._source,
            listeners,
            authorize=same_trust_domain,
            config=self.config.connection,
            budget=self._budget,
            drain_timeout=self.config.drain_deadline,
            revocations=self._known().revocations,
            refused=lambda error: self._refused("destination", error),
            task_status=task_status,
        )

    async def _take(self, stream: HboneStream) -> None:
        """One CONNECT: validate, ask the policies, hand over."""
        mesh = self._known()
        peer, local = _ends(stream)
        entry: Entry | None = None
        try:
            workload = await self._local.wait()
            target = inbound(
                mesh.store, workload, local[0], stream.request, frozenset({local[1]}), network=self.config.network
            )
            if isinstance(target, DataplaneError):
                raise target
            entry = self._books.inbound(mesh.store, workload, peer, local, stream.peer, stream.request, target)
            await self._decide_and_hand_over(
                mesh, workload, stream, entry, Connection(peer[0], stream.peer, target.address)
            )
        except DataplaneError as error:
            if entry is None:
                self._books.log.early_deny(INBOUND, peer, local, error)
            else:
                entry.close(error)
            if not stream.opened and not stream.closed:
                stream.reject(error.status)
        except BaseException:
            if entry is not None and not stream.opened:
                entry.close(ConnectFailed("the handler failed before it answered"))
            raise

    async def _decide_and_hand_over(
        self, mesh: Membership, workload: Workload, stream: HboneStream, entry: Entry, facts: Connection
    ) -> None:
        live = _Live(stream, facts, entry)
        self._live[live] = None  # before the decision, so that no change slips in between
        try:
            decision = decide(mesh.store, workload, facts)
            self._books.log.decision(decision)
            if not decision.allowed:
                raise decision.error()
            port = facts.destination[1]
            handler = self._handlers.get(port)
            if handler is None:
                raise ConnectFailed(f"nobody listens on port {port}")
            entry.follow(stream)
            stream.accept(response_headers(baggage_of(workload)) if self.config.response_baggage else ())
            await handler(stream)
        except trio.ClosedResourceError:
            if not live.cut:
                raise
        finally:
            self._live.pop(live, None)

    def _recheck(self, change: Change) -> None:
        if not (change.policies or change.workloads) or self._mesh is None:
            return
        workload = self._local.current
        for live in list(self._live):
            if workload is None or decide(self._mesh.store, workload, live.facts).allowed:
                continue
            self._live.pop(live, None)
            live.cut = True
            live.entry.error = PolicyChanged()
            self.metrics.policy_closed()
            if live.stream.opened:
                live.stream.reset(ErrorCode.CONNECT_ERROR)  # CANCEL would look like an orderly end to the peer
            elif not live.stream.closed:
                live.stream.reject(PolicyChanged.status)


@contextlib.asynccontextmanager
async def _nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery of background tasks, which end when the block is left; the block's own error leaves as it is."""
    async with open_quiet_nursery() as nursery:
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def _closing_on_error(entry: Entry | Callable[[], Entry]) -> Iterator[None]:
    """Write the line of a connection that does not come up."""
    try:
        yield
    except BaseException as error:
        made = entry if isinstance(entry, Entry) else entry()
        made.close(error if isinstance(error, DataplaneError) else ConnectFailed("given up"))
        raise


def _ends(stream: HboneStream) -> tuple[Address, Address]:
    transport = stream.session.transport  # type: ignore[attr-defined]  # a Connection of ours, over TCP
    return _address(transport.socket.getpeername()), _address(transport.socket.getsockname())


def _address(name: Any) -> Address:
    return parse_ip(name[0]), name[1]


def _reason(error: OSError) -> str:
    group = error.__cause__
    first = group.exceptions[0] if isinstance(group, BaseExceptionGroup) else error
    return (getattr(first, "strerror", None) or str(first)).lower()
