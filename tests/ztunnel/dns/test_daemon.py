"""The DNS proxy as a part of `ztunnel run`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import dns.message
import dns.rcode
import pytest
import trio
from tests.support.daemon import Running, running, settings, workload
from tests.support.dns import Resolver, exchange, records
from tests.support.mesh import at

from ztunnel.errors import address_text
from ztunnel.wire import workload_pb2

if TYPE_CHECKING:
    from tests.support.daemon import Resource


def service(hostname: str, vip: str) -> Resource:
    message = workload_pb2.Service(
        name="x",
        namespace="shop",
        hostname=hostname,
        addresses=[workload_pb2.NetworkAddress(address=bytes(map(int, vip.split("."))))],
    )
    name = f"shop/{hostname}"
    return name, "1", workload_pb2.Address(service=message).SerializeToString()


async def ask(ztunnel: Running, name: str, *, tcp: bool = False) -> dns.message.Message:
    address = at(address_text((at("127.0.0.1:0")[0], ztunnel.address("dns")[1])))
    return dns.message.from_wire(await exchange(address, dns.message.make_query(name, "A").to_wire(), tcp=tcp))


async def test_the_daemon_answers_what_discovery_sent_and_asks_the_resolver_for_the_rest() -> None:
    resolver = Resolver({("example.org", "A"): ["198.51.100.1"]})
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.serve, "127.0.0.53")
        config = settings(ZTUNNEL_DNS_SERVERS=address_text(resolver.server()))
        async with running(config) as ztunnel:
            await ztunnel.sync(workload(), service("web.shop.svc.cluster.local", "10.96.0.1"))
            await ztunnel.until_ready()
            for tcp in (False, True):
                assert records(await ask(ztunnel, "web", tcp=tcp)) == ["web A 10.96.0.1"]
                assert records(await ask(ztunnel, "example.org", tcp=tcp)) == ["example.org A 198.51.100.1"]
            _, page = await ztunnel.http("stats", "/metrics")
            assert 'istio_dns_requests_total{request_query_type="a",request_protocol="udp",' in page
            assert 'istio_dns_upstream_request_duration_seconds_bucket{request_query_type="a",' in page
        nursery.cancel_scope.cancel()


async def test_question_that_came_before_the_mesh_is_answered_by_it() -> None:
    async with running() as ztunnel, trio.open_nursery() as nursery:
        found: list[str] = []

        async def early() -> None:
            found.extend(records(await ask(ztunnel, "web")))

        nursery.start_soon(early)
        assert ztunnel.daemon.dns is not None
        while not ztunnel.daemon.dns._pending.waiting:
            await trio.lowlevel.checkpoint()
        await ztunnel.sync(workload(), service("web.shop.svc.cluster.local", "10.96.0.1"))
        with trio.fail_after(10):
            while not found:
                await trio.lowlevel.checkpoint()
        assert found == ["web A 10.96.0.1"]


async def test_capture_that_is_off_has_no_listener_and_nothing_to_wait_for() -> None:
    async with running(settings(ISTIO_META_DNS_CAPTURE="false")) as ztunnel:
        assert await ztunnel.http("readiness", "/healthz/ready") == (500, "not ready, pending: proxy, state manager\n")
        assert ztunnel.daemon.dns is None
        assert "dns" not in (await ztunnel.status())["listeners"]


async def test_names_of_the_control_plane_are_known_before_it_is() -> None:
    resolver = Resolver({("control.invalid", "A"): ["198.51.100.1"]})
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.serve, "127.0.0.53")
        async with running(settings(ZTUNNEL_DNS_SERVERS=address_text(resolver.server()))) as ztunnel:
            assert records(await ask(ztunnel, "control.invalid")) == ["control.invalid A 198.51.100.1"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("module", ["ztunnel.app", "ztunnel.embed", "ztunnel.dataplane"])
def test_dnspython_is_loaded_only_where_the_proxy_is_on(module: str) -> None:
    code = f"import sys, {module}; print([name for name in sys.modules if name.split('.')[0] == 'dns'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
