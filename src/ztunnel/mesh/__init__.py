"""Pure decisions about connections: no sockets, no clocks, no event loop."""

from ztunnel.mesh.address import (
    Address,
    GatewayAddress,
    IpAddress,
    IpNetwork,
    NamespacedHostname,
    NetworkAddress,
    RejectedResource,
    canonical,
    is_loopback,
    parse_ip,
)
from ztunnel.mesh.decode import ADDRESS_TYPE, AUTHORIZATION_TYPE, decode_address, decode_policy
from ztunnel.mesh.policy import Authorization
from ztunnel.mesh.push import Change, Push
from ztunnel.mesh.rbac import Connection, Decision, compile_policy, decide
from ztunnel.mesh.service import Endpoint, Service
from ztunnel.mesh.snapshot import Restored, SnapshotError
from ztunnel.mesh.store import Store
from ztunnel.mesh.workload import Protocol, Workload

__all__ = [
    "ADDRESS_TYPE",
    "AUTHORIZATION_TYPE",
    "Address",
    "Authorization",
    "Change",
    "Connection",
    "Decision",
    "Endpoint",
    "GatewayAddress",
    "IpAddress",
    "IpNetwork",
    "NamespacedHostname",
    "NetworkAddress",
    "Protocol",
    "Push",
    "RejectedResource",
    "Restored",
    "Service",
    "SnapshotError",
    "Store",
    "Workload",
    "canonical",
    "compile_policy",
    "decide",
    "decode_address",
    "decode_policy",
    "is_loopback",
    "parse_ip",
]
