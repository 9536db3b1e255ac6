"""Listening sockets: they accept in small batches, rest when descriptors run out, and know if sources can be kept."""

from __future__ import annotations

import errno
import functools
import itertools
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from ztunnel.errors import address_text
from ztunnel.given import shares_port
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.config import Config
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.sockets import SocketCalls
    from ztunnel.given import Given
    from ztunnel.mesh.address import Address, IpAddress

__all__ = ["SHARED", "Listener", "Listeners", "bind", "keeps_sources", "open_listeners"]

SHARED: Final = frozenset({"hbone"})
"""Sockets that processes share: tunnels are few and live long, and by chance one would get many and another none."""

_BURST: Final = 64
_MOST_WAITING: Final = 4096
_REST_SECONDS: Final = 0.2
_ASIDE_SECONDS: Final = 0.002
_OUT_OF_DESCRIPTORS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PROBE_SOURCE: Final = parse_ip("192.0.2.1")  # TEST-NET-1: nobody's
_PROBE_SECONDS: Final = 0.5

_log: Final = get_logger("ztunnel.dataplane")


class Listener:
    """Accepts, and hands each connection to `accepted`.

    One connection is accepted an event, so that a lone one costs no second call that finds nothing; while every turn
    brings more, twice as many each time, up to 64.

    Args:
        reactor: watches the socket.
        calls: the socket calls.
        sock: listening; closed by the listener.
        accepted: takes each connection, with its peer, and closes it sooner or later.
        what: its purpose.
        shared: other processes accept from this very socket. One of them is told of a connection, the one that was
            idle for longest; whoever took one steps aside for a moment, so that the next goes to another.
    """

    def __init__(
        self,
        reactor: Reactor,
        calls: SocketCalls,
        sock: socket.SocketType,
        accepted: Callable[[socket.SocketType, Address], None],
        *,
        what: str = "",
        shared: bool = False,
    ) -> None:
        self.sock = sock
        self.what = what
        self.address: Address = calls.local_address(sock)
        self._reactor = reactor
        self._calls = calls
        self._accepted = accepted
        self._mask = select.EPOLLIN  # level: what is left over is told again
        self._limit = _BURST
        if shared:
            self._mask |= select.EPOLLEXCLUSIVE
            self._limit = 1
        self._shared = shared
        self._burst = 1
        self._turn = -2
        self._wanted = False
        self._listening = False
        self._closed = False

    def start(self) -> None:
        """Begin to accept; until now connections waited in the kernel."""
        self._wanted = True
        self._go_on()

    def _go_on(self) -> None:
        if self._wanted and not self._listening and not self._closed:
            self._listening = True
            self._reactor.add(self.sock.fileno(), self, self._mask)

    def on_event(self, mask: int) -> None:
        """Connections wait."""
        turn = self._reactor.turns
        self._burst = min(self._burst * 2, self._limit) if turn == self._turn + 1 else 1
        self._turn = turn
        accept = self._calls.accept
        for _ in range(self._burst):
            try:
                sock, peer = accept(self.sock)
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in _OUT_OF_DESCRIPTORS:
                    _log.warning(
                        "no connection can be accepted for now", listener=address_text(self.address), error=str(exc)
                    )
                    self._rest(_REST_SECONDS)
                    return
                continue  # it was gone before it was accepted
            if self._shared:
                self._rest(_ASIDE_SECONDS)
            try:
                self._accepted(sock, peer)
            except Exception:
                self._reactor.close(sock)
                raise

    def on_fault(self) -> None:
        """One connection could not be taken; the listener goes on."""

    def _rest(self, seconds: float) -> None:
        self._leave()
        self._reactor.call_at(self._reactor.now + seconds, self._go_on)

    def _leave(self) -> None:
        if self._listening:
            self._listening = False
            self._reactor.remove(self.sock.fileno())

    def pause(self) -> None:
        """Accept nothing until `start`; connections wait in the kernel."""
        self._wanted = False
        self._leave()

    def drain(self) -> None:
        """Take what waits in the kernel, which closing would reset, then close."""
        if self._wanted and not self._closed:
            for _ in range(_MOST_WAITING):
                try:
                    sock, peer = self._calls.accept(self.sock)
                except OSError:
                    break
                try:
                    self._accepted(sock, peer)
                except Exception:
                    self._reactor.close(sock)
                    _log.exception("a connection could not be taken", listener=address_text(self.address))
        self.close()

    def close(self) -> None:
        """New connections are refused from now on."""
        if not self._closed:
            self._leave()  # another process may have the socket as well, and then closing it here ends no events
            self._closed = True
            self._reactor.close(self.sock)


@attrs.frozen(kw_only=True)
class Listeners:
    """Every listening socket of the data path."""

    transparent: bool
    """Applications see the client's own address."""
    shares: list[dict[str, socket.SocketType]]
    """By purpose: hbone, inbound, outbound, socks5. The first are the processes' own; what follows are sockets that
    were given, of processes which there are not any more, and process k % n of n accepts from share k as well."""
    shared: frozenset[str]
    """Purposes of which several processes accept from one socket."""


def open_listeners(calls: SocketCalls, config: Config, shares: int = 1, given: Given | None = None) -> Listeners:
    """Every listening socket of the data path.

    Args:
        calls: the socket calls.
        config: says where.
        shares: processes that accept. With more than one each has sockets of its own on the same addresses, and the
            kernel deals connections out to them by their four numbers; but those of `SHARED` are one for all.
        given: sockets to be used instead of new ones.

    Raises:
        ConfigurationError: an address cannot be had, or ENABLE_ORIG_SRC was asked for and does not work.
    """
    host, loopback = parse_ip(config.listen_host), parse_ip(config.loopback_host)
    transparent = keeps_sources(calls, host, wanted=config.original_source)
    ports: list[tuple[str, Address, bool]] = [
        ("hbone", (host, config.hbone_port), False),
        ("inbound", (host, config.inbound_port), True),
        ("outbound", (host, config.outbound_port), True),
    ]
    if config.socks5_enabled:
        ports.append(("socks5", (loopback, config.socks5_port), False))
    found: list[dict[str, socket.SocketType]] = [{} for _ in range(shares)]
    shared = set(SHARED)
    try:
        for what, address, keepalive in ports:
            had = [
                calls.adopt(sock, transparent=transparent, keepalive=keepalive)
                for sock in (given.take(what, address) if given is not None else ())
            ]
            found += [{} for _ in range(len(had) - len(found))]
            for share, sock in zip(found, had, strict=False):
                share[what] = sock
            if had and shares > len(had) and not shares_port(had[0]):
                shared.add(what)  # no other can be bound beside it
            make = functools.partial(bind, calls, what=what, transparent=transparent, keepalive=keepalive)
            where = calls.local_address(had[0]) if had else address
            for number in range(len(had), shares):
                if what in shared and number:
                    found[number][what] = found[0][what]
                    continue
                sock = make(where, shared=shares > 1 and what not in shared, first=not number)
                found[number][what] = sock
                where = calls.local_address(sock)  # of port 0 the one that was given
    except BaseException:
        for share in found:
            for sock in share.values():
                sock.close()
        raise
    return Listeners(transparent=transparent, shares=found, shared=frozenset(shared))


def bind(
    calls: SocketCalls,
    address: Address,
    what: str,
    *,
    transparent: bool,
    keepalive: bool = True,
    shared: bool = False,
    first: bool = True,
) -> socket.SocketType:
    """A listening socket, or the sentence that says why there is none.

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    try:
        if shared and first:
            calls.check_free(address)
        return calls.listen(address, transparent=transparent, keepalive=keepalive, shared=shared)
    except OSError as exc:
        remedy = {
            errno.EADDRINUSE: "; another program has it",
            errno.EADDRNOTAVAIL: "; it is no address of this host",
            errno.EACCES: "; it needs CAP_NET_BIND_SERVICE",
            errno.EPERM: "; IP_TRANSPARENT needs CAP_NET_ADMIN, or set ENABLE_ORIG_SRC=false",
        }.get(exc.errno or 0, "")
        raise ConfigurationError(f"cannot listen on {address_text(address)} ({what}): {exc.strerror}{remedy}") from exc


def keeps_sources(calls: SocketCalls, bind_address: IpAddress, *, wanted: bool | None) -> bool:
    """Whether connections to applications may come from their client's own address.

    Having the permission is not enough: the replies must find their way back here, by policy routing. So one such
    connection is made, to a listener of our own, and has half a second to come up.

    Args:
        calls: the socket calls.
        bind_address: where the listeners are.
        wanted: ENABLE_ORIG_SRC; None is "if it works".

    Raises:
        ConfigurationError: wanted, and it does not work.
    """
    if wanted is False:
        return False
    why = _probe(calls, bind_address)
    if why is None:
        return True
    if wanted:
        raise ConfigurationError(
            f"ENABLE_ORIG_SRC is true, but client addresses cannot be kept: {why}; unset it, or mend that"
        )
    _log.info("applications see this host's address, not the client's", reason=why)
    return False


def _keeps_foreign_packets() -> bool:
    """Whether some routing table delivers every address here; without one no reply can come back, nor is one sent."""
    try:
        lines = Path("/proc/net/fib_trie").read_text().splitlines()
    except OSError:
        return True  # then the probe finds out
    return any(
        leaf.strip() == "|-- 0.0.0.0" and route.split() == ["/0", "host", "LOCAL"]
        for leaf, route in itertools.pairwise(lines)
    )


def _probe(calls: SocketCalls, bind_address: IpAddress) -> str | None:
    """Why it does not work; None when it does."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener, socket.socket() as test:
        try:
            test.setsockopt(socket.SOL_IP, 19, 1)
        except OSError:
            return "IP_TRANSPARENT is not permitted (it needs CAP_NET_ADMIN)"
        if not _keeps_foreign_packets():
            return "no routing table sends replies to clients to this host itself ('local default dev lo')"
        target = bind_address
        if bind_address.is_unspecified or bind_address.version == 6:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
                try:
                    route.connect((str(_PROBE_SOURCE), 9))  # asks for a route; sends nothing
                except OSError:
                    return "this host has no route for replies to clients"
                target = parse_ip(route.getsockname()[0])
        try:
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)  # a reply that goes astray dies at the next hop
            listener.bind((str(target), 0))
            listener.listen(1)
            sock = calls.dial((target, listener.getsockname()[1]), source=_PROBE_SOURCE)
        except OSError as exc:
            return f"a connection from another address was refused ({exc.strerror})"
        try:
            poll = select.poll()
            poll.register(sock.fileno(), select.POLLOUT)
            if not poll.poll(_PROBE_SECONDS * 1000) or calls.error_of(sock) is not None:
                return "replies to a client's address do not come back to this host's proxy (no policy routing)"
            if calls.local_address(sock)[0] != _PROBE_SOURCE:
                return "a connection cannot be bound to another's address"
        finally:
            sock.close()
    return None
