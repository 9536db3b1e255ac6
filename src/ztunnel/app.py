"""The daemon: what starts in which order, what it waits for, and how it ends.

```text
pages (admin, metrics, readiness) -> listeners bound -> what was kept on disk -> discovery, certificate
first picture of the mesh -> accept -> ready        SIGTERM -> drain -> end
```

One that takes over gets its sockets first, and lets nobody notice before it is ready: `ztunnel.takeover`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, Any

import trio

from hbone.daemon import logs
from hbone.daemon.http import HttpLimits, serve_asgi, unix_socket
from hbone.daemon.late import tidy
from hbone.errors import ConfigurationError, HboneError, IdentityError
from hbone.version import VERSION
from ztunnel.admin import Readiness, admin_app, readiness_app, stats_app
from ztunnel.control.pace import Pace, QuietCollector
from ztunnel.datapath import data_path
from ztunnel.dataplane import Reactor
from ztunnel.dataplane.local import LocalWorkload
from ztunnel.dumpconfig import config_dump
from ztunnel.errors import address_text
from ztunnel.given import Given
from ztunnel.membership import Membership
from ztunnel.mesh.address import parse_ip
from ztunnel.metrics import Metrics
from ztunnel.standing import add_gauges
from ztunnel.systemd import notify, notify_main
from ztunnel.takeover import PREPARE, TakeOver, TakeOverFailed, serve_takeover
from ztunnel.view import View

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hbone.daemon.http import App as AsgiApp
    from ztunnel.config import Config
    from ztunnel.control.ca import CertificateAuthority
    from ztunnel.control.cache import StateDir
    from ztunnel.control.transport import Dial
    from ztunnel.dns.server import DnsProxy

    Pages = tuple[AsgiApp, Sequence[trio.SocketListener], tuple[str, ...] | None]

__all__ = ["Daemon", "run"]

PAGES = HttpLimits(request_seconds=600)
"""A dump of a large mesh takes its time, because connections go first; so does a profile."""
_ADMIN_SOCKET = "admin-socket"
_TAKEOVER_SOCKET = "takeover-socket"
_TAKEOVER_PATIENCE = 5.0  # seconds that one which takes over waits for discovery, before the disk's picture will do
_LOCK_TRIES = 100
_LOCK_STEP = 0.1  # seconds

log = logs.get_logger("ztunnel.app")


class Daemon:
    """`ztunnel run`."""

    def __init__(
        self,
        config: Config,
        reactor: Reactor,
        state: StateDir | None = None,
        *,
        xds: Dial | None = None,
        authority: CertificateAuthority | None = None,
        given: Given | None = None,
        take_over: bool = False,
        when_serving: Callable[[], object] = lambda: None,
        collector: QuietCollector | None = None,
    ) -> None:
        """Put the parts together; nothing listens yet.

        Args:
            config: settings.
            reactor: moves the bytes.
            state: what is kept on disk.
            xds: another way to discovery, for tests.
            authority: another CA, for tests.
            given: sockets of socket activation.
            take_over: replace the ztunnel that uses the state directory.
            when_serving: called once connections are accepted.
            collector: of this process, if that may be touched.

        Raises:
            ConfigurationError: a setting cannot be used.
        """
        self.config = config
        self.state = state
        self.metrics = Metrics(config.istio_version)
        self.mesh = Membership(
            config,
            self.metrics,
            state,
            xds=xds,
            authority=authority,
            check_revocations=True,
            pace=Pace(collector=collector),
        )
        self.path = data_path(reactor, config, self.mesh, self.metrics)
        self.dns = self._make_dns() if config.dns_proxy else None
        self.readiness = Readiness("proxy", "state manager", *(["dns proxy"] if config.dns_proxy else []))
        self.view = View(config, self.mesh, self.path, self.dns, self.readiness)
        self._given = given or Given()
        self._take_over = take_over
        self._when_serving = when_serving
        self._takeover: TakeOver | None = None
        self._takeover_socket: socket.socket | None = None
        self._page_sockets: list[tuple[str, socket.socket | trio.socket.SocketType]] = []
        self._owns_paths = True
        self._handed_over = False
        add_gauges(self.metrics, self.mesh)

    def _make_dns(self) -> DnsProxy:
        try:
            from ztunnel.dns.server import make_proxy  # brings dnspython, 3 MB that only the DNS proxy needs
        except ModuleNotFoundError as error:
            if error.name != "dns":
                raise
            raise ConfigurationError(
                "the DNS proxy needs dnspython, which is not installed; pip install 'hbone[ztunnel]',"
                " or set ISTIO_META_DNS_CAPTURE=false to do without"
            ) from None
        local = LocalWorkload(self.mesh.store, self.mesh.served, self.config.node_name)
        return make_proxy(self.config, self.mesh.store, local, self.metrics)

    # life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until told to stop, then drain.

        Raises:
            ConfigurationError: an address cannot be listened on.
        """
        limit = raise_descriptor_limit()
        log.info(
            "starting",
            version=VERSION,
            workload=str(self.mesh.served),
            xds=self.config.xds_address,
            ca=self.config.ca_address,
            state=str(self.state.path) if self.state else None,
            descriptors=limit,
            config=config_dump(self.config),
        )
        for text in self.config.warnings:
            log.warning("setting ignored", error=text)
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._given.close)
            await self._get_sockets(stack)
            pages = await self._listen(stack)
            stack.callback(self.path.close)
            if self.dns is not None:
                stack.callback(self.dns.close)
                self.dns.bind(self._given)
            self.path.bind(self._given)
            self._given.reject_rest()
            self.mesh.restore()
            async with trio.open_nursery() as nursery:
                await nursery.start(self._take_signals)
                if self._takeover is None:
                    await self._open(nursery, pages)
                await nursery.start(self.path.run)
                nursery.start_soon(self.mesh.run)
                nursery.start_soon(self._begin, nursery, pages)
                task_status.started()
                await self.view.stopping.wait()
                await self._drain()
                nursery.cancel_scope.cancel()
        log.info("stopped")

    async def _get_sockets(self, stack: contextlib.AsyncExitStack) -> None:
        """Ask the ztunnel that runs, where we are to replace it."""
        state = self.state
        if state is None:
            return
        if self._take_over:
            takeover = TakeOver(state.takeover_socket)
            given = await takeover.take()
            if given is not None:
                stack.callback(takeover.close)
                stack.callback(given.close)
                self._given.close()
                self._given = given
                self._takeover = takeover
                self._owns_paths = False
                return
            log.info("no ztunnel runs that could be taken over; starting as usual", state=str(state.path))
            state.acquire()

    async def _listen(self, stack: contextlib.AsyncExitStack) -> list[Pages]:
        config = self.config
        admin = admin_app(self.view)
        wanted = (
            ("admin", admin, config.loopback_host, config.admin_port, ()),
            (
                "stats",
                stats_app(self.metrics, self.view.refresh_counts),
                config.listen_host,
                config.stats_port,
                None,
            ),
            ("readiness", readiness_app(self.readiness), config.listen_host, config.ready_port, None),
        )
        pages: list[Pages] = []
        for name, app, host, port, hosts in wanted:
            listeners = given_listeners(self._given, host, port, name) or await listen(host, port, name)
            for listener in listeners:
                stack.push_async_callback(listener.aclose)
                self._page_sockets.append((name, listener.socket))
            self.view.pages[name] = _text(*listeners[0].socket.getsockname()[:2])
            pages.append((app, listeners, hosts))
        if self.state is not None:
            path = self.state.admin_socket
            sock = self._given.take_unix(_ADMIN_SOCKET) or unix_socket(path)
            local = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            stack.callback(self._unlink, path)
            stack.push_async_callback(local.aclose)
            self._page_sockets.append((_ADMIN_SOCKET, local.socket))
            pages.append((admin, [local], None))
            self._takeover_socket = self._given.take_unix(_TAKEOVER_SOCKET) or unix_socket(
                self.state.takeover_socket, kind=socket.SOCK_SEQPACKET
            )
            stack.callback(self._unlink, self.state.takeover_socket)
            stack.callback(self._takeover_socket.close)
        return pages

    def _unlink(self, path: Path) -> None:
        if self._owns_paths:
            path.unlink(missing_ok=True)

    async def _open(self, nursery: trio.Nursery, pages: Sequence[Pages]) -> None:
        """Answer on what is not the data path."""
        for app, listeners, hosts in pages:
            await nursery.start(functools.partial(serve_asgi, app, listeners, limits=PAGES, hosts=hosts))
        if self.dns is not None:
            await nursery.start(self.dns.run)
        if self._takeover is None:
            nursery.start_soon(self._await_successor)

    async def _begin(self, nursery: trio.Nursery, pages: Sequence[Pages]) -> None:
        """Accept once there is a picture of the mesh."""
        takeover = self._takeover
        if takeover is None:
            await self.mesh.first_picture()
        else:
            await self._get_ready()
        await self.path.start()
        self.readiness.done("state manager")
        self.readiness.done("proxy")
        if self.dns is not None:
            self.dns.start()
            self.readiness.done("dns proxy")
        if takeover is not None:
            await self._open(nursery, pages)
            await notify_main()
            await self._replace(takeover)
            nursery.start_soon(self._await_successor)
        notify("READY=1", f"STATUS=serving {self.mesh.served}")
        store = self.mesh.store
        log.info("ready", workloads=len(store.workloads), services=len(store.services), policies=len(store.policies))
        self._when_serving()
        if self.mesh.own_workload() is None:
            log.warning(
                "this workload is not known in the mesh; its connections are refused until it is",
                workload=str(self.mesh.served),
            )

    # taking over

    async def _get_ready(self) -> None:
        """Have what the running one has: a picture of the mesh and a certificate.

        Raises:
            TakeOverFailed: it could not be had; the running one goes on.
        """
        mesh = self.mesh
        with trio.move_on_after(PREPARE):
            await mesh.first_picture(_TAKEOVER_PATIENCE)
            if mesh.own_workload() is None:
                raise TakeOverFailed(f"the mesh does not know workload {mesh.served}; the ztunnel that runs goes on")
            try:
                await mesh.svids.fetch()
            except HboneError as error:
                raise TakeOverFailed(f"no certificate ({error}); the ztunnel that runs goes on") from None
            return
        plane = mesh.status()["controlPlane"] or {}
        raise TakeOverFailed(
            f"no picture of the mesh after {PREPARE:g} s ({plane.get('error') or 'the control plane sent none'});"
            " the ztunnel that runs goes on"
        )

    async def _replace(self, takeover: TakeOver) -> None:
        """We accept: have the running one stop, and get what it owns.

        Raises:
            TakeOverFailed: it neither ends nor gives way.
        """
        assert self.state is not None
        lock = await takeover.serving()
        self._takeover = None
        for _ in range(_LOCK_TRIES):
            try:
                self.state.acquire(lock)
            except ConfigurationError:
                lock = None  # the running one ended without passing it on: when it is gone, so is its lock
                await trio.sleep(_LOCK_STEP)
            else:
                self._owns_paths = True
                log.info("took over", sockets=len(self._sockets()))
                return
        raise TakeOverFailed("the ztunnel that runs keeps the state directory; it goes on")

    async def _await_successor(self) -> None:
        if self._takeover_socket is not None:
            await serve_takeover(self._takeover_socket, self._sockets, self._release)
            self.shut_down()

    def _sockets(self) -> list[tuple[str, Any]]:
        """What a successor gets."""
        found: list[tuple[str, Any]] = [*self.path.sockets(), *self._page_sockets]
        if self.dns is not None:
            found += self.dns.sockets()
        if self._takeover_socket is not None:
            found.append((_TAKEOVER_SOCKET, self._takeover_socket))
        return found

    async def _release(self, pid: int) -> int | None:
        """Another process accepts: leave the sockets to it, and the disk; returns the lock to pass on."""
        log.info("another ztunnel took over", pid=pid)
        self._handed_over = True
        self._owns_paths = False
        self.path.release()
        if self.dns is not None:
            self.dns.release()
        for _, sock in self._page_sockets:
            sock.close()
        await self.mesh.stop_writing()
        return self.state.lock if self.state is not None else None

    async def _take_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        interrupts = 0
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                interrupts += number == signal.SIGINT
                log.info("signal", name=signal.Signals(number).name)
                if interrupts > 1:
                    logs.flush()
                    os._exit(0)
                self.shut_down()

    async def _drain(self) -> None:
        self.view.draining = True
        if not self._handed_over:  # else systemd would take it for the unit's end
            notify("STOPPING=1", "STATUS=draining")
        connections = sum(self.path.open_connections().values())
        log.info("draining", connections=connections, deadline=f"{self.config.drain_deadline:g}s")
        await self.path.drain()
        if self.dns is not None:
            await self.dns.drain()  # last, as what still runs resolves names
        self.path.close()

    def shut_down(self) -> None:
        """Begin the drain; calling it again does nothing."""
        self.view.shut_down()

    def status(self) -> dict[str, Any]:
        """The short view; of several processes as of the last `refresh` of the view."""
        return self.view.status()


def run(
    config: Config,
    state: StateDir | None,
    *,
    given: Given | None = None,
    take_over: bool = False,
    when_serving: Callable[[], object] = lambda: None,
) -> None:
    """Run the daemon to its end, on a reactor of its own; the arguments are those of `Daemon`.

    Raises:
        ConfigurationError: a setting cannot be used, or an address not be listened on.
        TakeOverFailed: it did not come to that; the ztunnel that runs goes on.
    """
    reactor = Reactor()
    try:
        daemon = Daemon(
            config,
            reactor,
            state,
            given=given,
            take_over=take_over,
            when_serving=when_serving,
            collector=QuietCollector(),
        )
        # What is loaded by now stays for ever: a full collection need not walk it while connections wait.
        tidy()
        gc.freeze()
        reactor.run(daemon.run)
    except BaseExceptionGroup as group:
        found = group.subgroup((ConfigurationError, IdentityError, TakeOverFailed))
        if found is None:
            raise
        raise _first(found) from None
    finally:
        logs.flush()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def given_listeners(given: Given, host: str, port: int, what: str) -> list[trio.SocketListener]:
    """The sockets that were given for a page, if any.

    Raises:
        ConfigurationError: others could reach one that they must not.
    """
    found = given.take(what, (parse_ip(host), port))
    if host == "::":
        found += given.take(what, (parse_ip("0.0.0.0"), port))
    return [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in found]


async def listen(host: str, port: int, what: str) -> Sequence[trio.SocketListener]:
    """Listen for a page.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    try:
        # `::` means both families, which Trio does for None only.
        return await trio.open_tcp_listeners(port, host=None if host == "::" else host)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigurationError(f"cannot listen on {_text(host, port)} for {what}: {reason}") from None


def _text(host: str, port: int) -> str:
    return address_text((parse_ip(host), port))


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
