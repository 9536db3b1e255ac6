"""Whatever a control plane or CA does: connections of known workloads go on, and `status` says in a line what is wrong.

Two ztunnels have their certificates and the mesh; then the control plane fails, while they run or before they start
again. Failing servers are real ones, on a port.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.control_plane import Authority, ScriptedControlPlane
from tests.support.daemon import Running, running, settings, workload
from tests.support.faults import FAULTS, Plane, faulty, lost
from tests.support.pair import fresh_port
from tests.support.standing import line, printed

from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.control_plane import ScriptedStream

ALPHA, BETA = "127.0.91.1", "127.0.91.2"
MESH = [workload("web-1", "web", ALPHA), workload("cart-1", "cart", BETA)]
OF = {ALPHA: "shop/web-1/web", BETA: "shop/cart-1/cart"}
BOUND = 30


class Host:
    """A ztunnel that can be started again, on a control plane of its own."""

    def __init__(self, address: str, state: Path, authority: Authority, lifetime: float | None = None) -> None:
        good = ScriptedControlPlane(time.time)
        good.sign_with(authority, lifetime=lifetime)
        self.plane = Plane(good)
        self.state = state
        self.stream: ScriptedStream | None = None
        self.config = settings(
            ZTUNNEL_BIND_ADDRESS=address,
            PROXY_WORKLOAD_INFO=OF[address],
            ZTUNNEL_HBONE_PORT="15008",
            UNSTABLE_ENABLE_SOCKS5="true",
            ISTIO_META_DNS_CAPTURE="false",
            CONNECTION_TERMINATION_DEADLINE="0.1s",
        )

    def run(self) -> contextlib.AbstractAsyncContextManager[Running]:
        return running(self.config, self.state, self.plane)  # type: ignore[arg-type]  # what is asked of it is `dial`

    async def sync(self, ztunnel: Running) -> None:
        stream = self.stream = await self.plane.good.next_stream()
        await stream.opening()
        stream.respond(AUTHORIZATION_TYPE)
        stream.respond(ADDRESS_TYPE, MESH)
        await ztunnel.daemon.mesh.svids.fetch()
        await ztunnel.until_ready()

    def fail(self, port: int) -> None:
        self.plane.fail(port)
        if self.stream is not None:
            self.stream.fail(lost())


@contextlib.asynccontextmanager
async def application() -> AsyncIterator[int]:
    """What listens on beta's host: an echo."""

    async def echo(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            async for part in stream:
                await stream.send_all(part)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(fresh_port(), host=BETA)
        await nursery.start(trio.serve_listeners, echo, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def connect(client: Running, port: int) -> trio.SocketStream:
    """As an application on alpha's host would, by SOCKS5."""
    stream = await trio.open_tcp_stream(*client.address("socks5"))
    await stream.send_all(b"\x05\x01\x00\x05\x01\x00\x01" + socket.inet_aton(BETA) + port.to_bytes(2, "big"))
    answer = b""
    while len(answer) < 12 and (part := await stream.receive_some(12 - len(answer))):
        answer += part
    if answer[2:4] != b"\x05\x00":
        await stream.aclose()
        raise ConnectionRefusedError(answer)
    return stream


async def answered(stream: trio.SocketStream, text: bytes = b"hello") -> bool:
    await stream.send_all(text)
    back = b""
    while len(back) < len(text) and (part := await stream.receive_some(100)):
        back += part
    return back == text


async def complaint(ztunnel: Running, of_plane: str, of_ca: str) -> list[str]:
    """The lines of `ztunnel status`, once they have these words."""
    lines = []
    with trio.move_on_after(BOUND):
        while True:
            lines = printed(await ztunnel.status())
            if of_plane in line(lines, "control plane") and of_ca in line(lines, "identity"):
                break
            await trio.sleep(0.02)
    return lines


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a control plane that says nothing gives up sooner than in earnest."""
    monkeypatch.setattr("ztunnel.control.transport.CONNECT_TIMEOUT", 0.7)
    monkeypatch.setattr("ztunnel.control.conversation.FIRST_ANSWER_TIMEOUT", 0.7)
    monkeypatch.setattr("ztunnel.control.ca.CALL_TIMEOUT", 0.7)
    monkeypatch.setattr("ztunnel.membership.CATCH_UP", 0.1)


def renew(ztunnel: Running) -> None:
    """It is time for another certificate."""
    svids = ztunnel.daemon.mesh.svids
    svids._plan(0)
    svids._wake()


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("restarted", [False, True], ids=["while it runs", "before it starts again"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_traffic_of_known_workloads_goes_on(tmp_path: Path, fault: str, restarted: bool) -> None:
    authority = Authority(at=time.time())
    hosts = [Host(ALPHA, tmp_path / "alpha", authority), Host(BETA, tmp_path / "beta", authority)]
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(application())
        where = await stack.enter_async_context(faulty(fault, tmp_path, authority.root))
        async with contextlib.AsyncExitStack() as first:
            ztunnels = [await first.enter_async_context(host.run()) for host in hosts]
            for host, ztunnel in zip(hosts, ztunnels, strict=True):
                await host.sync(ztunnel)
            held = await connect(ztunnels[0], port)
            stack.push_async_callback(held.aclose)
            assert await answered(held)
            if not restarted:
                stack.push_async_callback(first.pop_all().aclose)
        for host in hosts:
            host.fail(where)
        if restarted:
            ztunnels = [await stack.enter_async_context(host.run()) for host in hosts]
            for ztunnel in ztunnels:
                await ztunnel.until_ready()
        for ztunnel in ztunnels:
            renew(ztunnel)
        said, said_of_ca = FAULTS[fault]
        lines = await complaint(ztunnels[0], said, said_of_ca)
        plane, identity = line(lines, "control plane"), line(lines, "identity")
        assert " away since " in plane or "; the mesh is as of " in plane  # one that hangs may be connected just now
        assert said in plane
        assert "Available, expires " in identity
        assert said_of_ca in identity.partition("last error: ")[2]
        assert not any("Traceback" in text or "\n" in text for text in lines)
        fresh = await connect(ztunnels[0], port)
        async with fresh:
            assert await answered(fresh)
        if not restarted:
            assert await answered(held)


async def test_traffic_ends_with_the_certificate_and_status_says_so(tmp_path: Path) -> None:
    authority = Authority(at=time.time())
    hosts = [Host(ALPHA, tmp_path / "alpha", authority, 4), Host(BETA, tmp_path / "beta", authority)]
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(application())
        where = await stack.enter_async_context(faulty("refuses connections", tmp_path, authority.root))
        ztunnels = [await stack.enter_async_context(host.run()) for host in hosts]
        for host, ztunnel in zip(hosts, ztunnels, strict=True):
            await host.sync(ztunnel)
            host.fail(where)
        identity = ""
        with trio.fail_after(BOUND):
            while "expired" not in identity:
                lines = printed(await ztunnels[0].status())
                identity = line(lines, "identity")
                await trio.sleep(0.05)
        assert "Unavailable: the certificate for spiffe://cluster.local/ns/shop/sa/web expired at " in identity
        with pytest.raises(ConnectionRefusedError):
            await connect(ztunnels[0], port)


@pytest.mark.parametrize("first", ["client", "server"])
async def test_a_normal_end_is_quiet(tmp_path: Path, first: str, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(at=time.time())
    hosts = [Host(ALPHA, tmp_path / "alpha", authority), Host(BETA, tmp_path / "beta", authority)]
    async with application() as port, contextlib.AsyncExitStack() as stack:
        started = {}
        for host in reversed(hosts) if first == "client" else hosts:  # what starts last ends first
            started[host] = await stack.enter_async_context(host.run())
            await host.sync(started[host])
        client = started[hosts[0]]
        async with await connect(client, port) as stream:
            assert await answered(stream)
        async with await connect(client, port) as stream:
            assert await answered(stream)
            await stream.send_eof()
            assert await stream.receive_some() == b""
    assert [record.getMessage() for record in caplog.records if record.levelname not in ("INFO", "DEBUG")] == []
