"""What a ztunnel knows and who it is: the mesh by discovery, its certificate, and both kept on disk.

The daemon and a program that embeds a ztunnel are built on the same one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from ztunnel import standing
from ztunnel.config import DEFAULT_ROOT, NO_ADDRESS
from ztunnel.control.ca import CaClient
from ztunnel.control.cache import CacheWriter
from ztunnel.control.demand import Demand
from ztunnel.control.discovery import DiscoveryClient, make_node, nobody_else
from ztunnel.control.pace import Pace
from ztunnel.control.revocation import Revocations
from ztunnel.control.svids import SvidManager
from ztunnel.control.transport import REMEDY, RootSource, ServerAddress, TokenSource, grpc_dialer
from ztunnel.mesh import SnapshotError, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.identity import Identity
    from ztunnel.config import Config
    from ztunnel.control.ca import CertificateAuthority
    from ztunnel.control.cache import StateDir
    from ztunnel.control.discovery import DiscoveryMetrics
    from ztunnel.control.transport import Dial
    from ztunnel.mesh import Change, Workload
    from ztunnel.mesh import local as local_file

__all__ = ["Membership"]

TOKEN = Path("./var/run/secrets/tokens/istio-token")
CATCH_UP = 1.0
"""Seconds that a start from the disk waits for the control plane, so that it seldom begins with an old picture."""

log = get_logger("ztunnel.membership")


class Membership:
    """The store, discovery and the certificate of one workload, with what is kept on disk."""

    def __init__(
        self,
        config: Config,
        metrics: DiscoveryMetrics,
        state: StateDir | None = None,
        *,
        xds: Dial | None = None,
        authority: CertificateAuthority | None = None,
        check_revocations: bool = False,
        pace: Pace | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Put the parts together; `run` starts them.

        Args:
            config: Settings.
            metrics: Counters.
            state: Where certificate and mesh are kept; None keeps nothing.
            xds: Another way to discovery, for tests.
            authority: Another CA, for tests.
            check_revocations: Ask for revocation lists; who says so acts on them.
            pace: Cuts the work of large responses.
            wall: Wall clock, seconds since 1970.

        Raises:
            ConfigurationError: an address of the control plane, the local file or the revocation lists cannot be used.
        """
        self.config = config
        self.served = config.served
        self.state = state
        self.store = Store()
        self.wall = wall
        """Seconds since 1970."""
        self.pace = pace or Pace()
        """Cuts the work of large responses."""
        self.local_text: str | None = None
        """The local file, where there is one."""
        self.local = self._read_local()
        """What it describes."""
        self.spread: Callable[[bytes, int], Awaitable[None]] = nobody_else
        """Gets each response of discovery that was applied, and the number of its resources, before it is acknowledged.
        """
        self.revocations = Revocations(config.crl_path, state if check_revocations else None)
        """Certificates that were taken back."""
        self._check_revocations = check_revocations
        token = self._token = TokenSource.from_setting(config.auth_token, TOKEN)
        self.token_expires: float | None = None
        """When the token for the control plane ends, as of the last look; None where there is none that says so."""
        self.svids = SvidManager(authority or self._ca(token), save=self._keep_identity, wall=wall)
        self.demand = Demand(self.store, config.network) if config.on_demand else None
        """Which addresses are subscribed to; None: all."""
        if self.demand is not None and config.instance_ip != NO_ADDRESS:
            self.demand.ask(f"{config.network}/{config.instance_ip}")  # or else nobody tells of ourselves
        self.discovery = self._discovery(token, metrics, xds) if config.xds_address or xds else None
        self._writer: CacheWriter | None = None
        if state is not None:
            self._writer = CacheWriter(
                state,
                workload=str(self.served),
                snapshot=self._snapshot,
                in_sync=self._is_in_sync,
                stale_since=self._stale_since,
            )
        self.restored = False
        """The picture of the last run was put in force."""
        self.store.subscribe(self._on_change)

    # parts

    def _roots(self, setting: str, variable: str) -> RootSource:
        extra = self.state.roots_pem if self.state is not None else lambda: None
        return RootSource(setting, default=Path(DEFAULT_ROOT), variable=variable, extra=extra)

    def _ca(self, token: TokenSource | None) -> CertificateAuthority:
        config = self.config
        if not config.ca_address:
            raise ConfigurationError("CA_ADDRESS is empty; name the certificate authority as https://host:15012")
        address = ServerAddress.parse(config.ca_address, variable="CA_ADDRESS", alternative=config.alt_ca_hostname)
        return CaClient(
            grpc_dialer(
                address,
                self._roots(config.ca_root_ca, "CA_ROOT_CA"),
                mark=config.packet_mark,
                source=config.bind_address,
            ),
            lifetime=config.secret_ttl,
            token=token,
            cluster_id=config.cluster_id,
            headers=config.ca_headers,
            wall=self.wall,
            warn=lambda text: log.warning("answer of the CA", error=text),
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        """How a host comes back that was away for longer than its certificate is valid."""
        served = self.served
        address = self.config.ca_address or self.config.xds_address
        try:
            server = str(ServerAddress.parse(address, variable="CA_ADDRESS"))
        except ConfigurationError:
            return REMEDY  # told elsewhere
        # What the daemon was told of this host counts for the command too: captured, it would not get out unmarked.
        given = {
            "ZTUNNEL_STATE_DIR": self.config.state_dir,
            "PACKET_MARK": self.config.packet_mark,
            "ZTUNNEL_BIND_ADDRESS": self.config.bind_address,
        }
        settings = "".join(f"{name}={value} " for name, value in given.items() if value is not None)
        return (
            f"on the control plane run 'miniistiod token create --state STATE --namespace {served.namespace}"
            f" --service-account {served.service_account} --name {served.name}', then here, with ztunnel stopped,"
            f" '{settings}ztunnel enroll --server {server} --token-file FILE' (or set AUTH_TOKEN), and start it again"
        )

    def _discovery(self, token: TokenSource | None, metrics: DiscoveryMetrics, xds: Dial | None) -> DiscoveryClient:
        config = self.config
        if xds is None:
            address = ServerAddress.parse(
                config.xds_address, variable="XDS_ADDRESS", alternative=config.alt_xds_hostname
            )
            xds = grpc_dialer(
                address,
                self._roots(config.xds_root_ca, "XDS_ROOT_CA"),
                mark=config.packet_mark,
                source=config.bind_address,
            )
        return DiscoveryClient(
            xds,
            self.store,
            node=make_node(
                name=config.pod_name or self.served.name,
                namespace=config.pod_namespace or self.served.namespace,
                ip=config.instance_ip,
                node_name=config.node_name or "",
                metadata=config.proxy_metadata,
                json_metadata=config.json_metadata,
            ),
            metrics=metrics,
            identity=self.svids.current,
            token=token,
            cluster_id=config.cluster_id,
            headers=config.xds_headers,
            applied=self._mesh_changed,
            revocations=self.revocations if self._check_revocations else None,
            spread=lambda raw, resources: self.spread(raw, resources),
            wall=self.wall,
            remedy=self._remedy(),
            pace=self.pace,
            demand=self.demand,
        )

    def _read_local(self) -> local_file.LocalFile | None:
        if self.config.local_xds_path is None and self.config.local_xds is None:
            return None
        from ztunnel.mesh import local as local_file  # brings YAML, a megabyte that most hosts do without

        path = self.config.local_xds_path
        if path is not None:
            try:
                text = path.read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"LOCAL_XDS_PATH {str(path)!r} cannot be read: {error}") from None
            self.local_text = text
            return local_file.load(text, str(path))
        if self.config.local_xds is not None:
            self.local_text = self.config.local_xds
            return local_file.load(self.config.local_xds)
        return None

    # state

    def own_workload(self) -> Workload | None:
        """The workload that is served, as the mesh describes it."""
        served = self.served
        return self.store.find_local(served.name, served.namespace, served.service_account, self.config.node_name)

    def local_names(self) -> tuple[set[str], set[str]]:
        """Names of what the local file describes: workloads and services, and policies."""
        local = self.local
        if local is None:
            return set(), set()
        addresses = {workload.uid for workload in local.workloads} | {service.key for service in local.services}
        return addresses, {policy.key for policy in local.policies}

    def restore(self) -> None:
        """Put the local file, and what was kept on disk, in force."""
        if self.local is not None:
            self.local.apply(self.store)
        self.revocations.restore()
        state = self.state
        if state is None:
            return
        identity = state.load_identity(
            namespace=self.served.namespace, service_account=self.served.service_account, now=self.wall()
        )
        if identity is not None:
            self.svids.adopt(identity)
        saved = state.load_snapshot(str(self.served)) if self.discovery is not None else None
        if saved is not None and self.discovery is not None:
            try:
                self.discovery.restore(saved.data, saved.saved_at)
            except SnapshotError as error:
                log.warning("saved mesh not used", path=str(state.path), error=str(error))
            else:
                self.restored = True
                self.pace.set_aside()

    async def first_picture(self, patience: float = CATCH_UP) -> None:
        """Wait for a picture of the mesh to serve by: discovery's, the local file, or the one kept on disk.

        Args:
            patience: Seconds to wait for discovery before the one on disk will do.
        """
        if self.discovery is None:
            return
        if not self.restored:
            await self.discovery.ready.wait()
            return
        with trio.move_on_after(patience):
            await self.discovery.ready.wait()
            return
        stale = standing.timestamp(self.discovery.status().stale_since)
        log.warning("serving by the mesh kept on disk: the control plane is away", stale_since=stale)

    async def run(self) -> None:
        """Keep certificate and mesh up to date until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.svids.run)
            nursery.start_soon(self.revocations.run)
            if self.discovery is not None:
                nursery.start_soon(self.discovery.run)
            if self._writer is not None:
                nursery.start_soon(self._writer.run)

    async def stop_writing(self) -> None:
        """Leave the disk to the process that takes over."""
        if self._writer is not None:
            await self._writer.stop()
        if self.state is not None:
            self.state.disown()

    def _on_change(self, change: Change) -> None:
        workload = self.own_workload()
        if workload is not None:
            self.svids.want(workload.identity)

    def _keep_identity(self, identity: Identity) -> None:
        if self._writer is not None:
            self._writer.identity_changed(identity)

    def _mesh_changed(self) -> None:
        if self._writer is not None:
            self._writer.mesh_changed()

    async def _snapshot(self) -> bytes | list[bytes]:
        return await self.discovery.snapshot() if self.discovery is not None else self.store.snapshot()

    def _is_in_sync(self) -> bool:
        return self.discovery is not None and self.discovery.in_sync

    def _stale_since(self) -> float | None:
        return self.discovery.status().stale_since if self.discovery is not None else None

    async def look_at_token(self) -> None:
        """Bring `token_expires` up to date: the file may be another now, and on a disk that does not answer."""
        if self._token is not None:
            with trio.move_on_after(1):
                self.token_expires = await trio.to_thread.run_sync(self._token.expires, abandon_on_cancel=True)

    def status(self) -> dict[str, Any]:
        """Identity, control plane and mesh, for `ztunnel status`."""
        return standing.status(self)
