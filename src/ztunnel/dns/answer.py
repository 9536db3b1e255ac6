"""What a question is answered: pure decisions on the store.

A name is owned when a service that the client may see has it, itself or by a wildcard. What is owned is answered
here for every type, without records where there are none: asked elsewhere, it would be NXDOMAIN, which spoils the
types that do exist. What is not owned is no business of ours.

Differences from ztunnel: other types than A and AAAA of an owned name are answered without records instead of
being asked of the resolver; endpoints of a headless service on another network are left out, as they can't be
reached by their addresses; at most `MAX_ADDRESSES` are answered.

Source: Istio's ztunnel, DNS proxy.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

import attrs

from ztunnel.dns.names import aliases, has_domain, normal, wildcards
from ztunnel.mesh.service import IpFamilies

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

    from ztunnel.config import Config
    from ztunnel.mesh.address import IpAddress
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.store import Store
    from ztunnel.mesh.workload import Workload

__all__ = ["MAX_ADDRESSES", "Answer", "Match", "Result", "Zone", "addresses", "decide", "find", "locate", "zone_of"]

MAX_ADDRESSES: Final = 1024
"""Address records of one answer; of more, a random choice. No client tries as many, and each costs time to write."""


class Result(enum.StrEnum):
    """How a question ended, as the log tells it."""

    SUCCESS = "success"
    NO_RECORDS = "no records"
    UNSUPPORTED = "service does not support this record type"
    FORWARDED = "forwarded"


@attrs.frozen(kw_only=True)
class Zone:
    """Settings that every look-up shares."""

    cluster_domain: str = attrs.field(default="cluster.local", converter=normal)
    search: tuple[str, ...] = ()
    """Search domains of the clients."""
    preferred_namespace: str | None = None
    """Its services win over those of other namespaces, the client's and canonical ones excepted."""
    ipv6: bool = True
    """Whether IPv6 addresses are answered at all."""


def zone_of(config: Config) -> Zone:
    """The settings of a configuration; search domains are the resolver's to know."""
    return Zone(
        cluster_domain=config.cluster_domain,
        preferred_namespace=config.preferred_namespace,
        ipv6=config.ipv6_enabled,
    )


@attrs.frozen
class Match:
    """The service that a name means."""

    service: Service
    stripped: str | None = None
    """The name without the client's search domain, when the service was found by that."""


@attrs.frozen(kw_only=True)
class Answer:
    """An authoritative answer. Without addresses it says that there are no such records."""

    result: Result
    canonical_name: str | None = None
    """What the asked name is an alias of; it then owns the addresses."""
    addresses: Sequence[IpAddress] = ()

    @property
    def records(self) -> int:
        """Number of records."""
        return len(self.addresses) + (self.canonical_name is not None)


def find(store: Store, namespace: str, name: str, zone: Zone) -> Match | None:
    """The service that `name` means to a client in `namespace`; None when the mesh does not own the name."""
    for alias in aliases(name, namespace, zone.cluster_domain, zone.search):
        service = _choose(store.services_by_host(alias.name), namespace, zone)
        if service is not None:
            return Match(service, alias.stripped)
        for wildcard in wildcards(alias.name):
            service = _choose(store.services_by_host(wildcard), namespace, zone)
            if service is not None:
                return Match(service)  # under a wildcard every name exists, so that none is an alias of another
    return None


def _choose(candidates: Iterable[Service], namespace: str, zone: Zone) -> Service | None:
    """The client's own namespace, then the canonical service, the preferred namespace, the first."""
    chosen: Service | None = None
    rank = -1
    for service in candidates:
        if not service.vips and not has_domain(normal(service.hostname), f"svc.{zone.cluster_domain}"):
            continue  # an outside host without an address of the mesh: the resolver knows its addresses
        if service.namespace == namespace:
            return service
        if service.namespace_only:
            continue
        if service.canonical:
            chosen, rank = service, 2  # the last one
        elif rank < 1 and service.namespace == zone.preferred_namespace:
            chosen, rank = service, 1
        elif rank < 0:
            chosen, rank = service, 0
    return chosen


def addresses(store: Store, service: Service, network: str, version: int) -> list[IpAddress]:
    """Addresses of one family, 4 or 6, by which a client on `network` reaches a service."""
    if service.vips:
        return [vip.ip for vip in service.vips if vip.network == network and vip.ip.version == version]
    key = (addresses, service.key, network, version)
    known: list[IpAddress] | None = store.memo.get(key)  # or else ten thousand endpoints would be read a question
    if known is None:
        known = _endpoint_addresses(store, service, network, version)
        store.remember(key, known)
    return known


def _endpoint_addresses(store: Store, service: Service, network: str, version: int) -> list[IpAddress]:
    """The first address of the family of each endpoint."""
    found: dict[IpAddress, None] = {}
    for uid in store.endpoints(service):
        workload = store.workload_by_uid(uid)
        if workload is not None and workload.network == network:
            for ip in workload.addresses:
                if ip.version == version:
                    found[ip] = None
                    break
    return list(found)


def locate(
    store: Store, client: Workload, name: str, zone: Zone, rng: random.Random, version: int = 4
) -> list[IpAddress] | None:
    """Where `client` reaches a host name of the mesh, for a program that asks for no type of record.

    Args:
        store: The mesh.
        client: Who asks.
        name: As people write it.
        zone: Settings.
        rng: Shuffles the addresses of a family.
        version: Family whose addresses come first, 4 or 6.

    Returns:
        Addresses, none when the service has none on the client's network; None when the mesh does not own the name.
    """
    match = find(store, client.namespace, normal(name), zone)
    if match is None:
        return None
    found: list[IpAddress] = []
    for each in (version, 10 - version):
        if _supports(match.service, each, zone):
            found += _some(addresses(store, match.service, client.network, each), rng)
    return found


def _some(found: list[IpAddress], rng: random.Random) -> list[IpAddress]:
    return rng.sample(found, min(len(found), MAX_ADDRESSES))


def _supports(service: Service, version: int, zone: Zone) -> bool:
    refused = IpFamilies.IPV6 if version == 4 else IpFamilies.IPV4
    return service.ip_families is not refused and (version == 4 or zone.ipv6)


def decide(
    store: Store, client: Workload, name: str, version: int | None, zone: Zone, rng: random.Random
) -> Answer | None:
    """Answer a question.

    Args:
        store: The mesh.
        client: Who asks.
        name: In lower case, without a trailing dot.
        version: 4 for A, 6 for AAAA, None for every other type.
        zone: Settings.
        rng: Shuffles the addresses.

    Returns:
        The answer; None when the question has to go on to the host's resolver.
    """
    match = find(store, client.namespace, name, zone)
    if match is None:
        return None
    if version is None:
        return Answer(result=Result.NO_RECORDS)
    service = match.service
    if not _supports(service, version, zone):
        return Answer(result=Result.UNSUPPORTED)
    found = addresses(store, service, client.network, version)
    if not found:
        return Answer(result=Result.NO_RECORDS)
    return Answer(
        result=Result.SUCCESS,
        canonical_name=match.stripped,
        addresses=_some(found, rng),
    )
