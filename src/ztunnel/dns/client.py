"""Addresses of a host name, asked of the host's resolver with the mark of our own packets.

The C library's questions bear no mark, so where a rule captures DNS they come back to our own DNS proxy, and that
answers a name of the mesh with the address of its service instead of the host behind it.
"""

from __future__ import annotations

import ipaddress
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from ztunnel.dns.names import normal
from ztunnel.dns.resolvconf import Resolvers
from ztunnel.errors import ResolutionFailed
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.mesh.address import IpAddress

__all__ = ["MarkedLookup", "in_hosts"]

HOSTS: Final = Path("/etc/hosts")
_MAX_HOSTS: Final = 1 << 20


class MarkedLookup:
    """Asks for A and AAAA, after a look at /etc/hosts.

    Args:
        config: mark, source and resolvers.
        resolvers: whom to ask, for tests.
        hosts: the file of hosts.
    """

    def __init__(self, config: Config, *, resolvers: Resolvers | None = None, hosts: Path = HOSTS) -> None:
        from ztunnel.dns.forward import Forwarder  # brings dnspython, which is needed when a name is asked for

        self._ipv6 = config.ipv6_enabled
        self._hosts = hosts
        self._forwarder = Forwarder(
            resolvers or Resolvers(time.monotonic, servers=config.dns_servers),
            mark=config.packet_mark,
            source=config.bind_address,
            own=[(ip, config.dns_port) for ip in config.dns_hosts],
        )

    async def __call__(self, hostname: str) -> list[IpAddress]:
        """Addresses of a name; empty for a name that has none.

        Raises:
            ResolutionFailed: no resolver answers, or one says that there is no such name.
        """
        known = in_hosts(hostname, self._hosts)
        if known:
            await trio.lowlevel.checkpoint()
            return known
        found: dict[str, list[IpAddress]] = {}
        failures: list[ResolutionFailed] = []

        async def ask(kind: str) -> None:
            try:
                found[kind] = await self._ask(hostname, kind)
            except ResolutionFailed as error:
                failures.append(error)

        async with trio.open_nursery() as nursery:
            for kind in ("A", "AAAA") if self._ipv6 else ("A",):
                nursery.start_soon(ask, kind)
        if not found:
            raise failures[0]
        return [ip for kind in ("A", "AAAA") for ip in found.get(kind, ())]

    async def _ask(self, hostname: str, kind: str) -> list[IpAddress]:
        import dns.exception
        import dns.flags
        import dns.message
        import dns.rcode
        import dns.rdatatype

        from ztunnel.dns.forward import Unanswered
        from ztunnel.dns.wire import read

        try:
            question = dns.message.make_query(hostname, kind, use_edns=0, payload=1232, id=random.getrandbits(16))
            query = read(question.to_wire())
            assert query is not None
            reply = dns.message.from_wire(await self._forwarder.ask(query, datagram=True))
            if reply.flags & dns.flags.TC:
                reply = dns.message.from_wire(await self._forwarder.ask(query, datagram=False))
        except (Unanswered, dns.exception.DNSException, UnicodeError) as error:
            raise ResolutionFailed(hostname, str(error) or type(error).__name__) from None
        if reply.rcode() != dns.rcode.NOERROR:
            raise ResolutionFailed(hostname, f"the resolver says {dns.rcode.to_text(reply.rcode())}")
        wanted = dns.rdatatype.from_text(kind)
        return [parse_ip(record.to_text()) for rrset in reply.answer if rrset.rdtype == wanted for record in rrset]


def in_hosts(hostname: str, path: Path = HOSTS) -> list[IpAddress]:
    """Addresses that the file gives a name. Source: hosts(5)."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_MAX_HOSTS).splitlines()
    except OSError:
        return []
    wanted = normal(hostname)
    found: list[IpAddress] = []
    for line in lines:
        address, *names = line.partition("#")[0].split() or [""]
        if wanted in map(normal, names):
            try:
                found.append(ipaddress.ip_address(address.partition("%")[0]))
            except ValueError:
                continue
    return list(dict.fromkeys(found))
