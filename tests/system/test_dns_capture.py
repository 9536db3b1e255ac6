"""DNS of a captured host: its applications ask whom they like, and the mesh answers what is its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.dns import Resolver, ask_from, exactly
from tests.support.dns_stub import USER
from tests.support.shop import ECHO, shop, until

from hbone.testing.hosts import Host, NamespaceHost

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh

PARTNER = """\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: partner, namespace: shop}
spec:
  hosts: [api.partner.example]
  addresses: [240.240.0.9]
  ports: [{number: 9000, name: tcp, protocol: TCP}]
  resolution: DNS
"""
ELSEWHERE = "10.77.0.99"
"""An address of the hosts' network that nobody has."""

pytestmark = [pytest.mark.netns, pytest.mark.timeout(180)]


async def serve(host: Host, resolver: Resolver, nursery: trio.Nursery) -> None:
    """A resolver on port 53 of a host."""
    udp = trio.socket.from_stdlib_socket(host.make(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)))
    await udp.bind((host.address, 53))

    async def datagrams() -> None:
        with udp:
            await resolver._udp(udp)

    nursery.start_soon(datagrams)
    nursery.start_soon(trio.serve_listeners, resolver._tcp, [await host.listen(53)])


async def test_an_application_that_asks_any_resolver_is_answered_by_the_mesh(tmp_path: Path) -> None:
    """And the host behind a name of the mesh is found, though the same name leads to the mesh when applications ask."""
    documents = {"partner": PARTNER}
    settings = {"ZTUNNEL_DNS_SERVERS": "127.0.0.53"}
    async with (
        shop(tmp_path, namespaces=True, documents=documents, environment=settings) as running,
        trio.open_nursery() as nursery,
    ):
        alpha, control = running.hosts["alpha"], running.hosts["control"]
        assert isinstance(alpha, NamespaceHost)
        beta = running.hosts["beta"].address
        uplink = Resolver({("outside.example", "A"): ["198.51.100.1"], ("api.partner.example", "A"): [beta]})
        await serve(control, uplink, nursery)
        rule = f"insert rule inet hbone_dns output meta skuid {USER} accept"
        await trio.run_process(alpha.command("nft", *rule.split()))
        command = alpha.command(sys.executable, "-m", "tests.support.dns_stub", control.address)
        stub: trio.Process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
        )
        try:
            assert stub.stdout is not None
            assert await stub.stdout.receive_some() == b"serving\n"
            assert await until(lambda: _knows(running, 3))
            for server in ("127.0.0.53", ELSEWHERE):
                for tcp in (False, True):

                    async def ask(name: str) -> list[str]:
                        call = partial(ask_from, alpha.make, server, name, tcp=tcp)  # noqa: B023
                        return await trio.to_thread.run_sync(call)

                    heard = len(uplink.heard)
                    found = await ask("api.partner.example")
                    assert found == ["240.240.0.9"]
                    assert len(uplink.heard) == heard
                    found = await ask("outside.example")
                    assert found == ["198.51.100.1"]
                    assert len(uplink.heard) == heard + 1  # asked once, and by no detour
                    found = await ask("nobody.example")
                    assert found == ["NXDOMAIN"]
            with trio.fail_after(20):
                async with await alpha.connect("240.240.0.9", ECHO) as stream:
                    await stream.send_all(b"partner")
                    assert await exactly(stream, 7) == b"partner"
        finally:
            nursery.cancel_scope.cancel()


async def _knows(running: Mesh, names: int) -> bool:
    code, body = await running.ztunnels["alpha"].http(15000, "/status")
    mesh = json.loads(body)["mesh"] if code == 200 else {}
    return bool(mesh.get("workloads", 0) + mesh.get("services", 0) >= names)
