"""Whose log lines have levels of their own: our scopes, and ztunnel's names for them."""

from __future__ import annotations

from typing import Final

from hbone.daemon.loglevels import Levels, Scopes, UnknownScope
from hbone.errors import ConfigurationError

__all__ = ["SCOPES", "read_levels"]

SCOPES: Final = Scopes(
    names=(
        "access",
        "dns",
        "hbone.daemon.http",
        "ztunnel.app",
        "ztunnel.control.cache",
        "ztunnel.control.discovery",
        "ztunnel.control.revocation",
        "ztunnel.control.svids",
        "ztunnel.dataplane",
        "ztunnel.embed",
        "ztunnel.membership",
        "ztunnel.mesh.rbac",
        "ztunnel.takeover",
        "ztunnel.workers",
    ),
    aliases={
        "ztunnel.admin": ("hbone.daemon.http",),
        "ztunnel.dns": ("dns",),
        "ztunnel.identity": ("ztunnel.control.svids", "ztunnel.control.revocation"),
        "ztunnel.proxy": ("ztunnel.dataplane",),
        "ztunnel.rbac": ("ztunnel.mesh.rbac",),
        "ztunnel.state": ("ztunnel.membership", "ztunnel.control.cache"),
        "ztunnel.tls": ("ztunnel.control.svids", "ztunnel.control.revocation"),
        "ztunnel.xds": ("ztunnel.control.discovery",),
    },
)


def read_levels(text: str) -> tuple[Levels, list[str]]:
    """Levels of the environment, and a sentence for each part that is for a scope that is not here.

    Such a part is no error, because an environment for Istio's ztunnel may name libraries of its own.

    Raises:
        ValueError: it cannot be read.
    """
    levels, complaints = Levels(), []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            levels = levels.plus(Levels.parse(part, SCOPES))
        except UnknownScope:
            complaints.append(f"RUST_LOG part {part!r} does nothing here: no log scope has this name")
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
    return levels, complaints
