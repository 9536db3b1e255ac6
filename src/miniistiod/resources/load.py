"""Texts of files -> one set of documents, with everything that is wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from miniistiod.resources import metadata as common
from miniistiod.resources import networking, security
from miniistiod.resources.findings import Finding, Findings, Severity
from miniistiod.resources.model import MeshConfig, Resource
from miniistiod.resources.reader import Reader
from miniistiod.resources.tree import Mapping as Tree
from miniistiod.resources.tree import Value, documents, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MESH_CONFIG", "Loader", "ResourceSet", "load"]

MESH_CONFIG = "meshconfig.yaml"
MAX_DOCUMENTS = 100_000
"""Documents of one mesh."""

_NETWORKING = ("networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3")
_SECURITY = ("security.istio.io/v1", "security.istio.io/v1beta1")
_VERSIONS = {
    "ServiceEntry": _NETWORKING,
    "WorkloadEntry": _NETWORKING,
    "AuthorizationPolicy": _SECURITY,
    "PeerAuthentication": _SECURITY,
    "Namespace": ("v1",),
    "Service": ("v1",),
}
_NOT_YET = (
    *("WorkloadGroup", "Gateway", "GatewayClass", "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute", "ReferenceGrant"),
    *("DestinationRule", "VirtualService", "Sidecar", "EnvoyFilter", "RequestAuthentication", "Telemetry"),
    *("WasmPlugin", "ProxyConfig"),
)

R = TypeVar("R", bound=Resource)


@attrs.frozen(kw_only=True)
class ResourceSet:
    """Documents that belong together, in the order of path and position."""

    resources: tuple[Resource, ...] = ()
    mesh: MeshConfig = attrs.Factory(MeshConfig)
    findings: tuple[Finding, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings for which the set must not be used."""
        return tuple(finding for finding in self.findings if finding.severity is Severity.ERROR)

    def of(self, kind: type[R]) -> list[R]:
        """The documents of one kind."""
        return [resource for resource in self.resources if isinstance(resource, kind)]


def load(files: Mapping[str, str]) -> ResourceSet:
    """Read every document of `files`, path to text.

    Returns:
        The set; not to be used while it has `errors`.
    """
    return Loader().load(files)


class Loader:
    """Reads sets of documents one after the other; a file that did not change is not parsed again."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[str, str, list[Resource], list[Finding]]] = {}

    def load(self, files: Mapping[str, str]) -> ResourceSet:
        """As the function of this name."""
        findings: list[Finding] = []
        mesh = MeshConfig()
        configs = [path for path in sorted(files) if path.rpartition("/")[2] == MESH_CONFIG]
        for path in configs:
            collected = Findings(path)
            mesh = _mesh_config(documents(files[path], collected), collected)
            if path != configs[0]:
                collected.error(0, f"a second {MESH_CONFIG}, besides {configs[0]}", "keep one of them")
            findings.extend(collected.items)
        resources: list[Resource] = []
        seen: dict[tuple[str, str, str], Resource] = {}
        read: dict[str, tuple[str, str, list[Resource], list[Finding]]] = {}
        for path in sorted(files.keys() - configs):
            known = self._read.get(path)
            if known is None or known[:2] != (files[path], mesh.root_namespace):
                known = (files[path], mesh.root_namespace, *_file(path, files[path], mesh.root_namespace))
            read[path] = known
            collected = Findings(path)
            for resource in known[2]:
                other = seen.setdefault(resource.meta.key, resource)
                if other is resource:
                    resources.append(resource)
                    continue
                collected.error(
                    resource.meta.line,
                    f"{_title(resource)} is defined a second time, first at {other.meta.path}:{other.meta.line}",
                    "keep one of them",
                )
            if len(resources) > MAX_DOCUMENTS:
                collected.error(0, f"more than {MAX_DOCUMENTS} documents", "split the mesh")
            findings += [*known[3], *collected.items]
        self._read = read
        return ResourceSet(resources=tuple(resources), mesh=mesh, findings=tuple(findings))


def _file(path: str, text: str, root_namespace: str) -> tuple[list[Resource], list[Finding]]:
    findings = Findings(path)
    found = [
        _document(value, path, position, findings, root_namespace)
        for position, value in enumerate(documents(text, findings))
    ]
    return [resource for resource in found if resource is not None], findings.items


def _title(resource: Resource) -> str:
    meta = resource.meta
    return f"{meta.kind} {meta.namespace}/{meta.name}" if meta.namespace else f"{meta.kind} {meta.name}"


def _document(value: Value, path: str, position: int, findings: Findings, root_namespace: str) -> Resource | None:
    if not isinstance(value, Tree):
        findings.error(value.line, f"the document is {kind_of(value)} instead of a mapping", "begin it with apiVersion")
        return None
    reader = Reader(value, "", findings)
    version_line, kind_line = (value.items.get(key, (value.line,))[0] for key in ("apiVersion", "kind"))
    version, kind = reader.text("apiVersion"), reader.text("kind")
    if kind is None:
        reader.require("kind", "say what it is, for example kind: ServiceEntry")
        return None
    if kind in _NOT_YET:
        findings.error(
            kind_line,
            f"a {kind} is not handled yet, so it would have no effect",
            f"remove the document (handled: {', '.join(sorted(_VERSIONS))})",
        )
        return None
    if kind not in _VERSIONS:
        findings.error(kind_line, f"the kind {kind!r} is not known", f"use one of {', '.join(sorted(_VERSIONS))}")
        return None
    if version not in _VERSIONS[kind]:
        shown = "missing" if version is None else repr(version)
        findings.error(version_line, f"the apiVersion of a {kind} is {shown}", f"write {_VERSIONS[kind][0]}")
        return None
    meta = common.metadata(reader, kind, path, position, namespaced=kind != "Namespace")
    if meta is None:
        return None
    readers: dict[str, Callable[[], Resource | None]] = {
        "ServiceEntry": lambda: networking.service_entry(reader, meta),
        "WorkloadEntry": lambda: networking.workload_entry(reader, meta),
        "Service": lambda: networking.service(reader, meta),
        "Namespace": lambda: networking.namespace(reader, meta),
        "AuthorizationPolicy": lambda: security.authorization_policy(reader, meta),
        "PeerAuthentication": lambda: security.peer_authentication(reader, meta, root_namespace),
    }
    resource = readers[kind]()
    reader.finish()
    return resource


def _mesh_config(values: list[Value], findings: Findings) -> MeshConfig:
    if not values:
        return MeshConfig()
    if len(values) > 1:
        findings.error(values[1].line, f"{MESH_CONFIG} has {len(values)} documents", "keep one")
    reader = Reader(values[0], "", findings)
    trust_domain, root = reader.text("trustDomain"), reader.text("rootNamespace")
    reader.finish()
    fields: dict[str, Any] = {}
    if trust_domain is not None:
        if common.is_object_name(trust_domain.replace("_", "-")):
            fields["trust_domain"] = trust_domain
        else:
            findings.error(
                reader.line, f"trustDomain is {trust_domain!r}", "use lower case letters, digits, '-', '.', '_'"
            )
    if root is not None:
        if common.is_namespace(root):
            fields["root_namespace"] = root
        else:
            findings.error(reader.line, f"rootNamespace is {root!r}", "use lower case letters, digits and '-'")
    return MeshConfig(**fields)
