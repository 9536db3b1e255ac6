from __future__ import annotations

from typing import Any

import pytest
from tests.support.mesh import at, gateway_at, gateway_named, hbone, service, store_of

from hbone.connect import Authority, ConnectRequest
from hbone.identity import SpiffeId
from ztunnel.errors import AddressMismatch, DataplaneError, NoService, SelfCall, UnusableDestination
from ztunnel.mesh import Store, Workload, parse_ip
from ztunnel.mesh.inbound import InboundTarget, guess_service, inbound, proxy_header
from ztunnel.mesh.workload import ApplicationTunnel

OWN_PORTS = frozenset({15001, 15006, 15008, 15080, 15000, 15020, 15021})
WEB, WP = "default/web.default.svc.cluster.local", "default/wp.default.svc.cluster.local"
POD, WAYPOINT = "10.2.0.1", "10.9.0.9"


def request(authority: str, forwarded_host: str | None = None) -> ConnectRequest:
    return ConnectRequest(authority=Authority.parse(authority), forwarded_host=forwarded_host)


def ask(
    store: Store, workload: Workload, authority: str, local: str = "", host: str | None = None, **options: Any
) -> InboundTarget | DataplaneError:
    local_ip = parse_ip(local) if local else workload.addresses[0]
    return inbound(store, workload, local_ip, request(authority, host), OWN_PORTS, **options)


def target(*args: Any, **options: Any) -> InboundTarget:
    found = ask(*args, **options)
    assert isinstance(found, InboundTarget), found
    return found


def test_own_address_leads_to_the_port() -> None:
    pod = hbone("web", POD, services={WEB: {}})
    store = store_of(pod, service("web", "10.96.0.1"))
    found = target(store, pod, f"{POD}:8080")
    assert found == InboundTarget(at(f"{POD}:8080"), at(f"{POD}:8080"), None, store.services[WEB])


def test_service_hostname_leads_to_its_target_port() -> None:
    pod = hbone("web", POD, services={WEB: {}})
    store = store_of(pod, service("web", "10.96.0.1"))
    assert target(store, pod, "web.default.svc.cluster.local:80").address == at(f"{POD}:8080")


def test_service_hostname_leads_to_the_endpoints_own_port() -> None:
    pod = hbone("web", POD, services={WEB: {80: 9090}})
    store = store_of(pod, service("web", "10.96.0.1", ports={80: 0}))
    assert target(store, pod, "web.default.svc.cluster.local:80").address == at(f"{POD}:9090")


@pytest.mark.parametrize("authority", ["web.default.svc.cluster.local:81", "unknown.example:80"])
def test_hostname_without_service_or_port_is_503(authority: str) -> None:
    pod = hbone("web", POD, services={WEB: {}})
    error = ask(store_of(pod, service("web", "10.96.0.1")), pod, authority)
    assert isinstance(error, NoService)
    assert error.status == 503


@pytest.mark.parametrize("reference", ["address", "vip", "hostname"])
@pytest.mark.parametrize("tunnel", [None, ApplicationTunnel(proxy=True, port=15088)])
@pytest.mark.parametrize("owner", ["workload", "service"])
def test_waypoint_serves_who_names_it(reference: str, tunnel: ApplicationTunnel | None, owner: str) -> None:
    to = {
        "address": gateway_at(WAYPOINT),
        "vip": gateway_at("10.96.0.9"),
        "hostname": gateway_named("default", "wp.default.svc.cluster.local"),
    }[reference]
    waypoint = hbone("wp", WAYPOINT, services={WP: {}}, application_tunnel=tunnel)
    store = store_of(
        waypoint,
        service("wp", "10.96.0.9", ports={15008: 15008}),
        hbone("web", POD, services={WEB: {}}, waypoint=to if owner == "workload" else None),
        service("web", "10.96.0.1", waypoint=to if owner == "service" else None),
    )
    authority = f"{POD}:8080" if owner == "workload" else "10.96.0.1:80"
    found = target(store, waypoint, authority)
    if tunnel is None:
        assert (found.address, found.proxy_target) == (at(f"{WAYPOINT}:{authority.rpartition(':')[2]}"), None)
    else:
        assert (found.address, found.proxy_target) == (at(f"{WAYPOINT}:15088"), at(authority))
        assert (found.connect, found.source) == (at("127.0.0.1:15088"), parse_ip("127.0.0.1"))


def test_address_of_another_pod_is_400() -> None:
    pod = hbone("web", POD)
    error = ask(store_of(pod, hbone("other", "10.2.0.2")), pod, "10.2.0.2:80")
    assert isinstance(error, AddressMismatch)
    assert (error.status, str(error)) == (400, f"ip mismatch: 10.2.0.2 != {POD}")


@pytest.mark.parametrize(
    ("owner", "authority"), [("service", f"{POD}:8080"), ("workload", "10.96.0.1:80"), ("", "1.1.1.1:80")]
)
def test_waypoint_refuses_who_does_not_name_it(owner: str, authority: str) -> None:
    to = gateway_at(WAYPOINT)
    waypoint = hbone("wp", WAYPOINT)
    store = store_of(
        waypoint,
        hbone("web", POD, services={WEB: {}}, waypoint=to if owner == "workload" else None),
        service("web", "10.96.0.1", waypoint=to if owner == "service" else None),
    )
    assert isinstance(ask(store, waypoint, authority), AddressMismatch)


SPECIAL = ["127.0.0.1", "127.0.0.2", "[::1]", "169.254.169.254", "[fe80::1]", "0.0.0.0", "[::]", "224.0.0.1"]
SPECIAL += ["255.255.255.255", "[ff02::1]", "0.1.2.3"]


@pytest.mark.parametrize("ip", SPECIAL)
@pytest.mark.parametrize("tunnel", [None, ApplicationTunnel(proxy=False, port=80)])
def test_special_addresses_are_refused_with_and_without_application_tunnel(
    ip: str, tunnel: ApplicationTunnel | None
) -> None:
    pod = hbone("web", POD, application_tunnel=tunnel)
    error = ask(store_of(pod), pod, f"{ip}:80")
    assert isinstance(error, UnusableDestination)
    assert error.status == 400


def test_loopback_is_refused_even_where_the_tunnel_came_over_loopback() -> None:
    pod = hbone("web", POD)
    assert isinstance(ask(store_of(pod), pod, "127.0.0.1:80", "127.0.0.1"), UnusableDestination)
    known = service("web", "10.96.0.1")
    assert isinstance(ask(store_of(pod, known), pod, f"{known.hostname}:80", "127.0.0.1"), AddressMismatch)


def test_registered_loopback_address_is_the_workloads_own() -> None:
    pod = hbone("web", "127.0.1.2")
    assert target(store_of(pod), pod, "127.0.1.2:80").connect == at("127.0.1.2:80")
    assert isinstance(ask(store_of(pod), pod, "127.0.1.3:80"), UnusableDestination)


@pytest.mark.parametrize("port", sorted(OWN_PORTS))
def test_own_ports_are_503(port: int) -> None:
    pod = hbone("web", POD, services={WEB: {}})
    for authority, ports in ((f"{POD}:{port}", {}), ("web.default.svc.cluster.local:80", {80: port})):
        error = ask(store_of(pod, service("web", "10.96.0.1", ports=ports)), pod, authority)
        assert isinstance(error, SelfCall)
        assert error.status == 503


def test_application_tunnel_may_not_lead_to_an_own_port() -> None:
    pod = hbone("web", POD, application_tunnel=ApplicationTunnel(proxy=True, port=15000))
    assert isinstance(ask(store_of(pod), pod, f"{POD}:80"), SelfCall)


def test_application_tunnel_without_proxy_header_only_changes_the_port() -> None:
    pod = hbone("web", POD, application_tunnel=ApplicationTunnel(proxy=False, port=81))
    found = target(store_of(pod), pod, "10.3.3.3:80")
    assert found == InboundTarget(at(f"{POD}:81"), at(f"{POD}:81"))


def test_proxy_header_names_a_vip_for_a_hostname() -> None:
    pod = hbone("web", POD, services={WEB: {}}, application_tunnel=ApplicationTunnel(proxy=True))
    web = service("web", "far/10.96.9.9", "fd96::1", "10.96.0.1")
    found = target(store_of(pod, web), pod, f"{web.hostname}:80", localhost_tunnel=False)
    assert (found.proxy_target, found.connect) == (at("10.96.0.1:80"), at(f"{POD}:8080"))
    error = ask(store_of(pod, service("web")), pod, f"{web.hostname}:80")
    assert isinstance(error, NoService)


def test_forwarded_host_names_the_service_else_the_port_does() -> None:
    pod = hbone("web", POD, services={WEB: {}, "default/b.example": {90: 8080}})
    store = store_of(pod, service("web", ports={80: 1}), service("b", hostname="b.example", ports={90: 0}))
    named = guess_service(store, pod, 8080, "web.default.svc.cluster.local")
    guessed = guess_service(store, pod, 8080)
    assert named is not None
    assert guessed is not None
    assert (named.name, guessed.name) == ("web", "b")
    assert guess_service(store, pod, 7) is None


def test_proxy_header_bytes() -> None:
    identity = SpiffeId.parse("spiffe://td/ns/a/sa/b")
    header = proxy_header(at("10.0.0.1:4000"), at("10.0.0.2:80"), identity)
    text = str(identity).encode()
    assert header[:12] == b"\r\n\r\n\x00\r\nQUIT\n"
    assert header[12:16] == bytes([0x21, 0x11]) + (12 + 3 + len(text)).to_bytes(2, "big")
    assert header[16:28] == bytes([10, 0, 0, 1, 10, 0, 0, 2]) + (4000).to_bytes(2, "big") + (80).to_bytes(2, "big")
    assert header[28:] == b"\xd0" + len(text).to_bytes(2, "big") + text
    assert proxy_header(at("[::1]:1"), at("[::2]:2"), None)[13] == 0x21
    assert proxy_header(at("[::1]:1"), at("10.0.0.2:2"), None)[13:] == b"\x01\x00\x00"
