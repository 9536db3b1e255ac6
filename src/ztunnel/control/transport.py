"""The wire under the control plane's clients: dial, trust, and what a call looks like to those who make one.

`ca.py` and `discovery.py` know only the protocols below, so their tests script a control plane in memory.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import attrs
import trio
from cryptography import x509

from hbone.errors import ConfigurationError, HboneError, IdentityError, TlsError
from hbone.grpc import GrpcConfig, GrpcError, GrpcUnavailable, StatusCode
from hbone.identity.svid import UNPARSABLE
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient, GrpcStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from hbone.identity import Identity
    from ztunnel.mesh import IpAddress

__all__ = [
    "CONNECT_TIMEOUT",
    "MAX_RESPONSE",
    "REMEDY",
    "Channel",
    "ControlPlaneError",
    "Dial",
    "MessageStream",
    "Metadata",
    "RootSource",
    "ServerAddress",
    "TokenSource",
    "Unreachable",
    "grpc_dialer",
    "open_stream",
    "refusal",
    "request_metadata",
    "tls_context",
]

CONNECT_TIMEOUT = 5.0
"""Seconds for TCP and TLS to the control plane together, each. Source: Istio's ztunnel, connect timeout of 15012."""
MAX_ADDRESSES = 8
"""Addresses of the control plane's name that are tried."""
KEEPALIVE = (300, 75, 9)
"""TCP keepalive of control-plane connections: idle seconds, interval seconds, probes."""
MAX_RESPONSE = 200 * 1024 * 1024
"""Bytes of one message of a stream. Source: Istio's ztunnel, message limit of its discovery client."""
MAX_TOKEN = 16 * 1024
"""Bytes of a token file; a JWT is one or two KiB."""
MAX_ROOTS = 1024 * 1024
"""Bytes of a root file."""

Metadata = tuple[tuple[str, str], ...]
"""gRPC request metadata: names in lower case."""


class ControlPlaneError(HboneError):
    """The control plane could not be reached, or what it said cannot be used. One sentence."""


class Unreachable(ControlPlaneError):
    """The control plane could not be reached, or the connection to it was lost; it may be tried again."""


class MessageStream(Protocol):
    """A bidirectional stream of messages."""

    async def send(self, message: bytes, /) -> None:
        """Send one message."""
        ...

    async def receive(self) -> bytes | None:
        """The next message; None when the server ended the stream without an error."""
        ...


class Channel(Protocol):
    """A connection to the control plane, already checked to be the right one."""

    async def unary(self, path: str, request: bytes, metadata: Metadata, /) -> bytes:
        """One request, one answer."""
        ...

    def stream(self, path: str, metadata: Metadata, /) -> AbstractAsyncContextManager[MessageStream]:
        """Open a stream; it is closed when the block is left."""
        ...


class Dial(Protocol):
    """Opens a channel, presenting the certificate of `identity` where one is given."""

    def __call__(self, identity: Identity | None, /) -> AbstractAsyncContextManager[Channel]:
        """Raises ControlPlaneError when the control plane cannot be reached or is not the one that we trust."""
        ...


@attrs.frozen(kw_only=True)
class ServerAddress:
    """Where the control plane is."""

    host: str
    port: int
    alternative: str | None = None
    """A further name that its certificate may carry (`ALT_XDS_HOSTNAME`, `ALT_CA_HOSTNAME`)."""

    @classmethod
    def parse(cls, text: str, *, variable: str, alternative: str | None = None) -> ServerAddress:
        """Parse `https://host:port`; the scheme may be left out, and so may the port (15012).

        Raises:
            ConfigurationError: another scheme, no host, or a bad port.
        """
        url = text if "://" in text else f"https://{text}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigurationError(f"{variable} is {text!r}: {error}; write https://host:port") from None
        if parts.scheme != "https":
            raise ConfigurationError(f"{variable} is {text!r}; the control plane is reached by https:// only")
        if not parts.hostname or parts.path.strip("/") or parts.query or parts.username is not None:
            raise ConfigurationError(
                f"{variable} is {text!r}; write https://host:port, for example https://10.0.0.1:15012"
            )
        if port == 0:
            raise ConfigurationError(f"{variable} is {text!r}; the port must be from 1 to 65535")
        return cls(host=parts.hostname, port=port or 15012, alternative=alternative or None)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class TokenSource:
    """The bearer token: a file that is read again for every request, or the token itself."""

    def __init__(self, *, path: Path | None = None, value: str = "") -> None:
        self._path = path
        self._value = value

    @classmethod
    def from_setting(cls, setting: str | None, default: Path) -> TokenSource | None:
        """Follow `AUTH_TOKEN`: unset, an existing path, or the token itself. Source: ztunnel `AUTH_TOKEN`.

        Returns:
            None when no token is configured: calls then carry no `authorization` at all.
        """
        if setting is None:
            return cls(path=default) if default.exists() else None
        if not setting.strip():
            return None
        if len(setting) < 4096 and "\n" not in setting and Path(setting).exists():
            return cls(path=Path(setting))
        return cls(value=setting)

    def read(self) -> str:
        """The token as it is now, without white space around it.

        Raises:
            ControlPlaneError: the file cannot be read, is empty, too large, or is no printable ASCII.
        """
        if self._path is None:
            token = self._value.strip()
            what = "the token in AUTH_TOKEN"
        else:
            what = f"the token file {self._path}"
            try:
                with self._path.open("rb") as file:
                    raw = file.read(MAX_TOKEN + 1)
            except OSError as error:
                raise ControlPlaneError(f"{what} cannot be read: {error.strerror or error}") from None
            if len(raw) > MAX_TOKEN:
                raise ControlPlaneError(f"{what} is larger than {MAX_TOKEN} bytes; it should hold one token")
            token = raw.decode("latin-1").strip()
        if not token:
            raise ControlPlaneError(f"{what} is empty; write the token into it")
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ControlPlaneError(
                f"{what} holds characters that no token has; it should be one line of printable ASCII"
            )
        return token

    def expires(self) -> float | None:
        """When the token ends, seconds since 1970, if it is one that says so. For people; nothing is decided by it."""
        try:
            claims = json.loads(base64.urlsafe_b64decode(self.read().split(".")[1] + "=="))
            return float(claims["exp"])
        except (ControlPlaneError, ValueError, IndexError, KeyError, TypeError):
            return None


class RootSource:
    """The roots that the control plane's certificate must end in; read again at every dial.

    A file that has become unreadable costs a warning, and the last good roots stay in use.
    """

    def __init__(
        self,
        setting: str,
        *,
        default: Path,
        variable: str,
        extra: Callable[[], bytes | None] = lambda: None,
    ) -> None:
        """Follow `CA_ROOT_CA` or `XDS_ROOT_CA`.

        Args:
            setting: A path, the word SYSTEM, or inline PEM.
            default: The path that stands when nothing is set.
            variable: The name of the setting, for errors.
            extra: Roots of an enrolment (PEM), used where the setting is `default` and nothing is there.
        """
        self._setting = setting
        self._default = default
        self._variable = variable
        self._extra = extra
        self._good: tuple[x509.Certificate, ...] = ()
        self._fixed = False
        self.problem: str | None = None
        """Why the last reading failed, when older roots are in use."""

    @classmethod
    def of(cls, *roots: x509.Certificate) -> RootSource:
        """Roots that are known already."""
        source = cls("", default=Path(), variable="")
        source._good = roots
        source._fixed = True
        return source

    def load(self) -> tuple[x509.Certificate, ...]:
        """The roots as they are now.

        Raises:
            ControlPlaneError: there is none, and never was.
        """
        if self._fixed:
            return self._good
        try:
            roots = self._read()
        except ControlPlaneError as error:
            if not self._good:
                raise
            self.problem = str(error)
            return self._good
        self.problem = None
        self._good = roots
        return roots

    def _read(self) -> tuple[x509.Certificate, ...]:
        setting = self._setting
        if setting == "SYSTEM":
            return _parse_roots(_system_roots(), f"{self._variable}=SYSTEM")
        if "-----BEGIN" in setting:
            return _parse_roots(setting.encode(), f"the PEM in {self._variable}")
        path = Path(setting)
        if path == self._default and not path.exists():
            pem = self._extra()
            if pem is not None:
                return _parse_roots(pem, "the root of the enrolment")
        try:
            with path.open("rb") as file:
                pem = file.read(MAX_ROOTS + 1)
        except OSError as error:
            raise ControlPlaneError(
                f"the control plane's root {path} cannot be read: {error.strerror or error};"
                f" set {self._variable} to its path, or run 'ztunnel enroll'"
            ) from None
        if len(pem) > MAX_ROOTS:
            raise ControlPlaneError(f"the control plane's root {path} is larger than {MAX_ROOTS} bytes")
        return _parse_roots(pem, f"the control plane's root {path}")


def _parse_roots(pem: bytes, what: str) -> tuple[x509.Certificate, ...]:
    try:
        roots = tuple(x509.load_pem_x509_certificates(pem))
    except UNPARSABLE:
        raise ControlPlaneError(f"{what} holds no PEM certificate") from None
    if not roots:
        raise ControlPlaneError(f"{what} holds no PEM certificate")
    return roots


def _system_roots() -> bytes:
    import ssl  # for this alone; it loads another OpenSSL than the one of our TLS

    paths = ssl.get_default_verify_paths()
    for name in (paths.cafile, paths.openssl_cafile, "/etc/ssl/certs/ca-certificates.crt"):
        if name and os.path.isfile(name):
            return Path(name).read_bytes()
    raise ControlPlaneError(
        "the system has no file of root certificates; apt-get install ca-certificates, or name a root file"
    )


def grpc_dialer(
    address: ServerAddress, roots: RootSource, *, mark: int | None = None, source: IpAddress | None = None
) -> Dial:
    """Dial `address` by TLS, checking chain and name, and speak gRPC on it.

    The name or address of the server is checked as well as its chain: the same root signs workloads, and none of
    them may pose as the control plane.

    Args:
        address: Where the control plane is.
        roots: Read at each dial.
        mark: SO_MARK, so that the host's capture rules let the connection pass.
        source: Local address to dial from.
    """

    @contextlib.asynccontextmanager
    async def dial(identity: Identity | None) -> AsyncIterator[Channel]:
        context = tls_context(address, roots.load(), identity)
        stream = await open_stream(address, mark=mark, source=source)
        client = GrpcClient(
            stream, context, authority=str(address), config=GrpcConfig(handshake_timeout=CONNECT_TIMEOUT)
        )
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(client)
            except TlsError as error:
                raise ControlPlaneError(f"no connection to the control plane {address}: {error}") from error
            except GrpcUnavailable as error:
                why = error.message.removeprefix(f"{address}: ")
                raise Unreachable(f"no connection to the control plane {address}: {why}") from error
            yield _GrpcChannel(client)

    return dial


class _GrpcChannel:
    """A gRPC connection in the form of `Channel`."""

    def __init__(self, client: GrpcClient) -> None:
        self._client = client

    async def unary(self, path: str, request: bytes, metadata: Metadata, /) -> bytes:
        return await self._client.unary(path, request, metadata)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, metadata: Metadata, /) -> AsyncIterator[MessageStream]:
        async with self._client.stream(path, metadata) as stream:
            yield _LargeStream(stream)


class _LargeStream:
    """A gRPC stream that takes responses as large as a mesh is."""

    def __init__(self, stream: GrpcStream) -> None:
        self._stream = stream
        self.send = stream.send

    async def receive(self) -> bytes | None:
        return await self._stream.receive(MAX_RESPONSE)


def tls_context(
    address: ServerAddress, roots: Sequence[x509.Certificate], identity: Identity | None = None
) -> TlsContext:
    """What a connection to the control plane is checked by.

    Raises:
        ControlPlaneError: a root is unusable, or the address is neither a name nor an IP address.
    """
    alternatives = (address.alternative,) if address.alternative else ()
    try:
        return TlsContext.client(identity, roots=roots, server_name=address.host, alt_names=alternatives)
    except (IdentityError, ConfigurationError) as error:
        raise ControlPlaneError(f"the control plane {address} cannot be dialled: {error}") from error


async def open_stream(
    address: ServerAddress, *, mark: int | None = None, source: IpAddress | None = None
) -> trio.SocketStream:
    """Connect by TCP, within five seconds, to one address after the other.

    Raises:
        ControlPlaneError: none of them answers.
    """
    reasons: list[str] = []
    with trio.move_on_after(CONNECT_TIMEOUT):
        try:
            found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Unreachable(f"the control plane's name {address.host} has no address: {error.strerror}") from None
        except UnicodeError:
            raise Unreachable(f"the control plane's name {address.host} is no host name") from None
        share = CONNECT_TIMEOUT / min(max(1, len(found)), MAX_ADDRESSES)
        for family, kind, protocol, _, target in found[:MAX_ADDRESSES]:
            sock = trio.socket.socket(family, kind, protocol)
            try:
                if mark is not None:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                if source is not None and (family == socket.AF_INET6) == (source.version == 6):
                    await sock.bind((str(source), 0))
                with trio.fail_after(share):
                    await sock.connect(target)
            except trio.TooSlowError:
                reasons.append(f"no answer within {share:g} s")
                sock.close()
            except OSError as error:
                reasons.append(os.strerror(error.errno).lower() if error.errno else str(error))
                sock.close()
            except BaseException:
                sock.close()
                raise
            else:
                stream = trio.SocketStream(sock)
                keepalive(stream)
                return stream
    why = "; ".join(dict.fromkeys(reasons)) or f"no answer within {CONNECT_TIMEOUT:g} s"
    raise Unreachable(f"the control plane {address} cannot be reached: {why}")


def keepalive(stream: trio.SocketStream) -> None:
    """Have the kernel notice a control plane that vanished."""
    idle, interval, probes = KEEPALIVE
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


REMEDY = "set AUTH_TOKEN, or run 'ztunnel enroll'"


def refusal(error: GrpcError, introduced: bool, remedy: str = REMEDY) -> str:
    """A gRPC status in words.

    Args:
        error: The status.
        introduced: Whether a token or a certificate was shown; else that is why, and the remedy is told.
        remedy: How this host gets one.
    """
    text = f"{error.code.name}: {error.message or 'no reason given'}"
    if error.code is StatusCode.UNAUTHENTICATED and not introduced:
        text += f"; this host has neither a token nor a valid certificate: {remedy}"
    elif error.code is StatusCode.INVALID_ARGUMENT and "max allowed TTL" in error.message:  # the words of Istio's CA
        text += "; set SECRET_TTL to no more than that"
    return text


def request_metadata(token: TokenSource | None, cluster_id: str, headers: Sequence[tuple[str, str]]) -> Metadata:
    """`authorization` and `clusterid` where there is a token, then the configured headers.

    Raises:
        ControlPlaneError: the token cannot be read.

    Source: Istio request metadata of ztunnel.
    """
    metadata: list[tuple[str, str]] = []
    if token is not None:
        metadata.append(("authorization", f"Bearer {token.read()}"))
        metadata.append(("clusterid", cluster_id))
    metadata.extend((name.lower(), value) for name, value in headers)
    return tuple(metadata)
