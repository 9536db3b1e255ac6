"""The guarded HTTP server, by raw bytes: what a hostile peer may send."""

from __future__ import annotations

import contextlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from hbone.daemon.http import HttpLimits, serve_asgi, unix_listener
from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from pathlib import Path

    from hbone.daemon.http import App, Receive, Scope, Send

OK = b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def page(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the path and the length of the body; /fail raises, /late raises after the head."""
    if scope["path"] == "/fail":
        raise RuntimeError("the application is broken")
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    if scope["path"] == "/slow":
        await trio.sleep_forever()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/big":
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    if scope["path"] == "/late":
        raise RuntimeError("the application is broken")
    await send({"type": "http.response.body", "body": f"{scope['path']} {size}".encode()})


class Served:
    def __init__(self, address: Any) -> None:
        self.address = address

    async def open(self) -> trio.SocketStream:
        return await trio.open_tcp_stream(*self.address[:2])

    async def exchange(self, *chunks: bytes) -> bytes:
        """All that the server answers to `chunks` until it closes."""
        stream = await self.open()
        async with stream:
            received = b""
            try:
                for chunk in chunks:
                    await stream.send_all(chunk)
                async for part in stream:
                    received += part
            except trio.BrokenResourceError:
                pass  # it closed with bytes of ours unread
            return received


@asynccontextmanager
async def serving(
    app: App = page, limits: HttpLimits | None = None, hosts: Collection[str] | None = None
) -> AsyncIterator[Served]:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[Any]) -> None:
            await serve_asgi(app, listeners, limits=limits, hosts=hosts, task_status=task_status)

        await nursery.start(serve)
        served = Served(listeners[0].socket.getsockname())
        yield served
        assert (await served.exchange(LAST)).startswith(b"HTTP/1.1 200"), "the server died"
        nursery.cancel_scope.cancel()


async def test_requests_share_a_connection() -> None:
    async with serving() as served:
        answer = await served.exchange(OK, b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", LAST)
        assert answer.count(b"HTTP/1.1 200") == 3
        assert b"/x 3" in answer


async def test_a_request_may_come_byte_by_byte() -> None:
    async with serving() as served:
        answer = await served.exchange(*[LAST[i : i + 1] for i in range(len(LAST))])
        assert answer.startswith(b"HTTP/1.1 200")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(PREFACE, id="http/2 preface"),
        pytest.param(PREFACE + SETTINGS + bytes([0, 0, 5, 2, 0, 0, 0, 0, 3, 0, 0, 0, 1, 9]), id="priority chain"),
        pytest.param(b"PRI * HTTP/2.0\r\nHost: a\r\n\r\n", id="preface with a field"),
        pytest.param(b"\r\n" + PREFACE + SETTINGS, id="preface after an empty line"),
        pytest.param(OK + PREFACE + SETTINGS, id="preface as the second request"),
        pytest.param(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", id="connect"),
        pytest.param(OK + b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", id="connect as the second request"),
        pytest.param("GÉT / HTTP/1.1\r\nHost: a\r\n\r\n".encode(), id="method not ascii"),
        pytest.param(b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", id="target not ascii"),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
            id="upgrade to http/2",
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            id="websocket",
        ),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no host"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", id="long header"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", id="two lengths"),
        pytest.param(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="bad chunk"),
        pytest.param(bytes(range(256)) * 4, id="garbage"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, id="tls"),
        pytest.param(b"GET /fail HTTP/1.1\r\nHost: a\r\n\r\n", id="application fails"),
        pytest.param(b"GET /late HTTP/1.1\r\nHost: a\r\n\r\n", id="application fails in the answer"),
    ],
)
async def test_a_hostile_connection_costs_only_itself(hostile: bytes) -> None:
    async with serving(limits=HttpLimits(idle_seconds=0.3, read_seconds=0.3)) as served:
        answer = await served.exchange(hostile)
        assert b"101 Switching" not in answer
        assert answer.count(b"HTTP/1.1 200") <= 1  # the request before it, or the one cut in its answer
        assert b"SETTINGS" not in answer
        assert not answer.startswith(b"\x00")


async def test_connect_and_bad_requests_are_told_so() -> None:
    async with serving() as served:
        assert (await served.exchange(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n")).startswith(b"HTTP/1.1 405")
        assert (await served.exchange("GÉT / HTTP/1.1\r\nHost: a\r\n\r\n".encode())).startswith(b"HTTP/1.1 400")
        assert (await served.exchange(b"GET /fail HTTP/1.1\r\nHost: a\r\n\r\n")).startswith(b"HTTP/1.1 500")


async def test_a_body_over_the_limit_gets_413() -> None:
    async with serving(limits=HttpLimits(body_bytes=10)) as served:
        head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n"
        assert (await served.exchange(head + b"x" * 11)).startswith(b"HTTP/1.1 413")
        assert (await served.exchange(head.replace(b"11", b"10") + b"x" * 10 + LAST)).startswith(b"HTTP/1.1 200")


async def test_a_silent_connection_is_closed() -> None:
    async with serving(limits=HttpLimits(idle_seconds=0.1)) as served:
        with trio.fail_after(5):
            assert await served.exchange() == b""
            assert await served.exchange(b"GET /re") == b""
            assert (await served.exchange(OK)).startswith(b"HTTP/1.1 200")


async def test_an_application_that_does_not_answer_is_cut_off() -> None:
    async with serving(limits=HttpLimits(request_seconds=0.1)) as served:
        assert (await served.exchange(LAST.replace(b"/ready", b"/slow"))).startswith(b"HTTP/1.1 504")


async def test_a_peer_that_does_not_read_delays_neither_others_nor_the_end() -> None:
    async with serving(limits=HttpLimits(write_seconds=3000)) as served:
        stalled = await served.open()
        await stalled.send_all(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await served.exchange(LAST)).startswith(b"HTTP/1.1 200")
    await stalled.aclose()


async def test_a_peer_that_does_not_read_is_cut_off() -> None:
    async with serving(limits=HttpLimits(write_seconds=0.1)) as served:
        async with await served.open() as stalled:
            await stalled.send_all(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            with trio.fail_after(10):
                while True:  # our first read comes after its deadline
                    await trio.sleep(0.05)
                    if len(served_connections(stalled)) == 0:
                        break


def served_connections(stream: trio.SocketStream) -> list[str]:
    """Kernel lines of established sockets that have `stream`'s local port as remote port."""
    port = f":{stream.socket.getsockname()[1]:04X}"
    with open("/proc/net/tcp") as table:
        return [line for line in table if line.split()[2].endswith(port) and line.split()[3] == "01"]


async def test_a_connection_over_the_limit_takes_the_place_of_the_most_silent_one() -> None:
    async with serving(limits=HttpLimits(connections=2)) as served:
        first, second = await served.open(), await served.open()
        for stream in (first, second):
            await stream.send_all(b"GET /")
        with trio.fail_after(5):
            assert (await served.exchange(LAST)).startswith(b"HTTP/1.1 200")
            with contextlib.suppress(trio.BrokenResourceError):
                assert await first.receive_some() == b""
        await second.send_all(b"ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await second.receive_some()).startswith(b"HTTP/1.1 200")
        await first.aclose()
        await second.aclose()


async def test_a_connection_over_the_limit_is_closed_when_all_are_being_answered() -> None:
    async with serving(limits=HttpLimits(connections=2)) as served:
        held = [await served.open(), await served.open()]
        for stream in held:
            await stream.send_all(b"GET /big HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with trio.fail_after(5):
            for stream in held:
                assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 200")
            assert await served.exchange(LAST) == b""
            for stream in held:
                await stream.aclose()
            while not await served.exchange(LAST):
                pass


async def test_a_connection_ends_with_its_last_request() -> None:
    async with serving(limits=HttpLimits(requests=2)) as served:
        first, second = (await served.exchange(OK + OK + OK)).split(b"HTTP/1.1 200")[1:]
        assert b"connection: close" not in first.lower()
        assert b"connection: close" in second.lower()


async def test_the_answer_to_head_has_no_body() -> None:
    async with serving() as served:
        answer = await served.exchange(LAST.replace(b"GET", b"HEAD"))
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b"\r\n\r\n")


async def test_a_peer_that_waits_to_be_asked_for_its_body_is_asked() -> None:
    async with serving() as served, await served.open() as stream:
        await stream.send_all(b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
        await stream.send_all(b"abc")
        assert b"/x 3" in await stream.receive_some()


async def test_a_peer_that_breaks_off_its_body_is_told_so() -> None:
    async with serving() as served, await served.open() as stream:
        await stream.send_all(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nab")
        await stream.send_eof()
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")


async def test_an_application_that_returns_without_an_answer_is_answered_for() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ready":
            await page(scope, receive, send)

    async with serving(silent) as served:
        assert (await served.exchange(OK.replace(b"ready", b"x"))).startswith(b"HTTP/1.1 500")


async def test_an_error_before_the_first_byte_of_a_body_still_has_its_status() -> None:
    async with serving() as served:
        assert (await served.exchange(OK.replace(b"ready", b"late"))).startswith(b"HTTP/1.1 500")


async def test_an_application_learns_that_its_peer_has_gone() -> None:
    told = trio.Event()

    async def patient(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/ready":
            await page(scope, receive, send)
            return
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        told.set()

    async with serving(patient) as served:
        async with await served.open() as stream:
            await stream.send_all(OK.replace(b"ready", b"x"))
            assert await stream.receive_some()
        with trio.fail_after(10):
            await told.wait()


async def test_the_next_request_may_come_while_the_end_is_awaited() -> None:
    async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
        seen: list[str] = []

        async def watch() -> None:
            while "http.disconnect" not in seen:
                seen.append((await receive())["type"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await trio.testing.wait_all_tasks_blocked()
            await page_end(send)
        assert seen == ["http.request", "http.disconnect"]

    async def page_end(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async with serving(streaming) as served:
        assert (await served.exchange(OK, OK + LAST)).count(b"done") == 3


@pytest.mark.parametrize(
    ("host", "origin", "allowed"),
    [
        (b"localhost:15000", None, True),
        (b"127.0.0.1:15000", None, True),
        (b"[::1]:15000", None, True),
        (b"LOCALHOST", None, True),
        (b"mesh.example", None, True),
        (b"evil.example:15000", None, False),
        (b"localhost.evil.example", None, False),
        (b"", None, False),
        (b"[::1", None, False),
        (b"127.0.0.1:15000", b"http://127.0.0.1:15000", True),
        (b"127.0.0.1:15000", b"http://evil.example", False),
        (b"127.0.0.1:15000", b"null", False),
        (b"127.0.0.1:15000", b"file://localhost", False),
    ],
)
async def test_a_name_pointed_at_loopback_is_refused(host: bytes, origin: bytes | None, allowed: bool) -> None:
    async with serving(hosts=["mesh.example"]) as served:
        head = b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n"
        if origin is not None:
            head += b"Origin: " + origin + b"\r\n"
        answer = await served.exchange(head + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 200" if allowed else b"HTTP/1.1 403")


async def test_a_unix_socket_serves_only_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    async with trio.open_nursery() as nursery:
        listener = unix_listener(path)
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ConfigurationError, match="another process listens"):
            unix_listener(path)
        await nursery.start(_serve_one, listener)
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(LAST)
            answer = b"".join([bytes(part) async for part in stream])
        assert answer.startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()
    replaced = unix_listener(path)  # nobody listens now
    await replaced.aclose()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="not a socket"):
        unix_listener(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="shorter"):
        unix_listener(tmp_path / ("x" * 120))
    with pytest.raises(ConfigurationError, match="cannot listen"):
        unix_listener(tmp_path / "missing" / "admin.sock")


async def _serve_one(listener: trio.SocketListener, *, task_status: trio.TaskStatus[Any]) -> None:
    await serve_asgi(page, [listener], task_status=task_status)


async def test_running_out_of_descriptors_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    real = listeners[0].accept
    failures = [OSError(24, os.strerror(24))]

    async def accept() -> trio.SocketStream:
        if failures:
            raise failures.pop()
        return await real()

    monkeypatch.setattr(listeners[0], "accept", accept)
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve_one, listeners[0])
        served = Served(listeners[0].socket.getsockname())
        assert (await served.exchange(LAST)).startswith(b"HTTP/1.1 200")
        nursery.cancel_scope.cancel()
