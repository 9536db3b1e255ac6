"""What discovery and the local file told: workloads, services, policies, and the look-ups that connections need.

Resources may come in any order. An endpoint waits for its service, and a service finds the workloads that
name it. Every change costs as much as it changes, and is announced once to each subscriber.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ztunnel.mesh.decode import placeholder
from ztunnel.mesh.policy import Authorization, PolicyScope
from ztunnel.mesh.push import Change, Push
from ztunnel.mesh.rbac import PolicySet, compile_policy
from ztunnel.mesh.snapshot import Restored, pack, unpack
from ztunnel.mesh.tables import Layer, Tables, View, discard

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence

    from ztunnel.mesh.address import IpAddress, RejectedResource
    from ztunnel.mesh.rbac import Connection
    from ztunnel.mesh.service import Endpoint, Service
    from ztunnel.mesh.workload import Workload

__all__ = ["Change", "Store"]

_MEMO_LIMIT = 4096
"""Entries of the memo of choices; above it is emptied, as an attacker could name many destinations."""

_CLEARED = 16
"""Entries that are let go in the time that a resource takes to be worked in."""


class Store:
    """The mesh as this node knows it. Not for several threads."""

    def __init__(self) -> None:
        self.policies: dict[str, Authorization] = {}
        """By resource name."""
        self.generation = 0
        """Rises with every change."""
        self._base = Tables()
        self._layer: Layer | None = None
        self._rubbish: Iterator[None] | None = None
        self._endpoints: dict[str, Mapping[str, Endpoint]] = {}  # of services that were asked for
        self._global: dict[str, Authorization] = {}
        self._namespaced: dict[str, dict[str, Authorization]] = {}
        self._matchers: dict[str, Callable[[Connection], bool]] = {}
        self._policy_sets: dict[tuple[str, tuple[str, ...]], PolicySet] = {}
        self._subscribers: list[Callable[[Change], None]] = []
        self.memo: dict[Hashable, Any] = {}
        """Choices worth keeping until addresses change; see `remember`."""

    @property
    def workloads(self) -> Mapping[str, Workload]:
        """By uid."""
        layer, base = self._layer, self._base
        if layer is None:
            return base.workloads
        return View(
            layer.workloads,
            base.workloads,
            layer.over_workloads,
            lambda: len(base.workloads) - layer.hidden_workloads + len(layer.workloads),
        )

    @property
    def services(self) -> Mapping[str, Service]:
        """By `namespace/hostname`."""
        layer, base = self._layer, self._base
        if layer is None:
            return base.services
        return View(
            layer.services,
            base.services,
            layer.over_services,
            lambda: len(base.services) - layer.hidden_services + len(layer.services),
        )

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
        push = self.begin_small()
        for resource in upserts:
            push.upsert(resource)
        for error in rejected:
            push.reject(error)
        for name in removals:
            push.remove(name)
        return push.commit()

    def begin_small(self) -> Push:
        """Begin a push that nobody looks into before its `commit`."""
        return Push(self._layer or self._base, self._announce)

    def prepare(self) -> Push:
        """Begin a large push: nobody sees any of it before its `commit`, which takes no longer however much there is.

        One at a time; what `settle` has left of the one before is done first, all at once.
        """
        while self.settle(1000):
            pass
        layer, generation = Layer(self._base), self.generation

        def commit(change: Change) -> Change:
            if self._layer is not None or self.generation != generation:
                # Somebody changed what the layer was made for. It is correct all the same, but not quick.
                while self.settle(1000):
                    pass
                layer.beneath = self._base
                while not layer.worked_in:
                    layer.work_in()
            elif not (self._base.workloads or self._base.services or self._base.rejected):
                self._base = layer.alone()
                self._rubbish = layer.left_over()
            else:
                self._layer = layer
            return self._announce(change)

        return Push(layer, commit)

    @property
    def unsettled(self) -> bool:
        """Whether there is something for `settle` to do."""
        return self._layer is not None or self._rubbish is not None

    def settle(self, count: int) -> bool:
        """Work `count` resources of a large push that is in force into the rest; what is seen stays the same.

        Returns:
            Whether there is more to do.
        """
        layer = self._layer
        if layer is not None:
            for _ in range(count):
                if layer.worked_in:
                    self._layer = None
                    self._rubbish = layer.left_over()
                    break
                layer.work_in()
        elif self._rubbish is not None:
            for _ in range(_CLEARED * count):
                if next(self._rubbish, self) is self:
                    self._rubbish = None
                    break
        return self.unsettled

    def apply_policies(
        self,
        upserts: Iterable[Authorization],
        removals: Iterable[str] = (),
        rejected: Iterable[RejectedResource] = (),
        matchers: Mapping[str, Callable[[Connection], bool]] | None = None,
    ) -> Change:
        """Take policies in, then remove others by resource name.

        Args:
            upserts: New or changed; each replaces the one of the same resource name.
            removals: Resource names; unknown ones are ignored.
            rejected: What could not be read. A former good version of it stays; without one, it denies
                whatever it would rule, unless it is a dry run.
            matchers: `compile_policy` of policies by their resource name, where that was done before.
        """
        compiled = matchers or {}
        changed: set[str] = set()
        for policy in upserts:
            self._insert_policy(policy, compiled.get(policy.key))
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
            self._endpoints.clear()
        for callback in tuple(self._subscribers):
            callback(change)
        return change

    def _insert_policy(self, policy: Authorization, matcher: Callable[[Connection], bool] | None = None) -> None:
        if policy.key in self.policies:
            self._remove_policy(policy.key)  # its scope may have been another
        self.policies[policy.key] = policy
        self._matchers[policy.key] = matcher or compile_policy(policy.rules)
        if policy.scope is PolicyScope.GLOBAL:
            self._global[policy.key] = policy
        elif policy.scope is PolicyScope.NAMESPACE:
            self._namespaced.setdefault(policy.namespace, {})[policy.key] = policy

    def _remove_policy(self, key: str) -> None:
        policy = self.policies.pop(key)
        del self._matchers[key]
        self._global.pop(key, None)
        if policy.scope is PolicyScope.NAMESPACE:
            discard(self._namespaced, policy.namespace, key)

    # Look-ups

    def workload_by_uid(self, uid: str) -> Workload | None:
        """The workload of that uid."""
        return self.workloads.get(uid)

    def workload_by_address(self, network: str, ip: IpAddress) -> Workload | None:
        """The workload that owns an address; of several the best ranked. Host-network workloads are not found."""
        layer = self._layer
        if layer is not None:
            over = layer.over_workloads
            ours = layer.claims(network, ip)
            theirs = [found for found in self._base.claims(network, ip) if found.uid not in over]
            # Of equal rank the last to come.
            return max((*ours[:1], *theirs[:1]), key=lambda found: found.rank, default=None)
        addresses = self._base.by_address.get(network)
        found = addresses.get(ip) if addresses else None
        return found[0] if isinstance(found, list) else found

    def workload_by_hostname(self, namespace: str, hostname: str) -> Workload | None:
        """The workload of that namespace that is reached by a host name."""
        layer, key = self._layer, (namespace, hostname)
        for uid, workload in self._base.by_hostname.get(key, {}).items():
            if layer is None or uid not in layer.over_workloads:
                return workload
        return next(iter(layer.by_hostname.get(key, {}).values()), None) if layer is not None else None

    def find_local(self, name: str, namespace: str, service_account: str, node: str | None = None) -> Workload | None:
        """The workload that this proxy serves.

        Args:
            name: Name of the workload.
            namespace: Its namespace.
            service_account: Its service account.
            node: Only a workload of this node counts, unless it is empty or None.
        """
        layer = self._layer
        found: Iterable[Workload] = self._base.named(name)
        if layer is not None:
            over = layer.over_workloads
            found = (*(workload for workload in found if workload.uid not in over), *layer.named(name))
        for workload in found:
            if (workload.namespace, workload.service_account) == (namespace, service_account) and (
                not node or workload.node == node
            ):
                return workload
        return None

    def service_by_vip(self, network: str, ip: IpAddress, namespace: str | None = None) -> Service | None:
        """The service that owns a virtual address: an exact one first, then a range.

        Args:
            network: Network of the address.
            ip: The address.
            namespace: Of the client: its own services win, and other namespaces' private ones are not seen.
        """
        layer, base = self._layer, self._base
        vips = base.vips.get(network)
        keys = vips.get(ip) if vips else None
        if layer is not None:
            keys = self._seen(keys) + layer.vips.get(network, {}).get(ip, [])
        if keys:
            service = self._best(keys, namespace)
            if service is not None:
                return service
        if not base.cidrs and (layer is None or not layer.cidrs):
            return None
        ranges: Iterable[tuple[int, str]] = base.ranges(network, ip)
        if layer is not None:
            over = layer.over_services
            ranges = (*((length, key) for length, key in ranges if key not in over), *layer.ranges(network, ip))
        best: tuple[tuple[bool, int, bool], Service] | None = None
        services = self.services
        for length, key in ranges:
            service = services[key]
            if service.namespace_only and namespace is not None and service.namespace != namespace:
                continue
            rank = (service.namespace == namespace, length, service.canonical)
            if best is None or rank > best[0]:
                best = (rank, service)
        return best[1] if best else None

    def service_by_host(self, hostname: str, namespace: str | None = None) -> Service | None:
        """The service of a host name, chosen among namespaces as `service_by_vip` does."""
        return self._best(self._keys_of_host(hostname.lower()), namespace)

    def services_by_host(self, hostname: str) -> Iterator[Service]:
        """Every service of a host name in lower case, oldest first."""
        services = self.services
        for key in self._keys_of_host(hostname):
            yield services[key]

    def _keys_of_host(self, hostname: str) -> Sequence[str]:
        keys = self._base.by_host.get(hostname)
        if self._layer is None:
            return keys or ()
        return self._seen(keys) + self._layer.by_host.get(hostname, [])

    def _seen(self, keys: Iterable[str] | None) -> list[str]:
        """Services of the tables beneath that the layer does not hide."""
        over = self._layer.over_services if self._layer is not None else ()
        return [key for key in keys or () if key not in over]

    def _best(self, keys: Iterable[str], namespace: str | None) -> Service | None:
        services = self.services
        chosen: Service | None = None
        for key in keys:
            service = services[key]
            if service.namespace == namespace:
                return service
            if service.namespace_only and namespace is not None:
                continue
            if chosen is None or service.canonical:
                chosen = service
        return chosen

    def endpoints(self, service: Service) -> Mapping[str, Endpoint]:
        """Endpoints of a service that its health rule takes, by uid of their workload."""
        key = service.key
        found = self._endpoints.get(key)
        if found is None:
            current = self.services.get(key)
            if current is None:
                return {}
            if len(self._endpoints) >= _MEMO_LIMIT:
                self._endpoints.clear()
            members = self.members(current)
            found = {uid: endpoint for uid, endpoint in members.items() if current.takes(endpoint)}
            self._endpoints[key] = found
        return found

    def members(self, service: Service) -> Mapping[str, Endpoint]:
        """All endpoints of a service, healthy or not."""
        return {**service.endpoints, **self._members(service.key)}

    def _members(self, key: str) -> Mapping[str, Endpoint]:
        """Endpoints that workloads say they are of a service, known or not."""
        layer = self._layer
        members = self._base.members.get(key, {})
        if layer is None or key not in layer.disturbed:
            return members
        over = layer.over_workloads
        seen = {uid: endpoint for uid, endpoint in members.items() if uid not in over}
        return seen | layer.members.get(key, {})

    def staged(self) -> dict[str, Mapping[str, Endpoint]]:
        """Endpoints that wait for their service, by its key."""
        keys = dict.fromkeys(self._base.members)
        if self._layer is not None:
            keys |= dict.fromkeys(self._layer.members)
        services = self.services
        return {key: members for key in keys if key not in services and (members := self._members(key))}

    def rejection(self, network: str, ip: IpAddress) -> RejectedResource | None:
        """The unreadable resource that claims an address nobody else has."""
        base, layer = self._base, self._layer
        if layer is not None:
            for name in layer.rejected_at.get((network, ip), ()):
                return layer.rejected[name]
            for name in base.rejected_at.get((network, ip), ()):
                if name not in layer.forgiven:
                    return base.rejected[name]
            return None
        if not base.rejected_at:
            return None
        names = base.rejected_at.get((network, ip))
        return base.rejected[next(iter(names))] if names else None

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
                return b"".join(done.value)

    def snapshot_in_slices(
        self, address_versions: Mapping[str, str] | None = None, policy_versions: Mapping[str, str] | None = None
    ) -> Generator[None, None, list[bytes]]:
        """The same in pieces, with a `yield` after every few resources; changes made meanwhile are not in it."""
        base, layer = self._base, self._layer
        # Copies of references, which is quick; of what changes meanwhile these are the old ones.
        held = [(list(base.workloads.values()), list(base.services.values()), list(base.rejected.values()))]
        hidden: tuple[set[str], set[str], set[str]] = (set(), set(), set())
        if layer is not None:
            held.append((list(layer.workloads.values()), list(layer.services.values()), list(layer.rejected.values())))
            hidden = (set(layer.over_workloads), set(layer.over_services), set(layer.forgiven))

        def addresses() -> Iterator[tuple[str, bytes]]:
            over_workloads, over_services, forgiven = hidden
            for workloads, services, rejected in held:
                yield from ((one.uid, one.wire) for one in workloads if one.uid not in over_workloads)
                yield from ((one.key, one.wire) for one in services if one.key not in over_services)
                yield from ((one.name, one.wire) for one in rejected if one.name not in forgiven)
                over_workloads = over_services = forgiven = set()

        policies = list(self.policies.values())
        work = pack(
            addresses(),
            ((policy.key, policy.wire) for policy in policies),
            dict(address_versions or {}),
            dict(policy_versions or {}),
        )
        return (yield from work)

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
