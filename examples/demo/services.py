"""The applications of the demo: an echo of HTTP and of plain TCP, and the clients that call them."""

from __future__ import annotations

import trio

__all__ = ["ask", "echo", "http_get", "serve_http", "serve_tcp"]


async def serve_tcp(listener: trio.SocketListener) -> None:
    """Echo every byte until the client ends its direction."""

    async def handle(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                async for data in stream:
                    await stream.send_all(data)
                await stream.send_eof()
        except trio.BrokenResourceError:
            return

    await trio.serve_listeners(handle, [listener])


async def serve_http(listener: trio.SocketListener) -> None:
    """Answer each request with its own path and the address that it came from."""

    async def handle(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                head = b""
                while b"\r\n\r\n" not in head and len(head) < 65536:
                    part = await stream.receive_some()
                    if not part:
                        return
                    head += part
                path = head.split(b" ", 2)[1]
                body = b"you asked for %s, your address is %s\n" % (path, stream.socket.getpeername()[0].encode())
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        except trio.BrokenResourceError:
            return

    await trio.serve_listeners(handle, [listener])


async def http_get(stream: trio.SocketStream, path: str) -> str:
    """The body of one GET, or nothing when the connection was closed instead."""
    async with stream:
        try:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: orders.shop.mesh\r\n\r\n".encode())
            answer = b"".join([part async for part in stream])
        except trio.BrokenResourceError:
            return ""
    return answer.partition(b"\r\n\r\n")[2].decode().strip()


async def echo(stream: trio.SocketStream, data: bytes) -> bytes:
    """Send `data` and read as much back; less when the connection ended."""
    back = b""
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


async def ask(stream: trio.SocketStream, data: bytes) -> bytes:
    """`echo` over a connection of its own."""
    async with stream:
        return await echo(stream, data)
