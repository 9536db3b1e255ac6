"""`meshconfig.yaml`: what holds for the whole mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miniistiod.resources import metadata as common
from miniistiod.resources.model import LabelSelector, MeshConfig, Visibility, VisibilityRule
from miniistiod.resources.reader import Reader

if TYPE_CHECKING:
    from miniistiod.resources.findings import Findings
    from miniistiod.resources.tree import Value

__all__ = ["MESH_CONFIG", "mesh_config"]

MESH_CONFIG = "meshconfig.yaml"
_VISIBILITIES = [item.value for item in Visibility]


def mesh_config(values: list[Value], findings: Findings) -> MeshConfig:
    """The settings of a file; defaults where it says nothing."""
    if not values:
        return MeshConfig()
    if len(values) > 1:
        findings.error(values[1].line, f"{MESH_CONFIG} has {len(values)} documents", "keep one")
    reader = Reader(values[0], "", findings)
    fields: dict[str, Any] = {}
    trust_domain, root, network = reader.text("trustDomain"), reader.text("rootNamespace"), reader.text("network")
    visibility = reader.mapping("serviceEntryVisibility")
    reader.finish()
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
    if network is not None:
        if not network or "/" not in network:
            fields["network"] = network
        else:
            findings.error(reader.line, f"network is {network!r}", "write a name without '/'")
    if visibility is not None:
        fields["default_visibility"] = Visibility(visibility.choice("defaultVisibility", _VISIBILITIES) or "PUBLIC")
        fields["visibility"] = tuple(_rule(item) for item in visibility.readers("policies") or ())
        visibility.finish()
    return MeshConfig(**fields)


def _rule(reader: Reader) -> VisibilityRule:
    chosen = reader.choice("visibility", _VISIBILITIES)
    inner = reader.mapping("namespaceSelector")
    reader.finish()
    if chosen is None or inner is None:
        reader.require("namespaceSelector and visibility", "write {namespaceSelector: {}, visibility: NAMESPACE}")
        return VisibilityRule(selector=LabelSelector(), visibility=Visibility.NONE)  # not used: it is an error
    return VisibilityRule(selector=common.label_selector(inner), visibility=Visibility(chosen))
