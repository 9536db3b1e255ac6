"""Settings of the control plane, each with its unit, default and limits."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from pathlib import Path
from typing import Any

import attrs

from hbone.errors import ConfigurationError
from miniistiod import ca
from miniistiod.watch import Debounce

__all__ = ["Address", "Config", "parse_address"]

_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9.]{0,251}[A-Za-z0-9])?")


@attrs.frozen
class Address:
    """Where to listen; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, default_port: int) -> Address:
    """`HOST:PORT`, `HOST`, `[IPV6]:PORT` or `:PORT`.

    Raises:
        ConfigurationError: another form, or a port beyond 65535.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]*))(?::([0-9]{1,5}))?", text)
    if not text or match is None or (match[3] is not None and int(match[3]) > 65_535):
        raise ConfigurationError(f"{text!r} is not an address; write HOST:PORT, for example 10.0.0.1:{default_port}")
    host = match[1] or match[2] or "0.0.0.0"  # every address: the caller asked for none in particular
    return Address(host, default_port if match[3] is None else int(match[3]))


def _names(_: object, attribute: attrs.Attribute[Any], value: tuple[str, ...]) -> None:
    for name in value:
        if _NAME.fullmatch(name):
            continue
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise ConfigurationError(
                f"{attribute.name} has {name!r}, which is neither a host name nor an address"
            ) from None


def _lifetimes(_: object, attribute: attrs.Attribute[Any], value: datetime.timedelta) -> None:
    if not datetime.timedelta(seconds=1) <= value <= ca.MAX_LIFETIME:
        raise ConfigurationError(
            f"{attribute.name} is {value}; it must be from a second to {ca.MAX_LIFETIME.days} days"
        )


def _grace(_: object, attribute: attrs.Attribute[Any], value: datetime.timedelta) -> None:
    if not datetime.timedelta(0) <= value <= datetime.timedelta(days=1):
        raise ConfigurationError(f"{attribute.name} is {value}; it must be from 0 to a day")


@attrs.frozen(kw_only=True)
class Config:
    """What a control plane is made of."""

    config_dir: Path = attrs.field(converter=Path)
    """Directory of documents, watched."""
    state_dir: Path = attrs.field(converter=Path)
    """Private directory of the state."""
    init: bool = False
    """Make the state with a new root if there is none."""
    trust_domain: str | None = None
    """With `init`: the mesh's trust domain, else that of meshconfig.yaml, else cluster.local. Without: must agree."""
    ca_dir: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """Private directory of a CA in files, with Istio's names; else the state has its own root."""
    issuers: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    """File of issuers whose tokens (OIDC) are believed."""
    listen: Address = Address("0.0.0.0", 15012)
    """Discovery and CA, over TLS."""
    monitoring: Address = Address("127.0.0.1", 15014)
    """Metrics and readiness, plaintext."""
    names: tuple[str, ...] = attrs.field(default=(), converter=tuple, validator=_names)
    """Further names and addresses of the server's certificate."""
    default_lifetime: datetime.timedelta = attrs.field(default=ca.DEFAULT_LIFETIME, validator=_lifetimes)
    """Of a certificate when none is asked for."""
    max_lifetime: datetime.timedelta = attrs.field(default=ca.MAX_LIFETIME, validator=_lifetimes)
    """More is an error, not cut."""
    cluster_id: str = "Kubernetes"
    """First part of a workload's uid; stock ztunnels expect this default."""
    cluster_domain: str = "cluster.local"
    """Suffix of the host names of Service documents."""
    registration_grace: datetime.timedelta = attrs.field(default=datetime.timedelta(seconds=10), validator=_grace)
    """How long a machine that registered itself may be away before it is taken out of the mesh."""
    debounce: Debounce = attrs.Factory(Debounce)
    """When a change of the documents counts."""

    def __attrs_post_init__(self) -> None:
        if self.default_lifetime > self.max_lifetime:
            object.__setattr__(self, "default_lifetime", self.max_lifetime)
        if os.path.realpath(self.config_dir) == os.path.realpath(self.state_dir):
            raise ConfigurationError("config_dir and state_dir are the same directory; the state must be a private one")
