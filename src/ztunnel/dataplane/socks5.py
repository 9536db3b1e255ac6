"""SOCKS5 on loopback: for hosts where nothing captures connections. CONNECT only, without authentication.

The reply comes when the upstream is connected, or with the reason why it is not (ztunnel says success before it
dials). After that the connection goes the way of 15001.

Source: RFC 1928.
"""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final

from ztunnel.dataplane.names import resolve
from ztunnel.dataplane.reactor import GONE, READ
from ztunnel.dataplane.sockets import DONTWAIT
from ztunnel.dns.answer import locate, zone_of
from ztunnel.errors import (
    ConnectFailed,
    ConnectTimedOut,
    DataplaneError,
    NoHealthyUpstream,
    ResolutionFailed,
    SelfCall,
    TunnelRejected,
    UnusableDestination,
)
from ztunnel.logs import OUTBOUND
from ztunnel.mesh.address import canonical

if TYPE_CHECKING:
    import socket

    from ztunnel.dataplane.outbound import Outbound
    from ztunnel.dataplane.plane import Plane
    from ztunnel.mesh.address import Address, IpAddress
    from ztunnel.mesh.workload import Workload

__all__ = ["Socks5"]

_VERSION: Final = 5
_CONNECT: Final = 1
_NO_AUTHENTICATION: Final = 0
_IPV4, _NAME, _IPV6 = 1, 3, 4
_GREETING_SECONDS: Final = 10.0
_MAX_GREETINGS: Final = 1024

_SUCCEEDED: Final = 0
_FAILURE: Final = 1
_NOT_ALLOWED: Final = 2
_HOST_UNREACHABLE: Final = 4
_REFUSED: Final = 5
_TTL_EXPIRED: Final = 6
_COMMAND_NOT_SUPPORTED: Final = 7
_ADDRESS_NOT_SUPPORTED: Final = 8
_NO_METHOD: Final = bytes((_VERSION, 0xFF))
_METHOD: Final = bytes((_VERSION, _NO_AUTHENTICATION))


def _reply(code: int) -> bytes:
    return bytes((_VERSION, code, 0, _IPV4, 0, 0, 0, 0, 0, 0))


class _Refused(Exception):
    """The greeting or the request is no good."""

    def __init__(self, why: str, reply: bytes) -> None:
        super().__init__(why)
        self.reply = reply


class Socks5:
    """Takes greetings.

    Args:
        plane: what the data path shares.
        outbound: takes the connections on.
    """

    def __init__(self, plane: Plane, outbound: Outbound) -> None:
        self.plane = plane
        self.outbound = outbound
        self.greetings: dict[_Greeting, None] = {}
        self._zone = zone_of(plane.config)
        self._rng = random.Random()

    def accepted(self, sock: socket.SocketType, peer: Address) -> None:
        """A connection to 15080."""
        if len(self.greetings) >= _MAX_GREETINGS:
            self.plane.reactor.close(sock)
            return
        _Greeting(self, sock, peer)

    def locate(self, source: Workload, name: str, peer: Address) -> list[IpAddress] | None:
        """Where a name of the mesh leads, as the DNS proxy would say; None when the mesh does not own it."""
        return locate(self.plane.store, source, name, self._zone, self._rng, peer[0].version)

    def close(self) -> None:
        """Cut the greetings."""
        for greeting in list(self.greetings):
            greeting.close()


class _Greeting:
    """The bytes before the payload: read exactly, so that none of the payload is."""

    __slots__ = ("_deadline", "_need", "_peer", "_read", "_sock", "_socks", "_step")

    def __init__(self, socks: Socks5, sock: socket.SocketType, peer: Address) -> None:
        self._socks = socks
        self._sock = sock
        self._peer = peer
        self._read = bytearray()
        self._need = 2
        self._step = self._greeting
        reactor = socks.plane.reactor
        self._deadline = reactor.now + _GREETING_SECONDS
        socks.greetings[self] = None
        reactor.add(sock.fileno(), self, READ)
        reactor.sweep(self)

    def on_event(self, mask: int) -> None:
        """Bytes, or the end."""
        if mask & GONE:
            self.close()
            return
        try:
            while self in self._socks.greetings:
                piece = bytearray(self._need - len(self._read))
                nbytes = self._sock.recv_into(piece, 0, DONTWAIT)
                if not nbytes:
                    self.close()
                    return
                self._read += piece[:nbytes]
                if len(self._read) == self._need:
                    self._step()
        except BlockingIOError:
            return
        except OSError:
            self.close()
        except _Refused as exc:
            self._send(exc.reply)
            self._socks.plane.log.early_deny(OUTBOUND, self._peer, None, f"socks5: {exc}")
            self.close()

    def on_fault(self) -> None:
        """A fault of ours."""
        self.close()

    def on_time(self, now: float) -> None:
        """Too slow."""
        if now >= self._deadline:
            self._socks.plane.log.early_deny(
                OUTBOUND, self._peer, None, f"socks5: no request within {_GREETING_SECONDS:g} s"
            )
            self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._leave():
            self._socks.plane.reactor.close(self._sock)

    def _leave(self) -> bool:
        if self not in self._socks.greetings:
            return False
        del self._socks.greetings[self]
        self._socks.plane.reactor.unsweep(self)
        return True

    def _send(self, data: bytes) -> None:
        try:
            self._sock.send(data, DONTWAIT)
        except OSError:
            pass  # the client is gone, which the next read shows

    # Steps

    def _greeting(self) -> None:
        version, methods = self._read
        if version != _VERSION:
            raise _Refused(f"version {version}, which is not 5", b"")
        if not methods:
            raise _Refused("no authentication method is offered", _NO_METHOD)
        self._next(methods, self._methods)

    def _methods(self) -> None:
        if _NO_AUTHENTICATION not in self._read:
            raise _Refused("the client wants to authenticate, which is not done here", _NO_METHOD)
        self._send(_METHOD)
        self._next(5, self._request)

    def _request(self) -> None:
        version, command, reserved, kind, first = self._read
        if version != _VERSION or reserved:
            raise _Refused("the request is malformed", _reply(_FAILURE))
        if command != _CONNECT:
            raise _Refused(f"command {command}; only CONNECT is served", _reply(_COMMAND_NOT_SUPPORTED))
        if kind == _IPV4:
            self._need = 4 + 4 + 2
        elif kind == _IPV6:
            self._need = 4 + 16 + 2
        elif kind == _NAME and first:
            self._need = 4 + 1 + first + 2
        else:
            raise _Refused(f"address type {kind} of length {first}", _reply(_ADDRESS_NOT_SUPPORTED))
        self._step = self._address

    def _address(self) -> None:
        data = bytes(self._read)
        port = int.from_bytes(data[-2:], "big")
        if not port:
            raise _Refused("port 0", _reply(_FAILURE))
        if data[3] == _NAME:
            name = data[5:-2]
            if not name.isascii() or any(byte <= 0x20 or byte == 0x7F for byte in name):
                raise _Refused("the host name has characters that no host name has", _reply(_ADDRESS_NOT_SUPPORTED))
            self._named(name.decode("ascii").rstrip(".").lower(), port)
        else:
            raw = data[4:-2]
            ip: IpAddress = IPv4Address(raw) if len(raw) == 4 else canonical(IPv6Address(raw))
            self._go((ip, port))

    def _next(self, need: int, step: object) -> None:
        self._read.clear()
        self._need = need
        self._step = step  # type: ignore[assignment]  # one of the methods above

    # Onwards

    def _named(self, name: str, port: int) -> None:
        """A name of the mesh, as the DNS proxy has it, or one of the system's resolver."""
        source = self._socks.plane.local.current
        found = self._socks.locate(source, name, self._peer) if source is not None else None
        if found:
            self._go((found[0], port))
            return
        self._socks.plane.reactor.remove(self._sock.fileno())
        self._leave()
        self._socks.plane.reactor.start_task(self._resolve, name, port)

    async def _resolve(self, name: str, port: int) -> None:
        plane = self._socks.plane
        error: DataplaneError = ResolutionFailed(name, "cancelled")
        ip: IpAddress | None = None
        try:
            # Who asks decides which names are the mesh's, and these are asked of nobody else.
            found = self._socks.locate(await plane.local.wait(), name, self._peer)
            if found is None:
                ip = await resolve(name, self._peer[0])
            elif found:
                ip = found[0]
            else:
                error = ResolutionFailed(name, "its service has no address on this network")
        except DataplaneError as exc:
            error = exc
        finally:
            if ip is None:
                self._answer(error)
                plane.log.early_deny(OUTBOUND, self._peer, None, error)
                plane.reactor.close(self._sock)
        if ip is not None:
            self._hand_over((ip, port))

    def _go(self, destination: Address) -> None:
        self._socks.plane.reactor.remove(self._sock.fileno())
        self._leave()
        self._hand_over(destination)

    def _hand_over(self, destination: Address) -> None:
        self._socks.outbound.begin(self._sock, self._peer, destination, answer=self._answer)

    def _answer(self, error: DataplaneError | None) -> None:
        self._send(_reply(_SUCCEEDED if error is None else _code_of(error)))


def _code_of(error: DataplaneError) -> int:
    if isinstance(error, SelfCall | UnusableDestination):
        return _NOT_ALLOWED
    if isinstance(error, TunnelRejected):
        return _NOT_ALLOWED if error.http_status == 401 else _FAILURE
    if isinstance(error, ResolutionFailed | NoHealthyUpstream):
        return _HOST_UNREACHABLE
    if isinstance(error, ConnectTimedOut):
        return _TTL_EXPIRED
    if isinstance(error, ConnectFailed):
        return _REFUSED
    return _FAILURE
