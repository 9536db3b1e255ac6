"""DNS messages on the wire. Only the question of a message is read, unless we answer it ourselves.

This module brings a little of dnspython; everything that imports it is imported only where the proxy is on. The most
of it, which reads what only few questions have, is imported by the first of those: it is three megabytes.

Source: RFC 1035 §4; RFC 6891 for EDNS.
"""

from __future__ import annotations

import contextlib
import re
import struct
from typing import TYPE_CHECKING, Final

import attrs
import dns.rcode
import dns.rdatatype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ztunnel.dns.answer import Answer

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
    "take_framed",
    "type_name",
]

MAX_MESSAGE: Final = 65_535
TTL: Final = 30
"""Seconds that our own records may be kept."""
_HEADER: Final = struct.Struct("!HHHHHH")
_RECORD: Final = struct.Struct("!HHHIH")
_OPT: Final = struct.Struct("!BHHIH")
_POINTER: Final = 0xC000
_PLAIN_UDP: Final = 512
_MAX_UDP: Final = 4096
_QUERY: Final = 0
_QR, _OPCODE, _AA, _TC, _RD, _RA, _CD = 0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
_DO: Final = 0x8000
_MAX_LABEL: Final = 63
_MAX_NAME: Final = 255
_TOO_LONG: Final = 64
_IN: Final = 1
_HOST: Final = re.compile(rb"[a-z0-9_*-]{1,63}(?:\.[a-z0-9_*-]{1,63})*")
_A, _CNAME, _AAAA, _OPT_TYPE = 1, 5, 28, 41
_TRANSFERS: Final = frozenset({dns.rdatatype.AXFR, dns.rdatatype.IXFR})
_TYPES: Final = {int(found): dns.rdatatype.to_text(found).lower() for found in dns.rdatatype.RdataType}


class _Malformed(Exception):
    """The message cannot be read."""


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
    labels: list[bytes] = []
    at = _HEADER.size
    while size := wire[at] if at < len(wire) else _TOO_LONG:
        if size > _MAX_LABEL:  # a pointer too: it could only lead into the header, where no name is
            return Query(wire=wire, opcode=opcode, malformed=True)
        labels.append(wire[at + 1 : at + 1 + size])
        at += 1 + size
    end = at + 5
    if end > len(wire) or at - _HEADER.size >= _MAX_NAME:
        return Query(wire=wire, opcode=opcode, malformed=True)
    joined = b".".join(labels).lower()
    known = joined.count(b".") == len(labels) - 1 and _HOST.fullmatch(joined)
    return Query(
        wire=wire,
        opcode=opcode,
        end=end,
        name=joined.decode("ascii") if known else None,
        type=int.from_bytes(wire[at + 1 : at + 3], "big"),
        internet=int.from_bytes(wire[at + 3 : end], "big") == _IN,
    )


def take_framed(kept: bytearray) -> bytes | None:
    """Take the first message off what came by TCP; None until it is whole. Source: RFC 1035 §4.2.2."""
    if len(kept) < 2 or len(kept) < (end := 2 + int.from_bytes(kept[:2], "big")):
        return None
    message = bytes(kept[2:end])
    del kept[:end]
    return message


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
        _Malformed: it cannot be read.
        Signed: it has a signature.
    """
    rest = query.wire[6:12]
    if rest == b"\0\0\0\0\0\0":
        if len(query.wire) != query.end:
            raise _Malformed
        return None
    if rest == b"\0\0\0\0\0\1" and len(query.wire) == query.end + _OPT.size:
        root, kind, payload, flags, nbytes = _OPT.unpack_from(query.wire, query.end)
        if not root and kind == _OPT_TYPE and not nbytes:  # as nearly every question has it
            return _Edns(payload=payload, version=flags >> 16 & 0xFF, flags=flags & _DO)
    import dns.exception
    import dns.message

    try:
        message = dns.message.from_wire(query.wire)
    except dns.message.UnknownTSIGKey:
        raise Signed from None
    except dns.exception.DNSException:
        raise _Malformed from None
    if message.edns < 0:
        return None
    return _Edns(payload=message.payload, version=message.edns, flags=message.ednsflags & _DO)


def render(query: Query, answer: Answer, *, datagram: bool) -> bytes:
    """The reply with our own answer.

    Written here, as dnspython takes fifty times as long for the same bytes.

    Args:
        query: With one question.
        answer: To it.
        datagram: Keep to what the client takes in a datagram; what is over is left out, and the reply says so.

    Raises:
        Signed: the query is; it is the resolver's.
    """
    try:
        edns = _edns(query)
    except _Malformed:
        return failure(query, dns.rcode.FORMERR)
    if edns is not None and edns.version:
        return _reply(query, edns, dns.rcode.BADVERS)
    room = (_limit(edns) if datagram else MAX_MESSAGE) - query.end - (0 if edns is None else _OPT.size)
    records: list[bytes] = []
    wanted, owner = answer.records, _HEADER.size  # offset of the name in the message
    if answer.canonical_name is not None:
        labels = answer.canonical_name.encode("ascii").split(b".")  # the asked name's first ones
        target = b"".join([bytes((len(label),)) + label for label in labels]) + b"\0"
        record = _RECORD.pack(_POINTER | owner, _CNAME, _IN, TTL, len(target)) + target
        owner = query.end + len(record) - len(target)
        room -= len(record)
        if room >= 0:
            records.append(record)
    if answer.addresses and room > 0:
        first = answer.addresses[0]
        size = len(first.packed)
        head = _RECORD.pack(_POINTER | owner, _A if first.version == 4 else _AAAA, _IN, TTL, size)
        records += [head + ip.packed for ip in answer.addresses[: room // (len(head) + size)]]
    flags = _AA if len(records) == wanted else _AA | _TC
    return _reply(query, edns, dns.rcode.NOERROR, flags, records)


def _limit(edns: _Edns | None) -> int:
    """Bytes that the client takes in one datagram."""
    return _PLAIN_UDP if edns is None else min(max(edns.payload, _PLAIN_UDP), _MAX_UDP)


def failure(query: Query, rcode: int) -> bytes:
    """A reply without records that says why."""
    edns = None
    if query.type:
        with contextlib.suppress(_Malformed, Signed):
            edns = _edns(query)
    return _reply(query, edns, rcode)


def _reply(query: Query, edns: _Edns | None, rcode: int, flags: int = 0, records: Sequence[bytes] = ()) -> bytes:
    asked = int.from_bytes(query.wire[2:4], "big")
    flags |= _QR | _RA | asked & (_RD | _CD | _OPCODE) | rcode & 0xF
    question = query.wire[_HEADER.size : query.end]
    header = _HEADER.pack(query.id, flags, 1 if question else 0, len(records), 0, 0 if edns is None else 1)
    message = b"".join((header, question, *records))
    if edns is None:
        return message
    # Our own version is 0; of a failure that has more than four bits, OPT carries the others.
    more = edns.flags | rcode >> 4 << 24
    return message + _OPT.pack(0, _OPT_TYPE, max(edns.payload, _PLAIN_UDP), more, 0)
