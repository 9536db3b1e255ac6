"""The environment as a whole: which variables are settings, which are refused, and which do nothing here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbone.errors import ConfigurationError
from ztunnel.environment import (
    Variable,
    exactly_true,
    invalid,
    parse_grace,
    parse_url,
    parse_variable,
    prefixed,
    read_headers,
    read_json_metadata,
)
from ztunnel.logscopes import read_levels
from ztunnel.proxyconfig import read_dns, read_proxy_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    import attrs

    Fields = Iterable[attrs.Attribute[Any]]

__all__ = ["read_settings", "supported_variables"]

_MORE = [
    Variable("ISTIO_META_CLUSTER_ID", "unset", "cluster named to the control plane; wins over `CLUSTER_ID`"),
    Variable("KUBERNETES_SERVICE_HOST", "unset", "present: istiod's address in the cluster is the default"),
    Variable("XDS_HEADER_<name>", "unset", "a further header for discovery"),
    Variable("CA_HEADER_<name>", "unset", "a further header for the CA"),
    Variable(
        "TERMINATION_GRACE_PERIOD_SECONDS", "unset", "drain deadline from it, unless that is set: n - 5, at least 1"
    ),
    Variable(
        "PROXY_CONFIG",
        "unset",
        "YAML of `discoveryAddress`, `proxyAdminPort`, `statsPort`, `concurrency`, `proxyMetadata`;"
        " wins over `defaultConfig` of `./etc/istio/config/mesh`",
    ),
    Variable(
        "ISTIO_META_<key>",
        "unset",
        "proxy metadata, told to discovery; `ISTIO_META_ISTIO_VERSION` is the version label",
    ),
    Variable("ISTIO_META_DNS_CAPTURE", "true", "anything but `true` turns the DNS proxy off"),
    Variable(
        "ISTIO_META_DNS_PROXY_ADDR", "localhost:15053", "where the DNS proxy listens: `localhost:port`, `ip:port`"
    ),
    Variable("ISTIO_METAJSON_<key>", "unset", "the same, parsed as JSON"),
]

_REFUSED: dict[str, tuple[Callable[[str], bool], str]] = {
    "TLS12_ENABLED": (exactly_true, "only TLS 1.3 is spoken; unset it"),
    "COMPLIANCE_POLICY": (bool, "its key exchange cannot be promised here; unset it"),
    "FAKE_CA": (exactly_true, "there is no fake CA; make certificates with 'hbone dev-ca', or run miniistiod"),
}
"""Variables that change who is trusted and that we cannot honour: value -> is it asked for, and why not."""

_IDLE: dict[str, tuple[Callable[[str], bool], str]] = {
    "INPOD_UDS": (bool, "it belongs to shared mode"),
    "INPOD_PORT_REUSE": (bool, "it belongs to shared mode"),
    "ZTUNNEL_RESOURCE_CPU_REQUEST": (bool, "only `ZTUNNEL_WORKER_THREADS` asks for more processes than one"),
}
"""Variables of ztunnel that do nothing here and need not."""


def supported_variables(fields: Fields) -> list[Variable]:
    """Every environment variable that is read: those of `fields` in their order, then those that are no field."""
    found = [
        Variable(field.metadata["env"], field.metadata["shown"], field.metadata["meaning"])
        for field in fields
        if "env" in field.metadata
    ]
    refused = [Variable(name, "unset", f"refused when set: {why}") for name, (_, why) in _REFUSED.items()]
    idle = [Variable(name, "unset", f"ignored with a warning: {why}") for name, (_, why) in _IDLE.items()]
    return found + _MORE + refused + idle


def read_settings(fields: Fields, environ: Mapping[str, str], directory: Path) -> dict[str, Any]:
    """What the environment sets, by the names of `fields`.

    Args:
        fields: What can be set, made by `setting`.
        environ: The environment.
        directory: Where `etc/istio/config/mesh` is looked for.

    Raises:
        ConfigurationError: one sentence that names the variable and its value.
    """
    values: dict[str, Any] = {}
    warnings: list[str] = []
    proxy = read_proxy_config(environ, directory)
    metadata: dict[str, str] = proxy["proxyMetadata"]
    metadata.update(prefixed(environ, "ISTIO_META_"))

    for name, (asked, why) in _REFUSED.items():
        if asked(environ.get(name, "")):
            raise invalid(name, environ[name], why)
    for name, (asked, why) in _IDLE.items():
        if asked(environ.get(name, "")):
            warnings.append(f"{name} is set and does nothing here: {why}")

    istiod = "istiod.istio-system.svc" if "KUBERNETES_SERVICE_HOST" in environ else "localhost"
    values["ca_address"] = f"https://{istiod}:15012"
    values["xds_address"] = f"https://{istiod}:15012"
    if proxy["discoveryAddress"]:
        try:
            values["xds_address"] = parse_url(proxy["discoveryAddress"])
        except ValueError as error:
            raise ConfigurationError(f"discoveryAddress is {proxy['discoveryAddress']!r} ({error})") from None
    for key, name in (("proxyAdminPort", "admin_port"), ("statsPort", "stats_port")):
        if proxy[key] is not None:
            values[name] = proxy[key]
    if proxy["concurrency"] is not None:
        values["worker_threads"] = str(proxy["concurrency"])
    values |= read_dns(metadata)
    if "TERMINATION_GRACE_PERIOD_SECONDS" in environ:
        values["drain_deadline"] = parse_variable(environ, "TERMINATION_GRACE_PERIOD_SECONDS", parse_grace)

    for field in fields:
        variable = field.metadata.get("env", "")
        if variable in environ:
            secret = field.metadata["secret"]
            values[field.name] = parse_variable(environ, variable, field.metadata["parse"], field, secret=secret)
    if "CLUSTER_ID" in metadata:
        values["cluster_id"] = metadata["CLUSTER_ID"]
    warnings += read_levels(environ.get("RUST_LOG", ""))[1]
    if "local_xds" in values and "local_xds_path" in values:
        raise ConfigurationError("LOCAL_XDS and LOCAL_XDS_PATH are both set; keep one of them")
    if values.get("enable_proxy") is False:
        raise ConfigurationError(
            "ENABLE_PROXY is false, and ztunnel run without any servers enabled does nothing; unset it"
        )
    if values.get("on_demand") and values.get("dns_proxy", True):
        raise ConfigurationError(
            "XDS_ON_DEMAND and the DNS proxy are both on, which needs all names; set ISTIO_META_DNS_CAPTURE=false"
        )
    values["xds_headers"] = read_headers(environ, "XDS_HEADER_")
    values["ca_headers"] = read_headers(environ, "CA_HEADER_")
    json_metadata, complaints = read_json_metadata(environ)
    return values | {
        "proxy_metadata": metadata,
        "json_metadata": json_metadata,
        "warnings": (*warnings, *complaints),
    }
