"""The few socket calls that the data path makes, and nothing else of `socket`.

Relays, tunnels and listeners see only what is here, so tests drive the same code with scripted sockets, or count the
calls. No descriptor is made non-blocking: every call says MSG_DONTWAIT instead, which saves an `ioctl` a connection.
Options that a connection inherits from its listener are set there, once.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import select
import socket
import struct
import termios
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Protocol

import attrs

from ztunnel.mesh.address import canonical, parse_ip

try:
    from hbone import _native as native
except ImportError:
    native = None  # type: ignore[assignment]  # not built: the same calls, which cost more

Socket = socket.SocketType if native is None else native.Socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from ztunnel.dataplane.handlers import Poller
    from ztunnel.mesh.address import Address, IpAddress

__all__ = [
    "DONTWAIT",
    "SocketCalls",
    "SocketOptions",
    "StreamSocket",
    "poll_of",
    "text_of",
]

DONTWAIT = socket.MSG_DONTWAIT
"""The flag of each `recv_into` and `send`."""

_SO_ORIGINAL_DST = 80
_IP_FREEBIND = 15
_IP_TRANSPARENT = 19
_IP_BIND_ADDRESS_NO_PORT = 24
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_SO_MARK = 36
_ESTABLISHED = 1  # the first byte of TCP_INFO
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_LISTEN_BACKLOG = 4096
_CONNECTING = (0, errno.EINPROGRESS)


class StreamSocket(Protocol):
    """What the data path calls on a connected socket; `socket.SocketType` is one."""

    def recv_into(self, buffer: Buffer, nbytes: int = ..., flags: int = ..., /) -> int: ...  # noqa: D102
    def send(self, data: Buffer, flags: int = ..., /) -> int: ...  # noqa: D102
    def shutdown(self, how: int, /) -> None: ...  # noqa: D102
    def setsockopt(self, level: int, optname: int, value: bytes, /) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102
    def fileno(self) -> int: ...  # noqa: D102


def poll_of(poller: Poller) -> Callable[[int, int], list[tuple[int, int]]]:
    """Its `poll` for a timeout of 0 or -1, as cheap as it can be had; of no use once the poller is closed."""
    if native is not None and type(poller) is select.epoll:
        return functools.partial(native.poll, poller.fileno())
    return poller.poll


@functools.lru_cache(maxsize=4096)
def _unpacked(raw: bytes) -> IpAddress:
    return IPv4Address(raw) if len(raw) == 4 else canonical(IPv6Address(raw))


@functools.lru_cache(maxsize=4096)
def text_of(ip: IpAddress) -> str:
    """`str(ip)`, remembered: it is asked for several times a connection."""
    return str(ip)


@attrs.frozen(kw_only=True)
class SocketOptions:
    """Options of every connection to a workload. Source: ztunnel's socket factory."""

    keepalive: bool = True
    keepalive_time: int = 180
    """Seconds of silence before the first probe."""
    keepalive_interval: int = 180
    """Seconds between probes."""
    keepalive_retries: int = 9
    user_timeout: bool = False
    """Give up on unacknowledged bytes after as long as keepalive would."""
    mark: int | None = None
    """SO_MARK of outgoing connections."""
    source: IpAddress | None = None
    """Own address that outgoing connections come from, where the caller names none; None: routing decides."""

    def apply(self, sock: socket.SocketType, *, local: bool = False) -> None:
        """Set them. Those of TCP are wishes: a kernel that refuses one still gets the connection.

        Args:
            sock: connected or not.
            local: the other end is on this host, and cannot fall silent without this host knowing.
        """
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if local:
            return
        if self.keepalive:
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, self.keepalive_time)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, self.keepalive_interval)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, self.keepalive_retries)
            except OSError:
                pass
        if self.user_timeout:
            seconds = self.keepalive_time + self.keepalive_retries * self.keepalive_interval
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)


class SocketCalls:
    """Makes sockets, and asks them what `StreamSocket` does not.

    Args:
        options: of accepted and of outgoing connections.
        socket_class: the class of connected sockets; tests count in a subclass of it.
    """

    def __init__(self, options: SocketOptions | None = None, *, socket_class: type[socket.SocketType] = Socket) -> None:
        self.options = options or SocketOptions()
        self._socket_class = socket_class

    def listen(
        self, address: Address, *, transparent: bool = False, keepalive: bool = True, shared: bool = False
    ) -> socket.SocketType:
        """A listening socket; `::` takes IPv4 as well. Connections inherit its options.

        Args:
            address: where.
            transparent: take connections to any address.
            keepalive: connections are probed as the options say.
            shared: further sockets of this user may listen there too; the kernel spreads connections over them.

        Raises:
            OSError: the address is taken or not ours, or `transparent` is not permitted.
        """
        ip, port = address
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        sock = socket.SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if transparent:
                sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
            (self.options if keepalive else attrs.evolve(self.options, keepalive=False, user_timeout=False)).apply(sock)
            sock.bind((text_of(ip), port))
            sock.listen(_LISTEN_BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock

    def adopt(self, sock: socket.socket, *, transparent: bool = False, keepalive: bool = True) -> socket.SocketType:
        """A listening socket that somebody else made, with the options that `listen` gives; `sock` is detached.

        Args:
            sock: listening.
            transparent: take connections to any address.
            keepalive: connections are probed as the options say.

        Raises:
            OSError: `transparent` is not permitted.
        """
        adopted = socket.SocketType(sock.family, sock.type, 0, sock.detach())
        try:
            adopted.setblocking(False)
            if transparent:
                adopted.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
            (self.options if keepalive else attrs.evolve(self.options, keepalive=False, user_timeout=False)).apply(
                adopted
            )
            adopted.listen(_LISTEN_BACKLOG)
        except BaseException:
            adopted.close()
            raise
        return adopted

    def check_free(self, address: Address) -> None:
        """See that nobody listens on `address`, which `listen` would not tell of a socket that is shared.

        Raises:
            OSError: somebody does.
        """
        ip, port = address
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((text_of(ip), port))

    def accept(self, listener: socket.SocketType) -> tuple[socket.SocketType, Address]:
        """One connection and its peer.

        Raises:
            BlockingIOError: none waits.
            OSError: no descriptor is left, or the connection died before it was accepted.
        """
        fd, peer = listener._accept()  # type: ignore[attr-defined]  # the public accept() would make it blocking by another system call
        try:
            sock = self._socket_class(listener.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0, fd)
        except BaseException:
            os.close(fd)
            raise
        return sock, (parse_ip(peer[0]), peer[1])

    def dial(self, address: Address, *, source: IpAddress | None = None, local: bool = False) -> socket.SocketType:
        """Begin to connect; writable means that it ended, `error_of` how.

        Args:
            address: where to.
            source: address to come from, ours or another's (IP_TRANSPARENT). One equal to the destination is left
                out, because it would confuse the application. An address that cannot be bound is left out as well.
            local: the destination is on this host.

        Raises:
            OSError: refused at once.

        Source: ztunnel's upstream connect, behind its 15006 and 15008.
        """
        ip, port = address
        if source is not None and source == ip:
            source = None
        host = text_of(ip)
        small = ":" not in host
        family = socket.AF_INET if (small if source is None else source.version == 4) else socket.AF_INET6
        sock = self._socket_class(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self.options.apply(sock, local=local)
            if self.options.mark is not None:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, self.options.mark)
            if source is not None:
                self._come_from(sock, source)
            elif self.options.source is not None:
                self._bind_own(sock, self.options.source, ip)
            if small and family == socket.AF_INET6:
                host = f"::ffff:{host}"
            code = sock.connect_ex((host, port))
            if code not in _CONNECTING:
                raise OSError(code, os.strerror(code))
        except BaseException:
            sock.close()
            raise
        return sock

    def _bind_own(self, sock: socket.SocketType, own: IpAddress, target: IpAddress) -> None:
        if own.version == target.version and own != target:
            sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((text_of(own), 0))

    def _come_from(self, sock: socket.SocketType, source: IpAddress) -> None:
        if not source.is_loopback:
            try:
                if source.version == 4:
                    sock.setsockopt(socket.SOL_IP, _IP_TRANSPARENT, 1)
                    sock.setsockopt(socket.SOL_IP, _IP_FREEBIND, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            except OSError:
                return
        try:
            sock.setsockopt(socket.SOL_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((text_of(source), 0))
        except OSError:
            return

    def is_connected(self, sock: socket.SocketType) -> bool:
        """Whether the connect has ended well already, as one to this host itself usually has."""
        try:
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO) & 0xFF == _ESTABLISHED
        except OSError:
            return False

    def error_of(self, sock: socket.SocketType) -> OSError | None:
        """How a connect ended, or why the connection did; None when it is well."""
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return OSError(code, os.strerror(code)) if code else None

    def segment(self, sock: socket.SocketType) -> int:
        """Bytes that the kernel puts into one segment of a connected socket; 0 where it does not say."""
        try:
            return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        except OSError:
            return 0

    def unsent(self, sock: StreamSocket) -> int:
        """Bytes written, FIN included, that the other end's kernel has not confirmed."""
        try:
            waiting: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        except (OSError, ValueError):  # no socket of the kernel's
            return 0
        return waiting

    def reset_on_close(self, sock: StreamSocket) -> None:
        """Let `close` send RST and drop what was not sent, so that a cut stream is not taken for a complete one."""
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        except OSError:
            pass

    def local_address(self, sock: socket.SocketType) -> Address:
        """The address that the connection was accepted on."""
        name = sock.getsockname()
        return parse_ip(name[0]), name[1]

    def original_destination(self, sock: socket.SocketType, peer: IpAddress) -> Address:
        """Where a captured connection was going: before nft's redirect, or by TPROXY the socket's own address.

        Args:
            sock: an accepted connection.
            peer: its other end, which tells the address family of a connection to `::`.

        Source: SO_ORIGINAL_DST of netfilter; ztunnel's order.
        """
        try:
            if peer.version == 4:
                raw = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
                return _unpacked(raw[4:8]), int.from_bytes(raw[2:4], "big")
            raw = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            return _unpacked(raw[8:24]), int.from_bytes(raw[2:4], "big")
        except OSError:
            return self.local_address(sock)


def local_addresses() -> frozenset[IpAddress]:
    """Addresses of this host's interfaces now, from /proc; without it only what a route shows."""
    found: set[IpAddress] = set()
    try:
        with open("/proc/net/fib_trie", encoding="ascii") as trie:
            previous = ""
            for line in trie:
                if "host LOCAL" in line and "|--" in previous:
                    found.add(parse_ip(previous.split("|--")[1].strip()))
                previous = line
        with open("/proc/net/if_inet6", encoding="ascii") as listing:
            for line in listing:
                found.add(canonical(IPv6Address(bytes.fromhex(line.split()[0]))))
    except OSError:
        pass
    return frozenset(found)
