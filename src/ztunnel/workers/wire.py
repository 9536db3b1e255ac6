"""What a parent and its workers say to each other, as bytes on a Unix socket.

```text
length u32 | kind u8 | number u32 | body          the length counts what follows it; numbers are of the sender
```

A change of the mesh is the response of discovery as it came in, an identity is PEM, a report is JSON. The two ends are
one program of one version; what is malformed is a fault, and ends the connection.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING

import attrs

from hbone.errors import HboneError
from hbone.identity import Identity, TrustBundle, X509Svid

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Decoder", "Kind", "Message", "WireError", "pack_identity", "unpack_identity"]

MAX_TO_WORKER = 1 << 30
"""Bytes of a message to a worker: a picture of the mesh is the largest."""
MAX_DEMANDED = 100
"""Names of one DEMAND."""
MAX_TO_PARENT = 64 << 20
"""Bytes of a message of a worker: its connections are the largest."""
_HEAD = struct.Struct("!IBI")
_AFTER_LENGTH = _HEAD.size - 4
_FIELD = struct.Struct("!I")


class WireError(HboneError):
    """The other end sent what it cannot have meant."""


class Kind(enum.IntEnum):
    """What a message is."""

    SNAPSHOT = 1
    """The whole mesh, as `Store.snapshot` gives it. The first message."""
    DELTA = 2
    """A response of discovery, as it came in."""
    IDENTITY = 3
    """The certificate to use; empty: none."""
    NO_IDENTITY = 4
    """Why there is none: the answer to FETCH."""
    ACCEPT = 5
    """Begin to accept."""
    COVER = 6
    """Accept for another worker, whose number is the body; UNCOVER ends that."""
    UNCOVER = 7
    LEVEL = 8
    """Log at this level."""
    REPORT = 9
    """Say what the body asks for."""
    DRAIN = 10
    """Accept nothing further, let connections finish, and end."""
    REVOCATIONS = 11
    """All revocation lists, as `pack_lists` gives them."""
    TRACE = 12
    """Trace allocations, if there is a body."""
    RELEASE = 13
    """Accept nothing further, and leave what waits: the sockets are another daemon's now."""

    ANSWERED = 14
    """Names that DEMAND asked for were answered, and what was said of them is in the changes before this."""

    DONE = 20
    """Of a worker: the message of this number is in force."""
    FETCH = 21
    """Of a worker: a connection waits for a certificate."""
    SERIES = 22
    """Of a worker: what a row of its counters means."""
    REPORTED = 23
    """Of a worker: the answer to the REPORT of this number."""
    DEMAND = 24
    """Of a worker: a connection waits to hear what these names are."""


CONFIRMED = frozenset({Kind.SNAPSHOT, Kind.DELTA, Kind.IDENTITY, Kind.REVOCATIONS, Kind.ACCEPT, Kind.ANSWERED})
"""What a worker answers by DONE once it is in force."""


@attrs.frozen
class Message:
    """One of them."""

    kind: Kind
    number: int = 0
    body: bytes = b""

    def encode(self) -> bytes:
        """The bytes that a `Decoder` takes."""
        return _HEAD.pack(_AFTER_LENGTH + len(self.body), self.kind, self.number) + self.body


class Decoder:
    """Bytes in, messages out.

    Args:
        limit: bytes of a body.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting = bytearray()

    def receive_data(self, data: bytes) -> list[Message]:
        """Every message that is whole now.

        Raises:
            WireError: one that is too long or of no kind; nothing can be read after it.
        """
        waiting = self._waiting
        waiting += data
        found: list[Message] = []
        at = 0
        while len(waiting) - at >= _HEAD.size:
            length, kind, number = _HEAD.unpack_from(waiting, at)
            size = length - _AFTER_LENGTH
            if not 0 <= size <= self._limit:
                raise WireError(f"a message of {size} bytes; at most {self._limit} are taken")
            if kind not in _KINDS:
                raise WireError(f"a message of kind {kind}, which there is not")
            end = at + _HEAD.size + size
            if len(waiting) < end:
                break
            found.append(Message(Kind(kind), number, bytes(memoryview(waiting)[at + _HEAD.size : end])))
            at = end
        if at:
            del waiting[:at]
        return found


_KINDS = frozenset(Kind)


def _join(fields: Iterable[bytes]) -> bytes:
    return b"".join(_FIELD.pack(len(field)) + field for field in fields)


def _split(body: bytes) -> list[bytes]:
    fields: list[bytes] = []
    at = 0
    while at < len(body):
        if len(body) - at < _FIELD.size:
            raise WireError("a field is cut")
        (size,) = _FIELD.unpack_from(body, at)
        at += _FIELD.size
        if len(body) - at < size:
            raise WireError("a field is cut")
        fields.append(body[at : at + size])
        at += size
    return fields


def pack_identity(identity: Identity | None) -> bytes:
    """Key, chain, and the roots of each trust domain; empty for none."""
    if identity is None:
        return b""
    chain, key = identity.svid.to_pem()
    fields = [key, chain]
    for name, bundle in sorted(identity.bundles.items()):
        fields += [name.encode(), bundle.to_pem()]
    return _join(fields)


def unpack_identity(body: bytes) -> Identity | None:
    """The identity of these bytes.

    Raises:
        WireError: it is cut.
        IdentityError: it is none.
    """
    if not body:
        return None
    fields = _split(body)
    if len(fields) < 4 or len(fields) % 2:
        raise WireError(f"an identity of {len(fields)} fields")
    key, chain = fields[:2]
    bundles = [
        TrustBundle.from_pem(name.decode(), pem) if pem else TrustBundle(name.decode(), ())
        for name, pem in zip(fields[2::2], fields[3::2], strict=True)
    ]
    return Identity(X509Svid.from_pem(chain, key), bundles)
