"""Hosts in network namespaces, captured and not: who is reached how, who reports it, and who is turned away."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.lab import DOCUMENTS, ECHO, NAMED, ORDERS, SANDWICHED, WHO, Lab, lab
from tests.support.shop import serve_echo, until
from tests.support.sizes import FULL, size

from hbone.errors import ConnectRejected, HboneError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hbone.testing.hosts import Host

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

HELLO = b"hello world"

GATEWAY = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: inner, namespace: shop, labels: {istio.io/waypoint-for: all}, annotations: {ANNOTATIONS}}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  addresses: [{value: EPSILON}]
"""
INNER = """
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: inner
  namespace: shop
  labels: {gateway.networking.k8s.io/gateway-name: inner, gateway.istio.io/managed: istio.io-mesh-controller}
spec: {address: "{epsilon}", serviceAccount: inner}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: sandwiched, namespace: shop, labels: {istio.io/use-waypoint: inner}}
spec:
  hosts: [sandwiched.shop.mesh]
  addresses: [10.88.0.4]
  resolution: STATIC
  ports: [{number: 80, name: tcp, protocol: TCP, targetPort: 9000}]
  workloadSelector: {labels: {app: orders}}
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    environment = {"CONNECTION_TERMINATION_DEADLINE": "20s"}
    if FULL:
        environment["ZTUNNEL_WORKER_THREADS"] = "2"
    with lab(tmp_path_factory.mktemp("lab"), DOCUMENTS + INNER, environment=environment) as running:
        yield running


async def counted(found: Lab, host: str, reporter: str) -> tuple[float, ...]:
    """Opened, closed, received and sent, by one reporter."""
    names = ("connections_opened", "connections_closed", "received_bytes", "sent_bytes")
    return tuple([await found.total(host, f"istio_tcp_{name}_total", f'reporter="{reporter}"') for name in names])


async def grew(found: Lab, host: str, reporter: str, before: tuple[float, ...], by: tuple[float, ...]) -> bool:
    async def is_so() -> bool:
        after = await counted(found, host, reporter)
        return tuple(now - then for now, then in zip(after, before, strict=True)) == by

    return await until(is_so, seconds=30)


async def test_both_sides_of_a_captured_connection_report_it(found: Lab) -> None:
    source, destination = await counted(found, "alpha", "source"), await counted(found, "beta", "destination")
    beta = found.address("beta")
    assert await found.ask("alpha", beta) == HELLO
    assert await grew(found, "alpha", "source", source, (1, 1, 11, 11))
    assert await grew(found, "beta", "destination", destination, (1, 1, 11, 11))
    client, orders = (f"spiffe://cluster.local/ns/shop/sa/{name}" for name in ("client", "orders"))
    sent = await found.logged("alpha", direction="outbound", dst__workload="orders", bytes_sent=11)
    assert (sent["src.identity"], sent["dst.identity"]) == (client, orders)
    assert (sent["dst.addr"], sent["dst.hbone_addr"]) == (f"{beta}:15008", f"{beta}:{ECHO}")
    came = await found.logged("beta", direction="inbound", dst__workload="orders", bytes_sent=11)
    assert (came["src.identity"], came["dst.identity"], came["src.workload"]) == (client, orders, "client")
    assert came["src.addr"].startswith(found.address("alpha") + ":")


async def test_a_server_without_ztunnel_is_reached_in_plaintext(found: Lab) -> None:
    before = await counted(found, "alpha", "source")
    assert await found.ask("alpha", found.address("plain")) == HELLO
    assert await grew(found, "alpha", "source", before, (1, 1, 11, 11))
    line = await found.logged("alpha", direction="outbound", dst__workload="legacy", bytes_sent=11)
    assert line["dst.addr"] == f"{found.address('plain')}:{ECHO}"
    assert "dst.hbone_addr" not in line
    labels = ('destination_workload="legacy"', 'connection_security_policy="unknown"')
    assert await found.total("alpha", "istio_tcp_connections_opened_total", *labels) >= 1


async def test_a_client_without_ztunnel_comes_in_without_an_identity(found: Lab) -> None:
    before = await counted(found, "beta", "destination")
    assert await found.ask("plain", found.address("beta")) == HELLO
    assert await grew(found, "beta", "destination", before, (1, 1, 11, 11))
    line = await found.logged("beta", direction="inbound", src__workload="legacy", bytes_sent=11)
    assert "src.identity" not in line
    labels = ('source_workload="legacy"', 'source_principal="unknown"', 'connection_security_policy="unknown"')
    assert await found.total("beta", "istio_tcp_connections_opened_total", *labels) >= 1


@pytest.mark.parametrize(("source", "target"), [("alpha", "beta"), ("alpha", "plain"), ("plain", "beta")])
async def test_megabytes_arrive_whole_on_every_way_and_each_direction_ends_by_itself(
    found: Lab, source: str, target: str
) -> None:
    data = bytes(range(256)) * 4096 * size(64, 8)
    back = bytearray()
    with trio.fail_after(120):
        async with await found.connect(source, found.address(target)) as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            while part := await stream.receive_some():
                back += part
    assert bytes(back) == data


@pytest.mark.parametrize(("source", "target"), [("alpha", "beta"), ("alpha", "plain"), ("plain", "beta")])
async def test_a_reset_reaches_the_application_on_every_way(found: Lab, source: str, target: str) -> None:
    host, port = found.host(target), 9200
    broken = trio.Event()

    async def wait_for_reset(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(await stream.receive_some())
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            broken.set()

    listener = await host.listen(port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, wait_for_reset, [listener])
        stream = await found.connect(source, host.address, port)
        await stream.send_all(HELLO)
        assert await stream.receive_some() == HELLO
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()
        with trio.fail_after(30):
            await broken.wait()
        nursery.cancel_scope.cancel()


STRICT = """\
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: strict, namespace: shop}
spec: {mtls: {mode: STRICT}}
"""


async def test_where_tunnels_are_required_plaintext_is_refused_and_tunnels_go_on(found: Lab) -> None:
    found.mesh.apply("strict", STRICT)
    try:
        assert await found.becomes(b"", "plain", found.address("beta"))
        assert await found.ask("alpha", found.address("beta")) == HELLO
    finally:
        found.mesh.withdraw("strict")
    assert await found.becomes(HELLO, "plain", found.address("beta"))


async def test_one_request_reaches_one_endpoint_and_many_reach_all(found: Lab) -> None:
    opened = {host: (await counted(found, host, "destination"))[0] for host in ("beta", "gamma")}
    answers = [await found.ask("alpha", ORDERS, 81)]
    sums = {host: (await counted(found, host, "destination"))[0] - opened[host] for host in opened}
    assert sorted(sums.values()) == [0, 1]
    with trio.fail_after(60):
        while len(set(answers)) < 2 or len(answers) < 20:
            answers.append(await found.ask("alpha", ORDERS, 81))
    assert {answer.split()[0] for answer in answers} == {b"beta", b"gamma"}
    label = 'destination_service="orders.shop.mesh"'
    for host, reporter, wanted in (("alpha", "source", 20), ("beta", "destination", 1), ("gamma", "destination", 1)):
        name = "istio_tcp_connections_opened_total"
        assert await found.total(host, name, label, f'reporter="{reporter}"') >= wanted


async def test_applications_see_their_clients_address_where_routing_brings_replies_back(found: Lab) -> None:
    for source in ("alpha", "plain"):  # through a tunnel, and in plaintext
        client, beta = found.address(source), found.address("beta")
        assert await found.ask(source, found.address("gamma"), WHO) == f"gamma {client}".encode()
        assert await found.ask(source, beta, WHO) == f"beta {beta}".encode()
    status = {host: json.loads((await found.ztunnel(host).http(15000, "/status"))[1]) for host in ("beta", "gamma")}
    assert (status["beta"]["keepsSources"], status["gamma"]["keepsSources"]) == (False, True)


SIX = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: six, namespace: shop, labels: {app: six}}
spec: {address: "fd78::4", serviceAccount: six}
"""
CAPTURE_SIX = """
table ip6 hbone {
  chain output {
    type nat hook output priority -100;
    oifname "lo" accept
    meta mark & 0xfff == 0x539 accept
    meta l4proto tcp redirect to :15001
  }
  chain prerouting {
    type nat hook prerouting priority -100;
    iifname "lo" accept
    tcp dport 15008 accept
    meta l4proto tcp redirect to :15006
  }
}
"""


def run(host: Host, *command: str, text: str = "") -> None:
    subprocess.run(host.command(*command), input=text, text=True, check=True, timeout=10)


async def over_ipv6(host: Host, address: str) -> bytes:
    sock = trio.socket.from_stdlib_socket(host.make(lambda: socket.socket(socket.AF_INET6)))
    async with trio.SocketStream(sock) as stream:
        with trio.fail_after(30):
            await sock.connect((address, ECHO))
            await stream.send_all(HELLO)
            await stream.send_eof()
            return b"".join([part async for part in stream])


async def test_ipv6_is_captured_and_tunnelled_as_ipv4_is(found: Lab) -> None:
    for number, name in ((1, "alpha"), (4, "delta"), (6, "plain")):
        host = found.host(name)
        run(host, "ip", "address", "add", f"fd78::{number}/64", "dev", "eth0", "nodad")
        if name != "plain":
            run(host, "nft", "-f", "-", text=CAPTURE_SIX)
    found.mesh.apply("six", SIX)
    listener = found.host("delta").make(lambda: socket.create_server(("::", ECHO), family=socket.AF_INET6))
    async with trio.open_nursery() as nursery:
        serve = [trio.SocketListener(trio.socket.from_stdlib_socket(listener))]
        nursery.start_soon(trio.serve_listeners, serve_echo, serve)
        ztunnel = await found.mesh.add_ztunnel("delta", ("shop", "six", "six"), wait=False)
        await ztunnel.until_ready(120.0)
        source, target = "[fd78::1]:", "[fd78::4]"

        async def tunnelled() -> bool:
            with contextlib.suppress(OSError, trio.BrokenResourceError):  # while one end knows more than the other
                return await over_ipv6(found.host("alpha"), "fd78::4") == HELLO and any(
                    line.get("dst.addr") == f"{target}:15008" for line in found.ztunnel("alpha").records()
                )
            return False

        assert await until(tunnelled, seconds=30)
        came = await found.logged("delta", direction="inbound", dst__hbone_addr=f"{target}:{ECHO}", bytes_sent=11)
        assert came["src.addr"].startswith(source)
        assert came["src.identity"] == "spiffe://cluster.local/ns/shop/sa/client"
        assert await over_ipv6(found.host("plain"), "fd78::4") == HELLO
        came = await found.logged("delta", direction="inbound", dst__addr=f"{target}:{ECHO}", bytes_sent=11)
        assert came["src.addr"].startswith("[fd78::6]:")
        assert "src.identity" not in came
        await ztunnel.stop()
        nursery.cancel_scope.cancel()


async def test_a_denied_connect_is_401_with_its_policy_in_the_log(found: Lab) -> None:
    policy = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-mallory, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/mallory]}}]}]
"""
    found.mesh.apply("deny", policy)
    authority = f"{found.address('beta')}:{ECHO}"

    async def denied() -> int:
        try:
            await found.tunnel("beta", authority, "mallory")
        except ConnectRejected as error:
            return error.status
        except trio.BrokenResourceError:
            return 200  # the policy came while it was open
        return 200

    assert await until(lambda: _is(denied(), 401), seconds=30)
    text = "connection closed due to policy rejection: explicitly denied by: shop/no-mallory"
    line = await found.logged("beta", error=text)
    assert line["src.identity"] == "spiffe://cluster.local/ns/shop/sa/mallory"
    assert await found.tunnel("beta", authority) == HELLO


async def _is(answer: object, wanted: object) -> bool:
    return await answer == wanted  # type: ignore[misc,no-any-return]  # a coroutine


async def test_a_connect_for_another_address_is_400(found: Lab) -> None:
    beta, gamma = found.address("beta"), found.address("gamma")
    with pytest.raises(ConnectRejected) as caught:
        await found.tunnel("beta", f"{gamma}:{ECHO}")
    assert caught.value.status == 400
    await found.logged("beta", error=f"ip mismatch: {gamma} != {beta}")


@pytest.mark.parametrize("service", ["orders", "named"])
async def test_a_connect_by_the_host_name_of_a_service_reaches_its_target_port(found: Lab, service: str) -> None:
    assert await found.tunnel("beta", f"{service}.shop.mesh:80") == HELLO
    with pytest.raises(ConnectRejected) as caught:
        await found.tunnel("beta", f"{service}.shop.mesh:82")
    assert caught.value.status == 503
    if service == "named":  # a target port by name: only beta defines it
        assert await found.ask("alpha", NAMED, 80) == HELLO


async def test_a_client_of_another_trust_domain_is_refused(found: Lab) -> None:
    with pytest.raises(HboneError):
        await found.tunnel("beta", f"{found.address('beta')}:{ECHO}", "client", "elsewhere.example")
    client = found.address("plain")
    await found.logged("beta", direction="inbound", src__addr=client, error="elsewhere.example")


# What each port of a ztunnel answers to an HTTP request that has no business there.
# C: nobody listens there; R: closed without a useful answer; H: an HTTP answer. In a dedicated ztunnel's namespace,
# loopback and the host's own address are not captured, so its own applications meet the ports themselves.
MALICIOUS = {
    #        captured -> another ztunnel, its own address, loopback; uncaptured -> a captured host
    15001: "RRRR",
    15006: "RRRR",
    15008: "RRRR",
    15080: "RCRR",
    15000: "RCHR",
    15020: "RHHR",
    15021: "RHHR",
    15053: "RCRR",
}


@pytest.mark.parametrize("port", MALICIOUS)
async def test_malicious_calls_get_nowhere(found: Lab, port: int) -> None:
    seen = ""
    ways = (("alpha", "beta"), ("alpha", "alpha"), ("alpha", ""), ("plain", "beta"))
    for source, target in ways:
        try:
            stream = await found.connect(source, found.address(target) if target else "127.0.0.1", port)
        except ConnectionRefusedError:
            seen += "C"
            continue
        answer = b""
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError), trio.fail_after(30):
                await stream.send_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                await stream.send_eof()
                while part := await stream.receive_some():
                    answer += part
        seen += "H" if answer.startswith(b"HTTP/1.1 ") else "R"
        assert answer.startswith(b"HTTP/1.1 ") or len(answer) < 100
    assert seen == MALICIOUS[port]
    assert await found.ask("alpha", found.address("beta")) == HELLO


@pytest.mark.parametrize(
    ("annotations", "proxied"), [("", False), ("ambient.istio.io/waypoint-inbound-binding: PROXY/15088", True)]
)
async def test_a_waypoint_behind_its_own_ztunnel(found: Lab, annotations: str, proxied: bool) -> None:
    text = GATEWAY.replace("ANNOTATIONS", annotations).replace("EPSILON", found.address("epsilon"))
    found.mesh.apply("gateway", text)
    found.headers.clear()
    answered = b"waypoint\n" + HELLO

    async def through() -> bool:
        return await found.ask("alpha", SANDWICHED, 80) == answered and bool(found.headers) is proxied

    assert await until(through, seconds=30)
    line = await found.logged("alpha", dst__service="sandwiched.shop.mesh", dst__workload="inner")
    assert (line["dst.addr"], line["dst.hbone_addr"]) == (f"{found.address('epsilon')}:15008", f"{SANDWICHED}:80")
    if proxied:
        header = found.headers[-1]
        source, target = bytes(map(int, found.address("alpha").split("."))), bytes(map(int, SANDWICHED.split(".")))
        assert header[16:24] == source + target
        assert header[26:28] == (80).to_bytes(2, "big")
        assert header.endswith(b"spiffe://cluster.local/ns/shop/sa/client")


async def test_while_a_ztunnel_drains_open_connections_go_on_and_new_ones_fail(found: Lab) -> None:
    ztunnel, gamma = found.ztunnel("gamma"), found.address("gamma")
    stream = await found.connect("alpha", gamma)
    await stream.send_all(b"first")
    assert await stream.receive_some() == b"first"
    async with trio.open_nursery() as nursery:
        codes: list[int] = []

        async def stop() -> None:
            codes.append(await ztunnel.stop(timeout=40))

        nursery.start_soon(stop)
        assert await until(lambda: _is(found.ask("alpha", gamma), b""), seconds=30)
        assert ztunnel.running
        await stream.send_all(b"still there")
        assert await stream.receive_some() == b"still there"
        await stream.send_eof()
        assert await stream.receive_some() == b""
        await stream.aclose()
    assert codes == [0]
    assert await found.ask("alpha", gamma) == b""
    assert await found.ask("plain", gamma) == b""  # captured, and nobody there: not reached past its ztunnel
    ztunnel.start()
    await ztunnel.until_ready()
    assert await found.becomes(HELLO, "alpha", gamma)


async def test_when_a_server_is_gone_connections_to_it_carry_nothing_more(found: Lab) -> None:
    ztunnel, gamma = found.ztunnel("gamma"), found.address("gamma")
    stream = await found.connect("alpha", gamma)
    await stream.send_all(b"first")
    assert await stream.receive_some() == b"first"
    await ztunnel.stop(signal.SIGKILL)
    with trio.fail_after(30):
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some() == b""
    await stream.aclose()
    # The client's ztunnel accepts, since it can't know; and never tries plaintext instead.
    assert await found.ask("alpha", gamma, WHO) == b""
    await found.logged("alpha", direction="outbound", dst__addr=f"{gamma}:15008", error="connection failed")
    ztunnel.start()
    await ztunnel.until_ready()
    assert await found.becomes(HELLO, "alpha", gamma)
