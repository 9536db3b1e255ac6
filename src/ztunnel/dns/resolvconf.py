"""`/etc/resolv.conf`: which resolver this host asks, and which domains its programs put behind short names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs

from ztunnel.dns.names import normal
from ztunnel.mesh.address import Address, parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["RESOLV_CONF", "ResolvConf", "Resolvers", "parse_resolv_conf"]

RESOLV_CONF: Final = "/etc/resolv.conf"
_PORT: Final = 53
_MAX_SERVERS: Final = 3  # as the C library, whose answers ours are to equal
_MAX_SEARCH: Final = 32
_MAX_BYTES: Final = 1 << 16
_CHECK_SECONDS: Final = 2.0


@attrs.frozen(kw_only=True)
class ResolvConf:
    """Source: resolv.conf(5)."""

    servers: tuple[Address, ...] = ()
    search: tuple[str, ...] = ()
    timeout: float = 5.0
    """Seconds that one try may take."""
    attempts: int = 2
    """How often each server is asked that does not answer."""


def parse_resolv_conf(text: str) -> ResolvConf:
    """Read what we need; what cannot be read is skipped, as every resolver does.

    Source: resolv.conf(5).
    """
    servers: list[Address] = []
    search: tuple[str, ...] = ()
    timeout, attempts = 5.0, 2
    for line in text.splitlines():
        words = line.partition("#")[0].partition(";")[0].split()
        if len(words) < 2:
            continue
        keyword, *values = words
        if keyword == "nameserver":
            try:
                servers.append((parse_ip(values[0]), _PORT))
            except ValueError:
                continue
        elif keyword in {"search", "domain"}:  # the last one counts
            names = (normal(value) for value in (values if keyword == "search" else values[:1]))
            search = tuple(dict.fromkeys(name for name in names if name))[:_MAX_SEARCH]
        elif keyword == "options":
            for value in values:
                name, _, number = value.partition(":")
                if number.isascii() and number.isdecimal():
                    if name == "timeout":
                        timeout = float(min(max(int(number[:6]), 1), 30))
                    elif name == "attempts":
                        attempts = min(max(int(number[:6]), 1), 5)
    return ResolvConf(
        servers=tuple(dict.fromkeys(servers))[:_MAX_SERVERS], search=search, timeout=timeout, attempts=attempts
    )


class Resolvers:
    """The host's resolvers as they are now: the file is read again when it changed, and the last good one kept.

    Args:
        path: The file.
        servers: These instead of the file's; its search domains and options still count.
        clock: Monotonic seconds.
    """

    def __init__(
        self, clock: Callable[[], float], *, path: str | os.PathLike[str] = RESOLV_CONF, servers: Sequence[Address] = ()
    ) -> None:
        self._clock = clock
        self._path = path
        self._servers = tuple(servers)
        self._seen: tuple[int, int, int] | None = None
        self._checked = float("-inf")
        self._current = ResolvConf(servers=self._servers)
        self.error: str | None = None
        """Why the file could not be read the last time."""

    def current(self) -> ResolvConf:
        """The settings in force. Looks at the file at most every two seconds."""
        now = self._clock()
        if now - self._checked >= _CHECK_SECONDS:
            self._checked = now
            self._read()
        return self._current

    def _read(self) -> None:
        try:
            status = os.stat(self._path)
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen == self._seen:
                return
            with open(self._path, encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_BYTES)
        except OSError as error:
            self._seen = None
            self.error = f"{self._path} cannot be read: {error.strerror}"
            return
        self._seen = seen
        self.error = None
        found = parse_resolv_conf(text)
        if self._servers:
            found = attrs.evolve(found, servers=self._servers)
        elif not found.servers:
            self.error = f"{self._path} names no nameserver"
            found = attrs.evolve(found, servers=self._current.servers)
        self._current = found
