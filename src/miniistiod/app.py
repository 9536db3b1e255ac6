"""The control plane in one `async with`: state, documents, both services, the pages, and an end that leaves nothing."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import trio

from hbone.daemon.http import serve_asgi, unix_listener
from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from hbone.trio.grpc import GrpcServer
from miniistiod import expiry, issue_tokens, pages, watch
from miniistiod.api import Api
from miniistiod.authority import Authority
from miniistiod.mesh import Mesh
from miniistiod.metrics import Metrics
from miniistiod.plugged import CaDirectory, new_state
from miniistiod.resources import load
from miniistiod.server_certificate import ServerTls, names_of_host
from miniistiod.store import ADMIN_SOCKET, DATABASE, Store, locked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import TracebackType

    from miniistiod.auth import Verifier
    from miniistiod.config import Address, Config
    from miniistiod.mesh import Status

__all__ = ["MiniIstiod", "open_state"]

_log = get_logger("miniistiod.app")
DEFAULT_TRUST_DOMAIN = "cluster.local"
_HOUSEKEEPING_SECONDS = 3600.0
_GOODBYE_SECONDS = 1.0
"""For the last answers, and to tell clients that they should connect again."""


def open_state(config: Config) -> Store:
    """The state of before, or with `init` a new one.

    Raises:
        ConfigurationError: there is none and `init` is not set, or it is of another trust domain.
    """
    if config.init and not (config.state_dir / DATABASE).exists():
        wanted = config.trust_domain
        if wanted is None:
            with contextlib.suppress(ConfigurationError):
                wanted = load(watch.read(config.config_dir)).mesh.trust_domain
        return new_state(config.state_dir, DEFAULT_TRUST_DOMAIN if wanted is None else wanted, config.ca_dir)
    store = Store.open(config.state_dir)
    if config.trust_domain not in (None, store.trust_domain):
        found = store.trust_domain
        store.close()
        raise ConfigurationError(
            f"the state in {str(config.state_dir)!r} is of the trust domain {found!r}, not {config.trust_domain!r};"
            " leave --trust-domain out, or name another state directory"
        )
    return store


def open_authority(config: Config, store: Store) -> Authority:
    """What signs: the state's own root, or the CA in files that the settings name.

    Raises:
        ConfigurationError: it cannot be used.
    """
    return Authority(store, None if config.ca_dir is None else CaDirectory(config.ca_dir, store))


def _issuers(config: Config) -> Verifier | None:
    if config.issuers is None:
        return None
    from miniistiod.issuers import read_issuers  # the only part that needs joserfc

    return read_issuers(config.issuers)


class MiniIstiod:
    """A control plane. `async with MiniIstiod(config) as cp:` serves until the block ends.

    Attributes of a running one: `addresses` and `monitoring_addresses` (what is bound, ports of 0 resolved), `store`,
    `mesh`, `api`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.addresses: tuple[tuple[str, int], ...] = ()
        self.monitoring_addresses: tuple[tuple[str, int], ...] = ()
        self.store: Store
        self.mesh: Mesh
        self.api: Api
        self.authority: Authority
        self._metrics = Metrics()
        self._context: contextlib.AbstractAsyncContextManager[None] | None = None

    @property
    def port(self) -> int:
        """The port of discovery and CA."""
        return self.addresses[0][1]

    @property
    def trust_domain(self) -> str:
        """The mesh's trust domain."""
        return self.store.trust_domain

    @property
    def root_pem(self) -> bytes:
        """The roots that hosts must believe."""
        return self.store.roots_pem()

    @property
    def status(self) -> Status:
        """How current what we serve is."""
        return self.mesh.status

    async def reload(self) -> None:
        """Read the documents now, instead of when the change is noticed."""
        await self.mesh.reload()

    def create_token(
        self,
        namespace: str,
        service_account: str,
        *,
        name: str | None = None,
        lifetime: float | None = None,
        reusable: bool = False,
        node: str = "",
        group: str = "",
    ) -> str:
        """Make a token; see `miniistiod token create`. `lifetime` is in seconds."""
        return issue_tokens.create(
            self.store,
            namespace=namespace,
            service_account=service_account,
            name=name,
            lifetime=lifetime,
            reusable=reusable,
            now=time.time(),
            node=node,
            group=group,
        ).text

    async def __aenter__(self) -> MiniIstiod:
        self._context = self._running()
        await self._context.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._context is not None
        return await self._context.__aexit__(kind, error, traceback)

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        config = self.config
        failure: Exception | None = None
        with contextlib.ExitStack() as stack:
            issuers = _issuers(config)
            if config.init and not (config.state_dir / DATABASE).exists():
                for address in (config.listen, config.monitoring):  # else there is a root, and nobody to serve by it
                    _close_all(await _listen(address))
            self.store = stack.enter_context(contextlib.closing(await trio.to_thread.run_sync(open_state, config)))
            stack.enter_context(locked(config.state_dir))
            self.authority = await trio.to_thread.run_sync(open_authority, config, self.store)
            self.mesh = Mesh(config, self.store, self._metrics)
            await self.mesh.restore()
            await self.mesh.reload()
            self.api = Api(config, self.store, self.mesh, self._metrics, self.authority, issuers)
            await self.api.registrar.start()
            grpc = await _listen(config.listen)
            stack.callback(_close_all, grpc)
            monitoring = await _listen(config.monitoring)
            stack.callback(_close_all, monitoring)
            admin = unix_listener(config.state_dir / ADMIN_SOCKET)
            stack.callback(_remove_socket, config, admin)
            self.addresses, self.monitoring_addresses = _bound(grpc), _bound(monitoring)
            bound = [host for host, _ in self.addresses]
            names = await trio.to_thread.run_sync(names_of_host, config.names, bound)  # asks the resolver
            tls = ServerTls(self.authority, self.store.trust_domain, names)
            tls.context()  # what is wrong with a name or the root is told now, not at the first connection
            server = GrpcServer(self.api.handlers)
            async with trio.open_nursery() as nursery:
                look = watch.Looking(config.config_dir)
                nursery.start_soon(
                    watch.watch, look, self.mesh.fingerprint, self.mesh.reload, config.debounce, lambda: look.cost
                )
                nursery.start_soon(self._housekeeping)
                nursery.start_soon(self.authority.keep_up)
                nursery.start_soon(self.api.registrar.run)
                app = pages.monitoring_app(self.mesh, self._metrics, self._refresh_metrics)
                await nursery.start(_serve_pages, app, monitoring)
                await nursery.start(_serve_pages, pages.admin_app(self.mesh, self.store, self.api), [admin])
                ended = trio.Event()
                await nursery.start(_serve_grpc, server, grpc, tls, ended)
                _log.info(
                    "listening",
                    addresses=[f"{host}:{port}" for host, port in self.addresses],
                    monitoring=[f"{host}:{port}" for host, port in self.monitoring_addresses],
                    trust_domain=self.store.trust_domain,
                    names=list(names),
                )
                try:
                    yield
                except Exception as error:  # raised again outside of the nursery, which would wrap it in a group
                    failure = error
                with trio.move_on_after(_GOODBYE_SECONDS):
                    server.drain()
                    self.api.discovery.end_streams()
                    await ended.wait()
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure

    def _refresh_metrics(self) -> None:
        now = time.time()
        view = self.authority.view
        self._metrics.root_expiry.set(view.signer.root.not_valid_after_utc.timestamp())
        self._metrics.signer_expiry.set(view.signer.expires.timestamp())
        self._metrics.ca_degraded.set(1 if self.authority.problem else 0)
        self._metrics.token_expiry.set(expiry.next_token_end(self.store, now))

    async def _housekeeping(self) -> None:
        while True:
            await trio.to_thread.run_sync(self.store.forget_expired, time.time())
            await trio.sleep(_HOUSEKEEPING_SECONDS)


async def _listen(address: Address) -> list[trio.SocketListener]:
    host = None if address.host in ("", "*") else address.host
    try:
        return await trio.open_tcp_listeners(address.port, host=host, backlog=512)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigurationError(f"cannot listen on {address}: {reason}; choose another address or port") from None


def _bound(listeners: list[trio.SocketListener]) -> tuple[tuple[str, int], ...]:
    return tuple((str(name[0]), int(name[1])) for name in (item.socket.getsockname() for item in listeners))


def _close_all(listeners: list[trio.SocketListener]) -> None:
    for listener in listeners:
        listener.socket.close()


def _remove_socket(config: Config, listener: trio.SocketListener) -> None:
    listener.socket.close()
    with contextlib.suppress(OSError):
        (config.state_dir / ADMIN_SOCKET).unlink()


async def _serve_pages(
    app: Any, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED
) -> None:
    await serve_asgi(app, listeners, task_status=task_status)


async def _serve_grpc(
    server: GrpcServer,
    listeners: list[trio.SocketListener],
    tls: ServerTls,
    ended: trio.Event,
    *,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    await server.serve(listeners, tls.context, task_status=task_status)
    ended.set()
