"""Which names of the mesh a DNS name may mean: expansions inside the cluster, search domains, wildcards.

Names are text in lower case without a trailing dot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Alias", "aliases", "expansions", "has_domain", "normal", "strip_domain", "wildcards"]


@attrs.frozen
class Alias:
    """A name that is looked up instead of the one that was asked for."""

    name: str
    stripped: str | None = None
    """The name that was asked for without its search domain; None when none was taken away."""


def normal(name: str) -> str:
    """`name` as it is compared: lower case, without a trailing dot."""
    return name.lower().removesuffix(".")


def has_domain(name: str, domain: str) -> bool:
    """Whether `name` lies below `domain`; no name lies below itself."""
    return bool(domain) and name.endswith(domain) and name[: -len(domain)].endswith(".")


def strip_domain(name: str, domain: str) -> str | None:
    """`name` without `domain` at its end; None when it does not lie below it, or nothing is left."""
    return name[: -len(domain) - 1] or None if has_domain(name, domain) else None


def expansions(name: str, namespace: str, cluster_domain: str) -> Iterator[str]:
    """The whole names that a short name of Kubernetes may stand for, likeliest first.

    Source: Istio's ztunnel, DNS names; Kubernetes DNS specification.
    """
    labels = name.count(".") + 1
    ends_in_svc = name.endswith(".svc")
    if labels == 1:
        yield f"{name}.{namespace}.svc.{cluster_domain}"
    elif labels == 2:
        yield f"{name}.svc.{cluster_domain}"
        yield f"{name}.{namespace}.svc.{cluster_domain}"
    elif labels == 3:
        if ends_in_svc:
            yield f"{name}.{cluster_domain}"
        yield f"{name}.svc.{cluster_domain}"
    elif labels == 4 and ends_in_svc:
        yield f"{name}.{cluster_domain}"


def aliases(name: str, namespace: str, cluster_domain: str, search: Iterable[str]) -> Iterator[Alias]:
    """Every name that `name` may mean, in the order in which they are tried, each once.

    Args:
        name: What was asked for.
        namespace: Of the client.
        cluster_domain: DNS domain of the cluster.
        search: Search domains of the client, one of which its resolver may have put behind the name.
    """
    seen = {name}
    yield Alias(name)
    for expanded in expansions(name, namespace, cluster_domain):
        if expanded not in seen:
            seen.add(expanded)
            yield Alias(expanded)
    for domain in search:
        short = strip_domain(name, domain)
        if short is None:
            continue
        for candidate in (short, *expansions(short, namespace, cluster_domain)):
            if candidate not in seen:
                seen.add(candidate)
                yield Alias(candidate, short)


def wildcards(name: str) -> Iterator[str]:
    """The wildcards that cover `name`, most specific first: of `a.b.c` these are `*.b.c` and `*.c`."""
    dot = name.find(".")
    while dot >= 0:
        yield f"*{name[dot:]}"
        dot = name.find(".", dot + 1)
