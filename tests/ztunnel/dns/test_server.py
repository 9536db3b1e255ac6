"""The proxy's own manners: what it waits for, what it bounds, and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rcode
import pytest
import trio
import trio.lowlevel
from tests.support.dns import CLIENT, Resolver, Someone, exactly, exchange, open_proxy, records
from tests.support.mesh import at, service, store_of

import ztunnel.dns.pending
import ztunnel.dns.server
from hbone.daemon import logs
from hbone.errors import ConfigurationError
from ztunnel.dns.resolvconf import Resolvers
from ztunnel.dns.server import DnsProxy, loopback_hosts
from ztunnel.mesh import parse_ip
from ztunnel.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ZONE = {("example.org", "A"): ["198.51.100.1"]}
STORE = store_of(service("web", "10.0.0.1"))
SILENT: Callable[[bytes, bool], list[bytes]] = lambda data, datagram: []  # noqa: E731


def query(name: str, kind: str = "A") -> bytes:
    return dns.message.make_query(name, kind).to_wire()


def framed(*messages: bytes) -> bytes:
    return b"".join(len(message).to_bytes(2, "big") + message for message in messages)


async def message_from(stream: trio.SocketStream) -> dns.message.Message | None:
    head = await exactly(stream, 2)
    return dns.message.from_wire(await exactly(stream, int.from_bytes(head, "big"))) if head else None


async def connect(proxy: DnsProxy) -> trio.SocketStream:
    ip, port = proxy.addresses[0]
    return await trio.open_tcp_stream(str(ip), port)


# what it waits for


async def test_question_waits_until_the_mesh_is_known() -> None:
    async with open_proxy(STORE, known=False) as running, trio.open_nursery() as nursery:
        replies: list[dns.message.Message] = []

        async def ask(name: str, tcp: bool) -> None:
            replies.append(await running.ask(name, tcp=tcp))

        for tcp in (False, True):
            nursery.start_soon(ask, "web.default", tcp)
        while len(running.proxy._pending.waiting) < 2:
            await trio.lowlevel.checkpoint()
        running.proxy.start()
        while len(replies) < 2:
            await trio.lowlevel.checkpoint()
        assert [records(reply) for reply in replies] == [["web.default A 10.0.0.1"]] * 2


async def test_question_of_an_unknown_workload_fails_rather_than_being_asked_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ztunnel.dns.server, "WAIT_SECONDS", 0.05)
    async with open_proxy(STORE, client=Someone(None)) as running:
        for tcp in (False, True):
            assert (await running.ask("example.org", tcp=tcp)).rcode() == dns.rcode.SERVFAIL
        assert running.resolver.heard == []
        assert running.samples("istio_dns_requests_total") == {
            ("a", "udp", "unknown", "unknown"): 1,
            ("a", "tcp", "unknown", "unknown"): 1,
        }
        running.client.tell(CLIENT)
        assert records(await running.ask("web.default")) == ["web.default A 10.0.0.1"]


async def test_names_of_the_control_plane_are_resolved_before_the_mesh_is_known(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("search lan\n")
    zone = {("control.example", "A"): ["198.51.100.1"]}
    async with open_proxy(
        zone=zone, conf=conf, known=False, client=Someone(None), bootstrap=["control.example"]
    ) as running:
        assert records(await running.ask("Control.example")) == ["Control.example A 198.51.100.1"]
        assert (await running.ask("control.example.lan")).rcode() == dns.rcode.NXDOMAIN


# clients on TCP


async def test_slow_question_does_not_hold_up_those_behind_it() -> None:
    def script(data: bytes, datagram: bool) -> list[bytes] | None:
        return [] if b"slow" in data else None

    async with open_proxy(STORE, resolver=Resolver(ZONE, script=script)) as running:
        async with await connect(running.proxy) as stream:
            await stream.send_all(framed(query("slow.example"), query("web.default"), query("example.org")))
            found = [await message_from(stream), await message_from(stream)]
            assert [records(message) for message in found if message] == [
                ["web.default A 10.0.0.1"],
                ["example.org A 198.51.100.1"],
            ]


async def test_message_may_come_in_pieces_and_the_client_may_end_first() -> None:
    async with open_proxy(STORE, zone=ZONE) as running:
        async with await connect(running.proxy) as stream:
            for byte in framed(query("example.org"), query("web.default")):
                await stream.send_all(bytes([byte]))
            await stream.send_eof()
            found = [await message_from(stream), await message_from(stream)]
            assert all(message is not None and records(message) for message in found)
            assert await message_from(stream) is None


async def test_connection_that_rests_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ztunnel.dns.pending, "IDLE_SECONDS", 0.05)
    async with open_proxy(STORE) as running:
        for begun in (b"", b"\0", b"\0\x20half"):
            async with await connect(running.proxy) as stream:
                if begun:
                    await stream.send_all(begun)
                assert await message_from(stream) is None


async def test_client_that_takes_no_answers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ztunnel.dns.pending, "IDLE_SECONDS", 0.1)
    big = service("big", *(f"10.1.{number >> 8}.{number & 255}" for number in range(1000)))
    async with open_proxy(store_of(big)) as running, await connect(running.proxy) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await stream.send_all(framed(*[query("big.default")] * 100))
        assert running.proxy._connections == {}


async def test_connection_over_the_limit_takes_the_place_of_the_longest_at_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ztunnel.dns.server, "MAX_CONNECTIONS", 2)
    async with open_proxy(STORE) as running:
        streams = [await connect(running.proxy)]
        for _ in range(2):
            await streams[0].send_all(framed(query("web.default")))
            assert await message_from(streams[0])
            streams.append(await connect(running.proxy))
        while len(running.proxy._connections) < 2:
            await trio.lowlevel.checkpoint()
        assert await message_from(streams[1]) is None
        await streams[0].send_all(framed(query("web.default")))
        assert await message_from(streams[0])
        for stream in streams:
            await stream.aclose()


async def test_reset_by_the_client_is_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with open_proxy(STORE, resolver=Resolver({}, script=SILENT)) as running:
        stream = await connect(running.proxy)
        await stream.send_all(framed(query("example.org")))
        while not running.proxy._pending.waiting:
            await trio.lowlevel.checkpoint()
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.socket.close()
        assert records(await running.ask("web.default", tcp=True))
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


# what it bounds


@pytest.mark.parametrize("tcp", [False, True])
async def test_questions_that_never_end_crowd_out_the_oldest_of_them_only(
    tcp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ztunnel.dns.pending, "MAX_PENDING", 8)

    def script(data: bytes, datagram: bool) -> list[bytes] | None:
        return [] if b"tarpit" in data else None

    async with open_proxy(STORE, resolver=Resolver(ZONE, script=script)) as running, trio.open_nursery() as nursery:
        replies: dict[int, int] = {}

        async def hang(number: int) -> None:
            replies[number] = (await running.ask(f"n{number}.tarpit.example", tcp=tcp)).rcode()

        for number in range(12):
            nursery.start_soon(hang, number)
            while len(running.resolver.heard) == number:
                await trio.lowlevel.checkpoint()
        assert records(await running.ask("example.org", tcp=tcp)) == ["example.org A 198.51.100.1"]
        assert records(await running.ask("web.default", tcp=tcp)) == ["web.default A 10.0.0.1"]
        while len(replies) < 5:
            await trio.lowlevel.checkpoint()
        assert replies == dict.fromkeys(range(5), dns.rcode.SERVFAIL)
        assert len(running.proxy._pending.waiting) <= 8
        nursery.cancel_scope.cancel()


async def test_bytes_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ztunnel.dns.pending, "MAX_PENDING_BYTES", 100_000)
    async with open_proxy(resolver=Resolver({}, script=SILENT)) as running:
        ip, port = running.proxy.addresses[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for number in range(6):
                sock.sendto(query(f"n{number}.example") + bytes(40_000), (str(ip), port))
                while len(running.resolver.heard) == number:
                    await trio.lowlevel.checkpoint()
                assert running.proxy._pending.nbytes <= 100_000
        assert len(running.proxy._pending.waiting) == 2


async def test_nothing_is_left_of_questions_that_ended() -> None:
    async with open_proxy(STORE, zone=ZONE) as running:
        for number in range(20):
            await running.ask(("example.org", "web.default")[number % 2], tcp=number % 3 == 0)
        await trio.testing.wait_all_tasks_blocked()
        pending = running.proxy._pending
        assert (len(pending.waiting), pending.nbytes, pending.alike) == (0, 0, {})
        assert running.proxy._forwarder._asking == {}
        assert running.proxy._connections == {}


async def test_rubbish_costs_no_one_else(caplog: pytest.LogCaptureFixture) -> None:
    async with open_proxy(STORE, zone=ZONE) as running:
        ip, port = running.proxy.addresses[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for number in range(300):
                rubbish = os.urandom(number)
                if len(rubbish) > 2:
                    rubbish = rubbish[:2] + b"\x80" + rubbish[3:]  # replies, so that none is worth asking about
                sock.sendto(rubbish, (str(ip), port))
                if not number % 30:
                    assert records(await running.ask("web.default"))
        async with await connect(running.proxy) as stream:
            await stream.send_all(framed(b"", b"\0", os.urandom(2) + b"\x80" + os.urandom(100), query("web.default")))
            assert await message_from(stream)
        assert len(running.resolver.heard) == 0
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


async def test_unreadable_question_is_a_format_error() -> None:
    async with open_proxy(STORE) as running:
        for tcp in (False, True):
            reply = await running.raw(b"\0\1\1\0\0\1\0\0\0\0\0\0\x05web", tcp=tcp)
            assert dns.message.from_wire(reply).rcode() == dns.rcode.FORMERR
        assert running.resolver.heard == []


async def test_fault_of_ours_is_one_failed_question(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_proxy(STORE, zone=ZONE) as running:
        monkeypatch.setattr(running.proxy._forwarder, "ask", lambda *_, **__: 1 / 0)
        assert (await running.ask("example.org")).rcode() == dns.rcode.SERVFAIL
        async with await connect(running.proxy) as stream:
            await stream.send_all(framed(query("example.org")))
            assert await message_from(stream) is None
        assert records(await running.ask("web.default"))
    assert sum("could not be answered" in record.getMessage() for record in caplog.records) == 2


# where it listens


@pytest.mark.parametrize(
    ("host", "asked"), [("0.0.0.0", "127.0.0.77"), ("::", "127.0.0.77"), ("::", "::1"), ("::1", "::1")]
)
async def test_reply_comes_from_the_address_that_was_asked(host: str, asked: str) -> None:
    async with open_proxy(STORE, host=host) as running:
        port = running.proxy.addresses[0][1]
        for tcp in (False, True):
            reply = await exchange((parse_ip(asked), port), query("web.default"), tcp=tcp)
            assert records(dns.message.from_wire(reply)) == ["web.default A 10.0.0.1"]


def test_loopback_of_ipv6_is_left_out_where_the_kernel_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [parse_ip("127.0.0.1"), parse_ip("::1")]
    flag = tmp_path / "disable_ipv6"
    flag.write_text("1\n")
    assert loopback_hosts(both, disabled=str(flag)) == both[:1]
    flag.write_text("0\n")
    assert loopback_hosts(both, disabled=str(flag)) == both
    flag.unlink()
    assert loopback_hosts(both, disabled=str(flag)) == both

    def no_socket(*_: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", no_socket)
    assert loopback_hosts(both, disabled=str(flag)) == both[:1]


def make(*addresses: Any) -> DnsProxy:
    resolvers = Resolvers(lambda: 0.0, servers=[at("127.0.0.53:53")])
    return DnsProxy(STORE, Someone(), Metrics(), addresses=addresses, resolvers=resolvers)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_taken_port_is_one_sentence_that_says_how_to_do_without(kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as caught:
            make((parse_ip("127.0.0.1"), 0), (parse_ip("127.0.0.1"), port)).bind()
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port} for dns: address already in use; set ISTIO_META_DNS_CAPTURE=false"
        " to do without, or ZTUNNEL_DNS_PORT to another port"
    )


async def test_address_without_a_resolver_is_told_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text("search example\n")
    proxy = DnsProxy(STORE, Someone(), Metrics(), addresses=[], resolvers=Resolvers(lambda: 0.0, path=conf))
    proxy.bind()
    (record,) = caplog.records
    assert "names outside the mesh cannot be resolved" in record.getMessage()
    assert f"{conf} names no nameserver" in record.getMessage()


# how it ends


async def test_drain_answers_what_was_asked_and_closes_what_rests() -> None:
    gate = trio.Event()

    class Gated(Resolver):
        async def _udp(self, sock: trio.socket.SocketType) -> None:
            data, peer = await sock.recvfrom(65_535)
            self.heard.append((data, True, peer))
            await gate.wait()
            for reply in self.replies(data, True, peer):
                await sock.sendto(reply, peer)

    async with open_proxy(STORE, resolver=Gated(ZONE)) as running, trio.open_nursery() as nursery:
        found: list[list[str]] = []

        async def ask() -> None:
            found.append(records(await running.ask("example.org")))

        rests = await connect(running.proxy)
        nursery.start_soon(ask)
        while not running.resolver.heard:
            await trio.lowlevel.checkpoint()
        nursery.start_soon(running.proxy.drain)
        assert await message_from(rests) is None
        gate.set()
        while not found:
            await trio.lowlevel.checkpoint()
        await rests.aclose()
    assert found == [["example.org A 198.51.100.1"]]


async def test_drain_does_not_wait_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ztunnel.dns.server, "DRAIN_SECONDS", 0.05)
    async with open_proxy(resolver=Resolver({}, script=SILENT)) as running:
        ip, port = running.proxy.addresses[0]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(query("example.org"), (str(ip), port))
            while not running.resolver.heard:
                await trio.lowlevel.checkpoint()
            await running.proxy.drain()
        with pytest.raises(OSError):
            await connect(running.proxy)


# what it tells


async def test_debug_lines_tell_how_each_question_ended() -> None:
    store = store_of(service("web", "10.0.0.1"), service("far", "n/10.0.0.2"))
    questions = [
        ("web.default", "A"),
        ("web.default", "AAAA"),
        ("far.default", "A"),
        ("example.org", "A"),
        ("no", "TXT"),
    ]
    stream = io.StringIO()
    logs.configure("json", "debug", stream=stream)
    try:
        async with open_proxy(store, zone=ZONE) as running:
            for name, kind in questions:
                await running.ask(name, kind)
        logs.flush()
    finally:
        logs.set_level("info")
        logs.shutdown()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    found = [line for line in lines if line.get("domain")]
    assert [(line["domain"], line["query"], line["result"], line["endpoints"]) for line in found] == [
        ("web.default", "a", "success", 1),
        ("web.default", "aaaa", "no records", 0),
        ("far.default", "a", "no records", 0),
        ("example.org", "a", "forwarded", 1),
        ("no", "txt", "forwarding failed (NXDOMAIN)", 0),
    ]
    assert {(line["src.workload"], line["src.namespace"]) for line in found} == {("client", "ns1")}
