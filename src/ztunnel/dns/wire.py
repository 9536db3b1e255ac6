"""DNS messages on the wire. Only the question of a message is read, unless we answer it ourselves.

This module brings dnspython; everything that imports it is imported only where the proxy is on.

Source: RFC 1035 §4; RFC 6891 for EDNS.
"""

from __future__ import annotations

import contextlib
import re
import struct
from typing import TYPE_CHECKING, Final

import attrs
import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdataset
import dns.rdatatype
import dns.rdtypes.ANY.CNAME
import dns.renderer
import dns.wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztunnel.dns.answer import Answer
    from ztunnel.mesh.address import IpAddress

__all__ = [
    "MAX_MESSAGE",
    "TTL",
    "Query",
    "Signed",
    "failure",
    "is_transfer",
    "rcode_of",
    "read",
    "render",
    "replies_to",
    "type_name",
    "udp_limit",
]

MAX_MESSAGE: Final = 65_535
TTL: Final = 30
"""Seconds that our own records may be kept."""
_HEADER: Final = struct.Struct("!HHHHHH")
_RECORD: Final = struct.Struct("!HHHIH")
_POINTER: Final = 0xC000
_PLAIN_UDP: Final = 512
_MAX_UDP: Final = 4096
_QR: Final = 0x8000
_QUERY: Final = 0
_OPCODE: Final = 0x7800
_OPT_BYTES: Final = 11
_IN: Final = 1
_HOST: Final = re.compile(rb"[a-z0-9_*-]{1,63}(?:\.[a-z0-9_*-]{1,63})*")
_A: Final = dns.rdatatype.A
_AAAA: Final = dns.rdatatype.AAAA
_TRANSFERS: Final = frozenset({dns.rdatatype.AXFR, dns.rdatatype.IXFR})
_TYPES: Final = {int(found): dns.rdatatype.to_text(found).lower() for found in dns.rdatatype.RdataType}


class Signed(Exception):
    """The question is signed, and its asker wants an answer that is too."""


@attrs.frozen(kw_only=True)
class Query:
    """A message that asks for something."""

    wire: bytes
    opcode: int
    end: int = _HEADER.size
    """Where its question section ends; at the header's end when it has none, or not one."""
    name: str | None = None
    """Name of the only question in lower case, without a trailing dot; None when no host is called like that."""
    type: int = 0
    """0 unless it is a query with one question."""
    internet: bool = False
    """The question is of class IN."""
    malformed: bool = False

    @property
    def id(self) -> int:
        """Chosen by the client."""
        return int.from_bytes(self.wire[:2], "big")

    @property
    def version(self) -> int | None:
        """Address family asked for, 4 or 6; None for every other type."""
        return 4 if self.type == _A else 6 if self.type == _AAAA else None


def _begin(wire: bytes) -> tuple[int, int, int]:
    """ID, flags and number of questions."""
    ident, flags, questions, _, _, _ = _HEADER.unpack_from(wire)
    return ident, flags, questions


def read(wire: bytes) -> Query | None:
    """Read the question of a message; None for what needs no reply: too short, or itself a reply."""
    if len(wire) < _HEADER.size:
        return None
    _, flags, questions = _begin(wire)
    if flags & _QR:
        return None
    opcode = flags >> 11 & 0xF
    if opcode != _QUERY or questions != 1:
        return Query(wire=wire, opcode=opcode)
    try:
        parser = dns.wire.Parser(wire, _HEADER.size)
        labels = parser.get_name().labels[:-1]
        rdtype, rdclass = parser.get_struct("!HH")
    except dns.exception.DNSException:
        return Query(wire=wire, opcode=opcode, malformed=True)
    name: str | None = None
    joined = b".".join(labels).lower()
    if joined.count(b".") == len(labels) - 1 and _HOST.fullmatch(joined):
        name = joined.decode("ascii")
    return Query(wire=wire, opcode=opcode, end=parser.current, name=name, type=rdtype, internet=rdclass == _IN)


def replies_to(query: Query, reply: bytes) -> bool:
    """Whether `reply` answers `query`: the same ID, operation and question.

    A server that could not read the question may leave it out, but then it has failed.
    """
    if len(reply) < _HEADER.size:
        return False
    ident, flags, questions = _begin(reply)
    if ident != query.id or not flags & _QR or flags >> 11 & 0xF != query.opcode:
        return False
    if query.end == _HEADER.size:
        return True
    if not questions:
        return flags & 0xF != 0
    name = slice(_HEADER.size, query.end - 4)
    fixed = slice(query.end - 4, query.end)
    # No length of a label is a letter, so that the whole name can be made lower case.
    return questions == 1 and reply[fixed] == query.wire[fixed] and reply[name].lower() == query.wire[name].lower()


def rcode_of(reply: bytes) -> int:
    """How the server says that it went, without the bits that EDNS adds."""
    return reply[3] & 0xF


def is_transfer(query: Query) -> bool:
    """Whether the answer is a zone, of many messages."""
    return query.type in _TRANSFERS


def type_name(query: Query) -> str:
    """The type asked for, in lower case; `unknown` for one without a name, as metrics need few values."""
    return _TYPES.get(query.type, "unknown") if query.type else "unknown"


@attrs.frozen(kw_only=True)
class _Edns:
    """What a question says in its OPT record."""

    payload: int
    version: int
    flags: int


def _edns(query: Query) -> _Edns | None:
    """The question's EDNS, after all of the message was read.

    Raises:
        dns.exception.DNSException: the message is malformed.
        Signed: it has a signature.
    """
    if query.wire[6:12] == b"\0\0\0\0\0\0":
        if len(query.wire) != query.end:
            raise dns.exception.FormError("bytes after the question")
        return None
    try:
        message = dns.message.from_wire(query.wire)
    except dns.message.UnknownTSIGKey:
        raise Signed from None
    if message.edns < 0:
        return None
    return _Edns(payload=message.payload, version=message.edns, flags=message.ednsflags & dns.flags.DO)


def udp_limit(edns: _Edns | None) -> int:
    """Bytes that the client takes in one datagram."""
    return _PLAIN_UDP if edns is None else min(max(edns.payload, _PLAIN_UDP), _MAX_UDP)


def render(query: Query, answer: Answer, *, datagram: bool) -> bytes:
    """The reply with our own answer.

    Args:
        query: With one question.
        answer: To it.
        datagram: Keep to what the client takes in a datagram; what is over is left out, and the reply says so.

    Raises:
        Signed: the query is; it is the resolver's.
    """
    try:
        edns = _edns(query)
    except dns.exception.DNSException:
        return failure(query, dns.rcode.FORMERR)
    if edns is not None and edns.version:
        return _Reply(query, edns, dns.rcode.BADVERS, MAX_MESSAGE).finish()
    reply = _Reply(query, edns, dns.rcode.NOERROR, udp_limit(edns) if datagram else MAX_MESSAGE)
    reply.flag(dns.flags.AA)
    owner, _ = dns.name.from_wire(query.wire, _HEADER.size)
    try:
        if answer.canonical_name is not None:
            target = dns.name.from_text(answer.canonical_name)
            reply.add(owner, dns.rdtypes.ANY.CNAME.CNAME(dns.rdataclass.IN, dns.rdatatype.CNAME, target))
            owner = target
        reply.add_addresses(owner, answer.addresses)
    except dns.exception.TooBig:
        reply.flag(dns.flags.TC)
    return reply.finish()


def failure(query: Query, rcode: int) -> bytes:
    """A reply without records that says why."""
    edns = None
    if query.type:
        with contextlib.suppress(dns.exception.DNSException, Signed):
            edns = _edns(query)
    return _Reply(query, edns, rcode, MAX_MESSAGE).finish()


class _Reply:
    """A reply that is being written: question, answers, OPT record."""

    def __init__(self, query: Query, edns: _Edns | None, rcode: int, limit: int) -> None:
        asked = int.from_bytes(query.wire[2:4], "big")
        kept = asked & (dns.flags.RD | dns.flags.CD | _OPCODE)
        self._out = dns.renderer.Renderer(query.id, _QR | dns.flags.RA | kept | rcode & 0xF, limit)
        self._edns = edns
        self._rcode = rcode
        if edns is not None:
            self._out.reserve(_OPT_BYTES)
        if query.end > _HEADER.size:
            name, _ = dns.name.from_wire(query.wire, _HEADER.size)
            rdtype, rdclass = struct.unpack_from("!HH", query.wire, query.end - 4)
            self._out.add_question(name, rdtype, rdclass)

    def flag(self, flag: int) -> None:
        """Set a flag of the header."""
        self._out.flags |= flag

    def add(self, owner: dns.name.Name, rdata: dns.rdata.Rdata) -> None:
        """Add a record to the answers.

        Raises:
            dns.exception.TooBig: there is no room for it.
        """
        self._out.add_rdataset(dns.renderer.ANSWER, owner, dns.rdataset.from_rdata(TTL, rdata))

    def add_addresses(self, owner: dns.name.Name, addresses: Sequence[IpAddress]) -> None:
        """Add address records of one family, as many as fit; `owner` is in the message already.

        Written here, as dnspython takes fifty times as long for the same bytes.

        Raises:
            dns.exception.TooBig: there is no room for all.
        """
        if not addresses:
            return
        out, size = self._out, len(addresses[0].packed)
        kind = _A if addresses[0].version == 4 else _AAAA
        head = _RECORD.pack(_POINTER | out.compress[owner], kind, _IN, TTL, size)
        room = (out.max_size - out.output.tell()) // (len(head) + size)
        written = addresses[:room]
        out.output.write(b"".join([head + ip.packed for ip in written]))
        out.counts[dns.renderer.ANSWER] += len(written)
        if len(written) < len(addresses):
            raise dns.exception.TooBig

    def finish(self) -> bytes:
        """The whole message."""
        edns = self._edns
        if edns is not None:
            self._out.release_reserved()
            # Our own version is 0; of a failure that has more than four bits, OPT carries the others.
            flags = edns.flags | (self._rcode >> 4) << 24
            self._out.add_edns(0, flags, max(edns.payload, _PLAIN_UDP))
        self._out.write_header()
        wire: bytes = self._out.get_wire()
        return wire
