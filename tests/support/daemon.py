"""A ztunnel in the test's own process, on a scripted control plane and loopback ports of its own."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import trio
from tests.support.control_plane import Authority, ScriptedControlPlane

from ztunnel.app import Daemon
from ztunnel.config import Config
from ztunnel.control.ca import CaClient
from ztunnel.control.cache import StateDir
from ztunnel.dataplane import Reactor
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

CA = Authority(at=time.time())

Resource = tuple[str, str, bytes]


class Warnings:
    """Stands in for a module's logger and keeps its warnings, however the logs are configured."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(f"{event} {fields}")


def settings(**environ: str) -> Config:
    return Config.from_env(
        {
            "PROXY_WORKLOAD_INFO": "shop/web-1/web",
            "XDS_ADDRESS": "https://control.invalid:15012",
            "CA_ADDRESS": "https://control.invalid:15012",
            "ZTUNNEL_BIND_ADDRESS": "127.0.0.1",
            "CONNECTION_TERMINATION_DEADLINE": "1s",
            **{
                f"ZTUNNEL_{name}_PORT": "0"
                for name in ("OUTBOUND", "INBOUND", "HBONE", "SOCKS5", "DNS", "ADMIN", "STATS", "READY")
            },
            **environ,
        }
    )


def workload(name: str = "web-1", account: str = "web", ip: str = "10.0.0.1") -> Resource:
    uid = f"c1//Pod/shop/{name}"
    message = workload_pb2.Workload(
        uid=uid,
        name=name,
        namespace="shop",
        service_account=account,
        addresses=[bytes(map(int, ip.split(".")))],
        tunnel_protocol=workload_pb2.HBONE,
    )
    return uid, "1", workload_pb2.Address(workload=message).SerializeToString()


def policy(name: str) -> Resource:
    message = authorization_pb2.Authorization(name=name, namespace="shop", scope=authorization_pb2.NAMESPACE)
    return f"shop/{name}", "1", message.SerializeToString()


class Running:
    """A daemon under test."""

    def __init__(self, daemon: Daemon, control: ScriptedControlPlane) -> None:
        self.daemon = daemon
        self.control = control

    def address(self, page: str) -> tuple[str, int]:
        host, _, port = self.daemon.status()["listeners"][page].rpartition(":")
        return host, int(port)

    async def http(
        self, page: str, path: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        stream = await trio.open_tcp_stream(*self.address(page))
        return await exchange(stream, path, method, headers)

    async def status(self) -> Any:
        code, body = await self.http("admin", "/status")
        assert code == 200
        return json.loads(body)

    async def sync(self, *addresses: Resource, policies: tuple[Resource, ...] = ()) -> None:
        """Answer the next stream, so that the daemon becomes ready."""
        stream = await self.control.next_stream()
        await stream.opening()
        stream.respond(AUTHORIZATION_TYPE, policies)
        stream.respond(ADDRESS_TYPE, addresses or [workload()])
        await stream.request()
        await stream.request()

    async def until_ready(self) -> None:
        with trio.fail_after(10):
            while not self.daemon.readiness.ready:
                await trio.sleep(0.01)


async def exchange(
    stream: trio.abc.Stream, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, str]:
    fields = {"host": "localhost", "connection": "close", "content-length": "0", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    async with stream:
        await stream.send_all(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
        answer = bytearray()
        while data := await stream.receive_some(65_536):
            answer += data
    top, _, body = bytes(answer).partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in top.lower():
        body = b"".join(unchunked(body))
    return int(top.split(b" ", 2)[1]), body.decode()


def unchunked(body: bytes) -> Iterator[bytes]:
    """The parts of a body whose length was not known before."""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return
        yield body[:length]
        assert body[length : length + 2] == b"\r\n"
        body = body[length + 2 :]


@contextlib.asynccontextmanager
async def running(
    config: Config | None = None, state: Path | None = None, control: ScriptedControlPlane | None = None
) -> AsyncIterator[Running]:
    """Start a daemon, and stop it as SIGTERM would."""
    if control is None:
        control = ScriptedControlPlane(time.time)
        control.sign_with(CA)
    directory = StateDir.open(state) if state is not None else None
    reactor = Reactor()
    daemon = Daemon(
        config or settings(),
        reactor,
        directory,
        xds=control.dial,
        authority=CaClient(control.dial, lifetime=3600),
    )
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(reactor.run_in_trio)
            async with trio.open_nursery() as inner:
                await inner.start(daemon.run)
                try:
                    yield Running(daemon, control)
                finally:
                    daemon.shut_down()
            nursery.cancel_scope.cancel()
    finally:
        if directory is not None:
            directory.release()
