"""What discovery and the local file told: workloads, services, policies, and the look-ups that connections need.

Resources may come in any order. An endpoint waits for its service, and a service finds the workloads that
name it. Every change costs as much as it changes, and is announced once to each subscriber.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

import attrs

from ztunnel.mesh.address import GatewayAddress, NamespacedHostname, RejectedResource
from ztunnel.mesh.decode import placeholder
from ztunnel.mesh.policy import Authorization, PolicyScope
from ztunnel.mesh.rbac import PolicySet, compile_policy
from ztunnel.mesh.service import Endpoint, Service
from ztunnel.mesh.snapshot import Restored, pack, unpack
from ztunnel.mesh.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping

    from ztunnel.mesh.address import IpAddress
    from ztunnel.mesh.rbac import Connection

__all__ = ["Change", "Store", "resolve_reference"]

_MEMO_LIMIT = 4096
"""Entries of the memo of choices; above it is emptied, as an attacker could name many destinations."""


@attrs.frozen(kw_only=True)
class Change:
    """What one push changed, removals included."""

    workloads: frozenset[str] = frozenset()
    """Uids."""
    services: frozenset[str] = frozenset()
    """`namespace/hostname`."""
    policies: frozenset[str] = frozenset()
    """Resource names."""

    def __bool__(self) -> bool:
        return bool(self.workloads or self.services or self.policies)


class Store:
    """The mesh as this node knows it. Not for several threads."""

    def __init__(self) -> None:
        self.workloads: dict[str, Workload] = {}
        """By uid."""
        self.services: dict[str, Service] = {}
        """By `namespace/hostname`."""
        self.policies: dict[str, Authorization] = {}
        """By resource name."""
        self.generation = 0
        """Rises with every change."""
        self._by_address: dict[str, dict[IpAddress, list[Workload]]] = {}  # network -> IP -> best first
        self._by_info: dict[tuple[str, str, str], dict[str, Workload]] = {}
        self._by_hostname: dict[tuple[str, str], dict[str, Workload]] = {}
        self._vips: dict[str, dict[IpAddress, list[str]]] = {}  # network -> IP -> service keys, oldest first
        self._cidrs: dict[tuple[str, int], dict[int, dict[int, list[str]]]] = {}  # network, family -> length -> prefix
        self._by_host: dict[str, list[str]] = {}  # hostname in lower case -> service keys, oldest first
        self._members: dict[str, dict[str, Endpoint]] = {}  # service key -> uid -> endpoint; also of unknown services
        self._endpoints: dict[str, dict[str, Endpoint]] = {}  # the same, only what the service takes
        self._rejected: dict[str, RejectedResource] = {}
        self._rejected_at: dict[tuple[str, IpAddress], set[str]] = {}
        self._global: dict[str, Authorization] = {}
        self._namespaced: dict[str, dict[str, Authorization]] = {}
        self._matchers: dict[str, Callable[[Connection], bool]] = {}
        self._policy_sets: dict[tuple[str, tuple[str, ...]], PolicySet] = {}
        self._subscribers: list[Callable[[Change], None]] = []
        self.memo: dict[Hashable, Any] = {}
        """Choices worth keeping until addresses change; see `remember`."""

    # Changes

    def subscribe(self, callback: Callable[[Change], None]) -> Callable[[], None]:
        """Have `callback` called after each change.

        Returns:
            A function that ends it.
        """
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def apply_addresses(
        self,
        upserts: Iterable[Workload | Service],
        removals: Iterable[str] = (),
        rejected: Iterable[RejectedResource] = (),
    ) -> Change:
        """Take workloads and services in, then remove others by resource name.

        Args:
            upserts: New or changed; each replaces the one of the same name.
            removals: Uids, or `namespace/hostname`; unknown ones are ignored.
            rejected: What could not be read. A former good version of it stays; without one, its addresses
                are refused rather than passed through.
        """
        workloads: set[str] = set()
        services: set[str] = set()
        for resource in upserts:
            if isinstance(resource, Workload):
                self._forgive(resource.uid)
                self._insert_workload(resource)
                workloads.add(resource.uid)
            else:
                self._forgive(resource.key)
                self._insert_service(resource)
                services.add(resource.key)
        for error in rejected:
            self._forgive(error.name)
            if error.name not in self.workloads and error.name not in self.services:
                self._rejected[error.name] = error
                for claim in error.addresses:
                    self._rejected_at.setdefault(claim, set()).add(error.name)
                workloads.add(error.name)
        for name in removals:
            self._forgive(name)
            if name in self.workloads:
                self._remove_workload(name)
                workloads.add(name)
            elif name in self.services:
                self._remove_service(name)
                services.add(name)
        return self._announce(Change(workloads=frozenset(workloads), services=frozenset(services)))

    def apply_policies(
        self,
        upserts: Iterable[Authorization],
        removals: Iterable[str] = (),
        rejected: Iterable[RejectedResource] = (),
    ) -> Change:
        """Take policies in, then remove others by resource name.

        Args:
            upserts: New or changed; each replaces the one of the same resource name.
            removals: Resource names; unknown ones are ignored.
            rejected: What could not be read. A former good version of it stays; without one, it denies
                whatever it would rule, unless it is a dry run.
        """
        changed: set[str] = set()
        for policy in upserts:
            self._insert_policy(policy)
            changed.add(policy.key)
        for error in rejected:
            known = self.policies.get(error.name)
            if error.enforced and (known is None or known.unusable):
                self._insert_policy(placeholder(error))
                changed.add(error.name)
        for name in removals:
            if name in self.policies:
                self._remove_policy(name)
                changed.add(name)
        return self._announce(Change(policies=frozenset(changed)))

    def _announce(self, change: Change) -> Change:
        if not change:
            return change
        self.generation += 1
        if change.policies:
            self._policy_sets.clear()
        if change.workloads or change.services:
            self.memo.clear()
        for callback in tuple(self._subscribers):
            callback(change)
        return change

    def _forgive(self, name: str) -> None:
        error = self._rejected.pop(name, None)
        if error is not None:
            for claim in error.addresses:
                names = self._rejected_at.get(claim)
                if names is not None:
                    names.discard(name)
                    if not names:
                        del self._rejected_at[claim]

    def _insert_workload(self, workload: Workload) -> None:
        old = self.workloads.get(workload.uid)
        if old is not None:
            self._remove_workload(workload.uid, keep=workload.services)
        self.workloads[workload.uid] = workload
        if not workload.host_network:
            for ip in workload.addresses:
                claims = self._by_address.setdefault(workload.network, {}).setdefault(ip, [])
                # Best rank first; of equal rank the last to come, so before its equals.
                claims.insert(bisect.bisect_left(claims, -workload.rank, key=lambda other: -other.rank), workload)
        info = (workload.name, workload.namespace, workload.service_account)
        self._by_info.setdefault(info, {})[workload.uid] = workload
        if workload.hostname:
            self._by_hostname.setdefault((workload.namespace, workload.hostname), {})[workload.uid] = workload
        for key, ports in workload.services.items():
            endpoint = Endpoint(workload.uid, ports, workload.healthy)
            self._members.setdefault(key, {})[workload.uid] = endpoint
            self._offer(key, endpoint)

    def _remove_workload(self, uid: str, keep: Iterable[str] = ()) -> None:
        workload = self.workloads.pop(uid)
        if not workload.host_network:
            addresses = self._by_address.get(workload.network, {})
            for ip in workload.addresses:
                claims = [other for other in addresses.get(ip, ()) if other.uid != uid]
                if claims:
                    addresses[ip] = claims
                else:
                    addresses.pop(ip, None)
            if not addresses:
                self._by_address.pop(workload.network, None)
        _discard(self._by_info, (workload.name, workload.namespace, workload.service_account), uid)
        if workload.hostname:
            _discard(self._by_hostname, (workload.namespace, workload.hostname), uid)
        kept = set(keep)
        for key in workload.services:
            if key not in kept:  # of a kept one the entry is replaced in place
                _discard(self._members, key, uid)
                self._endpoints.get(key, {}).pop(uid, None)

    def _offer(self, key: str, endpoint: Endpoint) -> None:
        service = self.services.get(key)
        if service is None:
            return  # staged in _members until the service comes
        if service.takes(endpoint):
            self._endpoints[key][endpoint.workload_uid] = endpoint
        else:
            self._endpoints[key].pop(endpoint.workload_uid, None)

    def _insert_service(self, service: Service) -> None:
        if service.key in self.services:
            self._remove_service(service.key)
        key = service.key
        self.services[key] = service
        members = {**service.endpoints, **self._members.get(key, {})}
        self._endpoints[key] = {uid: endpoint for uid, endpoint in members.items() if service.takes(endpoint)}
        self._by_host.setdefault(service.hostname.lower(), []).append(key)
        for vip in service.vips:
            self._vips.setdefault(vip.network, {}).setdefault(vip.ip, []).append(key)
        for network, cidr in service.cidrs:
            prefix = int(cidr.network_address) >> (cidr.max_prefixlen - cidr.prefixlen)
            lengths = self._cidrs.setdefault((network, cidr.version), {})
            lengths.setdefault(cidr.prefixlen, {}).setdefault(prefix, []).append(key)

    def _remove_service(self, key: str) -> None:
        service = self.services.pop(key)
        del self._endpoints[key]
        _remove(self._by_host, service.hostname.lower(), key)
        for vip in service.vips:
            _remove(self._vips.get(vip.network, {}), vip.ip, key)
        for network, cidr in service.cidrs:
            lengths = self._cidrs.get((network, cidr.version), {})
            prefixes = lengths.get(cidr.prefixlen, {})
            _remove(prefixes, int(cidr.network_address) >> (cidr.max_prefixlen - cidr.prefixlen), key)
            if not prefixes:
                lengths.pop(cidr.prefixlen, None)

    def _insert_policy(self, policy: Authorization) -> None:
        if policy.key in self.policies:
            self._remove_policy(policy.key)  # its scope may have been another
        self.policies[policy.key] = policy
        self._matchers[policy.key] = compile_policy(policy.rules)
        if policy.scope is PolicyScope.GLOBAL:
            self._global[policy.key] = policy
        elif policy.scope is PolicyScope.NAMESPACE:
            self._namespaced.setdefault(policy.namespace, {})[policy.key] = policy

    def _remove_policy(self, key: str) -> None:
        policy = self.policies.pop(key)
        del self._matchers[key]
        self._global.pop(key, None)
        if policy.scope is PolicyScope.NAMESPACE:
            _discard(self._namespaced, policy.namespace, key)

    # Look-ups

    def workload_by_uid(self, uid: str) -> Workload | None:
        """The workload of that uid."""
        return self.workloads.get(uid)

    def workload_by_address(self, network: str, ip: IpAddress) -> Workload | None:
        """The workload that owns an address; of several the best ranked. Host-network workloads are not found."""
        addresses = self._by_address.get(network)
        claims = addresses.get(ip) if addresses else None
        return claims[0] if claims else None

    def workload_by_hostname(self, namespace: str, hostname: str) -> Workload | None:
        """The workload of that namespace that is reached by a host name."""
        return next(iter(self._by_hostname.get((namespace, hostname), {}).values()), None)

    def find_local(self, name: str, namespace: str, service_account: str, node: str | None = None) -> Workload | None:
        """The workload that this proxy serves.

        Args:
            name: Name of the workload.
            namespace: Its namespace.
            service_account: Its service account.
            node: Only a workload of this node counts, unless it is empty or None.
        """
        for workload in self._by_info.get((name, namespace, service_account), {}).values():
            if not node or workload.node == node:
                return workload
        return None

    def service_by_vip(self, network: str, ip: IpAddress, namespace: str | None = None) -> Service | None:
        """The service that owns a virtual address: an exact one first, then a range.

        Args:
            network: Network of the address.
            ip: The address.
            namespace: Of the client: its own services win, and other namespaces' private ones are not seen.
        """
        vips = self._vips.get(network)
        keys = vips.get(ip) if vips else None
        if keys:
            service = self._best(keys, namespace)
            if service is not None:
                return service
        if not self._cidrs:
            return None
        lengths = self._cidrs.get((network, ip.version))
        if not lengths:
            return None
        bits = 32 if ip.version == 4 else 128
        best: tuple[tuple[bool, int, bool], Service] | None = None
        number = int(ip)
        for length in sorted(lengths, reverse=True):
            for key in lengths[length].get(number >> (bits - length), ()):
                service = self.services[key]
                if service.namespace_only and namespace is not None and service.namespace != namespace:
                    continue
                rank = (service.namespace == namespace, length, service.canonical)
                if best is None or rank > best[0]:
                    best = (rank, service)
        return best[1] if best else None

    def service_by_host(self, hostname: str, namespace: str | None = None) -> Service | None:
        """The service of a host name, chosen among namespaces as `service_by_vip` does."""
        keys = self._by_host.get(hostname.lower())
        return self._best(keys, namespace) if keys else None

    def services_by_host(self, hostname: str) -> Iterator[Service]:
        """Every service of a host name in lower case, oldest first."""
        for key in self._by_host.get(hostname, ()):
            yield self.services[key]

    def _best(self, keys: list[str], namespace: str | None) -> Service | None:
        chosen: Service | None = None
        for key in keys:
            service = self.services[key]
            if service.namespace == namespace:
                return service
            if service.namespace_only and namespace is not None:
                continue
            if chosen is None or service.canonical:
                chosen = service
        return chosen

    def endpoints(self, service: Service) -> Mapping[str, Endpoint]:
        """Endpoints of a service that its health rule takes, by uid of their workload."""
        return self._endpoints.get(service.key, {})

    def members(self, service: Service) -> Mapping[str, Endpoint]:
        """All endpoints of a service, healthy or not."""
        return {**service.endpoints, **self._members.get(service.key, {})}

    def staged(self) -> dict[str, Mapping[str, Endpoint]]:
        """Endpoints that wait for their service, by its key."""
        return {key: members for key, members in self._members.items() if key not in self.services}

    def rejection(self, network: str, ip: IpAddress) -> RejectedResource | None:
        """The unreadable resource that claims an address nobody else has."""
        if not self._rejected_at:
            return None
        names = self._rejected_at.get((network, ip))
        return self._rejected[next(iter(names))] if names else None

    def policies_for(self, workload: Workload) -> PolicySet:
        """The policies that rule a workload: its namespace's, the mesh's, and those it names, in this order."""
        found = self._policy_sets.get((workload.namespace, workload.authorization_policies))
        if found is not None:
            return found
        keys = list(self._namespaced.get(workload.namespace, ()))
        keys += self._global
        missing: list[str] = []
        for key in workload.authorization_policies:
            (keys if key in self.policies else missing).append(key)
        policies = PolicySet.of(((self.policies[key], self._matchers[key]) for key in dict.fromkeys(keys)), missing)
        if len(self._policy_sets) >= _MEMO_LIMIT:
            self._policy_sets.clear()
        self._policy_sets[workload.namespace, workload.authorization_policies] = policies
        return policies

    def remember(self, key: Hashable, value: Any) -> None:
        """Keep a choice in `memo` until addresses change."""
        if len(self.memo) >= _MEMO_LIMIT:
            self.memo.clear()
        self.memo[key] = value

    # Snapshot

    def snapshot(
        self, address_versions: Mapping[str, str] | None = None, policy_versions: Mapping[str, str] | None = None
    ) -> bytes:
        """What discovery sent, to be kept on disk; what came from the local file is not in it.

        Args:
            address_versions: Version of each address resource, as discovery gave it.
            policy_versions: Version of each policy.
        """
        work = self.snapshot_in_slices(address_versions, policy_versions)
        while True:
            try:
                next(work)
            except StopIteration as done:
                data: bytes = done.value
                return data

    def snapshot_in_slices(
        self, address_versions: Mapping[str, str] | None = None, policy_versions: Mapping[str, str] | None = None
    ) -> Generator[None, None, bytes]:
        """The same, with a `yield` after every few resources; changes made meanwhile are not in it."""
        addresses = [(name, wire) for name, wire in self._address_wires() if wire]
        policies = [(policy.key, policy.wire) for policy in self.policies.values() if policy.wire]
        work = pack(addresses, policies, dict(address_versions or {}), dict(policy_versions or {}))
        return (yield from work)

    def _address_wires(self) -> Iterator[tuple[str, bytes]]:
        for workload in self.workloads.values():
            yield workload.uid, workload.wire
        for service in self.services.values():
            yield service.key, service.wire
        for error in self._rejected.values():
            yield error.name, error.wire

    def restore(self, data: bytes) -> Restored:
        """Take in what `snapshot` gave.

        Raises:
            SnapshotError: it is damaged or of another version; the store is as it was.
        """
        addresses, policies = unpack(data)
        # Policies first, so that nobody is reachable without them.
        by_policy = self.apply_policies(policies.resources, (), policies.rejected)
        by_address = self.apply_addresses(addresses.resources, (), addresses.rejected)
        change = Change(workloads=by_address.workloads, services=by_address.services, policies=by_policy.policies)
        return Restored(address_versions=addresses.versions, policy_versions=policies.versions, change=change)


def _discard(index: dict[Any, dict[str, Any]], key: Any, name: str) -> None:
    entries = index.get(key)
    if entries is not None:
        entries.pop(name, None)
        if not entries:
            del index[key]


def _remove(index: dict[Any, list[str]], key: Any, name: str) -> None:
    names = index.get(key)
    if names is not None:
        if name in names:
            names.remove(name)
        if not names:
            del index[key]


def resolve_reference(store: Store, reference: GatewayAddress) -> list[Workload]:
    """Every workload that a reference may mean: an address's or host name's own, or all endpoints of its service."""
    destination = reference.destination
    if isinstance(destination, NamespacedHostname):
        service = store.services.get(str(destination))
        workload = store.workload_by_hostname(destination.namespace, destination.hostname)
    else:
        service = store.service_by_vip(destination.network, destination.ip)
        workload = store.workload_by_address(destination.network, destination.ip)
    if service is not None:
        uids = store.endpoints(service)
        return [found for uid in uids if (found := store.workloads.get(uid)) is not None]
    return [workload] if workload is not None else []
