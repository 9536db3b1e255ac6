"""A host with a resolver like systemd-resolved on 127.0.0.53, looked at by the C library in four ways.

Run in network and mount namespaces of its own: `unshare --net --mount python -m tests.support.dns_host DIR`. Prints
what `getent` (and `dig`, where it is) found: directly, with the proxy as nameserver, and captured by nft rules on the
way to that resolver and to one elsewhere.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import dns.message
import dns.rcode
import trio
from tests.support.dns import CLIENT, Resolver, Someone
from tests.support.mesh import service, store_of

from hbone.testing.hosts import PACKET_MARK, dns_rules
from ztunnel.dns.resolvconf import Resolvers
from ztunnel.dns.server import DnsProxy
from ztunnel.mesh import parse_ip
from ztunnel.metrics import Metrics

SEARCH = "ns1.svc.cluster.local svc.cluster.local cluster.local lan"
ZONE = {
    ("outside.example", "A"): ["198.51.100.1", "198.51.100.2"],
    ("outside.example", "AAAA"): ["2001:db8:1::1"],
    ("four.example", "A"): ["198.51.100.4"],
    ("big.example", "A"): [f"198.51.{number}.1" for number in range(100)],
    ("printer.lan", "A"): ["192.0.2.9"],
    ("alias.example", "TXT"): ["text"],
    ("records.example", "A"): ["198.51.100.1"],
    ("records.example", "AAAA"): ["2001:db8:1::1"],
    ("records.example", "TXT"): ['"one" "two"', '"three"'],
    ("records.example", "MX"): ["10 mail.records.example."],
    ("records.example", "NS"): ["ns1.example.", "ns2.example."],
    ("records.example", "SOA"): ["ns1.example. hostmaster.example. 1 2 3 4 5"],
    ("records.example", "CAA"): ['0 issue "ca.example"'],
    ("records.example", "HTTPS"): ["1 . alpn=h2"],
    ("records.example", "TYPE65280"): ["\\# 3 010203"],
    ("_sip._tcp.records.example", "SRV"): ["0 5 5060 sip.records.example."],
    ("alias.records.example", "CNAME"): ["records.example."],
    ("1.100.51.198.in-addr.arpa", "PTR"): ["records.example."],
    ("pod-0.headless.ns1.svc.cluster.local", "A"): ["192.0.2.10"],
    ("huge.example", "TXT"): [f'"{number:0200}"' for number in range(40)],
    (".", "NS"): ["a.root.example."],
}
STORE = store_of(
    service("web", "10.96.0.1", "2001:db8::1", namespace="ns1"),
    service("cart", "10.96.0.2", namespace="ns2"),
    service("se", "240.240.0.1", namespace="ns1", hostname="api.partner.example"),
    service("large", *(f"10.97.0.{number}" for number in range(200)), namespace="ns1"),
    service("private", "10.96.0.3", namespace="ns2", namespace_only=True),
    service("headless", namespace="ns1"),
)
NAMES = ["alias.example", "big.example", "four.example", "outside.example", "printer.lan", "printer", "nobody.example"]
MESH_NAMES = ["web", "web.ns1", "web.ns1.svc.cluster.local", "cart.ns2", "cart", "api.partner.example", "large"]


def run(*command: str, text: str | None = None, check: bool = True) -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=check, timeout=60).stdout


def getent(name: str, *, tcp: bool) -> list[str]:
    """What the C library resolves a name to, both families."""
    environ = ["RES_OPTIONS=use-vc"] if tcp else []
    out = run("env", *environ, "getent", "ahosts", name, check=False)
    return sorted({line.split()[0] for line in out.splitlines()})


def dig(server: str, name: str) -> list[str]:
    kinds = ("A", "AAAA", "TXT", "NS")
    return [run("dig", "+noall", "+answer", "+nottl", f"@{server}", name, kind, check=False) for kind in kinds]


def look(server: str, directory: Path) -> dict[str, Any]:
    """Every name, by a host whose nameserver is `server`."""
    (directory / "resolv.conf").write_text(f"nameserver {server}\nsearch {SEARCH}\noptions edns0 timeout:2\n")
    found: dict[str, Any] = {}
    for tcp in (False, True):
        for name in (*NAMES, *MESH_NAMES):
            found[f"{name} {'tcp' if tcp else 'udp'}"] = getent(name, tcp=tcp)
    for way in ("udp", "tcp"):
        options = "use-vc" if way == "tcp" else ""
        asked = run("env", f"RES_OPTIONS={options}", sys.executable, "-m", "tests.support.dns_libc")
        found[f"messages {way}"] = json.loads(asked)
    if shutil.which("dig"):
        found["dig"] = {name: dig(server, name) for name in NAMES}
    return found


def from_used_port(server: str) -> list[str]:
    """What a question past the proxy hears, as the proxy's own go, and then an application's from the same port."""
    heard, port = [], 0
    for mark in (PACKET_MARK, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(20)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            sock.bind(("127.0.0.1", port))
            port = sock.getsockname()[1]
            sock.sendto(dns.message.make_query("web.ns1", "A").to_wire(), (server, 53))
            heard.append(dns.rcode.to_text(dns.message.from_wire(sock.recv(65_535)).rcode()))
    return heard


async def main(directory: Path) -> None:
    run("mount", "--make-rprivate", "/")
    conf, stub = directory / "resolv.conf", directory / "stub-resolv.conf"
    conf.write_text("")
    stub.write_text(f"nameserver 127.0.0.53\nsearch {SEARCH}\n")
    run("mount", "--bind", str(conf), "/etc/resolv.conf")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "other")
    run("ip", "address", "add", "192.0.2.1/24", "dev", "wire")
    run("ip", "address", "add", "2001:db8:ffff::1/64", "dev", "wire", "nodad")  # or nobody asks for AAAA
    run("ip", "link", "set", "wire", "up")
    resolver = Resolver(ZONE, like_resolved=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.serve, "127.0.0.53", 53)
        proxy = DnsProxy(
            STORE,
            Someone(CLIENT),
            Metrics(),
            addresses=[(parse_ip("127.0.0.1"), 53), (parse_ip("127.0.0.1"), 15053), (parse_ip("::1"), 15053)],
            resolvers=Resolvers(trio.current_time, path=stub),
            mark=PACKET_MARK,
        )
        proxy.bind()
        await nursery.start(proxy.run)
        proxy.start()
        found: dict[str, Any] = {
            "direct": await trio.to_thread.run_sync(look, "127.0.0.53", directory),
            "nameserver": await trio.to_thread.run_sync(look, "127.0.0.1", directory),
        }
        run("nft", "-f", "-", text=dns_rules())
        found["captured"] = await trio.to_thread.run_sync(look, "127.0.0.53", directory)
        found["elsewhere"] = await trio.to_thread.run_sync(look, "192.0.2.53", directory)
        found["used port"] = await trio.to_thread.run_sync(from_used_port, "127.0.0.53")
        # Without the mark, what the proxy asks is led back to it: a failure, and no storm.
        proxy._forwarder._mark = None
        before = len(resolver.heard)
        found["misled"] = await trio.to_thread.run_sync(lambda: getent("outside.example", tcp=False))
        found["storm"] = len(resolver.heard) - before
        nursery.cancel_scope.cancel()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
