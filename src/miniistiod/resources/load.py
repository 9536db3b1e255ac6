"""Texts of files -> one set of documents, with everything that is wrong with them.

A set can be changed file by file; what that costs goes with the files that changed, not with those that are there.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import attrs

from miniistiod.resources import gate, gateway, kubernetes, networking, security
from miniistiod.resources import metadata as common
from miniistiod.resources.findings import Finding, Findings, Severity
from miniistiod.resources.meshconfig import MESH_CONFIG, mesh_config
from miniistiod.resources.model import KubernetesService, MeshConfig, Resource, ServiceEntry
from miniistiod.resources.reader import Reader
from miniistiod.resources.tree import Mapping as Tree
from miniistiod.resources.tree import Value, documents, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from miniistiod.resources.model import Metadata

__all__ = ["Delta", "Loader", "ResourceSet", "load"]

MAX_DOCUMENTS = 200_000
"""Documents of one mesh."""
REVISION_LABEL = "istio.io/rev"
REVISION = "default"
"""Documents of another revision are for another control plane."""

_NETWORKING = ("networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3")
_SECURITY = ("security.istio.io/v1", "security.istio.io/v1beta1")
_GATEWAY = ("gateway.networking.k8s.io/v1", "gateway.networking.k8s.io/v1beta1")
_ROUTE = (*_GATEWAY, "gateway.networking.k8s.io/v1alpha2")
_KINDS: dict[str, tuple[tuple[str, ...], Callable[[Reader, Metadata], Resource | None]]] = {
    "ServiceEntry": (_NETWORKING, networking.service_entry),
    "WorkloadEntry": (_NETWORKING, networking.workload_entry),
    "WorkloadGroup": (_NETWORKING, networking.workload_group),
    "AuthorizationPolicy": (_SECURITY, security.authorization_policy),
    "PeerAuthentication": (_SECURITY, security.peer_authentication),
    "Namespace": (("v1",), kubernetes.namespace),
    "Service": (("v1",), kubernetes.service),
    "EndpointSlice": (("discovery.k8s.io/v1",), kubernetes.endpoint_slice),
    "Gateway": (_GATEWAY, gateway.gateway),
    "GatewayClass": (_GATEWAY, gateway.gateway_class),
    **dict.fromkeys(("HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute"), (_ROUTE, gateway.route)),
}
_CLUSTER_WIDE = ("Namespace", "GatewayClass")
_REVISIONED = ("ServiceEntry", "WorkloadEntry", "AuthorizationPolicy", "PeerAuthentication")
_NOT_YET = (
    *("ReferenceGrant", "DestinationRule", "VirtualService", "Sidecar", "EnvoyFilter", "RequestAuthentication"),
    *("Telemetry", "WasmPlugin", "ProxyConfig"),
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


@attrs.frozen(kw_only=True)
class Delta:
    """How a set of documents differs from the one in force."""

    changed: Mapping[tuple[str, str, str], Resource]
    """New or different, by kind, namespace and name."""
    before: Mapping[tuple[str, str, str], Resource | None]
    """What each of these was, None if it was not there; and those that are gone."""
    mesh: MeshConfig | None = None
    """The new settings; None when they are the old ones."""

    @property
    def removed(self) -> list[tuple[str, str, str]]:
        """Documents that are gone."""
        return [key for key in self.before if key not in self.changed]


@attrs.frozen(eq=False)
class _File:
    resources: tuple[Resource, ...]
    findings: tuple[Finding, ...]
    errors: int


_NOTHING = _File((), (), 0)


def load(files: Mapping[str, str]) -> ResourceSet:
    """Read every document of `files`, path to text.

    Returns:
        The set; not to be used while it has `errors`.
    """
    return Loader().load(files)


class Loader:
    """The newest documents, file by file."""

    def __init__(self) -> None:
        self.documents: dict[tuple[str, str, str], Resource] = {}
        """By kind, namespace and name; of those that are defined twice, the first."""
        self.mesh = MeshConfig()
        self.warnings = 0
        """How many there are of them within files."""
        self.services: dict[tuple[str, str, str], Resource] = {}
        """The documents that can have addresses of services."""
        self._files: dict[str, _File] = {}
        self._digests: dict[str, bytes] = {}
        self._wrong: set[str] = set()
        """Files with errors."""
        self._configs: dict[str, tuple[MeshConfig, tuple[Finding, ...]]] = {}
        self._twice: dict[tuple[str, str, str], list[Resource]] = {}
        self._noted: dict[str, tuple[Finding, ...]] = {}
        """Findings of the files that have any."""
        self._watched: dict[tuple[str, str, str], Resource] = {}
        self._before: dict[tuple[str, str, str], Resource | None] = {}
        """What changed since `taken`, and what it was then."""
        self._mesh_before = self.mesh

    def load(self, files: Mapping[str, str]) -> ResourceSet:
        """All documents of `files`, and nothing else. See the function of this name."""
        self.update(files, [path for path in self.paths if path not in files])
        resources = [item for path in sorted(self._files) for item in self._files[path].resources]
        chosen = tuple(item for item in resources if self.documents[item.meta.key] is item)
        return ResourceSet(resources=chosen, mesh=self.mesh, findings=tuple(self.findings()))

    @property
    def paths(self) -> Iterable[str]:
        """Files that were read."""
        return self._digests.keys()

    def update(self, changed: Mapping[str, str], removed: Iterable[str] = ()) -> list[str]:
        """Read some files again, and forget others.

        Returns:
            Those of which the text is another, or which are gone.
        """
        different: list[str] = []
        for path in list(removed):
            if self._digests.pop(path, None) is None:
                continue
            different.append(path)
            if self._configs.pop(path, None) is None:
                self._replace(path, _NOTHING)
        for path, text in changed.items():
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if self._digests.get(path) == digest:
                continue
            self._digests[path] = digest
            different.append(path)
            if path.rpartition("/")[2] == MESH_CONFIG:
                collected = Findings(path)
                config = mesh_config(documents(text, collected), collected)
                self._configs[path] = (config, tuple(collected.items))
            else:
                self._replace(path, _file(path, text))
        self.mesh = self._configs[min(self._configs)][0] if self._configs else MeshConfig()
        return different

    def _replace(self, path: str, new: _File) -> None:
        old = self._files.pop(path, _NOTHING)
        for resource in old.resources:
            self._forget(resource)
        for resource in new.resources:
            self._add(resource)
        if new is not _NOTHING:
            self._files[path] = new
        self.warnings += len(new.findings) - len(old.findings)
        self._noted.pop(path, None)
        if new.findings:
            self._noted[path] = new.findings
        (self._wrong.add if new.errors else self._wrong.discard)(path)

    def _forget(self, resource: Resource) -> None:
        key = resource.meta.key
        same = self._twice.get(key)
        if same is None:
            self._set(key, None)
            return
        same.remove(resource)
        self._set(key, same[0])
        if len(same) == 1:
            del self._twice[key]

    def _add(self, resource: Resource) -> None:
        key = resource.meta.key
        first = self.documents.get(key)
        if first is None:
            self._set(key, resource)
            return
        same = self._twice.setdefault(key, [first])
        same.append(resource)
        same.sort(key=lambda item: (item.meta.path, item.meta.position))
        self._set(key, same[0])

    def _set(self, key: tuple[str, str, str], resource: Resource | None) -> None:
        self._before.setdefault(key, self.documents.get(key))
        self._watched.pop(key, None)
        self.services.pop(key, None)
        if resource is None:
            del self.documents[key]
            return
        self.documents[key] = resource
        if isinstance(resource, ServiceEntry | KubernetesService):
            self.services[key] = resource
        if gate.concerns(resource):
            self._watched[key] = resource

    def findings(self) -> list[Finding]:
        """Everything that is wrong, in the order of paths; what is wrong between documents comes last."""
        found: list[Finding] = []
        for path in sorted(self._configs):
            found += self._configs[path][1]
            if path != min(self._configs):
                text = f"a second {MESH_CONFIG}, besides {min(self._configs)}"
                found.append(Finding(path, 0, Severity.ERROR, text, "keep one of them"))
        for path in sorted(self._noted):
            found += self._noted[path]
        for same in self._twice.values():
            first = same[0].meta
            for other in same[1:]:
                text = f"{_title(other)} is defined a second time, first at {first.path}:{first.line}"
                found.append(Finding(other.meta.path, other.meta.line, Severity.ERROR, text, "keep one of them"))
        if len(self.documents) > MAX_DOCUMENTS:
            found.append(Finding("", 0, Severity.ERROR, f"more than {MAX_DOCUMENTS} documents", "split the mesh"))
        return found + gate.findings(self._watched.values(), self.documents, self.mesh)

    def errors(self) -> list[Finding]:
        """Findings for which the documents must not be used. Does not look at files that are right."""
        if self._wrong or self._twice or len(self._configs) > 1 or len(self.documents) > MAX_DOCUMENTS:
            found = self.findings()
        else:
            found = [item for _, noted in self._configs.values() for item in noted]
            found += gate.findings(self._watched.values(), self.documents, self.mesh)
        return [item for item in found if item.severity is Severity.ERROR]

    def delta(self) -> Delta:
        """How the documents differ from those that are in force."""
        changed: dict[tuple[str, str, str], Resource] = {}
        before: dict[tuple[str, str, str], Resource | None] = {}
        for key, old in self._before.items():
            new = self.documents.get(key)
            if new != old:
                before[key] = old
                if new is not None:
                    changed[key] = new
        mesh = None if self.mesh == self._mesh_before else self.mesh
        return Delta(changed=changed, before=before, mesh=mesh)

    def taken(self) -> None:
        """The documents are in force now."""
        self._before, self._mesh_before = {}, self.mesh


def _file(path: str, text: str) -> _File:
    findings = Findings(path)
    values = [item for value in documents(text, findings) for item in _items(value, findings)]
    found = [_document(value, path, position, findings) for position, value in enumerate(values)]
    return _File(tuple(item for item in found if item is not None), tuple(findings.items), findings.errors)


def _items(value: Value, findings: Findings) -> list[Value]:
    """A document, or those of a list as kubectl writes it."""
    kind = value.items.get("kind") if isinstance(value, Tree) else None
    if not isinstance(value, Tree) or kind is None or getattr(kind[1], "text", "") != "List":
        return [value]
    reader = Reader(value, "", findings)
    reader.ignore("apiVersion", "kind", "metadata")
    items = [item for _, item in reader.elements("items") or ()]
    reader.finish()
    return items


def _title(resource: Resource) -> str:
    meta = resource.meta
    return f"{meta.kind} {meta.namespace}/{meta.name}" if meta.namespace else f"{meta.kind} {meta.name}"


def _document(value: Value, path: str, position: int, findings: Findings) -> Resource | None:
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
            f"a {kind} is not handled, so it would have no effect",
            f"remove the document (handled: {', '.join(sorted(_KINDS))})",
        )
        return None
    if kind not in _KINDS:
        findings.error(kind_line, f"the kind {kind!r} is not known", f"use one of {', '.join(sorted(_KINDS))}")
        return None
    versions, read = _KINDS[kind]
    if version not in versions:
        shown = "missing" if version is None else repr(version)
        findings.error(version_line, f"the apiVersion of a {kind} is {shown}", f"write {versions[0]}")
        return None
    meta = common.metadata(reader, kind, path, position, namespaced=kind not in _CLUSTER_WIDE)
    if meta is None:
        return None
    revision = meta.labels.get(REVISION_LABEL, REVISION)
    if kind in _REVISIONED and revision != REVISION:
        findings.warning(
            meta.line,
            f"{kind} {meta.namespace}/{meta.name} is ignored: its label {REVISION_LABEL} is {revision!r}",
            "remove the label to have it in force here",
        )
        return None
    resource = read(reader, meta)
    reader.finish()
    return resource
