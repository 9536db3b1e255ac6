"""How much to send at once: as much as the kernel hands to the network card in one piece.

Linux gives the card, and loopback and veth as well, packets of a whole number of segments, up to 64 KiB together.
What a send has beyond that becomes a second packet, and a packet costs the kernels of both ends the same whatever is
in it. 64 KiB of payload are just beyond once they are encrypted; a little less of it costs a seventh less CPU.

Source: Linux, tcp_tso_autosize and sk_setup_caps.
"""

from __future__ import annotations

from typing import Final

from hbone.endpoint import FRAME_HEADER

__all__ = ["BURST", "burst_of", "packet_of"]

_LARGEST: Final = (1 << 16) - 321  # of payload: MAX_TCP_HEADER and one byte are kept for headers
_SMALLEST_SEGMENT: Final = 88  # Linux, TCP_MIN_MSS with all of its options
_LARGE_SEGMENT: Final = 16_384  # beyond what networks carry: loopback's, as far as a young connection's window lets it
_RECORD: Final = 1 << 14  # payload of a TLS record at most. RFC 8446 §5.1
_RECORD_OVERHEAD: Final = 22  # header, content type and tag. RFC 8446 §5.2


def packet_of(segment: int) -> int:
    """Bytes in one packet for the card, of a connection with segments of that size (TCP_MAXSEG, in bytes)."""
    if segment >= _LARGE_SEGMENT:
        return _LARGEST
    return _LARGEST - _LARGEST % max(segment, _SMALLEST_SEGMENT)


def burst_of(packet: int) -> int:
    """Payload whose DATA frame is `packet` bytes when it is encrypted, in records as full as can be."""
    records = -(-packet // (_RECORD + _RECORD_OVERHEAD))
    return packet - records * _RECORD_OVERHEAD - FRAME_HEADER


BURST: Final = burst_of(packet_of(1448))
"""That of an MTU of 1,500, which most connections have; 65,063 bytes."""
