"""Client addresses are kept where the host's routing brings replies back, and asking never sends a packet away."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.routing import bring_replies_back

from hbone.testing.hosts import NamespaceHost, hosts

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.netns

PROBE = """
from ztunnel.dataplane.listener import keeps_sources
from ztunnel.dataplane.sockets import SocketCalls, SocketOptions
from ztunnel.mesh import parse_ip
print(keeps_sources(SocketCalls(SocketOptions(mark=1337)), parse_ip("0.0.0.0"), wanted=None))
"""


def _asked(host: NamespaceHost) -> str:
    done = subprocess.run(
        host.command(sys.executable, "-c", PROBE), capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.split()[-1]


async def test_the_answer_is_that_of_the_routing_and_nothing_leaves_the_host() -> None:
    async with hosts(["alpha", "beta"], namespaces=True) as machines:
        alpha = machines["alpha"]
        assert isinstance(alpha, NamespaceHost)
        with alpha.tap() as tap:
            tap.setblocking(False)
            assert _asked(alpha) == "False"
            bring_replies_back(alpha)
            assert _asked(alpha) == "True"
            assert _tcp_packets(tap.recv) == 0


def _tcp_packets(receive: Callable[[int], bytes]) -> int:
    count = 0
    try:
        while True:
            frame = receive(65536)
            count += frame[12:14] == b"\x08\x00" and frame[23] == 6
    except BlockingIOError:
        return count
