"""The mesh file and PROXY_CONFIG. Source: Istio's ProxyConfig, as far as ztunnel reads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbone.errors import ConfigurationError
from ztunnel.environment import MAX_WORKERS, parse_address, parse_port

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MESH_FILE", "read_dns", "read_proxy_config"]

MESH_FILE = Path("etc/istio/config/mesh")
"""Where the mesh configuration is looked for, from the working directory."""


def read_proxy_config(environ: Mapping[str, str], directory: Path) -> dict[str, Any]:
    """The mesh file's `defaultConfig`, overridden by PROXY_CONFIG key by key. Unknown keys are ignored, as in Istio."""
    merged: dict[str, Any] = dict.fromkeys(("discoveryAddress", "proxyAdminPort", "statsPort", "concurrency"))
    merged["proxyMetadata"] = {}
    path = directory / MESH_FILE
    try:
        mesh = _mapping(path.read_text(), str(path))
    except FileNotFoundError:
        mesh = {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    default = mesh.get("defaultConfig")
    sources = [(f"{path}: defaultConfig", {} if default is None else default)]
    if "PROXY_CONFIG" in environ:
        sources.append(("PROXY_CONFIG", _mapping(environ["PROXY_CONFIG"], "PROXY_CONFIG")))
    for where, given in sources:
        if not isinstance(given, dict):
            raise ConfigurationError(f"{where} is a {type(given).__name__}; expected keys and values")
        _merge(merged, given, where)
    return merged


def _merge(merged: dict[str, Any], given: dict[Any, Any], where: str) -> None:
    if (address := given.get("discoveryAddress")) is not None:
        if not isinstance(address, str):
            raise ConfigurationError(f"{where}: discoveryAddress is {address!r}; expected host:port")
        merged["discoveryAddress"] = address
    for key in ("proxyAdminPort", "statsPort"):
        if (port := given.get(key)) is not None:
            if type(port) is not int or not 0 <= port <= 65_535:
                raise ConfigurationError(f"{where}: {key} is {port!r}; expected a port from 0 to 65535")
            merged[key] = port
    if (count := given.get("concurrency")) is not None:
        if type(count) is not int or not 0 <= count <= MAX_WORKERS:
            raise ConfigurationError(
                f"{where}: concurrency is {count!r}; expected a number of workers up to {MAX_WORKERS}, 0 for one a core"
            )
        merged["concurrency"] = count
    if (metadata := given.get("proxyMetadata")) is not None:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ConfigurationError(f"{where}: proxyMetadata must map names to strings; quote numbers and booleans")
        merged["proxyMetadata"].update({str(key).removeprefix("ISTIO_META_"): value for key, value in metadata.items()})


def _mapping(text: str, where: str) -> dict[Any, Any]:
    import yaml  # a megabyte that most hosts do without

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigurationError(f"{where} is not YAML{line}: {getattr(error, 'problem', None) or error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where} is a {type(value).__name__}; expected keys and values")
    return value


def read_dns(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata asks of the DNS proxy: fields of `Config`.

    Raises:
        ConfigurationError: `DNS_PROXY_ADDR` is no address.
    """
    values: dict[str, Any] = {"dns_proxy": metadata.get("DNS_CAPTURE", "true").lower() == "true"}
    address = metadata.get("DNS_PROXY_ADDR")
    if address is not None:
        host, _, port = address.rpartition(":")
        try:
            values["dns_port"] = parse_port(port)
            if host != "localhost":
                values["dns_address"] = parse_address(host[1:-1] if host.startswith("[") else host)
        except ValueError:
            raise ConfigurationError(
                f"failed to parse DNS_PROXY_ADDR: {address!r} is neither localhost:port nor ip:port"
            ) from None
    return values
