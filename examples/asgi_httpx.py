"""A web application that knows who calls it, and a client that says who it is: ASGI and httpx over HBONE.

    python -m examples.asgi_httpx

Needs the extras `asgi` and `httpx`. As in `examples.echo`, both ends run in this one program, and the certificates are
made in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import trio

import hbone
import hbone.asgi
import hbone.httpx
import hbone.trio
from hbone.testing.ca import TestCa

if TYPE_CHECKING:
    from hbone.daemon.http import Receive, Scope, Send

CA = TestCa()


def identity(name: str) -> hbone.StaticSource:
    """What a program holds: its certificate and key, and the roots that it trusts."""
    made = CA.identity("demo", name)
    return hbone.StaticSource(made.svid, made.bundles)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Any ASGI application; a framework's will do. Who calls is in its scope, proved by the caller's certificate."""
    caller = scope["extensions"]["spiffe"]
    allowed = caller["service_account"] == "shopper"
    body = f"{'welcome' if allowed else 'not for you'}, {caller['peer']}\n".encode()
    await send({"type": "http.response.start", "status": 200 if allowed else 403, "headers": []})
    await send({"type": "http.response.body", "body": body})


async def call_as(name: str, port: int) -> None:
    """Get a page under one identity."""
    async with hbone.trio.ConnectionPool(identity(name)) as pool:
        transport = hbone.httpx.HboneTransport(pool, via=("127.0.0.1", port), peer=CA.id("demo", "shop"))
        async with httpx.AsyncClient(transport=transport) as client:
            response = await client.get("http://shop.example:8080/basket")
            print(f"{name}: {response.status_code} {response.text.strip()}")


async def main() -> None:
    """Serve, call twice, and stop."""
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
            await hbone.trio.serve(
                hbone.asgi.handler(application),
                identity("shop"),
                host="127.0.0.1",
                port=0,
                authorize=hbone.same_trust_domain,
                task_status=task_status,
            )

        listeners = await nursery.start(serve)
        port = listeners[0].socket.getsockname()[1]
        await call_as("shopper", port)
        await call_as("stranger", port)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
