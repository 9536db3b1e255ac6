"""A table of questions, asked by the C library's resolver: `python -m tests.support.dns_libc`.

Whole messages go to `res_send`, which sends them to the nameservers of /etc/resolv.conf, asks again over TCP when an
answer was cut, and tries again when none comes. Prints the answers as JSON: question to hex, with the ID left out.
"""

from __future__ import annotations

import ctypes
import json
import sys

import dns.edns
import dns.flags
import dns.message
import dns.rdataclass

__all__ = ["FORWARDED", "OWNED", "TYPES", "ask_all", "message", "send"]

TYPES = (
    "A",
    "AAAA",
    "TXT",
    "MX",
    "NS",
    "SOA",
    "SRV",
    "PTR",
    "CNAME",
    "CAA",
    "HTTPS",
    "DS",
    "NAPTR",
    "TYPE65280",
    "ANY",
)
RECORDS = ("records.example", "nobody.example", "pod-0.headless.ns1.svc.cluster.local", ".")
ODD = (
    "RECORDS.Example A",
    "records.example A edns",
    "records.example A do",
    "records.example A cd",
    "records.example A cookie",
    "records.example A subnet",
    "records.example TXT edns",
    "version.bind TXT chaos",
    "big.example A",
    "big.example A edns",
    "huge.example TXT",
    "huge.example TXT edns",
    "1.100.51.198.in-addr.arpa PTR",
    "_sip._tcp.records.example SRV",
    f"{'a' * 63}.{'b' * 63}.example A",
    "a.wild.example A",
    "alias.records.example CNAME",
    "private.ns2.svc.cluster.local A",
    "web.ns9.svc.cluster.local A",
)
FORWARDED = (*(f"{name} {kind}" for name in RECORDS for kind in TYPES), *ODD)
"""What the mesh has nothing to say about: name, type, and perhaps an option."""
OWNED = tuple(f"{name} {kind}" for name in ("web", "web.ns1.svc.cluster.local", "cart.ns2") for kind in TYPES)
"""What the mesh alone knows, by all types."""


def message(question: str) -> bytes:
    """The question as a message, with ID 0x0101."""
    name, kind, *options = question.split()
    option = options[0] if options else ""
    more = {
        "edns": {"use_edns": 0, "payload": 1232},
        "do": {"use_edns": 0, "payload": 4096, "want_dnssec": True},
        "cookie": {"use_edns": 0, "options": [dns.edns.GenericOption(dns.edns.OptionType.COOKIE, b"12345678")]},
        "subnet": {"use_edns": 0, "options": [dns.edns.ECSOption("203.0.113.0", 24)]},
    }.get(option, {})
    rdclass = dns.rdataclass.CH if option == "chaos" else dns.rdataclass.IN
    found = dns.message.make_query(name, kind, rdclass, **more)  # type: ignore[arg-type]  # options by name
    if option == "cd":
        found.flags |= dns.flags.CD
    found.id = 0x0101
    return found.to_wire()


def send(query: bytes) -> bytes:
    """The nameserver's answer to a message, without its ID; empty when there is none."""
    library = ctypes.CDLL("libresolv.so.2")
    function = getattr(library, "res_send", None) or library.__res_send
    answer = ctypes.create_string_buffer(65_535)
    size = function(query, len(query), answer, len(answer))
    return answer.raw[2:size] if size > 0 else b""


def ask_all() -> dict[str, str]:
    """Every question of the tables."""
    return {question: send(message(question)).hex() for question in (*FORWARDED, *OWNED)}


if __name__ == "__main__":
    json.dump(ask_all(), sys.stdout)
