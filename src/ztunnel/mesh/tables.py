"""Workloads and services with their indexes, and a layer of changes over them.

A large push is put together as a layer beside the tables in force, a few resources at a time. Laying it over them is
one step; from then on a look-up asks the layer first and of the tables only what the layer does not hide. Afterwards
the layer is worked into the tables, a few resources at a time again, while every look-up goes on giving the same.
"""

from __future__ import annotations

import bisect
import collections
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ztunnel.mesh.service import Endpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ztunnel.mesh.address import IpAddress, RejectedResource
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.workload import Workload

__all__ = ["Layer", "Tables", "View", "discard", "dismantle"]

V = TypeVar("V")


class Tables:
    """Resources by name, and what finds them. Of one or many under a key, one is stored without a container."""

    def __init__(self) -> None:
        self.workloads: dict[str, Workload] = {}
        self.services: dict[str, Service] = {}
        self.rejected: dict[str, RejectedResource] = {}
        self.by_address: dict[str, dict[IpAddress, Workload | list[Workload]]] = {}  # network -> IP -> best first
        self.by_name: dict[str, Workload | dict[str, Workload]] = {}
        self.by_hostname: dict[tuple[str, str], dict[str, Workload]] = {}
        self.vips: dict[str, dict[IpAddress, list[str]]] = {}  # network -> IP -> service keys, oldest first
        self.cidrs: dict[tuple[str, int], dict[int, dict[int, list[str]]]] = {}  # network, family -> length -> prefix
        self.by_host: dict[str, list[str]] = {}  # hostname in lower case -> service keys, oldest first
        self.members: dict[str, dict[str, Endpoint]] = {}  # service key -> uid -> endpoint; also of unknown services
        self.rejected_at: dict[tuple[str, IpAddress], set[str]] = {}

    # Changes

    def forgive(self, name: str) -> None:
        """What was refused under this name counts no longer."""
        error = self.rejected.pop(name, None)
        if error is not None:
            for claim in error.addresses:
                names = self.rejected_at.get(claim)
                if names is not None:
                    names.discard(name)
                    if not names:
                        del self.rejected_at[claim]

    def reject(self, error: RejectedResource) -> None:
        """Refuse the addresses of what could not be read."""
        self.rejected[error.name] = error
        for claim in error.addresses:
            self.rejected_at.setdefault(claim, set()).add(error.name)

    def insert_workload(self, workload: Workload) -> None:
        """New, or in place of the one of the same uid."""
        uid = workload.uid
        old = self.workloads.get(uid)
        if old is not None:
            if self._replaced(old, workload):
                return
            self.remove_workload(uid, keep=workload.services)
        self.workloads[uid] = workload
        if not workload.host_network:
            network = self.by_address.setdefault(workload.network, {})
            for ip in workload.addresses:
                claims = network.setdefault(ip, workload)
                if claims is workload:
                    continue
                if not isinstance(claims, list):
                    claims = network[ip] = [claims]
                elif any(other is workload for other in claims):
                    continue  # it names the address twice
                # Best rank first; of equal rank the last to come, so before its equals.
                claims.insert(bisect.bisect_left(claims, -workload.rank, key=lambda other: -other.rank), workload)
        same = self.by_name.setdefault(workload.name, workload)
        if same is not workload:
            if not isinstance(same, dict):
                same = self.by_name[workload.name] = {same.uid: same}
            same[uid] = workload
        if workload.hostname:
            self.by_hostname.setdefault((workload.namespace, workload.hostname), {})[uid] = workload
        for key, ports in workload.services.items():
            self.members.setdefault(key, {})[uid] = Endpoint(uid, ports, workload.healthy)

    def _replaced(self, old: Workload, new: Workload) -> bool:
        """Put a workload in the place of another that is found by the same, alone; most changes are of that kind."""
        if (old.name, old.network, old.hostname) != (new.name, new.network, "") or old.host_network or new.host_network:
            return False
        if old.addresses != new.addresses or self.by_name.get(new.name) is not old:
            return False
        addresses = self.by_address.get(new.network, {})
        for ip in new.addresses:
            if addresses.get(ip) is not old:
                return False
        if new.hostname or (old.services is not new.services and old.services.keys() != new.services.keys()):
            return False
        uid = new.uid
        self.workloads[uid] = self.by_name[new.name] = new
        for ip in new.addresses:
            addresses[ip] = new
        if old.healthy != new.healthy or old.services != new.services:
            for key, ports in new.services.items():
                self.members[key][uid] = Endpoint(uid, ports, new.healthy)
        return True

    def remove_workload(self, uid: str, keep: Iterable[str] = ()) -> None:
        """Forget one that is here; its endpoints in the services `keep` are about to be replaced in place."""
        workload = self.workloads.pop(uid)
        if not workload.host_network:
            network = self.by_address.get(workload.network, {})
            for ip in workload.addresses:
                claims = network.get(ip)
                if isinstance(claims, list):
                    left = [other for other in claims if other is not workload]
                    network[ip] = left if len(left) > 1 else left[0]
                elif claims is workload:
                    del network[ip]
            if not network:
                self.by_address.pop(workload.network, None)
        same = self.by_name.get(workload.name)
        if isinstance(same, dict):
            same.pop(uid, None)
            if len(same) == 1:
                self.by_name[workload.name] = next(iter(same.values()))
        else:
            self.by_name.pop(workload.name, None)
        if workload.hostname:
            discard(self.by_hostname, (workload.namespace, workload.hostname), uid)
        for key in workload.services:
            if key not in keep:
                discard(self.members, key, uid)

    def insert_service(self, service: Service) -> None:
        """New, or in place of the one of the same name."""
        key = service.key
        if key in self.services:
            self.remove_service(key)
        self.services[key] = service
        self.by_host.setdefault(service.hostname.lower(), []).append(key)
        for vip in service.vips:
            self.vips.setdefault(vip.network, {}).setdefault(vip.ip, []).append(key)
        for network, cidr in service.cidrs:
            prefix = int(cidr.network_address) >> (cidr.max_prefixlen - cidr.prefixlen)
            lengths = self.cidrs.setdefault((network, cidr.version), {})
            lengths.setdefault(cidr.prefixlen, {}).setdefault(prefix, []).append(key)

    def remove_service(self, key: str) -> None:
        """Forget one that is here; its workloads stay, and what they say of it."""
        service = self.services.pop(key)
        _remove(self.by_host, service.hostname.lower(), key)
        for vip in service.vips:
            _remove(self.vips.get(vip.network, {}), vip.ip, key)
        for network, cidr in service.cidrs:
            lengths = self.cidrs.get((network, cidr.version), {})
            prefixes = lengths.get(cidr.prefixlen, {})
            _remove(prefixes, int(cidr.network_address) >> (cidr.max_prefixlen - cidr.prefixlen), key)
            if not prefixes:
                lengths.pop(cidr.prefixlen, None)
                if not lengths:
                    del self.cidrs[network, cidr.version]

    # A push

    def take_workload(self, workload: Workload) -> None:
        """New or changed."""
        self.forgive(workload.uid)
        self.insert_workload(workload)

    def take_service(self, service: Service) -> None:
        """New or changed."""
        self.forgive(service.key)
        self.insert_service(service)

    def take_rejection(self, error: RejectedResource) -> bool:
        """What could not be read; whether it counts: where there is a good version, that stays in force."""
        self.forgive(error.name)
        if self.has_workload(error.name) or self.has_service(error.name):
            return False
        self.reject(error)
        return True

    def take_removal(self, name: str) -> tuple[bool, bool]:
        """Whether that removed a workload, or a service."""
        self.forgive(name)
        if self.has_workload(name):
            self.drop_workload(name)
            return True, False
        if self.has_service(name):
            self.drop_service(name)
            return False, True
        return False, False

    def has_workload(self, uid: str) -> bool:
        """Whether there is such a workload."""
        return uid in self.workloads

    def has_service(self, key: str) -> bool:
        """Whether there is such a service."""
        return key in self.services

    def drop_workload(self, uid: str) -> None:
        """Have it no longer."""
        self.remove_workload(uid)

    def drop_service(self, key: str) -> None:
        """Have it no longer."""
        self.remove_service(key)

    # Look-ups

    def claims(self, network: str, ip: IpAddress) -> list[Workload]:
        """The workloads of an address, best first."""
        addresses = self.by_address.get(network)
        found = addresses.get(ip) if addresses else None
        if found is None:
            return []
        return found if isinstance(found, list) else [found]

    def named(self, name: str) -> Iterable[Workload]:
        """The workloads of a name, in the order they came."""
        found = self.by_name.get(name)
        if found is None:
            return ()
        return list(found.values()) if isinstance(found, dict) else (found,)

    def ranges(self, network: str, ip: IpAddress) -> Iterator[tuple[int, str]]:
        """Length and key of each service with a range that `ip` is in, the longest first."""
        lengths = self.cidrs.get((network, ip.version))
        if lengths:
            bits = 32 if ip.version == 4 else 128
            number = int(ip)
            for length in sorted(lengths, reverse=True):
                for key in lengths[length].get(number >> (bits - length), ()):
                    yield length, key


class Layer(Tables):
    """What a push brings, and what of the tables beneath counts no longer. Not for several threads.

    Args:
        beneath: in force; only read, and not changed by anybody before the layer is laid over it.
    """

    def __init__(self, beneath: Tables) -> None:
        super().__init__()
        self.beneath = beneath
        self.over_workloads: set[str] = set()
        """Uids of which the tables beneath have nothing to say any more."""
        self.over_services: set[str] = set()
        self.forgiven: set[str] = set()
        """Names whose refusals of before count no longer."""
        self.disturbed: set[str] = set()
        """Services with other endpoints than beneath."""
        self.hidden_workloads = 0
        """How many of the tables beneath are hidden."""
        self.hidden_services = 0
        self.order: collections.deque[str] = collections.deque()
        """Workloads and services to be worked in, in the order they came."""
        self.judged: collections.deque[str] = collections.deque()
        """Names of which refusals came or went."""

    def _over_workload(self, uid: str) -> None:
        self.order.append(uid)
        if uid not in self.over_workloads:
            self.over_workloads.add(uid)
            old = self.beneath.workloads.get(uid)
            if old is not None:
                self.hidden_workloads += 1
                self.disturbed.update(old.services)

    def _over_service(self, key: str) -> None:
        self.order.append(key)
        if key not in self.over_services:
            self.over_services.add(key)
            self.hidden_services += key in self.beneath.services
            self.disturbed.add(key)

    def forgive(self, name: str) -> None:
        """What was refused under this name counts no longer, here or beneath."""
        super().forgive(name)
        if name in self.beneath.rejected:
            self.forgiven.add(name)
            self.judged.append(name)

    def reject(self, error: RejectedResource) -> None:
        """Refuse the addresses of what could not be read."""
        super().reject(error)
        self.judged.append(error.name)

    def take_workload(self, workload: Workload) -> None:
        """New or changed."""
        self._over_workload(workload.uid)
        self.disturbed.update(workload.services)
        super().take_workload(workload)

    def take_service(self, service: Service) -> None:
        """New or changed."""
        self._over_service(service.key)
        super().take_service(service)

    def drop_workload(self, uid: str) -> None:
        """Have it no longer."""
        self._over_workload(uid)
        if uid in self.workloads:
            self.remove_workload(uid)

    def drop_service(self, key: str) -> None:
        """Have it no longer."""
        self._over_service(key)
        if key in self.services:
            self.remove_service(key)

    def has_workload(self, uid: str) -> bool:
        """Whether there is such a workload, in the layer or seen through it."""
        return uid in self.workloads or (uid in self.beneath.workloads and uid not in self.over_workloads)

    def has_service(self, key: str) -> bool:
        """Whether there is such a service, in the layer or seen through it."""
        return key in self.services or (key in self.beneath.services and key not in self.over_services)

    def alone(self) -> Tables:
        """What the layer brings, as tables of its own."""
        tables = Tables()
        for name in vars(tables):
            setattr(tables, name, getattr(self, name))
            setattr(self, name, {})
        return tables

    def left_over(self) -> Iterator[None]:
        """Take the layer apart, a little with each step, once nobody sees it any more."""
        for name, value in list(vars(self).items()):
            if name != "beneath":
                yield from dismantle(value)

    @property
    def worked_in(self) -> bool:
        """Whether the tables beneath have everything."""
        return not self.order and not self.judged

    def work_in(self) -> None:
        """Work the next name into the tables beneath. What is seen stays the same."""
        beneath = self.beneath
        if not self.order:
            name = self.judged.popleft()
            beneath.forgive(name)
            error = self.rejected.get(name)
            if error is not None:
                beneath.reject(error)
            return
        name = self.order.popleft()
        if name in self.over_workloads:
            self.hidden_workloads += _move(
                name, self.workloads, beneath.workloads, beneath.insert_workload, beneath.remove_workload
            )
        if name in self.over_services:
            self.hidden_services += _move(
                name, self.services, beneath.services, beneath.insert_service, beneath.remove_service
            )


class View(Mapping[str, V]):
    """A dictionary as seen through a layer.

    Args:
        layer: its entries come first.
        beneath: of these only the ones that are not hidden.
        hidden: names that count no longer beneath.
        count: how many of them are there.
    """

    def __init__(
        self, layer: Mapping[str, V], beneath: Mapping[str, V], hidden: set[str], count: Callable[[], int]
    ) -> None:
        self._layer = layer
        self._beneath = beneath
        self._hidden = hidden
        self._count = count

    def __getitem__(self, name: str) -> V:
        found = self._layer.get(name)
        if found is not None:
            return found
        if name in self._hidden:
            raise KeyError(name)
        return self._beneath[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The entry, or `default`."""
        found = self._layer.get(name)
        if found is not None:
            return found
        return default if name in self._hidden else self._beneath.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._layer or (name in self._beneath and name not in self._hidden)

    def __iter__(self) -> Iterator[str]:
        for name in self._beneath:
            if name not in self._hidden:
                yield name
        yield from self._layer

    def __len__(self) -> int:
        return self._count()


def _move(
    name: str,
    layer: Mapping[str, V],
    beneath: Mapping[str, V],
    insert: Callable[[V], None],
    remove: Callable[[str], None],
) -> int:
    """Do beneath what the layer says of a name; how many more there are beneath now, all of them hidden."""
    before = name in beneath
    resource = layer.get(name)
    if resource is not None:
        insert(resource)
    elif before:
        remove(name)
    return (resource is not None) - before


def dismantle(container: Any) -> Iterator[None]:
    """Empty nested dictionaries and sets entry by entry, as letting go of a large one at once takes long."""
    if isinstance(container, int):
        return
    if isinstance(container, dict):
        while container:
            _, value = container.popitem()
            if isinstance(value, dict | set) and len(value) > 1:
                yield from dismantle(value)
            yield
    else:
        while container:
            container.pop()
            yield


def discard(index: dict[Any, dict[str, Any]], key: Any, name: str) -> None:
    """Take `name` out of what an index has under `key`, and the key with its last name."""
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
