"""Header blocks: HPACK, and the rules of HTTP/2 for the fields in them.

The encoder keeps no dynamic table, whatever size the peer offers: the fields of a CONNECT differ from stream to stream
or are short, so a literal costs less time than a look-up, and there is no state that a peer could make us grow.
The decoder counts while it decodes. Past the limits it goes on without keeping fields, since its table must stay in
step with the peer's; far past them it gives up, and the connection with it.

What CONNECT itself asks of the fields is judged by `hbone.connect`.

Source: RFC 7541; RFC 9113 §8.2, §8.3.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Final

from hpack.exceptions import HPACKError
from hpack.hpack import decode_integer, encode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from hbone.errors import ErrorCode, ProtocolError
from hbone.fields import malformed_value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.events import Headers

__all__ = ["TABLE_SIZE", "BlockDecoder", "BlockEncoder", "HeaderBlock", "list_size", "request_fault", "response_status"]

TABLE_SIZE: Final = 4096
"""Bytes of the decoder's table, and the most that the encoder would ever use of the peer's. Source: RFC 7541 §4.2."""
FIELD_OVERHEAD: Final = 32
"""Bytes that a field counts beyond its name and value. Source: RFC 9113 §6.5.2."""
_GIVE_UP: Final = 4
"""How many times the limit a header list may be before decoding stops and the connection ends."""

_STATUS_200: Final = b"\x88"
_NAMES: Final = {b":authority": b"\x01", b":method": b"\x02", b":status": b"\x08", b"forwarded": b"\x00\x09forwarded"}
"""Literals without indexing, up to the value. Source: RFC 7541 §6.2.2, appendix A."""
_LENGTHS: Final = tuple(bytes(encode_integer(size, 7)) for size in range(255))
"""Of strings that are not coded, as nearly all lengths are. Source: RFC 7541 §5.2."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_STATIC: Final[Headers] = HeaderTable.STATIC_TABLE
_STATIC_SIZE: Final = len(_STATIC)
_STATUS: Final = re.compile(rb"[1-9][0-9][0-9]")
_ORDINARY: Final = frozenset({b"baggage", b"forwarded", b"traceparent"})
_CONNECTION_FIELDS: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)
_REQUEST_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})


class HeaderBlock:
    """A decoded block."""

    __slots__ = ("fields", "too_large")

    def __init__(self, fields: Headers, *, too_large: bool) -> None:
        self.fields = fields
        self.too_large = too_large
        """Beyond the limits; `fields` holds only those within."""


_NO_FIELDS: Final = HeaderBlock((), too_large=False)


def list_size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Size of a header list in bytes. Source: RFC 9113 §6.5.2."""
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + FIELD_OVERHEAD
    return size


class BlockEncoder:
    """Fields to a block, without a dynamic table."""

    __slots__ = ("_announced", "_lowest")

    def __init__(self) -> None:
        self._announced = TABLE_SIZE
        self._lowest: int | None = None

    @property
    def table_size(self) -> int:
        """The table that we may use, in bytes; never beyond 4096."""
        return self._announced if self._lowest is None else self._lowest

    def limit_table(self, size: int) -> None:
        """Heed the peer's SETTINGS_HEADER_TABLE_SIZE. Source: RFC 7541 §4.2."""
        size = min(size, TABLE_SIZE)
        if size < self.table_size:
            self._lowest = size

    def encode(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The block of these fields."""
        parts: list[bytes] = []
        if self._lowest is not None:  # a smaller table must be confirmed before the next field
            update = encode_integer(self._lowest, 5)
            update[0] |= 0x20
            parts.append(bytes(update))
            self._announced, self._lowest = self._lowest, None
        for name, value in headers:
            prefix = _NAMES.get(name)
            if prefix is None:
                prefix = b"\x00" + bytes(encode_integer(len(name), 7)) + name
                if _NAME.fullmatch(name) and len(name) <= 32 and len(_NAMES) < 64:
                    _NAMES[name] = prefix
            elif value == b"200" and name == b":status":
                parts.append(_STATUS_200)
                continue
            size = len(value)
            parts += (prefix, _LENGTHS[size] if size < len(_LENGTHS) else bytes(encode_integer(size, 7)), value)
        return b"".join(parts)


class BlockDecoder:
    """Blocks to fields, within limits."""

    __slots__ = ("_last", "_last_block", "_max_fields", "_max_size", "_table")

    def __init__(self, max_size: int, max_fields: int) -> None:
        self._max_size = max_size
        self._max_fields = max_fields
        self._table: HeaderTable | None = None  # made for the first field in it, as an empty one is 900 bytes
        self._last_block = b""
        self._last = _NO_FIELDS

    def trim(self) -> None:
        """Forget the last block, which is kept for speed alone."""
        self._last_block = b""
        self._last = _NO_FIELDS

    def _own_table(self) -> HeaderTable:
        table = self._table
        if table is None:
            table = self._table = HeaderTable()
        return table

    def decode(self, block: bytes) -> HeaderBlock:
        """Decode one whole block.

        Raises:
            ProtocolError: COMPRESSION_ERROR, or ENHANCE_YOUR_CALM for a list so large that decoding stopped. The
                table is out of step with the peer's then, so the connection must end.
        """
        if block == self._last_block:  # the answers of one server are often the same to the byte
            return self._last
        try:
            return self._decode(block)
        except (HPACKError, IndexError, ValueError) as error:
            raise ProtocolError(f"the header block cannot be decoded: {error}", ErrorCode.COMPRESSION_ERROR) from error

    def _decode(self, block: bytes) -> HeaderBlock:
        fields: list[tuple[bytes, bytes]] = []
        count = size = position = updates = 0
        fixed = True  # its meaning does not depend on the table, nor the table on it
        end = len(block)
        while position < end:
            first = block[position]
            if first & 0x80:
                index = first & 0x7F
                if index < 0x7F:
                    position += 1
                else:
                    index, position = _integer(block, position, 7)
                if 0 < index <= _STATIC_SIZE:
                    name, value = _STATIC[index - 1]
                else:
                    fixed = False
                    name, value = self._own_table().get_by_index(index)
            elif first & 0x60 == 0x20:
                fixed = False
                updates += 1
                new_size, position = _integer(block, position, 5)
                if count or updates > 2 or new_size > TABLE_SIZE:
                    raise ValueError(f"a table size update to {new_size} is not allowed here")
                self._own_table().maxsize = new_size
                continue
            else:
                index = first & 0x3F if first & 0x40 else first & 0x0F
                if index < 15:
                    position += 1
                else:
                    index, position = _integer(block, position, 6 if first & 0x40 else 4)
                if not index:
                    length = block[position]
                    if length < 0x7F:
                        start = position + 1
                        position = start + length
                        name = block[start:position]
                    else:
                        name, position = _string(block, position)
                elif index <= _STATIC_SIZE:
                    name = _STATIC[index - 1][0]
                else:
                    fixed = False
                    name = self._own_table().get_by_index(index)[0]
                length = block[position]
                if length < 0x7F:
                    start = position + 1
                    position = start + length
                    value = block[start:position]
                else:
                    value, position = _string(block, position)
                if position > end:
                    raise ValueError("it ends within a string")
                if first & 0x40:
                    fixed = False
                    self._own_table().add(name, value)
            count += 1
            size += len(name) + len(value) + FIELD_OVERHEAD
            if size <= self._max_size and count <= self._max_fields:
                fields.append((name, value))
            elif size > self._max_size * _GIVE_UP or count > self._max_fields * _GIVE_UP:
                raise ProtocolError(
                    f"a header list is beyond {self._max_size * _GIVE_UP} bytes or {self._max_fields * _GIVE_UP}"
                    f" fields; the limits are {self._max_size} and {self._max_fields}",
                    ErrorCode.ENHANCE_YOUR_CALM,
                )
        decoded = HeaderBlock(tuple(fields), too_large=count > len(fields))
        if fixed:
            self._last_block = block
            self._last = decoded
        return decoded


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    mask = (1 << bits) - 1
    value = block[position] & mask
    if value < mask:
        return value, position + 1
    value, used = decode_integer(block[position : position + 8], bits)
    return value, position + used


def _string(block: bytes, position: int) -> tuple[bytes, int]:
    first = block[position]
    coded = first & 0x80
    length = first & 0x7F
    if length < 0x7F:
        position += 1
    else:
        length, position = _integer(block, position, 7)
    end = position + length
    text = block[position:end]
    if len(text) != length:
        raise ValueError("it ends within a string")
    return (decode_huffman(text) if coded else text), end


def _field_fault(headers: Headers, pseudo: frozenset[bytes]) -> str | None:
    faulty = malformed_value(headers)
    if faulty is not None:
        return f"the value of {faulty!r} has a forbidden character"
    seen: list[bytes] = []
    regular = False
    for name, value in headers:
        if name[:1] == b":":
            if regular or name in seen or name not in pseudo:
                return f"{name!r} is unknown, repeated or after other fields"
            seen.append(name)
            continue
        regular = True
        if name in _ORDINARY:
            continue
        if not _NAME.fullmatch(name):
            return f"{name!r} is no field name in lower case"
        if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):
            return f"{name!r} belongs to HTTP/1.1"
    return None


def request_fault(headers: Headers) -> str | None:
    """Why HTTP/2 calls this request malformed; None when it does not. Source: RFC 9113 §8.2, §8.3."""
    fault = _field_fault(headers, _REQUEST_PSEUDO)
    if fault is not None:
        return fault
    for name, _ in headers:
        if name == b":method":
            return None
    return "there is no ':method'"


@functools.lru_cache(maxsize=64)
def response_status(headers: Headers) -> int | str:
    """The status of a response, or why HTTP/2 calls it malformed. Source: RFC 9113 §8.2, §8.3.2."""
    fault = _field_fault(headers, frozenset({b":status"}))
    if fault is not None:
        return fault
    if not headers or headers[0][0] != b":status" or not _STATUS.fullmatch(headers[0][1]):
        return "there is no ':status' of three digits"
    return int(headers[0][1])
