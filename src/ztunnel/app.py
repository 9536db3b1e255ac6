"""The daemon: what starts in which order, what it waits for, and how it ends.

```text
pages (admin, metrics, readiness) -> listeners bound -> what was kept on disk -> discovery, certificate
first picture of the mesh -> accept -> ready        SIGTERM -> drain -> end
```
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import signal
import socket
import ssl
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import trio

from hbone.daemon import logs
from hbone.daemon.http import HttpLimits, serve_asgi, unix_listener
from hbone.errors import ConfigurationError, IdentityError
from ztunnel import dump, heap
from ztunnel.admin import Readiness, admin_app, readiness_app, stats_app
from ztunnel.datapath import data_path
from ztunnel.dataplane import Reactor
from ztunnel.dataplane.local import LocalWorkload
from ztunnel.dumpconfig import config_dump
from ztunnel.errors import address_text
from ztunnel.membership import Membership, timestamp
from ztunnel.metrics import Metrics
from ztunnel.profiler import sample
from ztunnel.questions import answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hbone.daemon.http import App as AsgiApp
    from ztunnel.config import Config
    from ztunnel.control.ca import CertificateAuthority
    from ztunnel.control.cache import StateDir
    from ztunnel.control.transport import Dial
    from ztunnel.dns.server import DnsProxy
    from ztunnel.profiler import Stacks

    Pages = tuple[AsgiApp, Sequence[trio.SocketListener], tuple[str, ...] | None]

__all__ = ["Daemon", "notify", "run"]

PAGES = HttpLimits(request_seconds=600)
"""A dump of a large mesh takes its time, because connections go first; so does a profile."""

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
    ) -> None:
        """Put the parts together; nothing listens yet.

        Raises:
            ConfigurationError: a setting cannot be used.
        """
        self.config = config
        self.state = state
        self.metrics = Metrics(config.istio_version)
        self.mesh = Membership(config, self.metrics, state, xds=xds, authority=authority, check_revocations=True)
        self.path = data_path(reactor, config, self.mesh, self.metrics)
        self.dns = self._make_dns() if config.dns_proxy else None
        self.readiness = Readiness("proxy", "state manager", *(["dns proxy"] if config.dns_proxy else []))
        self._pages: dict[str, str] = {}
        self._stop = trio.Event()
        self._started = time.time()
        self._draining = False
        self._add_gauges()

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
            version=version("hbone"),
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
            pages = await self._listen(stack)
            stack.callback(self.path.close)
            if self.dns is not None:
                stack.callback(self.dns.close)
                self.dns.bind()
            self.path.bind()
            self.mesh.restore()
            async with trio.open_nursery() as nursery:
                for app, listeners, hosts in pages:
                    await nursery.start(functools.partial(serve_asgi, app, listeners, limits=PAGES, hosts=hosts))
                await nursery.start(self._take_signals)
                if self.dns is not None:
                    await nursery.start(self.dns.run)
                await nursery.start(self.path.run)
                nursery.start_soon(self.mesh.run)
                nursery.start_soon(self._begin)
                task_status.started()
                await self._stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()
        log.info("stopped")

    async def _listen(self, stack: contextlib.AsyncExitStack) -> list[Pages]:
        config = self.config
        admin = admin_app(self)
        wanted = (
            ("admin", admin, config.loopback_host, config.admin_port, ()),
            (
                "stats",
                stats_app(self.metrics, functools.partial(self.path.refresh, "counts")),
                config.listen_host,
                config.stats_port,
                None,
            ),
            ("readiness", readiness_app(self.readiness), config.listen_host, config.ready_port, None),
        )
        pages: list[Pages] = []
        for name, app, host, port, hosts in wanted:
            listeners = await listen(host, port, name)
            for listener in listeners:
                stack.push_async_callback(listener.aclose)
            self._pages[name] = _address_of(listeners[0])
            pages.append((app, listeners, hosts))
        if self.state is not None:
            path = self.state.admin_socket
            local = unix_listener(path)
            stack.callback(path.unlink, missing_ok=True)
            stack.push_async_callback(local.aclose)
            pages.append((admin, [local], None))
        return pages

    async def _begin(self) -> None:
        """Accept once there is a picture of the mesh."""
        await self.mesh.first_picture()
        await self.path.start()
        self.readiness.done("state manager")
        self.readiness.done("proxy")
        if self.dns is not None:
            self.dns.start()
            self.readiness.done("dns proxy")
        notify("READY=1", f"STATUS=serving {self.mesh.served}")
        store = self.mesh.store
        log.info("ready", workloads=len(store.workloads), services=len(store.services), policies=len(store.policies))
        if self.mesh.own_workload() is None:
            log.warning(
                "this workload is not known in the mesh; its connections are refused until it is",
                workload=str(self.mesh.served),
            )

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
        self._draining = True
        notify("STOPPING=1", "STATUS=draining")
        connections = sum(self.path.open_connections().values())
        log.info("draining", connections=connections, deadline=f"{self.config.drain_deadline:g}s")
        await self.path.drain()
        if self.dns is not None:
            await self.dns.drain()  # last, as what still runs resolves names
        self.path.close()

    # what the pages show

    def shut_down(self) -> None:
        """Begin the drain; calling it again does nothing."""
        self._stop.set()

    async def refresh(self) -> None:
        """Bring `status` up to date."""
        await self.path.refresh("status")

    def level_changed(self) -> None:
        """The log level is another now."""
        self.path.level_changed()

    def status(self) -> dict[str, Any]:
        """The short view; of several processes as of the last `refresh`."""
        path = self.path
        dns = {"dns": address_text(self.dns.addresses[0])} if self.dns is not None and self.dns.addresses else {}
        return self.mesh.status() | {
            "version": version("hbone"),
            "pid": os.getpid(),
            "startedAt": timestamp(self._started),
            "state": "draining" if self._draining else "ready" if self.readiness.ready else "starting",
            "pending": self.readiness.pending,
            "tunnels": path.tunnels(),
            "connections": path.open_connections(),
            "workers": path.workers(),
            "listeners": path.listening() | dns | self._pages,
            "keepsSources": path.transparent,
        }

    async def config_dump(self) -> dict[str, Any]:
        """Everything that is known, without secrets. Source: Istio's ztunnel, config dump."""
        await self.path.refresh("connections")
        mesh = self.mesh
        return {
            **dump.mesh_dump(mesh.store),
            "staticConfig": dump.static_dump(mesh.local),
            "certificates": dump.dump_certificates(mesh.svids),
            "version": {
                "version": version("hbone"),
                "pythonVersion": sys.version.split()[0],
                "cryptoProvider": ssl.OPENSSL_VERSION,
                "istioVersion": self.config.istio_version,
            },
            "config": config_dump(self.config),
            "connections": self.path.connections(),
            "tunnels": self.path.tunnels(),
            "workloadState": dump.workload_state(
                mesh.own_workload(), self.path.connections(), ready=self.readiness.ready
            ),
        }

    async def profile(self, seconds: int, frequency: int) -> dict[str, Stacks]:
        """Where the processes spend their CPU, by name.

        Raises:
            Busy: another profile is being taken.
            ConfigurationError: this is not the main thread.
        """
        found: dict[str, Stacks] = {}

        async def own() -> None:
            found["daemon"] = await sample(seconds, frequency)

        async def workers() -> None:
            found.update(await self.path.profile(seconds, frequency))

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(own)
                nursery.start_soon(workers)
        except BaseExceptionGroup as group:
            refused = group.subgroup(ConfigurationError)
            if refused is None:
                raise
            raise _first(refused) from None
        return dict(sorted(found.items()))

    async def heap(self) -> dict[str, dict[str, Any]]:
        """What fills the memory of the processes, by name."""
        return {"daemon": await heap.look()} | await self.path.heap()

    def trace_heap(self, on: bool) -> None:
        """Begin, or end, to trace allocations in all processes."""
        heap.trace(on)
        self.path.trace_heap(on)

    async def explain(self, destination: str, source: str | None) -> dict[str, Any]:
        """What the mesh does with a connection.

        Raises:
            ConfigurationError: the question names nothing that is known.
        """
        return await answer(self.mesh, destination, source)

    def _add_gauges(self) -> None:
        mesh, gauge = self.mesh, self.metrics.add_gauge

        def expiry() -> float:
            identity = mesh.svids.held()
            return identity.svid.expires_at.timestamp() if identity is not None else 0.0

        def stale() -> float:
            since = mesh.discovery.status().stale_since if mesh.discovery is not None else None
            return max(0.0, time.time() - since) if since is not None else 0.0

        gauge(
            "ztunnel_certificate_expiration_timestamp_seconds", "End of the certificate in use, 0 without one", expiry
        )
        gauge("ztunnel_mesh_stale_seconds", "Age of the picture of the mesh while the control plane is away", stale)
        gauge(
            "ztunnel_control_plane_connected",
            "Whether the discovery stream is open",
            lambda: float(mesh.discovery is not None and mesh.discovery.status().connected),
        )


def run(config: Config, state: StateDir | None) -> None:
    """Run the daemon to its end, on a reactor of its own.

    Raises:
        ConfigurationError: a setting cannot be used, or an address not be listened on.
    """
    reactor = Reactor()
    try:
        daemon = Daemon(config, reactor, state)
        # What is loaded by now stays for ever: a full collection need not walk it while connections wait.
        gc.collect()
        gc.freeze()
        reactor.run(daemon.run)
    except BaseExceptionGroup as group:
        found = group.subgroup((ConfigurationError, IdentityError))
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
        raise ConfigurationError(f"cannot listen on {_text((host, port))} for {what}: {reason}") from None


def _address_of(listener: trio.SocketListener) -> str:
    return _text(listener.socket.getsockname())


def _text(address: Any) -> str:
    host, port = address[0], address[1]
    host = host.removeprefix("::ffff:")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def notify(*lines: str) -> None:
    """Tell systemd, where it waits to be told (`Type=notify`). Source: sd_notify(3)."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        sock.sendto("\n".join(lines).encode(), address)
