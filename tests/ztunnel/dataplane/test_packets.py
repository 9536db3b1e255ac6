"""How much is sent at once: what the kernel makes one packet of."""

from __future__ import annotations

import pytest
from tests.support.joined import Joined

from ztunnel.dataplane.packets import BURST, burst_of, packet_of
from ztunnel.dataplane.relay import CHUNK, HEADROOM

_MTUS = {
    1448: 65_160,  # 1,500, IPv4
    1428: 64_260,  # 1,500, IPv6
    1368: 64_296,  # 1,420, WireGuard
    1408: 64_768,  # 1,460
    8948: 62_636,  # 9,000
    536: 64_856,  # the least that hosts must take
    9_188: 64_316,
    65_483: 65_215,  # loopback
    40_960: 65_215,  # the same, while half the peer's window is less
    0: 65_208,  # not told
}
MIB = 1 << 20


@pytest.mark.parametrize(("segment", "packet"), _MTUS.items())
def test_a_packet_is_as_many_segments_as_the_kernel_gives_at_once(segment: int, packet: int) -> None:
    assert packet_of(segment) == packet


@pytest.mark.parametrize("packet", [*_MTUS.values(), 16_406, 16_407, 32_812])
def test_a_burst_is_a_packet_once_it_has_its_header_and_is_encrypted(packet: int) -> None:
    plaintext = burst_of(packet) + HEADROOM
    full, rest = divmod(plaintext, 16_384)
    encrypted = plaintext + 22 * (full + bool(rest))
    assert packet - 22 <= encrypted <= packet  # what a record of its own would be for is left out


def test_without_another_word_the_network_is_ethernet() -> None:
    assert BURST == CHUNK == 65_063


@pytest.mark.parametrize("segment", [1448, 1428, 8948, 65_483])
def test_each_send_of_bulk_is_a_packet(segment: int) -> None:
    joined = Joined(segment=segment)
    for _ in range(8):  # until windows have grown
        carry(joined, MIB)
    joined.calls.clear()
    joined.client.tunnel_socket.largest = 0
    burst = joined.client.tunnel.burst
    carry(joined, 16 * burst)
    assert burst == min(burst_of(packet_of(segment)), CHUNK)
    assert joined.client.tunnel_socket.largest == min(packet_of(segment), packet_of(1448))
    assert joined.calls["send"] <= 16 * 3  # one each of the tunnel; of the app two where two reads cut a frame


def carry(joined: Joined, nbytes: int) -> None:
    joined.client.from_app.put(bytes(nbytes))
    joined.settle()
    assert joined.server.to_app.get(memoryview(bytearray(nbytes)), nbytes) == nbytes
