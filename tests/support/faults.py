"""Control planes and CAs that fail, each in its own way, on a real port; and a way to change between them."""

from __future__ import annotations

import contextlib
import random
import ssl
from typing import TYPE_CHECKING, Any

import trio

from hbone.grpc import GrpcError, StatusCode
from hbone.identity import ServerCertificate, TrustBundle
from hbone.testing.ca import TestCa
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcCall, GrpcServer
from ztunnel.control.ca import CREATE_CERTIFICATE
from ztunnel.control.discovery import DELTA
from ztunnel.control.transport import ControlPlaneError, RootSource, ServerAddress, grpc_dialer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from cryptography import x509
    from tests.support.control_plane import ScriptedControlPlane

    from hbone.identity import Identity
    from ztunnel.control.transport import Channel, Dial

__all__ = ["FAULTS", "Plane", "faulty"]

ROOT = TestCa()
"""What the control plane's own certificate ends in."""


class Plane:
    """A scripted control plane that can be replaced by a real, failing one at any time."""

    def __init__(self, good: ScriptedControlPlane) -> None:
        self.good = good
        self._now: Dial = good.dial

    @contextlib.asynccontextmanager
    async def dial(self, identity: Identity | None) -> AsyncIterator[Channel]:
        async with self._now(identity) as channel:
            yield channel

    def fail(self, port: int) -> None:
        """From now on everyone comes to this port."""
        self._now = grpc_dialer(ServerAddress(host="127.0.0.1", port=port), RootSource.of(ROOT.root))


async def _hang(_: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def _close(_: trio.SocketStream) -> None:
    await trio.lowlevel.checkpoint()


async def _babble(stream: trio.abc.Stream) -> None:
    noise = random.Random(7)
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(noise.randbytes(4096))
        await trio.sleep_forever()


async def _babble_inside(stream: trio.SocketStream, directory: Path) -> None:
    issued = ROOT.server("127.0.0.1")
    (directory / "cert.pem").write_bytes(issued.cert_pem)
    (directory / "key.pem").write_bytes(issued.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    context.set_alpn_protocols(["h2"])
    inside = trio.SSLStream(stream, context, server_side=True)
    with contextlib.suppress(trio.BrokenResourceError):
        await inside.do_handshake()
        await _babble(inside)


async def _silent(call: GrpcCall) -> None:
    async for _ in call:
        await trio.sleep_forever()


async def _nonsense(call: GrpcCall) -> None:
    async for _ in call:
        await call.send(b"\xff" * 100)


async def _refuse(call: GrpcCall) -> None:
    async for _ in call:
        raise GrpcError(StatusCode.PERMISSION_DENIED, "this workload is not welcome")


class TlsServer:
    """A gRPC server that does the same with every call."""

    def __init__(
        self,
        handler: Callable[[GrpcCall], Awaitable[None]],
        workloads: x509.Certificate,
        *,
        root: TestCa = ROOT,
        ttl: float = 3600,
    ) -> None:
        issued = root.server("127.0.0.1", ttl=ttl)
        certificate = ServerCertificate(issued.chain, issued.key)
        self._context = TlsContext.server(certificate, "optional", bundles=[TrustBundle("cluster.local", (workloads,))])
        self._server = GrpcServer({DELTA: handler, CREATE_CERTIFICATE: handler})

    async def serve(self, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[Any]) -> None:
        await self._server.serve(listeners, lambda: self._context, task_status=task_status)


FAULTS: dict[str, tuple[str, str]] = {
    "refuses connections": ("cannot be reached: connection refused", "cannot be reached: connection refused"),
    "hangs before TLS": ("the TLS handshake took longer than", "the CA did not answer within"),
    "hangs after TLS": ("the control plane sent no", "the CA did not answer within"),
    "babbles before TLS": ("the peer does not speak TLS", "the peer does not speak TLS"),
    "babbles inside TLS": ("a frame of 3716326 bytes", "a frame of 3716326 bytes"),
    "sends nonsense": ("bytes that are no DeltaDiscoveryResponse", "the CA's answer is no IstioCertificateResponse"),
    "has another root": ("which is no root of ours", "which is no root of ours"),
    "has an expired certificate": ("it expired at", "it expired at"),
    "does not know us": (
        "the peer refused our certificate: unknown ca",
        "the peer refused our certificate: unknown ca",
    ),
    "disappears at once": ("the connection broke during the TLS handshake", "broke during the TLS handshake"),
    "refuses calls": ("this workload is not welcome", "this workload is not welcome"),
}
"""What a control plane does, and what is said of it: of discovery, and of the CA."""


@contextlib.asynccontextmanager
async def faulty(fault: str, directory: Path, workloads: x509.Certificate) -> AsyncIterator[int]:
    """A control plane with that fault, which knows workloads by the CA of theirs; its port."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port: int = listeners[0].socket.getsockname()[1]
        by_stream: dict[str, Callable[[trio.SocketStream], Awaitable[None]]] = {
            "hangs before TLS": _hang,
            "disappears at once": _close,
            "babbles before TLS": _babble,
            "babbles inside TLS": lambda stream: _babble_inside(stream, directory),
        }
        by_call = {
            "hangs after TLS": lambda: TlsServer(_silent, workloads),
            "sends nonsense": lambda: TlsServer(_nonsense, workloads),
            "has another root": lambda: TlsServer(_silent, workloads, root=TestCa()),
            "has an expired certificate": lambda: TlsServer(_silent, workloads, ttl=-60),
            "does not know us": lambda: TlsServer(_silent, ROOT.root),
            "refuses calls": lambda: TlsServer(_refuse, workloads),
        }
        if fault in by_stream:
            await nursery.start(trio.serve_listeners, by_stream[fault], listeners)
        elif fault in by_call:
            await nursery.start(by_call[fault]().serve, listeners)
        else:
            assert fault == "refuses connections"
            for listener in listeners:
                await listener.aclose()
        yield port
        nursery.cancel_scope.cancel()


def lost() -> ControlPlaneError:
    """How an open stream learns of it."""
    return ControlPlaneError("the connection was lost")
