"""Listening sockets that somebody else made: systemd, or the ztunnel that runs.

They are matched by purpose and address with what the settings ask for. A name says the purpose, else the port does.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final

import attrs

from hbone.errors import ConfigurationError
from ztunnel.errors import address_text
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

    from ztunnel.mesh.address import Address

__all__ = ["PURPOSES", "Given", "GivenSocket", "from_systemd", "shares_port"]

PURPOSES: Final = frozenset({"outbound", "inbound", "hbone", "socks5", "dns", "admin", "stats", "readiness"})
"""Names that systemd may give (`FileDescriptorName=`)."""
_LOOPBACK_ONLY: Final = frozenset({"socks5", "admin"})
_FIRST: Final = 3  # the first descriptor that systemd passes


@attrs.frozen(eq=False)
class GivenSocket:
    """One of them."""

    name: str
    """Its purpose, or what somebody else calls it."""
    sock: socket.socket

    @property
    def is_unix(self) -> bool:
        """It has a path and no port."""
        return self.sock.family == socket.AF_UNIX

    @property
    def address(self) -> Address:
        """Where it listens."""
        host, port = self.sock.getsockname()[:2]
        return parse_ip(host), port


class Given:
    """Sockets to be used instead of new ones, each once.

    Args:
        found: with their names.
        strict: another address than the settings' is another socket; else only the port counts.
    """

    def __init__(self, found: Iterable[GivenSocket] = (), *, strict: bool = True) -> None:
        self._left = list(found)
        self._strict = strict

    def take(self, what: str, address: Address, kind: socket.SocketKind = socket.SOCK_STREAM) -> list[socket.socket]:
        """Every socket for this purpose, not blocking, now the caller's to close; none when there is none.

        Args:
            what: the purpose.
            address: what the settings say; port 0 is any.
            kind: of the socket.

        Raises:
            ConfigurationError: one that others must not reach, and could.
        """
        taken = [given for given in self._left if self._fits(given, what, address, kind)]
        for given in taken:
            if what in _LOOPBACK_ONLY and not given.address[0].is_loopback:
                raise ConfigurationError(
                    f"the socket given for {what} is {address_text(given.address)}; it must be a loopback address"
                )
            given.sock.setblocking(False)
            self._left.remove(given)
        return [given.sock for given in taken]

    def _fits(self, given: GivenSocket, what: str, address: Address, kind: socket.SocketKind) -> bool:
        if given.is_unix or given.sock.type != kind:
            return False
        if given.name in PURPOSES:
            if given.name != what:
                return False
        elif self._strict or not address[1]:
            return False
        ip, port = given.address
        if self._strict:
            return ip == address[0] and address[1] in (0, port)
        if what == "dns" and ip != address[0]:  # it may have several
            return False
        return port == address[1] or (given.name == what and not address[1])

    def take_unix(self, what: str) -> socket.socket | None:
        """The Unix socket of this name, now the caller's to close."""
        for given in self._left:
            if given.is_unix and given.name == what:
                self._left.remove(given)
                return given.sock
        return None

    def reject_rest(self) -> None:
        """See that nothing is left that somebody meant us to use.

        Raises:
            ConfigurationError: something is, and was given on purpose.
        """
        left = [] if self._strict else self._left
        for given in left:
            where = given.sock.getsockname() if given.is_unix else address_text(given.address)
            self.close()
            raise ConfigurationError(
                f"systemd passed a socket on {where!s} ({given.name}), which no setting names; listen there by a"
                " ZTUNNEL_..._PORT, or take it out of the socket unit"
            )
        self.close()

    def close(self) -> None:
        """Close what nobody took; others that have it go on."""
        for given in self._left:
            given.sock.close()
        self._left.clear()


def from_systemd(environ: MutableMapping[str, str], *, pid: int | None = None) -> Given:
    """The sockets of socket activation, none where there is none. Their variables are taken out of `environ`.

    Args:
        environ: the environment.
        pid: of this process.

    Raises:
        ConfigurationError: what the variables name are no listening sockets.

    Source: sd_listen_fds_with_names(3).
    """
    ours, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if not count or ours != str(os.getpid() if pid is None else pid):
        return Given()
    if not count.isdecimal() or int(count) > 4096:
        raise ConfigurationError(f"LISTEN_FDS is {count[:20]!r}; systemd sets it to a number of sockets")
    called = names.split(":") if names else []
    found = []
    for number in range(int(count)):
        name = called[number] if number < len(called) else "unknown"
        found.append(GivenSocket(name, _adopt(_FIRST + number, name)))
    return Given(found, strict=False)


def _adopt(fd: int, name: str) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        if sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(0, "it does not listen")
    except OSError as error:
        raise ConfigurationError(
            f"descriptor {fd} ({name}) of LISTEN_FDS is no listening socket ({error.strerror}); give ztunnel what a"
            " socket unit with ListenStream= or ListenDatagram= and Accept=no gives"
        ) from None
    return sock


def shares_port(sock: socket.SocketType) -> bool:
    """Whether further sockets may be bound beside it (SO_REUSEPORT)."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT))
