"""Host names of workloads -> addresses, when a connection needs them: by the system's resolver.

The system's resolver keeps nothing and tells no time to live, so an answer is used for a few seconds here: long enough
for a burst of connections to ask once, short enough for every name that moves. Who asks meanwhile waits for the same
answer. A failure is not kept.
"""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING, Final

import trio

from ztunnel.errors import ResolutionFailed
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ztunnel.config import Config
    from ztunnel.mesh.address import IpAddress

__all__ = ["Names", "look_up", "lookup_for", "resolve"]

RESOLVE_SECONDS: Final = 5.0
"""How long an answer may take."""
KEEP_SECONDS: Final = 5.0
"""How long an answer is used."""
_NAMES: Final = 4096


class Names:
    """Answers, for as long as they are used.

    Args:
        clock: seconds, monotonic.
        ipv6: IPv6 addresses count.
        lookup: the addresses of a name; for tests.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        ipv6: bool = True,
        lookup: Callable[[str], Awaitable[list[IpAddress]]] | None = None,
    ) -> None:
        self._clock = clock
        self._ipv6 = ipv6
        self._lookup = lookup or look_up
        self._kept: dict[str, tuple[float, list[IpAddress]]] = {}
        self._asked: dict[str, trio.Event] = {}

    async def resolve(self, hostname: str, hint: IpAddress) -> IpAddress:
        """An address of a name, any of them; one of the hint's family if there is any.

        Raises:
            ResolutionFailed: none within five seconds.
        """
        with trio.move_on_after(RESOLVE_SECONDS):
            while True:
                kept = self._kept.get(hostname)
                if kept is not None and self._clock() < kept[0]:
                    return _pick(kept[1], hint)
                asked = self._asked.get(hostname)
                if asked is None:
                    return _pick(await self._ask(hostname), hint)
                await asked.wait()
        raise ResolutionFailed(hostname, f"no answer within {RESOLVE_SECONDS:g} s")

    async def _ask(self, hostname: str) -> list[IpAddress]:
        done = self._asked[hostname] = trio.Event()
        try:
            found = await self._lookup(hostname)
        finally:
            del self._asked[hostname]
            done.set()
        found = [ip for ip in found if self._ipv6 or ip.version == 4]
        if not found:
            raise ResolutionFailed(hostname)
        if len(self._kept) >= _NAMES:
            self._kept.clear()
        self._kept[hostname] = (self._clock() + KEEP_SECONDS, found)
        return found


def _pick(found: list[IpAddress], hint: IpAddress) -> IpAddress:
    return random.choice([ip for ip in found if ip.version == hint.version] or found)


async def look_up(hostname: str) -> list[IpAddress]:
    """Addresses of a name, by the system's resolver; empty for a name that has none.

    Raises:
        ResolutionFailed: the resolver says so.
    """
    try:
        entries = await trio.socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise ResolutionFailed(hostname, str(exc)) from exc
    return [parse_ip(str(entry[4][0])) for entry in entries]


def lookup_for(config: Config) -> Callable[[str], Awaitable[list[IpAddress]]]:
    """How hosts behind names of the mesh are looked up: past our own DNS proxy, where that may be in the way."""
    if config.packet_mark is None or not config.dns_proxy:
        return look_up
    made: list[Callable[[str], Awaitable[list[IpAddress]]]] = []

    async def marked(hostname: str) -> list[IpAddress]:
        if not made:
            from ztunnel.dns.client import MarkedLookup  # brings dnspython, for the first name only

            made.append(MarkedLookup(config))
        return await made[0](hostname)

    return marked


async def resolve(hostname: str, hint: IpAddress) -> IpAddress:
    """An address of a name, asked for anew.

    Raises:
        ResolutionFailed: none within five seconds.
    """
    return await Names(trio.current_time).resolve(hostname, hint)
