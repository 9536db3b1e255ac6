"""Documents in few words, and the mesh that they become."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from miniistiod import conditions, services, vips
from miniistiod.registry import Inputs, Registry
from miniistiod.resources import ResourceSet, load
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from miniistiod.resources.binding import Key

__all__ = ["Mesh", "document", "entry", "policy", "read", "service", "service_entry", "waypoint"]

_VERSIONS = {
    **dict.fromkeys(("WorkloadEntry", "ServiceEntry", "WorkloadGroup"), "networking.istio.io/v1"),
    **dict.fromkeys(("AuthorizationPolicy", "PeerAuthentication"), "security.istio.io/v1"),
    **dict.fromkeys(("Gateway", "GatewayClass", "HTTPRoute"), "gateway.networking.k8s.io/v1"),
    "EndpointSlice": "discovery.k8s.io/v1",
}
_FIELDS = ("namespace", "labels", "annotations", "creationTimestamp")


def document(kind: str, name: str, spec: Any = None, **fields: Any) -> str:
    """A document as JSON, which is YAML too. Fields that belong to `metadata` go there, others beside `spec`."""
    if kind not in ("Namespace", "GatewayClass"):
        fields.setdefault("namespace", "shop")
    meta = {"name": name, **{key: fields.pop(key) for key in _FIELDS if key in fields}}
    body = {"apiVersion": _VERSIONS.get(kind, "v1"), "kind": kind, "metadata": meta, **fields}
    return json.dumps(body if spec is None else {**body, "spec": spec})


def entry(name: str = "a", address: str | None = "10.0.0.1", *, spec: Any = None, **fields: Any) -> str:
    """A WorkloadEntry."""
    where = {} if address is None else {"address": address}
    return document("WorkloadEntry", name, {**where, **(spec or {})}, **fields)


def service_entry(name: str = "s", *, spec: Any = None, **fields: Any) -> str:
    """A ServiceEntry of one host, `NAME.mesh`, with one port and its endpoints by the label `app: a`."""
    wanted = {"hosts": [f"{name}.mesh"], "addresses": ["10.9.0.1"], "resolution": "STATIC", **(spec or {})}
    wanted.setdefault("ports", [{"number": 80, "name": "http", "protocol": "HTTP"}])
    if "endpoints" not in wanted and wanted["resolution"] == "STATIC":
        wanted.setdefault("workloadSelector", {"labels": {"app": "a"}})
    return document("ServiceEntry", name, {key: item for key, item in wanted.items() if item is not None}, **fields)


def service(name: str = "k", *, spec: Any = None, **fields: Any) -> str:
    """A Kubernetes Service of `app: a` with one port."""
    ports = [{"port": 80, "name": "http", "targetPort": 8080}]
    wanted = {"clusterIP": "10.8.0.1", "ports": ports, "selector": {"app": "a"}, **(spec or {})}
    return document("Service", name, {key: item for key, item in wanted.items() if item is not None}, **fields)


def waypoint(name: str = "wp", *, address: str | None = "10.7.0.1", allowed: Any = None, **fields: Any) -> str:
    """A Gateway that is a waypoint; without address it is not ready."""
    listener: dict[str, Any] = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    if allowed is not None:
        listener["allowedRoutes"] = {"namespaces": allowed}
    kind = "Hostname" if address is not None and address[-1].isalpha() else "IPAddress"
    status = {"addresses": [] if address is None else [{"type": kind, "value": address}]}
    spec = {"gatewayClassName": fields.pop("gateway_class", "istio-waypoint"), "listeners": [listener]}
    return document("Gateway", name, spec, status=status, **fields)


def policy(name: str = "p", *, spec: Any = None, **fields: Any) -> str:
    """An AuthorizationPolicy; by default one that allows everything for its namespace."""
    return document("AuthorizationPolicy", name, {"rules": [{}]} if spec is None else spec, **fields)


def read(*texts: str, config: Any = None, refused: bool = False) -> ResourceSet:
    """Documents that are right, unless they are to be converted though they are refused."""
    files = {f"{number:03}.yaml": text for number, text in enumerate(texts)}
    if config is not None:
        files["meshconfig.yaml"] = json.dumps(config)
    found = load(files)
    assert refused or not found.errors, [str(error) for error in found.errors]
    return found


class Mesh:
    """What documents become, and what each later change of them changes."""

    def __init__(self, *texts: str, config: Any = None, refused: bool = False, **inputs: Any) -> None:
        resources = read(*texts, config=config, refused=refused)
        wanted, given = services.vip_needs(resources.resources)
        inputs.setdefault("vips", vips.allot({}, wanted, given))
        self.registry = Registry.of(resources, Inputs(**inputs))

    def names(self) -> list[str]:
        """Of all addresses."""
        return sorted(self.registry.catalog.addresses)

    def _address(self, name: str) -> workload_pb2.Address:
        return workload_pb2.Address.FromString(self.registry.catalog.addresses[name].body)

    def service(self, name: str = "s.mesh", namespace: str = "shop") -> workload_pb2.Service:
        """A service by its host."""
        return self._address(f"{namespace}/{name}").service

    def workload(self, name: str = "a", namespace: str = "shop") -> workload_pb2.Workload:
        """A workload: the name of a WorkloadEntry, or a uid."""
        uid = name if "/" in name else f"Kubernetes/networking.istio.io/WorkloadEntry/{namespace}/{name}"
        return self._address(uid).workload

    def endpoint(self, name: str) -> workload_pb2.Workload:
        """An endpoint of a ServiceEntry, by `SERVICE-ENTRY/ADDRESS`."""
        return self.workload(f"Kubernetes/networking.istio.io/ServiceEntry/shop/{name}")

    def policy(self, name: str) -> authorization_pb2.Authorization:
        """A policy by `namespace/name`."""
        return authorization_pb2.Authorization.FromString(self.registry.catalog.policies[name].body)

    def ports(self, name: str = "a") -> dict[str, dict[int, int]]:
        """Services of a workload, each with service and target ports."""
        message = self.workload(name)
        return {key: {p.service_port: p.target_port for p in item.ports} for key, item in message.services.items()}

    def conditions(self, title: str) -> list[tuple[str, bool, str]]:
        """Type, state and reason of the conditions of a document, by `Kind namespace/name`."""
        found = conditions.every_condition(self.registry).get(title, [])
        return [(item["type"].rpartition("/")[2], item["ok"], item["reason"]) for item in found]

    def change(self, *texts: str, removed: tuple[Key, ...] = (), config: Any = None) -> list[str]:
        """Take changed documents, and say what that changes: names, those that are gone with a minus."""
        resources = read(*texts, config=config)
        documents = {item.meta.key: item for item in resources.resources}
        plan = self.registry.change(documents, removed, mesh=None if config is None else resources.mesh)
        self.registry.catalog.apply(plan)
        made = {**plan.addresses, **plan.policies}
        return sorted(_short(name) if item is not None else f"-{_short(name)}" for name, item in made.items())


def _short(name: str) -> str:
    return name.removeprefix("Kubernetes/networking.istio.io/WorkloadEntry/")
