"""HTTP over HBONE: an ASGI application on one end, httpx on the other."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio
from tests.support.tunnels import who

import hbone
import hbone.asgi
import hbone.asyncio
import hbone.httpx
import hbone.trio
from hbone.testing.network import Network

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

VIA = ("10.0.0.7", 15008)
ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"
WEB = "spiffe://cluster.local/ns/shop/sa/web"


def source_of(name: str) -> hbone.StaticSource:
    identity = who(name)
    return hbone.StaticSource(identity.svid, identity.bundles)


async def app(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    tls = scope["extensions"]["tls"]
    answer = {
        "path": scope["path"],
        "body": body.decode(),
        "peer": scope["extensions"]["spiffe"]["peer"],
        "account": scope["extensions"]["spiffe"]["service_account"],
        "version": tls["tls_version"],
        "chain": len(tls["client_cert_chain"]),
        "suite": tls["cipher_suite"],
        "authority": scope["hbone"]["authority"],
    }
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


@contextlib.asynccontextmanager
async def serving(network: Network) -> AsyncIterator[hbone.trio.ConnectionPool]:
    async with trio.open_nursery() as nursery:
        await nursery.start(
            functools.partial(
                hbone.trio.serve_listeners,
                hbone.asgi.handler(app),
                source_of("orders"),
                [network.listen(*VIA)],
                authorize=hbone.same_trust_domain,
            )
        )
        async with hbone.trio.ConnectionPool(source_of("web"), open_transport=network.open_transport) as pool:
            yield pool
        nursery.cancel_scope.cancel()


async def test_the_application_knows_who_called() -> None:
    network = Network()
    async with serving(network) as pool:
        transport = hbone.httpx.HboneTransport(pool, peer=ORDERS)
        async with httpx.AsyncClient(transport=transport) as client:
            for number in range(3):
                response = await client.post(f"http://10.0.0.7:8080/things/{number}", content=b"hello")
                assert response.status_code == 200
                assert response.json() == {
                    "path": f"/things/{number}",
                    "body": "hello",
                    "peer": WEB,
                    "account": "web",
                    "version": 0x0304,
                    "chain": 1,
                    "suite": 0x1301,
                    "authority": "10.0.0.7:8080",
                }
    assert len(network.links) == 1


async def test_another_peer_is_a_connect_error() -> None:
    network = Network()
    async with serving(network) as pool:
        transport = hbone.httpx.HboneTransport(pool, via=VIA, peer=WEB)
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(httpx.ConnectError, match="orders"):
                await client.get("http://10.0.0.7:8080/")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
        b"http2-settings: AA\r\n\r\n",
        b"CONNECT 10.0.0.1:80 HTTP/1.1\r\nhost: 10.0.0.1:80\r\n\r\n",
    ],
)
async def test_what_leads_out_of_http1_is_refused(request_bytes: bytes) -> None:
    network = Network()
    async with serving(network) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=VIA, peer=ORDERS)
        await stream.send_all(request_bytes)
        answer = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async for data in stream:
                answer += data
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 405"))
        async with httpx.AsyncClient(transport=hbone.httpx.HboneTransport(pool, peer=ORDERS)) as client:
            assert (await client.get("http://10.0.0.7:8080/")).status_code == 200


def test_httpx_works_over_the_asyncio_pool() -> None:
    async def echo_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        body = head.split(b" ")[1]
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()

    async def main() -> None:
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(
            hbone.asyncio.serve(
                echo_http,
                source_of("orders"),
                0,
                host="127.0.0.1",
                authorize=hbone.same_trust_domain,
                started=lambda addresses: started.set_result(addresses[0][1]),
            )
        )
        port = await started
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            transport = hbone.httpx.HboneTransport(pool, via=("127.0.0.1", port), peer=ORDERS)
            async with httpx.AsyncClient(transport=transport) as client:
                response = await client.get("http://10.0.0.7:8080/over/asyncio")
                assert response.text == "/over/asyncio"
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server

    asyncio.run(main())
