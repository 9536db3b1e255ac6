"""What the control plane sends is read strictly: workload.py, service.py, policy.py."""

from __future__ import annotations

import contextlib
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mesh import gateway_at, gateway_named

from ztunnel.mesh import RejectedResource, Service, Workload, decode_address, decode_policy, parse_ip
from ztunnel.mesh.policy import Action, Authorization, Kind, Match, PolicyScope, ServiceAccount, StringMatch
from ztunnel.mesh.service import IpFamilies, Mode, Scope
from ztunnel.mesh.workload import Locality, Protocol
from ztunnel.wire import authorization_pb2 as auth
from ztunnel.wire import workload_pb2 as pb

V4, V6 = b"\x0a\x02\x00\x01", parse_ip("fd00::1").packed


def workload(**values: Any) -> pb.Workload:
    values.setdefault("uid", "c//Pod/default/w")
    values.setdefault("namespace", "default")
    return pb.Workload(**values)


def service(**values: Any) -> pb.Service:
    values.setdefault("hostname", "web.example")
    values.setdefault("namespace", "default")
    return pb.Service(**values)


def read_workload(message: pb.Workload) -> Workload:
    found = decode_address(message.uid, pb.Address(workload=message).SerializeToString())
    assert isinstance(found, Workload)
    return found


def read_service(message: pb.Service) -> Service:
    name = f"{message.namespace}/{message.hostname}"
    found = decode_address(name, pb.Address(service=message).SerializeToString())
    assert isinstance(found, Service)
    return found


def test_absent_fields_have_their_defaults() -> None:
    found = read_workload(workload())
    assert (found.trust_domain, found.service_account, found.cluster_id) == ("cluster.local", "default", "Kubernetes")
    assert (found.capacity, found.workload_type, found.healthy) == (1, "deployment", True)
    assert (found.protocol, found.locality, found.application_tunnel) == (Protocol.TCP, Locality(), None)
    assert str(found.identity) == "spiffe://cluster.local/ns/default/sa/default"


def test_every_field_of_a_workload_is_read() -> None:
    message = workload(
        name="w",
        addresses=[V4, V6],
        hostname="w.example",
        network="n",
        tunnel_protocol=pb.HBONE,
        trust_domain="td",
        service_account="sa",
        waypoint=pb.GatewayAddress(address=pb.NetworkAddress(network="n", address=V4), hbone_mtls_port=15008),
        network_gateway=pb.GatewayAddress(hostname=pb.NamespacedHostname(namespace="a", hostname="b")),
        node="node",
        canonical_name="cn",
        canonical_revision="v1",
        workload_type=pb.CRONJOB,
        workload_name="wn",
        native_tunnel=True,
        authorization_policies=["a/b"],
        status=pb.UNHEALTHY,
        cluster_id="c1",
        locality=pb.Locality(region="r", zone="z", subzone="s"),
        network_mode=pb.HOST_NETWORK,
        services={"a/b": pb.PortList(ports=[pb.Port(service_port=80, target_port=1), pb.Port(service_port=80)])},
        application_tunnel=pb.ApplicationTunnel(protocol=pb.ApplicationTunnel.PROXY, port=15088),
    )
    message.capacity.value = 0
    found = read_workload(message)
    assert found.addresses == (parse_ip("10.2.0.1"), parse_ip("fd00::1"))
    assert (found.waypoint, found.network_gateway) == (gateway_at("10.2.0.1", 15008, "n"), gateway_named("a", "b", 0))
    assert found.services == {"a/b": {80: 0}}
    assert found.application_tunnel is not None
    assert (found.application_tunnel.proxy, found.application_tunnel.port) == (True, 15088)
    assert (found.healthy, found.host_network, found.capacity) == (False, True, 0)
    assert (found.workload_type, found.locality) == ("cronjob", Locality("r", "z", "s"))
    assert found.wire == pb.Address(workload=message).SerializeToString()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"addresses": [b"\x01\x02\x03"]}, "address has 3 bytes; an IP address has 4 or 16"),
        ({"tunnel_protocol": pb.LEGACY_ISTIO_MTLS}, "tunnel_protocol 2 is not supported; use NONE or HBONE"),
        ({"tunnel_protocol": 9}, "tunnel_protocol 9 is not supported; use NONE or HBONE"),
        ({"status": 5}, "status 5 is unknown"),
        ({"network_mode": 5}, "network_mode 5 is unknown"),
        ({"services": {"noslash": pb.PortList()}}, "service 'noslash' is not of the form namespace/hostname"),
        ({"waypoint": pb.GatewayAddress()}, "waypoint has no destination; it needs an address or a hostname"),
        ({"application_tunnel": pb.ApplicationTunnel(protocol=4)}, "application_tunnel.protocol 4 is unknown"),  # type: ignore[arg-type]  # an unknown value
        ({"service_account": "a/b"}, "service account 'a/b' is malformed; only a-z A-Z 0-9 . - _ are allowed"),
    ],
)
def test_unusable_workload_is_rejected_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedResource) as caught:
        read_workload(workload(**fields))
    assert caught.value.reason == reason
    assert caught.value.name == "c//Pod/default/w"


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (V4, "10.2.0.1"),
        (bytes(4), "0.0.0.0"),
        (b"\xff\xff\xff\xff", "255.255.255.255"),
        (V6, "fd00::1"),
        (bytes(16), "::"),
        (bytes(10) + b"\xff\xff" + V4, "10.2.0.1"),  # the IPv6 form of an IPv4 address
        *((bytes(length), None) for length in (0, 1, 3, 5, 15, 17)),
    ],
)
def test_addresses_are_4_or_16_bytes(packed: bytes, text: str | None) -> None:
    message = workload(addresses=[packed])
    if text is None:
        with pytest.raises(RejectedResource, match="4 or 16"):
            read_workload(message)
    else:
        assert read_workload(message).addresses == (parse_ip(text),)


def test_port_over_65535_is_rejected_instead_of_naming_another() -> None:
    ports = pb.PortList(ports=[pb.Port(service_port=65_616)])
    with pytest.raises(RejectedResource, match="service port is 65616; a port is at most 65535"):
        read_workload(workload(services={"a/b": ports}))


def test_rejected_workload_tells_its_addresses() -> None:
    with pytest.raises(RejectedResource) as caught:
        read_workload(workload(network="n", addresses=[V4, b""], status=5))
    assert caught.value.addresses == (("n", parse_ip("10.2.0.1")),)


def test_resource_that_calls_itself_otherwise_is_rejected() -> None:
    with pytest.raises(RejectedResource, match="could not be removed by its name"):
        decode_address("other", pb.Address(workload=workload()).SerializeToString())


def test_address_that_is_neither_is_rejected() -> None:
    with pytest.raises(RejectedResource, match="neither a workload nor a service"):
        decode_address("x", b"")


def test_service_addresses_are_exact_or_ranges_by_length() -> None:
    found = read_service(
        service(
            addresses=[
                pb.NetworkAddress(network="n", address=V4),
                pb.NetworkAddress(network="n", address=V4, length=32),
                pb.NetworkAddress(network="n", address=V6, length=128),
                pb.NetworkAddress(network="n", address=V4, length=8),
            ]
        )
    )
    assert [str(vip) for vip in found.vips] == ["n/10.2.0.1", "n/10.2.0.1", "n/fd00::1"]
    assert found.cidrs == (("n", ip_network("10.0.0.0/8")),)


def test_every_field_of_a_service_is_read() -> None:
    spiffe = "spiffe://td/ns/a/sa/b"
    found = read_service(
        service(
            name="web",
            ports=[pb.Port(service_port=80, target_port=8080)],
            subject_alt_names=[spiffe, "web.example"],
            waypoint=pb.GatewayAddress(address=pb.NetworkAddress(address=V4), hbone_mtls_port=15008),
            weighted_waypoints=[
                pb.WeightedWaypoint(
                    destination=pb.GatewayAddress(address=pb.NetworkAddress(address=V4), hbone_mtls_port=1), weight=3
                )
            ],
            load_balancing=pb.LoadBalancing(
                routing_preference=[pb.LoadBalancing.NETWORK, pb.LoadBalancing.REGION],
                mode=pb.LoadBalancing.FAILOVER,
                health_policy=pb.LoadBalancing.ALLOW_ALL,
            ),
            ip_families=pb.IPV6_ONLY,
            canonical=True,
            visibility=pb.Service.NAMESPACE,
        )
    )
    assert (found.key, found.ports) == ("default/web.example", {80: 8080})
    assert set(map(str, found.identities)) == {spiffe}
    assert found.weighted_waypoints[0].weight == 3
    assert found.load_balancer is not None
    assert found.load_balancer.preferences == (Scope.NETWORK, Scope.REGION)
    assert (found.load_balancer.mode, found.load_balancer.allow_unhealthy) == (Mode.FAILOVER, True)
    assert (found.ip_families, found.canonical, found.namespace_only) == (IpFamilies.IPV6, True, True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ip_families": 9}, "ip_families 9 is unknown"),
        ({"addresses": [pb.NetworkAddress(address=V4, length=33)]}, "prefix length 33; at most 32"),
        ({"addresses": [pb.NetworkAddress(address=b"1")]}, "address has 1 bytes"),
        ({"load_balancing": pb.LoadBalancing(routing_preference=[0])}, "routing_preference 0 is unknown"),  # type: ignore[list-item]  # an unknown value
        ({"load_balancing": pb.LoadBalancing(mode=9)}, "mode 9 is unknown"),  # type: ignore[arg-type]  # as above
        ({"load_balancing": pb.LoadBalancing(health_policy=9)}, "health_policy 9 is unknown"),  # type: ignore[arg-type]  # as above
        ({"weighted_waypoints": [pb.WeightedWaypoint(weight=1)]}, "weighted_waypoints has no destination"),
        ({"ports": [pb.Port(service_port=80, target_port=70_000)]}, "target port is 70000"),
        ({"hostname": ""}, "the service has no hostname"),
    ],
)
def test_unusable_service_is_rejected_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedResource, match=reason):
        read_service(service(**fields))


def read_match(**fields: Any) -> Match:
    policy = Authorization.from_wire(policy_of(auth.Match(**fields)))
    return policy.rules[0][0][0]


def policy_of(*matches: auth.Match, **values: Any) -> auth.Authorization:
    rules = [auth.Rule(clauses=[auth.Clause(matches=matches)])]
    return auth.Authorization(name="p", namespace="default", rules=rules, **values)


def test_every_field_of_a_match_is_read() -> None:
    texts = [
        auth.StringMatch(exact="a"),
        auth.StringMatch(prefix="b"),
        auth.StringMatch(suffix="c"),
        auth.StringMatch(presence={}),
    ]
    strings = (
        StringMatch(Kind.EXACT, "a"),
        StringMatch(Kind.PREFIX, "b"),
        StringMatch(Kind.SUFFIX, "c"),
        StringMatch(Kind.PRESENCE),
    )
    ips, networks = [auth.Address(address=V4, length=8)], (ip_network("10.0.0.0/8"),)
    accounts = [auth.ServiceAccountMatch(namespace="n", serviceAccount="s")]
    found = read_match(
        namespaces=texts,
        not_namespaces=texts,
        principals=texts,
        not_principals=texts,
        source_ips=ips,
        not_source_ips=ips,
        destination_ips=ips,
        not_destination_ips=ips,
        destination_ports=[80],
        not_destination_ports=[81],
        service_accounts=accounts,
        not_service_accounts=accounts,
    )
    assert found.namespaces == found.not_namespaces == found.principals == found.not_principals == strings
    assert found.source_ips == found.not_source_ips == found.destination_ips == found.not_destination_ips == networks
    assert (found.destination_ports, found.not_destination_ports) == ((80,), (81,))
    assert found.service_accounts == found.not_service_accounts == (ServiceAccount("n", "s"),)


def test_prefix_length_zero_is_everything() -> None:
    assert read_match(source_ips=[auth.Address(address=V4)]).source_ips == (ip_network("0.0.0.0/0"),)


def test_scope_action_and_dry_run_are_read() -> None:
    found = Authorization.from_wire(policy_of(scope=2, action=1, dry_run=True), "key")
    assert (found.scope, found.action, found.dry_run) == (PolicyScope.WORKLOAD_SELECTOR, Action.DENY, True)
    assert (found.key, found.label) == ("key", "default/p")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (policy_of(scope=9), "scope 9 is unknown"),
        (policy_of(action=2), "action 2 is unknown; only ALLOW and DENY can be enforced"),
        (policy_of(auth.Match(namespaces=[auth.StringMatch()])), "namespaces has an entry without a kind"),
        (policy_of(auth.Match(source_ips=[auth.Address(address=b"1")])), "source_ips has 1 bytes"),
        (policy_of(auth.Match(source_ips=[auth.Address(address=V4, length=40)])), "prefix length 40"),
        (policy_of(auth.Match(source_ips=[auth.Address(address=V4, length=256)])), "prefix length 256"),
        (policy_of(auth.Match(destination_ports=[65_616])), "destination_ports is 65616"),
    ],
)
def test_policy_that_would_widen_is_rejected(message: auth.Authorization, reason: str) -> None:
    with pytest.raises(RejectedResource, match=reason) as caught:
        decode_policy("default/p", message.SerializeToString())
    assert caught.value.enforced


def test_rejected_policy_tells_what_it_ruled() -> None:
    def namespace_of(scope: int) -> str | None:
        with pytest.raises(RejectedResource) as caught:
            decode_policy("x", policy_of(scope=scope, action=9).SerializeToString())
        return caught.value.namespace

    assert [namespace_of(scope) for scope in (0, 1, 2, 9)] == ["", "default", None, "default"]
    with pytest.raises(RejectedResource) as caught:
        decode_policy("shop/p", b"\xff")
    assert caught.value.namespace == "shop"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_rejected(payload: bytes) -> None:
    for decode in (decode_address, decode_policy):
        with contextlib.suppress(RejectedResource):
            decode("name", payload)
