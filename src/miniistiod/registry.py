"""Documents -> the mesh as ztunnels see it. The whole conversion is one pure function, `convert`.

A `Registry` does the same step by step: it keeps the documents indexed by what refers to them, so that a change costs
what it touches, and gives the same result as converting everything again.

Source: Istio's ambient index (names, fields and precedence). Where istiod has a defect, this follows the evident
intent: a selector never selects what has no labels, an endpoint's network is its own, and PeerAuthentication is
resolved by inheritance first.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import attrs

from miniistiod import policies, services, workloads
from miniistiod.catalog import AUTHORIZATION, Catalog, Entry, Plan, entry
from miniistiod.index import LabelIndex, SelectorIndex
from miniistiod.inputs import HboneMark, Inputs, ServiceModel
from miniistiod.resources.binding import Key, bind, instance_of
from miniistiod.resources.model import (
    AuthorizationPolicy,
    EndpointSlice,
    Gateway,
    GatewayClass,
    KubernetesService,
    MeshConfig,
    Namespace,
    PeerAuthentication,
    Resource,
    ServiceEntry,
    Visibility,
    WorkloadEntry,
)
from miniistiod.resources.networking import NETWORK_LABEL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from miniistiod.resources import ResourceSet
    from miniistiod.resources.binding import Binding, Traffic
    from miniistiod.resources.model import Metadata
    from ztunnel.wire.workload_pb2 import GatewayAddress

__all__ = ["HboneMark", "Inputs", "Registry", "ServiceModel", "convert"]

_LAST = datetime.datetime.max.replace(tzinfo=datetime.UTC)


@attrs.define
class _Dirty:
    """What must be made again."""

    objects: dict[Key, None] = attrs.Factory(dict)
    """WorkloadEntries, ServiceEntries (their endpoints), EndpointSlices, AuthorizationPolicies."""
    hosts: dict[str, None] = attrs.Factory(dict)
    """`namespace/host` of which the owner may be another."""
    services: dict[str, None] = attrs.Factory(dict)
    selectors: list[tuple[str | None, Mapping[str, str]]] = attrs.Factory(list)
    """Whatever these select."""
    peers: dict[str, None] = attrs.Factory(dict)
    """Namespaces with other PeerAuthentications."""
    gateways: bool = False
    everything: bool = False


def convert(resources: ResourceSet, inputs: Inputs | None = None) -> Catalog:
    """The mesh of a set of documents."""
    return Registry.of(resources, inputs).catalog


class Registry:
    """The documents of a mesh, and what refers to what among them."""

    def __init__(self, inputs: Inputs, catalog: Catalog | None = None) -> None:
        self.inputs = inputs
        self.catalog = catalog or Catalog()
        self.mesh = MeshConfig()
        self.documents: dict[Key, Resource] = {}
        self.services: dict[str, ServiceModel] = {}
        """Owners of hosts, by `namespace/host`."""
        self.network = ""
        self.ways: dict[str, GatewayAddress] = {}
        """How other networks are reached."""
        self.peers = policies.PeerAuthentications(self.mesh.root_namespace)
        self._claims: dict[str, dict[Key, None]] = {}
        """`namespace/host` to the documents that want it."""
        self._hosts: dict[str, dict[str, None]] = {}
        """Host to the services of that name in all namespaces."""
        self._labels = LabelIndex[Key]()
        self._service_selectors = SelectorIndex[str]()
        self._policy_selectors = SelectorIndex[str]()
        self._members: dict[str, dict[Key, None]] = {}
        """Namespace to its Services and EndpointSlices; LabelIndex has the others."""
        self._peer_documents: dict[str, dict[Key, None]] = {}
        self._slices: dict[tuple[str, str], dict[Key, None]] = {}
        """Namespace and name of a Service to its EndpointSlices."""
        self._gateways: dict[Key, None] = {}
        self._users: dict[tuple[str, str], dict[Key, None]] = {}
        """Gateway to what depends on it."""
        self._asked: dict[Key, tuple[tuple[str, str], ...]] = {}
        self._on_network: dict[str, dict[Key, None]] = {}
        self._made: dict[Key, tuple[str, ...]] = {}
        """Resource names of the documents that make any number of them."""

    @classmethod
    def of(cls, resources: ResourceSet, inputs: Inputs | None = None) -> Registry:
        """A set of documents and, in `catalog`, what it is converted to."""
        registry = cls(inputs or Inputs())
        documents = {item.meta.key: item for item in resources.resources}
        registry.catalog.apply(registry.change(documents, mesh=resources.mesh))
        return registry

    # -- changes

    def change(
        self,
        changed: Mapping[Key, Resource],
        removed: Iterable[Key] = (),
        *,
        mesh: MeshConfig | None = None,
        vips: Mapping[tuple[str, str], int] | None = None,
        touched: Iterable[Key] = (),
    ) -> Plan:
        """Take other documents, settings or inputs, and say what differs from the catalog, which is left alone.

        Args:
            changed: new and different documents.
            removed: keys of documents that are gone.
            mesh: new settings, or None.
            vips: new automatic addresses, or None.
            touched: keys of documents whose mark or age is another now.
        """
        dirty = _Dirty()
        if mesh is not None and mesh != self.mesh:
            if mesh.root_namespace != self.mesh.root_namespace:
                self.peers = policies.PeerAuthentications(mesh.root_namespace)
                dirty.peers.update(dict.fromkeys(self._peer_documents))
            self.mesh = mesh
            dirty.everything = True
        if vips is not None:
            old, self.inputs = self.inputs.vips, attrs.evolve(self.inputs, vips=vips)
            for place in old.keys() | vips.keys():
                if old.get(place) != vips.get(place):
                    dirty.services[f"{place[0]}/{place[1]}"] = None
        for key in touched:
            self._touch(key, dirty)
        for key in removed:
            self._replace(key, None, dirty)
        for key, item in changed.items():
            self._replace(key, item, dirty)
        return self._make(dirty)

    def _replace(self, key: Key, new: Resource | None, dirty: _Dirty) -> None:
        old = self.documents.pop(key, None)
        for item, add in ((old, False), (new, True)):
            if isinstance(item, WorkloadEntry | ServiceEntry):
                self._index_labelled(item, add, dirty)
            elif isinstance(item, KubernetesService):
                _member(self._members, item.meta.namespace, key, add)
                self._claim(item, add, dirty)
            elif isinstance(item, EndpointSlice):
                _member(self._members, item.meta.namespace, key, add)
                _member(self._slices, (item.meta.namespace, item.service), key, add)
                dirty.objects[key] = None
            elif isinstance(item, AuthorizationPolicy):
                self._index_policy(item, add, dirty)
            elif isinstance(item, PeerAuthentication):
                _member(self._peer_documents, item.meta.namespace, key, add)
                dirty.peers[item.meta.namespace] = None
            elif isinstance(item, Gateway):
                _change(self._gateways, key, add)
                dirty.gateways = True
                dirty.objects.update(self._users.get((item.meta.namespace, item.meta.name), {}))
                self._touch_network(item.meta.labels.get(NETWORK_LABEL), dirty)
            elif isinstance(item, Namespace):
                self._touch_namespace(item.meta.name, dirty)
            elif isinstance(item, GatewayClass):
                dirty.everything = True
        if new is not None:
            self.documents[key] = new

    def _index_labelled(self, item: WorkloadEntry | ServiceEntry, add: bool, dirty: _Dirty) -> None:
        meta = item.meta
        if isinstance(item, WorkloadEntry):
            labels: Mapping[str, str] = item.labels
            networks = {item.endpoint.network}
        else:
            labels = meta.labels
            networks = {endpoint.network for endpoint in item.endpoints}
            self._claim(item, add, dirty)
        (self._labels.put if add else self._labels.drop)(meta.namespace, labels, meta.key)
        for network in networks:
            if network:
                _member(self._on_network, network, meta.key, add)
        dirty.objects[meta.key] = None

    def _claim(self, item: ServiceEntry | KubernetesService, add: bool, dirty: _Dirty) -> None:
        for host in services.hosts(item, self.inputs.cluster_domain):
            name = f"{item.meta.namespace}/{host}"
            _member(self._claims, name, item.meta.key, add)
            dirty.hosts[name] = None

    def _index_policy(self, item: AuthorizationPolicy, add: bool, dirty: _Dirty) -> None:
        meta = item.meta
        dirty.objects[meta.key] = None
        if item.selector and policies.is_layer_4(item):
            change = self._policy_selectors.put if add else self._policy_selectors.drop
            change(meta.namespace, item.selector, f"{meta.namespace}/{meta.name}")
            everywhere = meta.namespace == self.mesh.root_namespace
            dirty.selectors.append((None if everywhere else meta.namespace, item.selector))

    def _touch_namespace(self, name: str, dirty: _Dirty) -> None:
        """Whatever is in a namespace may inherit something else from it."""
        if name == self.mesh.root_namespace:
            dirty.everything = True  # it names the network of all
        for key in (*self._labels.of(name), *self._members.get(name, ())):
            self._touch(key, dirty)

    def _touch(self, key: Key, dirty: _Dirty) -> None:
        item = self.documents.get(key)
        if isinstance(item, ServiceEntry | KubernetesService):
            for host in services.hosts(item, self.inputs.cluster_domain):
                name = f"{item.meta.namespace}/{host}"
                dirty.hosts[name] = dirty.services[name] = None
        if not isinstance(item, KubernetesService):
            dirty.objects[key] = None

    def _touch_network(self, network: str | None, dirty: _Dirty) -> None:
        if network is None:
            return
        if network == self.network:
            dirty.everything = True
        dirty.objects.update(self._on_network.get(network, {}))

    # -- owners of hosts

    def _own(self, name: str, dirty: _Dirty) -> None:
        """Find the owner of a host; all that depends on the old or the new one is to be made again."""
        old = self.services.pop(name, None)
        new = self._owner(name)
        if new is not None:
            self.services[name] = new
        for model, add in ((old, False), (new, True)):
            if model is None:
                continue
            _member(self._hosts, model.host, name, add)
            selector = model.source.selector
            if selector:
                change = self._service_selectors.put if add else self._service_selectors.drop
                change(model.source.meta.namespace, selector, name)
                dirty.selectors.append((model.source.meta.namespace, selector))
            if isinstance(model.source, ServiceEntry):
                dirty.objects[model.source.meta.key] = None
            else:
                dirty.objects.update(self._slices.get((model.source.meta.namespace, model.source.meta.name), {}))
        host = name.partition("/")[2]
        dirty.services[name] = None
        dirty.services.update(self._hosts.get(host, {}))

    def _owner(self, name: str) -> ServiceModel | None:
        """The owner of a host in its namespace: a Kubernetes Service, else the oldest ServiceEntry."""
        host = name.partition("/")[2]
        for item in self.claimants(name):
            visibility = self.visibility(item)
            if visibility is not Visibility.NONE:
                return ServiceModel(source=item, host=host, visibility=visibility)
        return None

    def claimants(self, name: str) -> list[ServiceEntry | KubernetesService]:
        """Documents that want a host, the rightful owner first."""
        items = [self.documents[key] for key in self._claims.get(name, ())]
        found = [item for item in items if isinstance(item, ServiceEntry | KubernetesService)]
        return sorted(found, key=self._rank)

    def contested(self) -> Iterator[str]:
        """Hosts that more than one document wants."""
        return (name for name, keys in self._claims.items() if len(keys) > 1)

    def is_canonical(self, model: ServiceModel) -> bool:
        """Whether a service is the one that is meant by its host in other namespaces."""
        same = [self.services[name] for name in self._hosts[model.host]]
        seen = [item for item in same if item.visibility is Visibility.PUBLIC]
        first = min(seen, key=lambda item: self._rank(item.source), default=None)
        return first is not None and first.name == model.name

    def visibility(self, item: ServiceEntry | KubernetesService) -> Visibility:
        """How far a service is seen."""
        if isinstance(item, KubernetesService):
            return Visibility.PUBLIC
        home = self.namespace(item.meta.namespace)
        return self.mesh.visibility_of(item.meta.namespace, home.labels if home is not None else {})

    def _rank(self, item: ServiceEntry | KubernetesService) -> tuple[bool, datetime.datetime, str, int]:
        return (isinstance(item, ServiceEntry), *self._age(item))

    def _age(self, item: Resource) -> tuple[datetime.datetime, str, int]:
        """Oldest is least: by creationTimestamp, else by when it was first seen; ties by path and position."""
        meta = item.meta
        return (meta.created or self.inputs.first_seen.get(meta.key, _LAST), meta.path, meta.position)

    # -- look-ups of the conversion

    def namespace(self, name: str) -> Metadata | None:
        """Labels and annotations of a namespace, when there is a document of it."""
        found = self.documents.get(("Namespace", "", name))
        return None if found is None else found.meta

    def selecting(self, namespace: str, labels: Mapping[str, str]) -> list[ServiceModel]:
        """Services that select labels."""
        return [self.services[name] for name in sorted(self._service_selectors.selecting(namespace, labels))]

    def policies_of(self, namespace: str, labels: Mapping[str, str]) -> list[str]:
        """Names of the policies that a workload must refer to."""
        chosen = [
            name
            for scope in {namespace, self.mesh.root_namespace}
            for name in self._policy_selectors.selecting(scope, labels)
        ]
        return sorted(chosen) + self.peers.names_for(namespace, labels)

    def gateways(self) -> list[Gateway]:
        """All Gateways, oldest first."""
        found = [item for key in self._gateways if isinstance(item := self.documents[key], Gateway)]
        return sorted(found, key=self._age)

    def waypoints_in_use(self) -> list[Gateway]:
        """Gateways with an address that something asked for as its waypoint."""
        found = (self.documents.get(("Gateway", *place)) for place in sorted(self._users))
        return [item for item in found if isinstance(item, Gateway) and item.addresses]

    def bind(self, meta: Metadata, labels: Mapping[str, str], traffic: Traffic, *, user: Key, **more: Any) -> Binding:
        """The waypoints of an object. `user` is made again when one of them changes."""
        found = bind(meta.namespace, labels, meta.annotations, traffic, self.documents, **more)
        if found.asked:
            self._depend(user, found.asked)
        return found

    def instance(self, meta: Metadata, labels: Mapping[str, str]) -> None:
        """Note that a workload is an instance of a waypoint, and changes with its Gateway."""
        place = instance_of(meta, labels)
        if place is not None:
            self._depend(meta.key, (place,))

    def _depend(self, user: Key, places: Iterable[tuple[str, str]]) -> None:
        """Note that something is made again when these Gateways change."""
        self._asked[user] = tuple(dict.fromkeys((*self._asked.get(user, ()), *places)))
        for place in places:
            self._users.setdefault(place, {})[user] = None

    # -- making

    def _make(self, dirty: _Dirty) -> Plan:
        had_peers = self.peers.any
        for namespace in dirty.peers:
            keys = self._peer_documents.get(namespace, ())
            found = [item for key in keys if isinstance(item := self.documents[key], PeerAuthentication)]
            self.peers.replace(namespace, sorted(found, key=self._age))
            for key in self._labels.of(namespace):
                dirty.objects[key] = None
        if dirty.peers and (had_peers is not self.peers.any or self.mesh.root_namespace in dirty.peers):
            dirty.everything = True
        root = self.namespace(self.mesh.root_namespace)
        label = root.labels.get(NETWORK_LABEL, "") if root is not None else ""
        network = label if self.mesh.network is None else self.mesh.network
        if network != self.network:
            self.network = network
            dirty.everything = True
        if dirty.everything:
            dirty.gateways = True
            dirty.hosts.update(dict.fromkeys(self._claims))
            dirty.peers.update(dict.fromkeys(self._peer_documents))
            dirty.objects.update(
                (key, None)
                for key, item in self.documents.items()
                if isinstance(item, WorkloadEntry | ServiceEntry | EndpointSlice | AuthorizationPolicy)
            )
        if dirty.gateways:
            self.ways = workloads.ways(self.gateways())
        for name in list(dirty.hosts):
            self._own(name, dirty)
        for scope, selector in dirty.selectors:
            dirty.objects.update(dict.fromkeys(self._labels.selected(scope, selector)))
        return self._plan(dirty)

    def _plan(self, dirty: _Dirty) -> Plan:
        addresses: dict[str, Entry | None] = {}
        converted: dict[str, Entry | None] = {}
        if dirty.gateways:
            self._replace_made(("gateways", "", ""), workloads.of_gateways(self), addresses)
        for key in dirty.objects:
            if key[0] == "service":
                dirty.services[key[2]] = None
                continue
            self._release(key)
            item = self.documents.get(key)
            if key[0] == "AuthorizationPolicy":
                name = f"{key[1]}/{key[2]}"
                message = None
                if isinstance(item, AuthorizationPolicy):
                    message = policies.authorization(item, self.mesh.root_namespace)
                previous = self.catalog.policies
                converted[name] = None if message is None else entry(AUTHORIZATION, message, name, previous=previous)
            elif key[0] == "WorkloadEntry":
                uid = workloads.entry_uid(self.inputs.cluster_id, key[1], key[2])
                made = workloads.of_entry(self, item) if isinstance(item, WorkloadEntry) else None
                addresses[uid] = None if made is None else workloads.encode(made, self.catalog.addresses)
            elif isinstance(item, ServiceEntry):
                self._replace_made(key, workloads.of_service_entry(self, item), addresses)
            elif isinstance(item, EndpointSlice):
                self._replace_made(key, workloads.of_slice(self, item), addresses)
            else:
                self._replace_made(key, (), addresses)
        for host in dirty.services:
            self._release(("service", "", host))
            model = self.services.get(host)
            addresses[host] = None if model is None else services.encode(self, model, self.catalog.addresses)
        for namespace in dirty.peers:
            self._replace_peers(namespace, converted)
        if dirty.peers:
            static = self.peers.static()
            self._replace_policies(("static", "", ""), [] if static is None else [static], converted)
        return Plan(
            addresses=_differing(addresses, self.catalog.addresses),
            policies=_differing(converted, self.catalog.policies),
        )

    def _replace_made(self, key: Key, messages: Iterable[Any], out: dict[str, Entry | None]) -> None:
        entries = [workloads.encode(message, self.catalog.addresses) for message in messages]
        for name in self._made.pop(key, ()):
            out.setdefault(name, None)
        if entries:
            self._made[key] = tuple(item.name for item in entries)
        for item in entries:
            out[item.name] = item

    def _replace_peers(self, namespace: str, out: dict[str, Entry | None]) -> None:
        self._replace_policies(("peers", namespace, ""), self.peers.converted(namespace), out)

    def _replace_policies(self, key: Key, messages: Iterable[Any], out: dict[str, Entry | None]) -> None:
        for name in self._made.pop(key, ()):
            out[name] = None
        names: list[str] = []
        for message in messages:
            name = f"{message.namespace}/{message.name}"
            names.append(name)
            out[name] = entry(AUTHORIZATION, message, name, previous=self.catalog.policies)
        if names:
            self._made[key] = tuple(names)

    def _release(self, user: Key) -> None:
        """Forget which Gateways something depends on; making it again notes them anew."""
        for place in self._asked.pop(user, ()):
            users = self._users.get(place)
            if users is not None:
                users.pop(user, None)
                if not users:
                    del self._users[place]


def _differing(made: Mapping[str, Entry | None], known: Mapping[str, Entry]) -> dict[str, Entry | None]:
    return {name: item for name, item in made.items() if known.get(name) is not item}


def _change(known: dict[Any, None], key: Any, add: bool) -> None:
    if add:
        known[key] = None
    else:
        known.pop(key, None)


def _member(groups: dict[Any, dict[Any, None]], group: Any, key: Any, add: bool) -> None:
    if add:
        groups.setdefault(group, {})[key] = None
        return
    members = groups[group]
    members.pop(key, None)
    if not members:
        del groups[group]
