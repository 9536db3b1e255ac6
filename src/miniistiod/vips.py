"""Virtual addresses for services that bring none: the same for a host whatever the order of the documents.

Each host gets a number; its addresses are `240.240.x.y` and `2001:2::n` of that number. The number is the hash of
namespace and host, moved on past those that are taken, and is remembered in the state.

Source: Istio's automatic address allocation for ServiceEntry (the pools).
"""

from __future__ import annotations

import hashlib
import ipaddress
from typing import TYPE_CHECKING

from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from miniistiod.resources.reader import IpAddress

__all__ = ["POOL_SIZE", "addresses_of", "allot", "number_of"]

_V4 = int(ipaddress.IPv4Address("240.240.0.0"))
_V6 = int(ipaddress.IPv6Address("2001:2::"))
POOL_SIZE = 65_534
"""Hosts that can have an automatic address."""


def addresses_of(number: int) -> tuple[ipaddress.IPv4Address, ipaddress.IPv6Address]:
    """The addresses of a number."""
    return ipaddress.IPv4Address(_V4 + number), ipaddress.IPv6Address(_V6 + number)


def number_of(address: IpAddress) -> int | None:
    """The number that an address belongs to, or None when it is outside of the pools."""
    number = int(address) - (_V4 if address.version == 4 else _V6)
    return number if 1 <= number <= POOL_SIZE else None


def allot(
    kept: Mapping[tuple[str, str], int], wanted: Iterable[tuple[str, str]], given: Iterable[IpAddress]
) -> dict[tuple[str, str], int]:
    """Numbers for all wanted hosts.

    Args:
        kept: numbers of before, by namespace and host; a host keeps its own unless a document gives that address
            to another, and one that went away keeps it while the pool has room, so that an address is not soon
            another service's.
        wanted: namespaces and hosts that need one.
        given: addresses that documents name themselves; they win.

    Raises:
        ConfigurationError: more hosts than the pool holds.
    """
    wanted = sorted(set(wanted))
    taken = {number for address in given if (number := number_of(address)) is not None}
    if len(wanted) + len(taken) > POOL_SIZE:
        raise ConfigurationError(
            f"{len(wanted)} hosts need an automatic address and the pool has {POOL_SIZE}; give some spec.addresses"
        )
    result: dict[tuple[str, str], int] = {}
    for key in wanted:
        number = kept.get(key)
        if number is not None and number not in taken:
            result[key] = number
            taken.add(number)
    gone = {key: number for key, number in kept.items() if key not in result and number not in taken}
    if len(taken) + len(gone) + len(wanted) - len(result) > POOL_SIZE:
        gone = {}
    reserved = taken | set(gone.values())
    for key in wanted:
        if key in result:
            gone.pop(key, None)
            continue
        digest = hashlib.sha256("/".join(key).encode()).digest()
        number = int.from_bytes(digest[:8], "big") % POOL_SIZE
        while number + 1 in reserved:
            number = (number + 1) % POOL_SIZE
        result[key] = number + 1
        reserved.add(number + 1)
        gone.pop(key, None)
    return {**gone, **result}
