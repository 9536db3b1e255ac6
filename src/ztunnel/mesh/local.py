"""The local file of workloads, services and policies. Source: Istio, ztunnel's LOCAL_XDS_PATH.

Strict: an unknown key is an error everywhere, in matches too, where ignoring one would widen a policy.
Two of ztunnel's oddities are mended: a missing trust domain or service account means what it means in
discovery (`cluster.local`, `default`), and a workload's services are known as such.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import yaml

from hbone.errors import ConfigurationError, IdentityError
from ztunnel.mesh.address import GatewayAddress, NamespacedHostname, NetworkAddress, parse_ip
from ztunnel.mesh.policy import Action, Authorization, Kind, Match, PolicyScope, ServiceAccount, StringMatch
from ztunnel.mesh.service import Endpoint, IpFamilies, LoadBalancer, Mode, Scope, Service, WeightedWaypoint
from ztunnel.mesh.workload import ApplicationTunnel, Locality, Protocol, Workload

if TYPE_CHECKING:
    import enum
    from collections.abc import Callable, Iterator

    from ztunnel.mesh.store import Change, Store

__all__ = ["LocalFile", "load"]


@attrs.frozen
class LocalFile:
    """What a local file describes."""

    workloads: tuple[Workload, ...] = ()
    policies: tuple[Authorization, ...] = ()
    services: tuple[Service, ...] = ()

    def apply(self, store: Store) -> tuple[Change, Change]:
        """Put everything into `store`, policies first."""
        return store.apply_policies(self.policies), store.apply_addresses([*self.workloads, *self.services])


def load(text: str, name: str = "LOCAL_XDS") -> LocalFile:
    """Read a local file.

    Args:
        text: YAML, with the tags `!Exact`, `!Prefix`, `!Suffix` and `!Presence` in matches.
        name: What errors call it.

    Raises:
        ConfigurationError: one sentence with the path of what is wrong.
    """
    try:
        document = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{name}{line}: {getattr(error, 'problem', None) or error}") from None
    top = _Map(document if document is not None else {}, name)
    workloads = [_workload(entry) for entry in top.maps("workloads")]
    policies = [_policy(entry) for entry in top.maps("policies")]
    services = [_service(entry) for entry in top.maps("services")]
    top.end()
    _unique([workload.uid for workload in workloads], f"{name}: workloads", "uid")
    _unique([policy.key for policy in policies], f"{name}: policies", "namespace and name")
    _unique([service.key for service in services], f"{name}: services", "namespace and hostname")
    return LocalFile(tuple(workloads), tuple(policies), tuple(services))


class _Loader(yaml.SafeLoader):
    """A safe loader with the tags of matches, which refuses a key given twice."""


def _tagged(kind: Kind) -> Callable[[_Loader, yaml.Node], StringMatch]:
    def construct(loader: _Loader, node: yaml.Node) -> StringMatch:
        if kind is Kind.PRESENCE:
            if not isinstance(node, yaml.SequenceNode) or node.value:
                raise yaml.constructor.ConstructorError(None, None, "!Presence takes an empty list", node.start_mark)
            return StringMatch(kind)
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, f"!{kind.value} takes a text", node.start_mark)
        return StringMatch(kind, str(loader.construct_scalar(node)))

    return construct


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        try:
            again = key in seen
            seen.add(key)
        except TypeError:
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a text or a number", key_node.start_mark
            ) from None
        if again:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
    return dict(loader.construct_mapping(node, deep=True))


for _kind in Kind:
    _Loader.add_constructor(f"!{_kind.value}", _tagged(_kind))
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _fail(path: str, what: str) -> NoReturn:
    raise ConfigurationError(f"{path}: {what}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _unique(names: list[str], path: str, what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            _fail(path, f"two entries have the {what} {name!r}; each needs its own")
        seen.add(name)


class _Map:
    """A mapping that is read key by key; `end` refuses the keys that nobody read."""

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, dict):
            _fail(path, f"expected keys and values, found {_shown(value)}")
        self._values: dict[Any, Any] = value
        self._read: set[str] = set()
        self.path = path

    def at(self, key: str) -> str:
        return f"{self.path}.{key}" if "." in self.path or "[" in self.path else f"{self.path}: {key}"

    def fail(self, key: str, what: str) -> NoReturn:
        _fail(self.at(key), what)

    def raw(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def need(self, *keys: str) -> None:
        for key in keys:
            if self._values.get(key) is None:
                self.fail(key, "is missing")

    def end(self) -> None:
        for key in self._values:
            if key not in self._read:
                _fail(self.path, f"unknown key {key!r}; known are {', '.join(sorted(self._read))}")

    def text(self, key: str, default: str = "") -> str:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, str):
            self.fail(key, f"expected a text, found {_shown(value)}; quote it")
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, f"expected true or false, found {_shown(value)}")
        return value

    def number(self, key: str, default: int, limit: int) -> int:
        value = self.raw(key)
        return default if value is None else _number(value, self.at(key), limit)

    def choice(self, key: str, kind: type[enum.Enum], default: Any) -> Any:
        value = self.raw(key)
        return default if value is None else _enum(value, kind, self.at(key))

    def list(self, key: str) -> Iterator[tuple[Any, str]]:
        value = self.raw(key)
        if value is None:
            return
        if not isinstance(value, list):
            self.fail(key, f"expected a list, found {_shown(value)}")
        for index, entry in enumerate(value):
            yield entry, f"{self.at(key)}[{index}]"

    def maps(self, key: str) -> Iterator[_Map]:
        for entry, path in self.list(key):
            yield _Map(entry, path)

    def texts(self, key: str) -> tuple[str, ...]:
        found = []
        for entry, path in self.list(key):
            if not isinstance(entry, str):
                _fail(path, f"expected a text, found {_shown(entry)}; quote it")
            found.append(entry)
        return tuple(found)

    def map(self, key: str) -> _Map | None:
        value = self.raw(key)
        return None if value is None else _Map(value, self.at(key))

    def items(self, key: str) -> Iterator[tuple[Any, Any, str]]:
        value = self.raw(key)
        if value is None:
            return
        if not isinstance(value, dict):
            self.fail(key, f"expected keys and values, found {_shown(value)}")
        for name, entry in value.items():
            yield name, entry, f"{self.at(key)}[{name!r}]"


def _number(value: object, path: str, limit: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        _fail(path, f"expected a number from 0 to {limit}, found {_shown(value)}")
    return value


def _enum(value: object, kind: type[enum.Enum], path: str) -> Any:
    for member in kind:
        if value == member.value:
            return member
    _fail(path, f"expected {' or '.join(str(member.value) for member in kind)}, found {_shown(value)}")


def _ip(value: object, path: str) -> Any:
    try:
        return parse_ip(value) if isinstance(value, str) else _fail(path, f"expected an IP, found {_shown(value)}")
    except ValueError:
        _fail(path, f"{_shown(value)} is no IP address")


def _ports(values: Iterator[tuple[Any, Any, str]]) -> dict[int, int]:
    ports: dict[int, int] = {}
    for name, target, path in values:
        number = int(name) if isinstance(name, str) and re.fullmatch(r"\d{1,5}", name, re.ASCII) else name
        ports[_number(number, path, 65_535)] = _number(target, path, 65_535)
    return ports


def _network_address(value: object, path: str) -> NetworkAddress:
    if not isinstance(value, str) or "/" not in value:
        _fail(path, f"expected network/ip, for example /10.96.0.10, found {_shown(value)}")
    network, _, ip = value.rpartition("/")
    return NetworkAddress(network, _ip(ip, path))


def _gateway(values: _Map | None) -> GatewayAddress | None:
    if values is None:
        return None
    values.need("destination", "hboneMtlsPort")
    text = values.text("destination")
    port = values.number("hboneMtlsPort", 0, 65_535)
    values.end()
    left, slash, right = text.rpartition("/")
    if not slash:
        values.fail("destination", f"expected network/ip or namespace/hostname, found {text!r}")
    try:
        return GatewayAddress(NetworkAddress(left, parse_ip(right)), port)
    except ValueError:
        return GatewayAddress(NamespacedHostname(left, right), port)


def _status(values: _Map) -> bool:
    value = values.text("status", "Healthy")
    if value not in {"Healthy", "Unhealthy"}:
        values.fail("status", f"expected Healthy or Unhealthy, found {value!r}")
    return value == "Healthy"


def _workload(values: _Map) -> Workload:
    values.need("workloadIps", "namespace", "services")
    namespace, name = values.text("namespace"), values.text("name")
    addresses = tuple(_ip(entry, path) for entry, path in values.list("workloadIps"))
    uid = values.text("uid") or f"local//{namespace}/{name or ','.join(map(str, addresses))}"
    tunnel = None
    if (given := values.map("applicationTunnel")) is not None:
        given.need("protocol")
        protocol = given.text("protocol")
        if protocol not in {"NONE", "PROXY"}:
            given.fail("protocol", f"expected NONE or PROXY, found {protocol!r}")
        tunnel = ApplicationTunnel(protocol == "PROXY", given.number("port", 0, 65_535))
        given.end()
    locality = Locality()
    if (place := values.map("locality")) is not None:
        place.need("region", "zone", "subzone")
        locality = Locality(place.text("region"), place.text("zone"), place.text("subzone"))
        place.end()
    services: dict[str, dict[int, int]] = {}
    for key, ports, path in values.items("services"):
        if not isinstance(key, str) or "/" not in key:
            _fail(path, "expected namespace/hostname as the key")
        services[key] = _ports(iter(_Map({"ports": ports}, path).items("ports")))
    mode = values.text("networkMode", "Standard")
    if mode not in {"Standard", "HostNetwork"}:
        values.fail("networkMode", f"expected Standard or HostNetwork, found {mode!r}")
    try:
        workload = Workload(
            uid=uid,
            name=name,
            namespace=namespace,
            addresses=addresses,
            hostname=values.text("hostname"),
            network=values.text("network"),
            protocol=values.choice("protocol", Protocol, Protocol.TCP),
            trust_domain=values.text("trustDomain") or "cluster.local",
            service_account=values.text("serviceAccount") or "default",
            waypoint=_gateway(values.map("waypoint")),
            network_gateway=_gateway(values.map("networkGateway")),
            node=values.text("node"),
            canonical_name=values.text("canonicalName"),
            canonical_revision=values.text("canonicalRevision"),
            workload_type=values.text("workloadType") or "deployment",
            workload_name=values.text("workloadName"),
            native_tunnel=values.flag("nativeTunnel"),
            application_tunnel=tunnel,
            services=services,
            authorization_policies=values.texts("authorizationPolicies"),
            healthy=_status(values),
            cluster_id=values.text("clusterId"),
            locality=locality,
            host_network=mode == "HostNetwork",
            capacity=values.number("capacity", 1, 2**32 - 1),
        )
    except IdentityError as error:
        _fail(values.path, str(error))
    values.end()
    return workload


def _service(values: _Map) -> Service:
    values.need("name", "namespace", "hostname", "vips", "ports")
    cidrs = []
    for entry in values.maps("cidrVips"):
        entry.need("network", "cidr")
        cidrs.append((entry.text("network"), _cidr(entry.raw("cidr"), entry.at("cidr"))))
        entry.end()
    endpoints: dict[str, Endpoint] = {}
    for _, given, path in values.items("endpoints"):
        entry = _Map(given, path)
        entry.need("workloadUid")
        uid = entry.text("workloadUid")
        endpoints[uid] = Endpoint(uid, _ports(entry.items("port")), _status(entry))
        entry.end()
    weighted = []
    for entry in values.maps("weightedWaypoints"):
        entry.need("destination", "weight")
        destination = _gateway(entry.map("destination"))
        assert destination is not None  # `need` saw to it
        weighted.append(WeightedWaypoint(destination, entry.number("weight", 0, 2**32 - 1)))
        entry.end()
    balancer = None
    if (given_balancer := values.map("loadBalancer")) is not None:
        given_balancer.need("routingPreferences", "mode", "healthPolicy")
        health = given_balancer.text("healthPolicy")
        if health not in {"OnlyHealthy", "AllowAll"}:
            given_balancer.fail("healthPolicy", f"expected OnlyHealthy or AllowAll, found {health!r}")
        balancer = LoadBalancer(
            preferences=tuple(_enum(entry, Scope, path) for entry, path in given_balancer.list("routingPreferences")),
            mode=given_balancer.choice("mode", Mode, Mode.STANDARD),
            allow_unhealthy=health == "AllowAll",
        )
        given_balancer.end()
    visibility = values.text("visibility", "Public")
    if visibility not in {"Public", "Namespace"}:
        values.fail("visibility", f"expected Public or Namespace, found {visibility!r}")
    service = Service(
        name=values.text("name"),
        namespace=values.text("namespace"),
        hostname=values.text("hostname"),
        vips=tuple(_network_address(entry, path) for entry, path in values.list("vips")),
        cidrs=tuple(cidrs),
        ports=_ports(values.items("ports")),
        subject_alt_names=values.texts("subjectAltNames"),
        waypoint=_gateway(values.map("waypoint")),
        weighted_waypoints=tuple(weighted),
        load_balancer=balancer,
        ip_families=values.choice("ipFamilies", IpFamilies, IpFamilies.AUTOMATIC),
        canonical=values.flag("canonical"),
        namespace_only=visibility == "Namespace",
        endpoints=endpoints,
    )
    values.end()
    return service


def _cidr(value: object, path: str) -> Any:
    if not isinstance(value, str) or "/" not in value:
        _fail(path, f"expected an address with a prefix length, for example 10.0.0.0/8, found {_shown(value)}")
    try:
        return ipaddress.ip_network(value, strict=False)
    except ValueError as error:
        _fail(path, str(error))


def _policy(values: _Map) -> Authorization:
    values.need("name", "namespace", "scope", "action", "rules", "dryRun")
    policy = Authorization(
        name=values.text("name"),
        namespace=values.text("namespace"),
        scope=values.choice("scope", PolicyScope, None),
        action=values.choice("action", Action, None),
        rules=tuple(_rule(rule, path) for rule, path in values.list("rules")),
        dry_run=values.flag("dryRun"),
    )
    values.end()
    return policy


def _rule(rule: object, path: str) -> tuple[tuple[Match, ...], ...]:
    return tuple(
        tuple(_match(_Map(match, match_path)) for match, match_path in _entries(clause, clause_path, "matches"))
        for clause, clause_path in _entries(rule, path, "clauses")
    )


def _entries(value: object, path: str, what: str) -> Iterator[tuple[Any, str]]:
    if not isinstance(value, list):
        _fail(path, f"expected a list of {what}, found {_shown(value)}")
    for index, entry in enumerate(value):
        yield entry, f"{path}[{index}]"


def _match(values: _Map) -> Match:
    found = Match(
        namespaces=_strings(values, "namespaces"),
        not_namespaces=_strings(values, "notNamespaces"),
        principals=_strings(values, "principals"),
        not_principals=_strings(values, "notPrincipals"),
        service_accounts=_accounts(values, "serviceAccounts"),
        not_service_accounts=_accounts(values, "notServiceAccounts"),
        source_ips=tuple(_cidr(entry, path) for entry, path in values.list("sourceIps")),
        not_source_ips=tuple(_cidr(entry, path) for entry, path in values.list("notSourceIps")),
        destination_ips=tuple(_cidr(entry, path) for entry, path in values.list("destinationIps")),
        not_destination_ips=tuple(_cidr(entry, path) for entry, path in values.list("notDestinationIps")),
        destination_ports=_port_list(values, "destinationPorts"),
        not_destination_ports=_port_list(values, "notDestinationPorts"),
    )
    values.end()
    return found


def _port_list(values: _Map, key: str) -> tuple[int, ...]:
    return tuple(_number(entry, path, 65_535) for entry, path in values.list(key))


def _accounts(values: _Map, key: str) -> tuple[ServiceAccount, ...]:
    found = []
    for entry in values.maps(key):
        entry.need("namespace", "serviceAccount")
        found.append(ServiceAccount(entry.text("namespace"), entry.text("serviceAccount")))
        entry.end()
    return tuple(found)


def _strings(values: _Map, key: str) -> tuple[StringMatch, ...]:
    return tuple(_string(entry, path) for entry, path in values.list(key))


def _string(value: object, path: str) -> StringMatch:
    if isinstance(value, StringMatch):
        return value
    if isinstance(value, dict) and len(value) == 1:  # the same in JSON, as dumps have it
        name, text = next(iter(value.items()))
        for kind in Kind:
            if name == kind.value and kind is Kind.PRESENCE and text == []:
                return StringMatch(kind)
            if name == kind.value and kind is not Kind.PRESENCE and isinstance(text, str):
                return StringMatch(kind, text)
    _fail(path, f"expected !Exact, !Prefix or !Suffix with a text, or !Presence [], found {_shown(value)}")
