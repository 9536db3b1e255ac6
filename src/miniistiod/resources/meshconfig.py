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
_SIDECARS = (
    *("accessLogEncoding", "accessLogFile", "accessLogFormat", "connectTimeout", "defaultConfig", "defaultProviders"),
    *("defaultHttpRetryPolicy", "disableEnvoyListenerLog", "dnsRefreshRate", "enableAutoMtls", "enableTracing"),
    *("enableEnvoyAccessLogService", "enablePrometheusMerge", "extensionProviders", "h2UpgradePolicy"),
    *("inboundClusterStatName", "ingressClass", "ingressControllerMode", "ingressSelector", "ingressService"),
    *("outboundClusterStatName", "pathNormalization", "protocolDetectionTimeout", "proxyHttpPort"),
    *("proxyInboundListenPort", "proxyListenPort", "serviceSettings", "tcpKeepalive"),
)
"""Istio's settings of sidecars and gateways. Nobody relies on them for who may talk to whom."""
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
    for name in _SIDECARS:
        value = reader.take(name)
        if value is not None:
            reader.warning(value.line, f"{name} is about sidecars and gateways, and has no effect here", "remove it")
    _refuse_what_is_not_enforced(reader)
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


def _refuse_what_is_not_enforced(reader: Reader) -> None:
    for name, why, fix in (
        (
            "trustDomainAliases",
            "has no effect in an ambient mesh: names of policies are compared as written",
            "remove it",
        ),
        ("caCertificates", "would have others believed, and is not done", "give the roots to 'run --ca-dir'"),
        ("meshMTLS", "has no effect: ztunnels speak TLS 1.3", "remove it"),
        ("tlsDefaults", "has no effect: ztunnels speak TLS 1.3", "remove it"),
        ("serviceScopeConfigs", "is about several clusters, and this is one", "remove it"),
        ("discoverySelectors", "is not applied: every document counts", "take the others out of the directory"),
    ):
        reader.refuse(name, why, fix)
    for name in ("outboundTrafficPolicy", "inboundTrafficPolicy"):
        policy = reader.mapping(name)
        if policy is None:
            continue
        mode = policy.text("mode")
        if mode == "REGISTRY_ONLY":
            policy.error(
                policy.line, f"{name}.mode REGISTRY_ONLY is not enforced by ztunnels", "remove it, use a firewall"
            )


def _rule(reader: Reader) -> VisibilityRule:
    chosen = reader.choice("visibility", _VISIBILITIES)
    inner = reader.mapping("namespaceSelector")
    reader.finish()
    if chosen is None or inner is None:
        reader.require("namespaceSelector and visibility", "write {namespaceSelector: {}, visibility: NAMESPACE}")
        return VisibilityRule(selector=LabelSelector(), visibility=Visibility.NONE)  # not used: it is an error
    return VisibilityRule(selector=common.label_selector(inner), visibility=Visibility(chosen))
