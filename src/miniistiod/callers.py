"""Lets callers in: who they are, how often they may come, and what they hear when they are not believed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import trio
from google.protobuf.message import DecodeError, Message

from hbone.daemon.logs import get_logger
from hbone.grpc import GrpcError, StatusCode
from miniistiod import auth
from miniistiod.store import serial_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hbone.identity import SpiffeId
    from miniistiod.metrics import Metrics

__all__ = ["Call", "Callers", "host_of", "parse", "remote_of"]

_Message = TypeVar("_Message", bound=Message)
_log = get_logger("miniistiod.api")


class Call(Protocol):
    """What is used of `hbone.trio.grpc.GrpcCall`."""

    @property
    def peer(self) -> SpiffeId | None:
        """Identity of the verified client certificate."""
        ...

    @property
    def tls(self) -> Any:
        """The connection's TLS, with the chain of that certificate."""
        ...

    @property
    def metadata(self) -> Any:
        """Header fields, as pairs of name and value."""
        ...

    @property
    def remote_address(self) -> Any:
        """Where the caller connected from."""
        ...

    async def receive(self, max_bytes: int | None = None) -> bytes | None:
        """The next message; None at the end."""
        ...

    async def send(self, message: bytes | Sequence[bytes], /) -> None:
        """Send a message, whole or in parts."""
        ...


class Callers:
    """Authenticates the calls of both services."""

    def __init__(self, authenticator: auth.Authenticator, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics
        self._anonymous = auth.RateLimiter(per_second=50, burst=500)
        self._known = auth.RateLimiter(per_second=10, burst=100)

    def limit_anonymous(self, call: Call) -> None:
        """Raise GrpcError when too many calls without a certificate come from one host."""
        if call.peer is None and not self._anonymous.allow(host_of(call), time.monotonic()):
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "request rate limit exceeded: try again in a second")

    def limit(self, caller: auth.Caller) -> None:
        """Raise GrpcError when an identity comes too often."""
        if not self._known.allow(str(caller.identity), time.monotonic()):
            raise GrpcError(StatusCode.RESOURCE_EXHAUSTED, "request rate limit exceeded: try again in a second")

    async def for_certificate(self, call: Call, key_sha256: str | None) -> auth.Caller:
        """Who asks for a certificate; raises GrpcError, which says nothing of why. Without a key no token is spent."""
        try:
            caller = await trio.to_thread.run_sync(
                self._authenticator.for_certificate, presented(call), call.metadata, key_sha256, time.time()
            )
        except auth.Refused as error:
            raise self.refused(call, "ca", str(error), "request authenticate failure") from None
        return caller

    async def for_stream(self, call: Call) -> auth.Caller:
        """Who opens a discovery stream; raises GrpcError, which says nothing of why."""
        try:
            caller = await trio.to_thread.run_sync(
                self._authenticator.for_stream, presented(call), call.metadata, time.time()
            )
        except auth.Refused as error:
            raise self.refused(call, "discovery", str(error), "authentication failure") from None
        self.limit(caller)
        return caller

    def refused(self, call: Call, service: str, why: str, told: str, **fields: str) -> GrpcError:
        """The error for a caller that is not believed; the reason goes to the log only."""
        self._metrics.unauthenticated.labels(service).inc()
        message = "certificate refused" if service == "ca" else "discovery refused"
        _log.warning(message, reason=why, peer=remote_of(call), **fields)
        return GrpcError(StatusCode.UNAUTHENTICATED, told)


def presented(call: Call) -> auth.Presented | None:
    """The certificate that the caller showed."""
    if call.peer is None:
        return None
    leaf = call.tls.peer_chain[0]
    return auth.Presented(
        identity=call.peer,
        serial=serial_text(leaf.serial_number),
        not_before=leaf.not_valid_before_utc.timestamp(),
    )


def remote_of(call: Call) -> str:
    """Address and port of the caller."""
    address = call.remote_address
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def host_of(call: Call) -> str:
    """Address of the caller."""
    address = call.remote_address
    return str(address[0]) if isinstance(address, tuple) and address else str(address)


def parse(kind: type[_Message], data: bytes | None) -> _Message:
    """A message of a call; raises GrpcError when there is none, or it is not of that kind."""
    if data is None:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, "the call ended without a message")
    try:
        return kind.FromString(data)
    except DecodeError:
        raise GrpcError(StatusCode.INVALID_ARGUMENT, "the message cannot be parsed") from None
