"""`ztunnel explain`: HOST:PORT as people write it -> what the mesh decides about it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import trio

from hbone.connect import Authority, AuthorityError
from hbone.errors import ConfigurationError
from ztunnel.dns.answer import addresses, find, zone_of
from ztunnel.dns.names import normal
from ztunnel.mesh import parse_ip
from ztunnel.mesh.explain import explain

if TYPE_CHECKING:
    from ztunnel.dns.answer import Zone
    from ztunnel.membership import Membership
    from ztunnel.mesh import IpAddress, Store, Workload

__all__ = ["answer", "find_workload", "resolve"]

LOOKUP_TIMEOUT = 5.0
"""Seconds for a name that the mesh does not know."""


async def answer(mesh: Membership, destination: str, source: str | None) -> dict[str, Any]:
    """Ask the functions that connections ask.

    Args:
        mesh: What is known.
        destination: `HOST:PORT`; the host is an address, a service's or workload's name, or any other.
        source: The client: uid, `namespace/name`, or name; default the workload that is served.

    Raises:
        ConfigurationError: the question names nothing that is known.
    """
    try:
        authority = Authority.parse(destination)
    except AuthorityError as error:
        raise ConfigurationError(f"destination {destination!r}: {error}") from None
    workload = mesh.own_workload() if source is None else find_workload(mesh.store, source)
    if workload is None:
        raise ConfigurationError(f"the mesh does not know the workload {mesh.served} yet; name another by --from")
    if authority.ip is not None:
        ip, how = authority.ip, None
    else:
        ip, how = await resolve(mesh.store, authority.host, workload, zone_of(mesh.config))
    found = explain(
        mesh.store,
        workload,
        (ip, authority.port),
        network=mesh.config.network,
        own_ports=mesh.config.own_ports,
    ).to_dict()
    if how is not None:
        found["steps"].insert(0, {"topic": "name", "text": f"{authority.host} {how} {ip}"})
    found["destination"] = destination
    found["source"] = workload.uid
    status = mesh.discovery.status() if mesh.discovery is not None else None
    if status is not None and status.stale_since is not None:
        found["steps"].append({"topic": "note", "text": "the control plane is away; this is by the last picture of it"})
    return found


async def resolve(store: Store, host: str, client: Workload, zone: Zone) -> tuple[IpAddress, str]:
    """The address that an application would connect to, and where it is from: the DNS proxy's answer, else DNS.

    Raises:
        ConfigurationError: the name has no address.
    """
    match = find(store, client.namespace, normal(host), zone)
    if match is not None:
        service = match.service
        for version in (4, 6):
            for ip in addresses(store, service, client.network, version):
                if service.vips:
                    return ip, f"is service {service.key} with virtual address"
                return ip, f"is service {service.key} without a virtual address; an endpoint of it is"
        raise ConfigurationError(
            f"{host!r} is service {service.key}, which has no address on network {client.network!r}"
        )
    found: list[Any] = []
    with trio.move_on_after(LOOKUP_TIMEOUT):
        try:
            found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"{host!r} is no service of the mesh, nor known to DNS: {reason}") from None
    if not found:
        raise ConfigurationError(f"{host!r} is no service of the mesh, and its look-up took over {LOOKUP_TIMEOUT:g} s")
    return parse_ip(found[0][4][0]), "is resolved by this host to"


def find_workload(store: Store, text: str) -> Workload:
    """The workload that `text` names: a uid, `namespace/name`, or a name that only one has.

    Raises:
        ConfigurationError: none, or several.
    """
    exact = store.workload_by_uid(text)
    if exact is not None:
        return exact
    namespace, slash, name = text.partition("/")
    found = [
        workload
        for workload in store.workloads.values()
        if (slash and (workload.namespace, workload.name) == (namespace, name)) or (not slash and workload.name == text)
    ]
    if not found:
        raise ConfigurationError(f"no workload is called {text!r}; write namespace/name or its uid")
    if len(found) > 1:
        uids = ", ".join(sorted(workload.uid for workload in found)[:5])
        raise ConfigurationError(f"{len(found)} workloads are called {text!r}; name one by its uid, such as {uids}")
    return found[0]
