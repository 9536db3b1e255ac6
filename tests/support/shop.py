"""A mesh of two hosts for end-to-end tests: `alpha` runs a client, `beta` the orders service."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest
import trio

from hbone.testing.hosts import namespace_obstacle
from hbone.testing.mesh import Mesh, mesh

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

__all__ = ["DENY_ALL", "ECHO", "NAMESPACES", "WORKLOADS", "descriptors", "echo", "kinds", "serve_echo", "shop", "until"]

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

kinds = pytest.mark.parametrize(
    "namespaces",
    [
        pytest.param(False, id="loopback"),
        pytest.param(True, id="namespaces", marks=pytest.mark.netns),
    ],
)


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
        loopback=f"127.{2 + os.getpid() % 200}.{os.getpid() // 200 % 250}",  # two runs on one machine keep apart
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


def descriptors(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


async def until(condition: Callable[[], Any], *, seconds: float = 10.0) -> bool:
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
