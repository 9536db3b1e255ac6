"""HTTP over HBONE: an ASGI application on one end, httpx on the other."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import pathlib
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import trio
from tests.support.tunnels import ca, who

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


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's, for HTTPS inside the tunnel."""
    issued = ca().server("orders.example")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as directory:
        files = pathlib.Path(directory, "cert.pem"), pathlib.Path(directory, "key.pem")
        files[0].write_bytes(issued.cert_pem)
        files[1].write_bytes(issued.key_pem)
        server.load_cert_chain(*files)
    return ssl.create_default_context(cadata=ca().root_pem.decode()), server


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


def under_asyncio(handler: Serve, use: Callable[[hbone.httpx.HboneTransport], Awaitable[None]], **options: Any) -> None:
    """Serve with `handler` on the loopback interface, and call `use` with a transport that leads there."""

    async def main() -> None:
        started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(
            hbone.asyncio.serve(
                handler,
                source_of("orders"),
                0,
                host="127.0.0.1",
                authorize=hbone.same_trust_domain,
                drain_timeout=0.5,
                started=lambda addresses: started.set_result(addresses[0][1]),
            )
        )
        port = await started
        async with hbone.asyncio.ConnectionPool(source_of("web")) as pool:
            await use(hbone.httpx.HboneTransport(pool, via=("127.0.0.1", port), peer=ORDERS, **options))
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server

    asyncio.run(asyncio.wait_for(main(), 30))


async def echo_path(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    body = head.split(b" ")[1]
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()


def test_httpx_works_over_the_asyncio_pool() -> None:
    async def use(transport: hbone.httpx.HboneTransport) -> None:
        async with httpx.AsyncClient(transport=transport) as client:
            response = await client.get("http://10.0.0.7:8080/over/asyncio")
            assert response.text == "/over/asyncio"

    under_asyncio(echo_path, use)


def test_httpx_speaks_https_over_the_asyncio_pool() -> None:
    trusted, served = tls_contexts()

    async def over_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport = await loop.start_tls(writer.transport, protocol, served, server_side=True)
        assert transport is not None
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        await echo_path(reader, writer)
        writer.close()
        await writer.wait_closed()

    async def use(transport: hbone.httpx.HboneTransport) -> None:
        async with httpx.AsyncClient(transport=transport) as client:
            response = await client.get("https://orders.example/over/tls")
            assert response.text == "/over/tls"

    under_asyncio(over_tls, use, ssl_context=trusted)


def test_closing_does_not_wait_for_a_peer_that_reads_nothing() -> None:
    async def sleep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def use(transport: hbone.httpx.HboneTransport) -> None:
        async with httpx.AsyncClient(transport=transport, timeout=0.2) as client:
            with pytest.raises(httpx.WriteTimeout):
                await client.post("http://10.0.0.7:8080/", content=bytes(20_000_000))

    under_asyncio(sleep, use)


async def test_a_host_name_that_is_no_authority_is_a_connect_error() -> None:
    network = Network()
    async with serving(network) as pool:
        transport = hbone.httpx.HboneTransport(pool, via=VIA, peer=ORDERS)
        async with httpx.AsyncClient(transport=transport) as client:
            with pytest.raises(httpx.ConnectError, match="my_host"):
                await client.get("http://my_host/")


async def test_httpx_speaks_https_over_the_trio_pool() -> None:
    trusted, served = tls_contexts()

    async def over_tls(stream: hbone.trio.HboneStream) -> None:
        inner = trio.SSLStream(stream, served, server_side=True, https_compatible=True)
        head = b""
        while b"\r\n\r\n" not in head:
            head += await inner.receive_some()
        await inner.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n" + head.split(b" ")[1][:5])
        await inner.aclose()

    network = Network()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            functools.partial(
                hbone.trio.serve_listeners,
                over_tls,
                source_of("orders"),
                [network.listen(*VIA)],
                authorize=hbone.same_trust_domain,
            )
        )
        async with hbone.trio.ConnectionPool(source_of("web"), open_transport=network.open_transport) as pool:
            transport = hbone.httpx.HboneTransport(pool, via=VIA, peer=ORDERS, ssl_context=trusted)
            async with httpx.AsyncClient(transport=transport) as client:
                response = await client.get("https://orders.example/tlsx")
                assert response.text == "/tlsx"
        nursery.cancel_scope.cancel()


def test_hypercorn_is_imported_for_applications_only() -> None:
    code = "import sys, hbone.asgi, hbone.daemon.http1; sys.exit('hypercorn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
