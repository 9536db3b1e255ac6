"""What the mesh does not own goes on to the host's resolver, byte for byte, and comes back so."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import TYPE_CHECKING, Any

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rrset
import dns.update
import pytest
import trio
from tests.support.dns import Asked, Resolver, both, exchange, open_proxy, records
from tests.support.mesh import at, service, store_of

import ztunnel.dns.forward
import ztunnel.dns.pending
import ztunnel.dns.server
from ztunnel.mesh import parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ZONE = {
    ("example.org", "A"): ["198.51.100.1"],
    ("example.org", "AAAA"): ["2001:db8::1"],
    ("example.org", "TXT"): ["x" * 200, "y" * 200, "z" * 200],
    ("_sip._tcp.example.org", "SRV"): ["0 0 5060 sip.example.org."],
    ("mail.example.org", "MX"): ["10 mx.example.org."],
    ("1.0.0.127.in-addr.arpa", "PTR"): ["localhost."],
}


def with_case(wire: bytes) -> bytes:
    return wire.replace(b"example", b"eXaMpLe")


def header(opcode: int, questions: int, body: bytes = b"") -> bytes:
    return struct.pack("!HHHHHH", 0x1234, opcode << 11 | 0x0100, questions, 0, 0, 0) + body


def query(name: str = "example.org", kind: str = "A", **options: Any) -> bytes:
    return dns.message.make_query(name, kind, **options).to_wire()


def update() -> bytes:
    message = dns.update.UpdateMessage("example.org")
    message.add("host", 300, "A", "198.51.100.7")
    return message.to_wire()


MESSAGES: dict[str, bytes] = {
    **{f"{kind} of {name}": query(name, kind) for name, kind in ZONE},
    "unknown name": query("nobody.example"),
    "name without such records": query("example.org", "MX"),
    "root": query(".", "NS"),
    "mixed case": with_case(query()),
    "name that no host has": query(r"a\.b\000c.example.org"),
    "unknown type": query(kind="TYPE65280"),
    "unknown class": query(rdclass="CH", name="version.bind", kind="TXT"),
    "without recursion": query(flags=0),
    "EDNS": query(use_edns=0, payload=4096),
    "EDNS with DNSSEC": query(use_edns=0, want_dnssec=True),
    "EDNS of another version": query(use_edns=3),
    "EDNS with a cookie and an unknown option": query(
        use_edns=0,
        options=[
            dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678"),
            dns.edns.GenericOption("65001", b"?"),
        ],
    ),
    "client subnet": query(use_edns=0, options=[dns.edns.ECSOption("203.0.113.0", 24)]),
    "bytes behind it": query() + b"behind",
    "update": update(),
    "notify": header(4, 1, b"\x07example\x03org\0\0\x06\0\x01"),
    "stateful operations": header(6, 0, b"\0\1\0\4\0\0\0\0"),
    "unknown operation": header(15, 0, b"anything"),
    "no question": header(0, 0),
    "two questions": header(0, 2, b"\x01a\0\0\1\0\1\x01b\0\0\1\0\1"),
}


def echo(data: bytes, datagram: bool) -> list[bytes] | None:
    """A resolver that answers even what it does not understand, with its bytes."""
    try:
        message = dns.message.from_wire(data)
        return None if message.opcode() == dns.opcode.QUERY and len(message.question) == 1 else [_as_reply(data)]
    except dns.exception.DNSException:
        return [_as_reply(data)]


def _as_reply(data: bytes) -> bytes:
    return data[:2] + bytes([data[2] | 0x80]) + data[3:]


@pytest.mark.parametrize("what", MESSAGES)
async def test_answer_is_the_resolvers_to_the_last_byte(what: str) -> None:
    data = MESSAGES[what]
    async with open_proxy(store_of(service("web", "10.0.0.1")), resolver=Resolver(ZONE, script=echo)) as running:
        resolver = running.resolver
        for over_tcp in (False, True):
            ours = await running.raw(data, tcp=over_tcp)
            theirs = await exchange(resolver.server(), data, tcp=over_tcp)
            assert ours == theirs
            assert [heard[:2] for heard in resolver.heard] == [(data, not over_tcp)] * 2
            resolver.heard.clear()


@pytest.mark.parametrize(("name", "kind"), [("example.org", "A"), ("example.org", "TXT"), ("nobody.example", "AAAA")])
async def test_resolver_that_behaves_like_systemd_resolved_is_asked_over_loopback(name: str, kind: str) -> None:
    resolver = Resolver(ZONE, like_resolved=True)
    # The proxy's own address is another; over loopback it can't be used.
    async with open_proxy(resolver=resolver, source=parse_ip("192.0.2.1")) as running:
        for over_tcp in (False, True):
            for data in (query(name, kind), query(name, kind, payload=1232)):
                assert await running.raw(data, tcp=over_tcp) == await exchange(resolver.server(), data, tcp=over_tcp)
        assert {peer[0] for _, _, peer in resolver.heard} <= {"127.0.0.1"}


async def test_refusal_of_systemd_resolved_is_handed_on() -> None:
    async with open_proxy(resolver=Resolver(ZONE, like_resolved=True)) as running:
        reply = await running.ask("example.org", flags=0)
        assert reply.rcode() == dns.rcode.REFUSED


async def test_cut_answer_is_whole_when_asked_again_over_tcp() -> None:
    async with open_proxy(zone=ZONE) as running:
        assert (await running.ask("example.org", "TXT")).flags & dns.flags.TC
        reply = await running.ask("example.org", "TXT", tcp=True)
        assert not reply.flags & dns.flags.TC
        assert len(records(reply)) == 3


async def test_each_question_has_a_port_of_its_own() -> None:
    async with open_proxy(zone=ZONE) as running:
        for _ in range(40):
            await running.ask("example.org")
        ports = [peer[1] for _, _, peer in running.resolver.heard]
    assert len(set(ports)) >= 38
    assert len({later - sooner for sooner, later in itertools.pairwise(ports)}) > 20  # no counting up


def forgeries(data: bytes, datagram: bool) -> list[bytes]:
    """Answers of somebody who does not know the question, and then the answer."""
    message = dns.message.from_wire(data)
    other_id = dns.message.make_response(message)
    other_id.id ^= 1
    other = dns.message.make_query("evil.example", "A")
    other.id = message.id
    good = dns.message.make_response(message)
    good.answer.append(dns.rrset.from_text(message.question[0].name, 5, "IN", "A", "198.51.100.1"))
    return [other_id.to_wire(), dns.message.make_response(other).to_wire(), data, b"", b"\0", good.to_wire()]


async def test_answers_to_another_question_are_passed_over() -> None:
    async with open_proxy(resolver=Resolver({}, script=forgeries)) as running:
        for over_tcp in (False, True):
            reply = await running.ask("example.org", tcp=over_tcp)
            assert records(reply) == ["example.org A 198.51.100.1"]


async def test_answer_from_elsewhere_is_not_taken() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:

        def script(data: bytes, datagram: bool) -> None:
            # To the right port, with the right ID and first: but not from the resolver.
            stranger.sendto(forgeries(data, True)[-1], running.resolver.heard[-1][2])

        async with open_proxy(resolver=Resolver({}, script=script)) as running:
            assert (await running.ask("example.org")).rcode() == dns.rcode.NXDOMAIN


def failing(rcode: dns.rcode.Rcode) -> Callable[[bytes, bool], list[bytes]]:
    def script(data: bytes, datagram: bool) -> list[bytes]:
        reply = dns.message.make_response(dns.message.from_wire(data))
        reply.set_rcode(rcode)
        return [reply.to_wire()]

    return script


SILENT: Callable[[bytes, bool], list[bytes]] = lambda data, datagram: []  # noqa: E731


@pytest.mark.parametrize("over_tcp", [False, True])
@pytest.mark.parametrize(
    "script",
    [failing(dns.rcode.SERVFAIL), failing(dns.rcode.REFUSED), SILENT, None],
    ids=["fails", "refuses", "silent", "dead"],
)
async def test_next_resolver_is_asked(
    script: Callable[[bytes, bool], list[bytes]] | None, over_tcp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ztunnel.dns.forward, "STAGGER_SECONDS", 0.05)
    first, second = Resolver(ZONE, script=script), Resolver(ZONE)
    async with trio.open_nursery() as nursery:
        if script is None:
            first.address = at("127.0.0.54:1")
        else:
            await nursery.start(first.serve, "127.0.0.54")
        await nursery.start(second.serve, "127.0.0.55")
        async with open_proxy(servers=[first.server(), second.server()]) as running:
            assert records(await running.ask("example.org", tcp=over_tcp)) == ["example.org A 198.51.100.1"]
        nursery.cancel_scope.cancel()


async def test_failure_of_the_last_resolver_is_handed_on_and_nobody_is_asked_twice() -> None:
    resolver = Resolver({}, script=failing(dns.rcode.SERVFAIL))
    async with open_proxy(resolver=resolver) as running:
        data = query(use_edns=0)
        reply = await running.raw(data)
        assert len(resolver.heard) == 1
        assert reply == await exchange(resolver.server(), data)


async def test_unknown_name_is_not_asked_of_another_resolver() -> None:
    first, second = Resolver({}), Resolver(ZONE)
    async with trio.open_nursery() as nursery:
        await nursery.start(first.serve, "127.0.0.54")
        await nursery.start(second.serve, "127.0.0.55")
        async with open_proxy(servers=[first.server(), second.server()]) as running:
            assert (await running.ask("example.org")).rcode() == dns.rcode.NXDOMAIN
        assert second.heard == []
        nursery.cancel_scope.cancel()


async def test_silent_resolver_is_asked_again(tmp_path: Path) -> None:
    heard: list[bytes] = []

    def script(data: bytes, datagram: bool) -> list[bytes] | None:
        heard.append(data)
        return [] if len(heard) == 1 else None

    conf = tmp_path / "resolv.conf"
    conf.write_text("options timeout:1\n")
    async with open_proxy(resolver=Resolver(ZONE, script=script), conf=conf) as running:
        assert len(records(await running.ask("example.org"))) == 1
        assert len(heard) == 2


async def test_resolvers_that_all_fail_are_a_failure_with_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ztunnel.dns.forward, "MAX_SECONDS", 0.05)
    async with open_proxy(resolver=Resolver({}, script=SILENT)) as running:
        for over_tcp in (False, True):
            reply = await running.ask("example.org", tcp=over_tcp, use_edns=0)
            assert (reply.rcode(), reply.edns) == (dns.rcode.SERVFAIL, 0)


async def test_without_a_resolver_names_of_the_mesh_are_answered_still() -> None:
    async with open_proxy(store_of(service("web", "10.0.0.1")), resolvers=Asked()) as running:
        assert (await running.ask("example.org")).rcode() == dns.rcode.SERVFAIL
        assert records(await running.ask("web.default")) == ["web.default A 10.0.0.1"]


async def test_the_proxy_is_never_its_own_resolver() -> None:
    asked = Asked()
    async with open_proxy(zone=ZONE, resolvers=asked) as running:
        asked.servers = (running.proxy.addresses[0],)
        assert (await running.ask("example.org")).rcode() == dns.rcode.SERVFAIL
        asked.servers = (running.proxy.addresses[0], running.resolver.server())
        assert len(records(await running.ask("example.org"))) == 1
        assert len(running.resolver.heard) == 1


@pytest.mark.parametrize("over_tcp", [False, True])
async def test_question_that_is_led_back_here_fails_at_once(over_tcp: bool, caplog: pytest.LogCaptureFixture) -> None:
    asked = Asked()
    async with open_proxy(resolvers=asked, host="0.0.0.0") as running:
        port = running.proxy.addresses[0][1]
        asked.servers = (at(f"127.0.0.99:{port}"),)  # the proxy itself, under an address that does not show it
        for _ in range(3):
            assert (await running.ask("example.org", tcp=over_tcp)).rcode() == dns.rcode.SERVFAIL
    assert sum("led back" in record.getMessage() for record in caplog.records) == 1


async def test_resolver_that_asks_the_proxy_is_found_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when systemd-resolved has the proxy for its only server, and the proxy has systemd-resolved for its own."""
    monkeypatch.setattr(ztunnel.dns.pending, "MAX_ALIKE", 10)
    asked = 0
    async with trio.open_nursery() as nursery:
        front, unused = both("127.0.0.54")

        async def relay() -> None:
            while True:
                nursery.start_soon(pass_on, *await front.recvfrom(65_535))

        async def pass_on(data: bytes, peer: Any) -> None:
            nonlocal asked
            asked += 1
            again = dns.message.from_wire(data)
            again.id = asked
            reply = await running.raw(again.to_wire())
            await front.sendto(data[:2] + reply[2:], peer)

        async with open_proxy(servers=[at(f"127.0.0.54:{front.getsockname()[1]}")]) as running:
            nursery.start_soon(relay)
            assert (await running.ask("example.org")).rcode() == dns.rcode.SERVFAIL
            assert asked == 9
        nursery.cancel_scope.cancel()
        front.close()
        unused.close()
    assert sum("does the host's resolver ask this proxy" in record.getMessage() for record in caplog.records) == 1


async def test_zone_transfer_brings_all_its_messages() -> None:
    def script(data: bytes, datagram: bool) -> list[bytes]:
        message = dns.message.from_wire(data)
        first = dns.message.make_response(message)
        more = dns.message.make_response(message)
        more.question = []
        return [first.to_wire(), more.to_wire(), more.to_wire()]

    async with open_proxy(resolver=Resolver({}, script=script)) as running:
        ip, port = running.proxy.addresses[0]
        data = query("example.org", "AXFR")
        async with await trio.open_tcp_stream(str(ip), port) as stream:
            await stream.send_all(len(data).to_bytes(2, "big") + data)
            received = b""
            while len(received) < 2 + 29 + 2 * (2 + 12):
                received += await stream.receive_some(4096)
    assert received.count(data[:2]) == 3


async def test_settings_of_the_host_are_followed_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.dns.resolvconf._CHECK_SECONDS", 0.0)
    conf = tmp_path / "resolv.conf"
    async with open_proxy(store_of(service("web", "10.0.0.1")), conf=conf) as running:
        assert (await running.ask("web.default.lan")).rcode() == dns.rcode.NXDOMAIN
        conf.write_text("search lan\n")
        assert records(await running.ask("web.default.lan")) == [
            "web.default A 10.0.0.1",
            "web.default.lan CNAME web.default.",
        ]


async def test_what_is_asked_of_the_resolver_is_counted() -> None:
    async with open_proxy(store_of(service("web", "10.0.0.1")), zone=ZONE) as running:
        await running.ask("web.default")
        await running.ask("example.org", "TXT", tcp=True)
        await running.ask("nobody.example", "AAAA")
        await running.raw(update())
        labels = ("client", "unknown")
        assert running.samples("istio_dns_requests_total") == {
            ("a", "udp", *labels): 1,
            ("txt", "tcp", *labels): 1,
            ("aaaa", "udp", *labels): 1,
            ("unknown", "udp", *labels): 1,
        }
        assert set(running.samples("istio_dns_upstream_requests_total").values()) == {1}
        assert len(running.samples("istio_dns_upstream_requests_total")) == 3
        assert running.samples("istio_dns_upstream_failures_total") == {("aaaa", "udp", *labels): 1}
        buckets = running.samples("istio_dns_upstream_request_duration_seconds_bucket")
        assert [le for *_, le in buckets][:7] == ["0.0005", "0.001", "0.01", "0.1", "1.0", "5.0", "+Inf"]
        assert buckets["txt", "tcp", *labels, "+Inf"] == 1
        assert running.samples("istio_dns_upstream_request_duration_seconds_count")["txt", "tcp", *labels] == 1
