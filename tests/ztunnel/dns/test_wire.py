from __future__ import annotations

import random
import struct

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.tsig
import dns.tsigkeyring
import dns.wire
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.dns.answer import Answer, Result
from ztunnel.dns.wire import Query, Signed, failure, read, render, replies_to, type_name
from ztunnel.mesh import parse_ip

ANSWER = Answer(result=Result.SUCCESS, addresses=[parse_ip("10.0.0.1"), parse_ip("10.0.0.2")])


def question(name: str = "Web.Example", kind: str = "A", **options: object) -> dns.message.Message:
    return dns.message.make_query(name, kind, **options)  # type: ignore[arg-type]


def parsed(wire: bytes) -> Query:
    found = read(wire)
    assert found is not None
    return found


def rendered(message: dns.message.Message, answer: Answer = ANSWER, *, datagram: bool = True) -> dns.message.Message:
    return dns.message.from_wire(render(parsed(message.to_wire()), answer, datagram=datagram))


def test_question_is_read_in_lower_case() -> None:
    query = parsed(question().to_wire())
    assert (query.name, query.version, query.internet, query.malformed) == ("web.example", 4, True, False)
    assert parsed(question(kind="AAAA").to_wire()).version == 6
    assert parsed(question(kind="TXT").to_wire()).version is None
    assert not parsed(question(rdclass="CH").to_wire()).internet


@pytest.mark.parametrize("wire", [b"", bytes(11), b"\0\1\x80\0" + bytes(8)])
def test_what_is_too_short_or_itself_a_reply_is_no_question(wire: bytes) -> None:
    assert read(wire) is None


@pytest.mark.parametrize(
    "name", [rb"a\.b.example", rb"a\000b.example", rb"\195\164.example", rb"a\032b", b"."], ids=repr
)
def test_what_no_host_is_called_has_no_name(name: bytes) -> None:
    assert parsed(question(name.decode()).to_wire()).name is None


@pytest.mark.parametrize(
    "body",
    [
        b"\x03web",
        b"\x40web\0\0\1\0\1",
        b"\xc0\x0c\0\1\0\1",
        b"\x03web\0\0\1",
        b"\x03web\xc0\xff\0\1\0\1",
        b"\x03web\xc0\0\0\1\0\1",
    ],
    ids=["cut", "label", "pointer", "no class", "pointer out", "pointer into the header"],
)
def test_unreadable_question_is_malformed(body: bytes) -> None:
    query = parsed(struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + body)
    assert query.malformed
    reply = dns.message.from_wire(failure(query, dns.rcode.FORMERR))
    assert (reply.id, reply.rcode(), reply.question) == (7, dns.rcode.FORMERR, [])
    assert reply.flags & dns.flags.RD


def test_reply_repeats_the_question_with_its_case_and_flags() -> None:
    message = question()
    message.flags |= dns.flags.CD | dns.flags.AD
    wire = render(parsed(message.to_wire()), ANSWER, datagram=True)
    assert b"\x03Web\x07Example\0" in wire
    reply = dns.message.from_wire(wire)
    assert reply.id == message.id
    assert reply.flags == dns.flags.QR | dns.flags.AA | dns.flags.RD | dns.flags.RA | dns.flags.CD
    assert [rdata.address for rdata in reply.answer[0]] == ["10.0.0.1", "10.0.0.2"]


def test_alias_owns_the_addresses() -> None:
    answer = Answer(result=Result.SUCCESS, canonical_name="web", addresses=ANSWER.addresses)
    reply = rendered(question("web.example"), answer)
    assert [rrset.to_text() for rrset in reply.answer] == [
        "web.example. 30 IN CNAME web.",
        "web. 30 IN A 10.0.0.1\nweb. 30 IN A 10.0.0.2",
    ]


def test_alias_that_does_not_fit_is_cut_whole() -> None:
    target = ".".join(["t" * 60] * 4)
    answer = Answer(result=Result.SUCCESS, canonical_name=target, addresses=ANSWER.addresses)
    reply = rendered(question(f"{target}.example"), answer)
    assert reply.answer == []
    assert reply.flags & dns.flags.TC
    assert len(rendered(question(f"{target}.example"), answer, datagram=False).answer) == 2


def test_edns_is_answered_with_edns_and_only_then() -> None:
    assert rendered(question()).edns == -1
    reply = rendered(question(use_edns=0, payload=1400, want_dnssec=True))
    assert (reply.edns, reply.payload, reply.ednsflags) == (0, 1400, dns.flags.DO)
    assert rendered(question(use_edns=0, payload=100)).payload == 512


def test_unknown_version_of_edns_is_refused_and_ours_named() -> None:
    reply = rendered(question(use_edns=1))
    assert (reply.rcode(), reply.edns, reply.answer) == (dns.rcode.BADVERS, 0, [])


@pytest.mark.parametrize(("payload", "limit"), [(None, 512), (100, 512), (1232, 1232), (65_535, 4096)])
def test_datagram_is_as_long_as_the_client_takes_it_and_says_when_it_was_cut(payload: int | None, limit: int) -> None:
    many = Answer(
        result=Result.SUCCESS, addresses=[parse_ip(f"10.0.{number >> 8}.{number & 255}") for number in range(999)]
    )
    message = question() if payload is None else question(use_edns=0, payload=payload)
    wire = render(parsed(message.to_wire()), many, datagram=True)
    assert limit - 16 < len(wire) <= limit
    assert dns.message.from_wire(wire).flags & dns.flags.TC
    whole = rendered(message, many, datagram=False)
    assert len(whole.answer[0]) == 999
    assert not whole.flags & dns.flags.TC


def test_rubbish_behind_an_owned_question_is_a_format_error() -> None:
    wire = question().to_wire() + b"rubbish"
    assert dns.message.from_wire(render(parsed(wire), ANSWER, datagram=True)).rcode() == dns.rcode.FORMERR
    wire = question().to_wire()[:10] + b"\0\1" + question().to_wire()[12:]  # a record that is not there
    assert dns.message.from_wire(render(parsed(wire), ANSWER, datagram=True)).rcode() == dns.rcode.FORMERR


def test_signed_question_is_left_to_who_can_sign_the_answer() -> None:
    message = question()
    message.use_tsig(dns.tsigkeyring.from_text({"key.": "c2VjcmV0"}), "key.")
    with pytest.raises(Signed):
        render(parsed(message.to_wire()), ANSWER, datagram=True)


def test_failure_answers_edns_too() -> None:
    reply = dns.message.from_wire(failure(parsed(question(use_edns=0).to_wire()), dns.rcode.SERVFAIL))
    assert (reply.rcode(), reply.edns) == (dns.rcode.SERVFAIL, 0)


def test_only_the_same_id_operation_and_question_is_a_reply() -> None:
    message = question()
    query = parsed(message.to_wire())
    reply = dns.message.make_response(message)
    assert replies_to(query, reply.to_wire())
    assert replies_to(query, reply.to_wire().replace(b"Web", b"wEB"))
    assert not replies_to(query, message.to_wire())
    assert not replies_to(query, b"")
    for change in ("id", "name", "type", "class", "opcode", "two", "none"):
        other = question("Web.Example2" if change == "name" else "Web.Example", "AAAA" if change == "type" else "A",
                         rdclass="CH" if change == "class" else "IN")  # fmt: skip
        other.id = message.id ^ (change == "id")
        forged = dns.message.make_response(other)
        if change == "opcode":
            forged.set_opcode(dns.opcode.UPDATE)
        if change == "two":
            forged.question *= 2
        if change == "none":
            forged.question = []
        assert not replies_to(query, forged.to_wire()), change
    forged.set_rcode(dns.rcode.FORMERR)  # it could not read the question, and says so
    assert replies_to(query, forged.to_wire())


def test_types_of_which_there_are_65536_are_few_in_metrics() -> None:
    names = set()
    for kind in range(65_536):
        wire = struct.pack("!HHHHHH", 1, 0, 1, 0, 0, 0) + b"\x01a\0" + struct.pack("!HH", kind, 1)
        names.add(type_name(parsed(wire)))
    assert {"a", "aaaa", "https", "unknown"} <= names
    assert len(names) < 150


@given(st.binary(max_size=80))
def test_no_bytes_do_harm(data: bytes) -> None:
    for wire in (data, b"\0\1\1\0\0\1" + bytes(6) + data):
        query = read(wire)
        if query is not None:
            dns.message.from_wire(failure(query, dns.rcode.SERVFAIL))
            if query.name is not None:
                assert len(render(query, ANSWER, datagram=True)) <= 512


@given(st.integers(0, 2**32))
def test_no_change_of_a_good_question_does_harm(seed: int) -> None:
    rng = random.Random(seed)
    wire = bytearray(
        question(use_edns=0, options=[dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")]).to_wire()
    )
    for _ in range(rng.randrange(1, 5)):
        wire[rng.randrange(len(wire))] = rng.randrange(256)
    query = read(bytes(wire))
    if query is not None and query.name is not None:
        try:
            render(query, ANSWER, datagram=True)
        except Signed:
            pass


@given(st.binary(max_size=300))
def test_a_name_ends_where_dnspython_says(name: bytes) -> None:
    wire = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + name
    query = parsed(wire)
    parser = dns.wire.Parser(wire, 12)
    try:
        labels = parser.get_name().labels
        rdtype, _ = parser.get_struct("!HH")
    except dns.exception.DNSException:
        assert query.malformed
        return
    compressed = sum(map(len, labels)) + len(labels) != parser.current - 12 - 4
    assert query.malformed == compressed  # it can point only at what is no name
    if not compressed:
        assert (query.end, query.type) == (parser.current, rdtype)
