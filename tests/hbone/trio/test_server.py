"""serve() on real sockets of the loopback interface."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from tests.support.tunnels import Watched, ca, who

import hbone
import hbone.trio
from hbone.admission import Admission
from hbone.errors import ConnectionLost, HboneError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"


def source_of(name: str) -> hbone.StaticSource:
    identity = who(name)
    return hbone.StaticSource(identity.svid, identity.bundles)


async def echo(stream: hbone.trio.HboneStream) -> None:
    async for data in stream:
        await stream.send_all(data)


@contextlib.asynccontextmanager
async def serving(handler: Any = echo, **options: Any) -> AsyncIterator[int]:
    options.setdefault("authorize", hbone.same_trust_domain)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            functools.partial(hbone.trio.serve, handler, source_of("orders"), 0, host="127.0.0.1", **options)
        )
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_the_programs_of_the_readme_run_as_they_stand(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for account, name in (("orders", "server"), ("web", "client")):
        issued = ca().issue(uris=[f"spiffe://cluster.local/ns/shop/sa/{account}"])
        (tmp_path / f"{name}.pem").write_bytes(issued.cert_pem)
        (tmp_path / f"{name}.key").write_bytes(issued.key_pem)
    (tmp_path / "root.pem").write_bytes(ca().root_pem)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    readme = pathlib.Path(__file__).parents[3] / "README.md"
    program = readme.read_text().split("```python\n", 1)[1].split("```", 1)[0]
    # Only where the server is differs from what a reader types.
    program = program.replace('("10.0.0.7", 15008)', f'("127.0.0.1", {port})').replace("port=15008", f"port={port}")
    names: dict[str, Any] = {}
    exec(compile(program, readme, "exec"), names)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(names["serve"])
        with trio.fail_after(10):
            while True:
                try:
                    await names["main"]()
                    break
                except ConnectionLost:
                    await trio.testing.wait_all_tasks_blocked(0.01)  # it does not listen yet
        nursery.cancel_scope.cancel()
    said = capsys.readouterr().out.splitlines()
    assert "spiffe://cluster.local/ns/shop/sa/web 10.0.0.7:8080" in said
    assert "b'hello'" in said


async def test_megabytes_both_ways_over_sockets() -> None:
    async with serving() as port, hbone.trio.ConnectionPool(source_of("web")) as pool:
        stream = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        total = 20_000_000
        received = 0

        async def send() -> None:
            for _ in range(total // 100_000):
                await stream.send_all(bytes(100_000))
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async for data in stream:
                received += len(data)
        assert received == total


async def test_too_many_handshakes_of_one_address_are_closed_at_once() -> None:
    admission = Admission(limit=512, per_address=2, waiting=0)
    async with serving(admission=admission) as port:
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert admission.count == 2
        third = await trio.open_tcp_stream("127.0.0.1", port)
        with contextlib.suppress(trio.BrokenResourceError):
            assert await third.receive_some() == b""
        await third.aclose()
        for stream in idle:
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert admission.count == 0
        async with hbone.trio.ConnectionPool(source_of("web")) as pool:
            await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            assert admission.count == 0


async def keeps_out(admission: Watched) -> None:
    with trio.fail_after(30):
        while not admission.kept_out:
            await trio.sleep(0.01)


async def test_handshakes_over_the_limit_wait_for_their_turn() -> None:
    admission = Watched(per_address=2)
    async with serving(admission=admission) as port, hbone.trio.ConnectionPool(source_of("web")) as pool:
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]

        async def ask() -> None:
            stream = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await keeps_out(admission)
            await idle[0].aclose()
        assert admission.count == 1
        await idle[1].aclose()


@contextlib.asynccontextmanager
async def kept_waiting(**options: Any) -> AsyncIterator[trio.SocketStream]:
    """One that waits at a server, for a turn that it will not get."""
    admission = Watched(per_address=1)
    assert admission.enter("127.0.0.1")  # as another server of the process would
    async with serving(admission=admission, **options) as port:
        shaking = await trio.open_tcp_stream("127.0.0.1", port, local_address="127.0.0.2")
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await keeps_out(admission)
        yield stream
    with trio.fail_after(30):
        while admission.count > 1:
            await trio.sleep(0.01)
    await stream.aclose()
    await shaking.aclose()


async def test_who_waits_for_a_handshake_is_closed_when_its_time_is_over(caplog: pytest.LogCaptureFixture) -> None:
    async with kept_waiting(config=hbone.ConnectionConfig(handshake_timeout=1)) as stream:
        with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(30):
            assert await stream.receive_some() == b""
    assert "its TLS handshake had no turn in time" in caplog.text


async def test_who_waits_for_a_handshake_does_not_hold_up_the_end() -> None:
    with trio.fail_after(30):
        async with kept_waiting(drain_timeout=3600):
            pass


async def test_a_silent_client_is_closed_after_ten_seconds(autojump_clock: MockClock) -> None:
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            functools.partial(hbone.trio.serve_transport, echo, source_of("orders"), server, authorize=hbone.any_peer)
        )
        started = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while await client.receive_some():
                pass
        assert trio.current_time() - started == pytest.approx(10.0, abs=1.1)


async def test_what_is_not_tls_costs_its_own_connection() -> None:
    async with serving() as port, hbone.trio.ConnectionPool(source_of("web")) as pool:
        good = await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), b""):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                if garbage:
                    await stream.send_all(garbage)
                await stream.send_eof()
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
        await good.send_all(b"still here")
        assert await good.receive_some() == b"still here"


async def test_a_fault_in_the_authorizer_ends_one_connection() -> None:
    def broken(peer: hbone.SpiffeId, own: hbone.SpiffeId) -> bool:
        raise ZeroDivisionError

    async with serving(authorize=broken) as port, hbone.trio.ConnectionPool(source_of("web")) as pool:
        for _ in range(2):
            with pytest.raises(HboneError):
                await pool.connect("10.0.0.7:8080", via=("127.0.0.1", port), peer=ORDERS)


async def test_one_tunnel_without_a_pool() -> None:
    async with serving() as port:
        async with hbone.trio.open_tunnel(("127.0.0.1", port), source_of("web"), peer=ORDERS) as tunnel:
            assert str(tunnel.peer) == ORDERS
            stream = await tunnel.connect("10.0.0.7:8080")
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await tunnel.ping()
        with pytest.raises(ConnectionLost):
            await tunnel.connect("10.0.0.7:8080")


async def test_nothing_listens_there() -> None:
    async with hbone.trio.ConnectionPool(source_of("web")) as pool:
        with pytest.raises(ConnectionLost, match=r"127\.0\.0\.1:1: connection refused"):
            await pool.connect("10.0.0.7:8080", via=("127.0.0.1", 1), peer=ORDERS)


async def test_a_port_that_is_taken_is_an_os_error() -> None:
    async with serving() as port:
        with pytest.raises(OSError, match="in use"):
            await hbone.trio.serve(echo, source_of("orders"), port, host="127.0.0.1", authorize=hbone.any_peer)
