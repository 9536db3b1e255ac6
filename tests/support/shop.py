"""A mesh of two hosts for end-to-end tests: `alpha` runs a client, `beta` the orders service."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.sizes import FULL

from hbone.testing.hosts import namespace_obstacle
from hbone.testing.mesh import Mesh, mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

__all__ = [
    "DENY_ALL",
    "ECHO",
    "LOOPBACK",
    "NAMESPACES",
    "WORKLOADS",
    "closest_kind",
    "descriptors",
    "echo",
    "ended",
    "kinds",
    "open_stream",
    "serve_echo",
    "shop",
    "until",
]

ECHO = 9000
NAMESPACES = not namespace_obstacle()

WORKLOADS = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {address: "{alpha}", serviceAccount: client}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: orders, namespace: shop, labels: {app: orders}}
spec: {address: "{beta}", serviceAccount: orders}
"""

DENY_ALL = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules: [{}]
"""

LOOPBACK = f"127.{2 + os.getpid() % 200}.{os.getpid() // 200 % 250}"
"""Where the hosts of this process are if they are loopback addresses: two runs on one machine keep apart."""

_KINDS = [pytest.param(False, id="loopback"), pytest.param(True, id="namespaces", marks=pytest.mark.netns)]
kinds = pytest.mark.parametrize("namespaces", _KINDS)
closest_kind = pytest.mark.parametrize("namespaces", _KINDS[(0 if FULL else NAMESPACES) : (1 + NAMESPACES)])
"""The short run takes the one that is closer to a real host."""


@contextlib.asynccontextmanager
async def shop(
    directory: Path,
    *,
    namespaces: bool,
    documents: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    serve: Callable[[trio.SocketStream], Awaitable[None]] | None = None,
) -> AsyncIterator[Mesh]:
    """Two hosts with their ztunnels, and an application on port 9000 of `beta`."""
    started = mesh(
        directory,
        ["alpha", "beta"],
        namespaces=namespaces,
        documents={"shop": WORKLOADS, **(documents or {})},
        loopback=LOOPBACK,
    )
    async with started as running, trio.open_nursery() as nursery:
        listener = await running.hosts["beta"].listen(ECHO)
        nursery.start_soon(trio.serve_listeners, serve or serve_echo, [listener])
        for host, name in (("alpha", "client"), ("beta", "orders")):
            await running.add_ztunnel(host, ("shop", name, name), environment=environment)
        yield running
        nursery.cancel_scope.cancel()


async def serve_echo(stream: trio.SocketStream) -> None:
    """Echo until the client ends its direction."""
    try:
        async with stream:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()
    except trio.BrokenResourceError:
        pass


async def echo(running: Mesh, data: bytes = b"hello", *, port: int = ECHO) -> bytes:
    """One connection of `alpha` to `beta`: send, read as much back, close. Empty when it was refused."""
    try:
        stream = await running.connect("alpha", running.hosts["beta"].address, port)
    except OSError:
        return b""
    back = b""
    async with stream:
        try:
            await stream.send_all(data)
            while len(back) < len(data):
                part = await stream.receive_some()
                if not part:
                    break
                back += part
        except trio.BrokenResourceError:
            pass
    return back


async def open_stream(running: Mesh) -> trio.SocketStream:
    """A connection of `alpha` to `beta` that is served and stays open."""
    stream = await running.connect("alpha", running.hosts["beta"].address, ECHO)
    await stream.send_all(b"first")
    assert await stream.receive_some() == b"first"
    return stream


async def ended(stream: trio.SocketStream, seconds: float) -> bool:
    """Whether a stream that carries nothing further ended in time, by a reset too; closes it."""
    found = False
    with trio.move_on_after(seconds):
        try:
            found = not await stream.receive_some()
        except trio.BrokenResourceError:
            found = True
    await trio.aclose_forcefully(stream)
    return found


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def until(condition: Callable[[], Any], *, seconds: float = 30.0) -> bool:
    """Whether `condition` (plain or async) came true in time."""
    with trio.move_on_after(seconds):
        while True:
            result = condition()
            if hasattr(result, "__await__"):
                result = await result
            if result:
                return True
            await trio.sleep(0.05)
    return False
