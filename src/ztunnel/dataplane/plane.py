"""What every part of one data path shares."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ztunnel.mesh.route import HBONE_PORT

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.control.demand import Demand
    from ztunnel.dataplane.connections import Connections
    from ztunnel.dataplane.local import LocalWorkload
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.sockets import SocketCalls
    from ztunnel.logs import AccessLog
    from ztunnel.mesh.address import IpAddress
    from ztunnel.mesh.store import Store
    from ztunnel.metrics import Metrics

__all__ = ["Plane"]


@attrs.define(kw_only=True, eq=False)
class Plane:
    """What every part of one data path shares."""

    reactor: Reactor
    calls: SocketCalls
    config: Config
    store: Store
    local: LocalWorkload
    metrics: Metrics
    log: AccessLog
    connections: Connections
    demand: Demand | None = None
    """Asks for addresses that are not known; None: all are."""
    own_ports: frozenset[int] = frozenset()
    """Ports of our own listeners."""
    own_addresses: frozenset[IpAddress] = frozenset()
    """Addresses of this host's interfaces, at start."""
    hbone_port: int = HBONE_PORT
    """Where peers take tunnels."""
