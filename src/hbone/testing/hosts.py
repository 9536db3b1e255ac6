"""Hosts for demos, tests and benches: network namespaces where they can be made, loopback addresses elsewhere.

A namespace host has its own address, nftables rules that capture its traffic, and sockets that were made inside
it; everything else of the program stays where it is. A loopback host is an address of 127.0.0.0/8 and needs no
privilege; applications then reach the mesh by their ztunnel's SOCKS5 port.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import trio

from hbone.errors import HboneError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

__all__ = [
    "Host",
    "HostsError",
    "LoopbackHost",
    "NamespaceHost",
    "capture_rules",
    "dns_rules",
    "hosts",
    "namespace_obstacle",
]

CLONE_NEWNET = 0x4000_0000
PACKET_MARK = 1337
"""The mark of ztunnel's own packets; the capture rules let them pass. Source: Istio's in-pod mark 0x539."""
DNS_ZONE = 53
"""The kernel's connection tracking zone of questions that go to the DNS proxy. Source: Istio has two such zones."""


class HostsError(HboneError):
    """A host could not be made, or does not answer."""


def _run(command: Sequence[str], text: str | None = None) -> str:
    """Run a short system command.

    Raises:
        HostsError: it is missing, failed, or took longer than ten seconds.
    """
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostsError(f"{' '.join(command)} failed: {error}") from error
    if done.returncode:
        raise HostsError(f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def capture_rules(
    outbound: int = 15001,
    inbound: int = 15006,
    hbone: int = 15008,
    *,
    bypass: Sequence[int] = (),
    elsewhere: Mapping[int, int] | None = None,
    dns: int | None = None,
    resolver_user: int | str | None = None,
) -> str:
    """The nftables rules with which a host's TCP goes through its ztunnel, both ways.

    Ztunnel's own packets carry the mark and pass; so does everything on loopback. Apply it with `nft -f -`.

    Args:
        outbound: where captured outgoing connections go.
        inbound: where captured incoming ones go.
        hbone: the tunnel port, which is never captured.
        bypass: destination ports that are left alone, both ways.
        elsewhere: outgoing connections to these ports go to those local ports instead.
        dns: where questions to port 53 go, see `dns_rules`; None leaves them alone.
        resolver_user: user of a resolver on this host.
    """
    passing = "".join(f"    tcp dport {port} accept\n" for port in bypass)
    moved = "".join(f"    tcp dport {port} redirect to :{to}\n" for port, to in (elsewhere or {}).items())
    return f"""\
table ip hbone {{
  chain output {{
    type nat hook output priority -100; policy accept;
    oifname "lo" accept
    meta mark & 0xfff == {PACKET_MARK:#x} accept
    ip daddr 127.0.0.0/8 accept
{passing}{moved}    ip protocol tcp redirect to :{outbound}
  }}
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
    iifname "lo" accept
    tcp dport {hbone} accept
{passing}    ip protocol tcp redirect to :{inbound}
  }}
}}
""" + ("" if dns is None else dns_rules(dns, resolver_user=resolver_user))


def dns_rules(port: int = 15053, *, resolver_user: int | str | None = None) -> str:
    """The rules with which this host's DNS questions, UDP and TCP, go to its ztunnel's DNS proxy.

    Questions to a resolver on this host itself go there too. They come before the rules for TCP. What the proxy asks
    in turn carries the mark and passes; so must what a resolver on this host asks, or the proxy's own questions to
    that resolver would come back to it. Those questions that go to the proxy are tracked in a zone of their own: for
    half a minute the kernel treats a datagram like an earlier one between the same ports, so an application whose
    port the proxy had used to ask the resolver would otherwise reach the resolver, past the mesh.

    Args:
        port: of the DNS proxy, on 127.0.0.1 and ::1.
        resolver_user: user of a resolver on this host, such as systemd-resolve, if there is one.
    """
    passing = "" if resolver_user is None else f"    meta skuid {resolver_user} accept\n"
    return f"""\
table inet hbone_dns {{
  chain output {{
    type filter hook output priority -300; policy accept;
    meta l4proto {{ tcp, udp }} th sport {port} ct zone set {DNS_ZONE}
    meta mark & 0xfff == {PACKET_MARK:#x} accept
{passing}    meta l4proto {{ tcp, udp }} th dport 53 ct zone set {DNS_ZONE}
  }}
  chain to_proxy {{
    type nat hook output priority -101; policy accept;
    ct zone {DNS_ZONE} meta l4proto {{ tcp, udp }} th dport 53 redirect to :{port}
  }}
}}
"""


_PROBE = """\
table inet probe {
  chain output { type filter hook output priority -300; ct zone set 1; }
  chain elsewhere { type nat hook output priority -100; tcp dport 1 redirect to :2; }
}
"""


@functools.cache
def namespace_obstacle() -> str:
    """Why network namespaces with nftables can't be made here; empty when they can. Tries it, once a process."""
    if os.geteuid() != 0:
        return "this needs root"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"the program {tool} is missing: apt-get install nftables iproute2"
    name = f"hbone-probe-{os.getpid()}"
    try:
        _run(["ip", "netns", "add", name])
        try:
            _run(["ip", "netns", "exec", name, "nft", "-f", "-"], _PROBE)  # a fault in our rules is no obstacle
        finally:
            _run(["ip", "netns", "del", name])
    except HostsError as error:
        return str(error)
    return ""


@attrs.define(kw_only=True)
class Host:
    """One host: a name, an address, and sockets of its own."""

    name: str
    address: str

    captured: bool = False
    """Whether its traffic goes through its ztunnel without its applications' knowledge."""

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on this host."""
        return list(arguments)

    def make(self, build: Callable[[], socket.socket]) -> socket.socket:
        """Call `build` where a socket that it makes belongs to this host."""
        return build()

    async def listen(self, port: int, backlog: int = 1024) -> trio.SocketListener:
        """Listen on the host's own address."""

        def build() -> socket.socket:
            return socket.create_server((self.address, port), backlog=backlog, reuse_port=False)

        made = trio.socket.from_stdlib_socket(self.make(build))
        return trio.SocketListener(made)

    async def connect(self, host: str, port: int, *, source: str | None = None) -> trio.SocketStream:
        """Connect from this host, as an application would; captured where rules are in place.

        Raises:
            OSError: no connection within ten seconds.
        """
        sock = trio.socket.from_stdlib_socket(self.make(socket.socket))
        try:
            if source:
                await sock.bind((source, 0))
            with trio.fail_after(10):
                await sock.connect((host, port))
        except BaseException as error:
            sock.close()
            if isinstance(error, trio.TooSlowError):
                raise OSError(f"no connection from {self.name} to {host}:{port} within 10 s") from error
            raise
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return trio.SocketStream(sock)

    async def connect_by_proxy(self, host: str, port: int, *, proxy_port: int = 15080) -> trio.SocketStream:
        """Connect through the SOCKS5 port of this host's ztunnel. Source: RFC 1928.

        Raises:
            ConnectionError: the proxy refused; the message has its reply code.
        """
        stream = await self.connect(self.proxy_address, proxy_port, source=self.source_address)
        try:
            with trio.fail_after(30):
                try:
                    target = b"\x01" + socket.inet_aton(host)
                except OSError:
                    target = b"\x03" + bytes([len(host)]) + host.encode()
                await stream.send_all(b"\x05\x01\x00")
                if await _exactly(stream, 2) != b"\x05\x00":
                    raise ConnectionError("the SOCKS5 port wants a method that we don't have")
                await stream.send_all(b"\x05\x01\x00" + target + struct.pack(">H", port))
                reply = await _exactly(stream, 10)
            if reply[1]:
                raise ConnectionRefusedError(f"SOCKS5 reply {reply[1]} for {host}:{port}")
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    @property
    def proxy_address(self) -> str:
        """Where the SOCKS5 port of this host's ztunnel listens."""
        return "127.0.0.1"

    @property
    def source_address(self) -> str | None:
        """The source that applications bind to, so that they count as this host's; None where routing decides."""
        return None

    async def established(self, port: int) -> int:
        """TCP connections from this host to `port` anywhere, as its socket table has them."""
        return sum(
            1 for fields in self.socket_table() if fields[3] == "01" and int(fields[2].rpartition(":")[2], 16) == port
        )

    def socket_table(self) -> list[list[str]]:
        """The rows of /proc/net/tcp that belong to this host."""
        local = socket.inet_aton(self.address)[::-1].hex().upper()
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [row for row in rows if row[1].startswith(local)]


async def _exactly(stream: trio.SocketStream, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        part = await stream.receive_some(nbytes - len(data))
        if not part:
            raise ConnectionError("the SOCKS5 port closed the connection")
        data += part
    return data


@attrs.define(kw_only=True)
class LoopbackHost(Host):
    """An address of 127.0.0.0/8; its applications use SOCKS5."""

    @property
    def proxy_address(self) -> str:
        """Where the SOCKS5 port of this host's ztunnel listens."""
        return self.address

    @property
    def source_address(self) -> str | None:
        """The host's own address: otherwise everything on loopback would come from 127.0.0.1."""
        return self.address


@attrs.define(kw_only=True)
class NamespaceHost(Host):
    """A network namespace with one interface, on a bridge that only such hosts share."""

    namespace: str

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs `arguments` on this host."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def make(self, build: Callable[[], socket.socket]) -> socket.socket:
        """Call `build` inside the namespace; what it made stays there."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            away = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if libc.setns(away, CLONE_NEWNET):
                    raise HostsError(f"namespace {self.namespace}: {os.strerror(ctypes.get_errno())}")
                try:
                    return build()
                finally:
                    if libc.setns(home, CLONE_NEWNET):
                        os._exit(70)  # in the wrong namespace nothing that follows could be trusted
            finally:
                os.close(away)
        finally:
            os.close(home)

    def socket_table(self) -> list[list[str]]:
        """The rows of the namespace's /proc/net/tcp."""
        text = _run(self.command("cat", "/proc/net/tcp"))
        return [line.split() for line in text.splitlines()[1:]]

    def capture(
        self,
        *,
        bypass: Sequence[int] = (),
        elsewhere: Mapping[int, int] | None = None,
        dns: int | None = 15053,
        resolver_user: int | str | None = None,
    ) -> None:
        """Send this host's TCP and DNS through its ztunnel; see `capture_rules`."""
        rules = capture_rules(bypass=bypass, elsewhere=elsewhere, dns=dns, resolver_user=resolver_user)
        _run(self.command("nft", "-f", "-"), rules)
        self.captured = True

    def tap(self) -> socket.socket:
        """A packet socket on the host's interface: it sees what a wiretap on the wire would see."""
        return self.make(lambda: _packet_socket("eth0"))


def _packet_socket(interface: str) -> socket.socket:
    every_protocol = 0x0003
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(every_protocol))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    sock.bind((interface, 0))
    return sock


@contextlib.asynccontextmanager
async def hosts(
    names: Sequence[str], *, namespaces: bool, network: str = "10.77.0", loopback: str = "127.0.1"
) -> AsyncIterator[dict[str, Host]]:
    """Make hosts for the body, numbered from 1 in `network` or in `loopback`, and remove every trace afterwards.

    Raises:
        HostsError: namespaces were asked for and can't be made; nothing is left behind.
    """
    if not namespaces:
        yield {name: LoopbackHost(name=name, address=f"{loopback}.{i}") for i, name in enumerate(names, 1)}
        return
    prefix = f"hb{os.getpid()}-"
    made: list[str] = []
    switch = f"{prefix}switch"
    try:
        made.append(switch)
        _run(["ip", "netns", "add", switch])
        _run(["ip", "-n", switch, "link", "add", "br0", "type", "bridge"])
        _run(["ip", "-n", switch, "link", "set", "br0", "up"])
        result: dict[str, Host] = {}
        for number, name in enumerate(names, 1):
            namespace = prefix + name
            made.append(namespace)
            _run(["ip", "netns", "add", namespace])
            peer = ["peer", "name", f"port{number}", "netns", switch]
            _run(["ip", "-n", namespace, "link", "add", "eth0", "type", "veth", *peer])
            _run(["ip", "-n", switch, "link", "set", f"port{number}", "master", "br0", "up"])
            _run(["ip", "-n", namespace, "addr", "add", f"{network}.{number}/24", "dev", "eth0"])
            _run(["ip", "-n", namespace, "link", "set", "lo", "up"])
            _run(["ip", "-n", namespace, "link", "set", "eth0", "up"])
            _run(["ip", "-n", namespace, "route", "add", "default", "dev", "eth0"])
            result[name] = NamespaceHost(name=name, address=f"{network}.{number}", namespace=namespace)
        yield result
    finally:
        for namespace in reversed(made):
            with contextlib.suppress(HostsError):
                _run(["ip", "netns", "del", namespace])
