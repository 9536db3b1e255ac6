"""The look-ups of ztunnel's own test, each over UDP and TCP: what the mesh owns, and what is the resolver's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from tests.support.dns import Resolver, open_proxy, records
from tests.support.mesh import service, store_of, tcp

from ztunnel.dns.answer import Zone
from ztunnel.mesh.service import IpFamilies

if TYPE_CHECKING:
    from pathlib import Path

SEARCH = "ns1.svc.cluster.local svc.cluster.local cluster.local"
V4_ONLY: dict[str, Any] = {"ip_families": IpFamilies.IPV4}
V6_ONLY: dict[str, Any] = {"ip_families": IpFamilies.IPV6}


def outside(hostname: str, *vips: str, **values: Any) -> Any:
    return service(values.pop("name", "se"), *vips, hostname=hostname, **{"namespace": "ns1", **values})


def inside(name: str, *vips: str, namespace: str = "ns1", **values: Any) -> Any:
    return service(name, *vips, namespace=namespace, **values)


def endpoint(name: str, service_key: str, *ips: str, **values: Any) -> Any:
    return tcp(name, *ips, namespace="ns1", uid=f"c//Pod/ns1/{name}", services={service_key: {}}, **values)


STORE = store_of(
    outside("www.google.com", "1.1.1.1"),
    inside("productpage", "9.9.9.9"),
    inside("example", "10.10.10.10", namespace="ns2"),
    inside("details", "11.11.11.11", namespace="ns2", namespace_only=True),
    inside("reviews", "12.12.12.12", namespace_only=True),
    service("remote", "13.13.13.13", namespace="ns1", hostname="remote.ns1.svc.clusterset.local"),
    inside("dual", "14.14.14.14", "2001:db8::14"),
    inside("four", "15.15.15.15", **V4_ONLY),
    inside("six", "2001:db8::16", **V6_ONLY),
    outside("*.wildcard.com", "17.17.17.17"),
    outside("*.sub.wildcard.com", "18.18.18.18"),
    outside("*.a.b.multi.example", "19.19.19.19"),
    inside("far", "remote/20.20.20.20"),
    inside("near-and-far", "21.21.21.21", "remote/21.21.21.22"),
    inside("headless"),
    endpoint("headless-0", "ns1/headless.ns1.svc.cluster.local", "30.30.30.30", "2001:db8::30", hostname="h0"),
    endpoint("headless-1", "ns1/headless.ns1.svc.cluster.local", "30.30.30.31", "30.30.30.99", "2001:db8::31"),
    endpoint("headless-2", "ns1/headless.ns1.svc.cluster.local", "30.30.30.32", network="remote"),
    inside("headless-six", **V6_ONLY),
    endpoint("headless-six-0", "ns1/headless-six.ns1.svc.cluster.local", "33.33.33.33", "2001:db8::33"),
    outside("no-endpoints.example"),
    outside("endpoints.example"),
    endpoint("outer", "ns1/endpoints.example", "34.34.34.34"),
    outside("preferred.example", "40.0.0.1", namespace="ns5"),
    outside("preferred.example", "40.0.0.2", namespace="ns-preferred"),
    outside("own.example", "41.0.0.1", namespace="ns5"),
    outside("own.example", "41.0.0.2", namespace="ns-preferred"),
    outside("own.example", "41.0.0.3", namespace="ns1"),
    outside("canonical.example", "42.0.0.1", namespace="ns5"),
    outside("canonical.example", "42.0.0.2", namespace="ns6", canonical=True),
    outside("canonical.example", "42.0.0.3", namespace="ns-preferred"),
    outside("own-canonical.example", "43.0.0.1", namespace="ns5", canonical=True),
    outside("own-canonical.example", "43.0.0.2", namespace="ns1"),
)

UPSTREAM = {
    ("example.org", "A"): ["198.51.100.1"],
    ("example.org", "NS"): ["ns.example.org."],
    ("headless-0.headless.ns1.svc.cluster.local", "A"): ["198.51.100.2"],
    ("no-endpoints.example", "A"): ["198.51.100.3"],
    ("endpoints.example", "A"): ["198.51.100.4"],
}


@attrs.frozen
class Case:
    """A question, and the answer's records; what is forwarded has the resolver's code."""

    what: str
    name: str
    kind: str = "A"
    answer: tuple[str, ...] = ()
    forwarded: bool = False
    rcode: str = "NOERROR"


def own(what: str, name: str, *values: str, kind: str = "A", cname: str | None = None) -> Case:
    owner = cname or name
    answer = [f"{owner} {kind} {value}" for value in values]
    if cname is not None:
        answer.append(f"{name} CNAME {cname}.")
    return Case(what, name, kind, tuple(sorted(answer)))


def other(what: str, name: str, value: str | None = None, kind: str = "A") -> Case:
    answer = () if value is None else (f"{name} {kind} {value}",)
    return Case(what, name, kind, answer, True, "NXDOMAIN" if value is None else "NOERROR")


FQDN = "ns1.svc.cluster.local"
CASES = [
    other("another type of an unknown name", "example.org", "ns.example.org.", "NS"),
    own("outside host with an address of the mesh", "www.google.com", "1.1.1.1"),
    own("outside host with a search domain", f"www.google.com.{FQDN}", "1.1.1.1", cname="www.google.com"),
    other("unknown host", "example.org", "198.51.100.1"),
    own("service by its whole name", f"productpage.{FQDN}", "9.9.9.9"),
    own("service by name and namespace", "productpage.ns1", "9.9.9.9"),
    own("service by its short name", "productpage", "9.9.9.9"),
    own("name and namespace with a search domain", f"productpage.ns1.{FQDN}", "9.9.9.9", cname="productpage.ns1"),
    own("IPv6 of an IPv4 address", "productpage", kind="AAAA"),
    own("IPv6 of an IPv4 address with a search domain", f"productpage.ns1.{FQDN}", kind="AAAA"),
    own("other namespace by name and namespace", "example.ns2", "10.10.10.10"),
    own("other namespace with svc", "example.ns2.svc", "10.10.10.10"),
    own("other namespace by its whole name", "example.ns2.svc.cluster.local", "10.10.10.10"),
    other("other namespace by its short name", "example"),
    other("private service of another namespace", "details.ns2.svc.cluster.local"),
    own("private service of the own namespace", f"reviews.{FQDN}", "12.12.12.12"),
    own("other cluster domain by its whole name", "remote.ns1.svc.clusterset.local", "13.13.13.13"),
    other("other cluster domain by a short name", "remote.ns1"),
    own("IPv4 of both", f"dual.{FQDN}", "14.14.14.14"),
    own("IPv6 of both", f"dual.{FQDN}", "2001:db8::14", kind="AAAA"),
    own("IPv6 of an IPv4 service", f"four.{FQDN}", kind="AAAA"),
    own("IPv4 of an IPv6 service", f"six.{FQDN}"),
    own("wildcard", "a.wildcard.com", "17.17.17.17"),
    own("more specific wildcard", "a.sub.wildcard.com", "18.18.18.18"),
    own("wildcard of several labels", "x.a.b.multi.example", "19.19.19.19"),
    own("wildcard with a search domain", f"a.wildcard.com.{FQDN}", "17.17.17.17"),
    own("address on another network only", f"far.{FQDN}"),
    own("addresses on both networks", f"near-and-far.{FQDN}", "21.21.21.21"),
    own("headless, IPv4", f"headless.{FQDN}", "30.30.30.30", "30.30.30.31"),
    own("headless, IPv6", f"headless.{FQDN}", "2001:db8::30", "2001:db8::31", kind="AAAA"),
    own("headless of IPv6, IPv6", f"headless-six.{FQDN}", "2001:db8::33", kind="AAAA"),
    own("headless of IPv6, IPv4", f"headless-six.{FQDN}"),
    other("pod of a headless service", f"headless-0.headless.{FQDN}", "198.51.100.2"),
    other("short name of a pod of a headless service", "headless-0.headless.ns1"),
    other("outside host without address or endpoints", "no-endpoints.example", "198.51.100.3"),
    other("outside host without address, with endpoints", "endpoints.example", "198.51.100.4"),
    own("preferred namespace", "preferred.example", "40.0.0.2"),
    own("own namespace over the preferred", "own.example", "41.0.0.3"),
    own("canonical over the preferred", "canonical.example", "42.0.0.2"),
    own("own namespace over the canonical", "own-canonical.example", "43.0.0.2"),
]


def test_there_are_forty_of_them() -> None:
    assert len(CASES) == len({case.what for case in CASES}) == 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
async def test_look_up(case: Case, tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    conf.write_text(f"search {SEARCH}\n")
    settings = Zone(preferred_namespace="ns-preferred")
    async with open_proxy(STORE, zone=UPSTREAM, conf=conf, settings=settings) as running:
        for over_tcp in (False, True):
            reply = await running.ask(case.name, case.kind, tcp=over_tcp)
            assert (records(reply), dns.rcode.to_text(reply.rcode())) == (list(case.answer), case.rcode)
            assert bool(reply.flags & dns.flags.AA) is not case.forwarded
            assert reply.flags & dns.flags.RA
            assert not reply.flags & dns.flags.TC
            assert len(running.resolver.heard) == (1 + over_tcp if case.forwarded else 0)
            if not case.forwarded:
                assert all(rrset.ttl == 30 for rrset in reply.answer)


async def test_forwarded_answer_keeps_its_additional_records() -> None:
    def script(data: bytes, datagram: bool) -> list[bytes]:
        reply = dns.message.make_response(dns.message.from_wire(data))
        reply.answer.append(dns.rrset.from_text("example.org.", 5, "IN", "SRV", "0 0 1 host.example.org."))
        reply.additional.append(dns.rrset.from_text("host.example.org.", 5, "IN", "A", "198.51.100.9"))
        return [reply.to_wire()]

    async with open_proxy(resolver=Resolver({}, script=script)) as running:
        for over_tcp in (False, True):
            reply = await running.ask("example.org", "SRV", tcp=over_tcp)
            assert len(reply.answer) == len(reply.additional) == 1


async def test_a_large_answer_is_cut_for_udp_and_whole_over_tcp() -> None:
    endpoints = [endpoint(f"w{number}", "ns1/large.ns1.svc.cluster.local", f"10.1.0.{number}") for number in range(256)]
    async with open_proxy(store_of(inside("large"), *endpoints)) as running:
        small = await running.ask("large.ns1.svc", payload=1232)
        assert small.flags & dns.flags.TC
        assert len(records(small)) == 74
        assert len(small.to_wire()) <= 1232
        assert len(records(await running.ask("large.ns1.svc"))) == 30
        whole = await running.ask("large.ns1.svc", tcp=True, payload=1232)
        assert not whole.flags & dns.flags.TC
        assert len(records(whole)) == 256


@pytest.mark.parametrize("kind", ["TXT", "MX", "SRV", "HTTPS", "ANY", "TYPE65280"])
async def test_owned_name_has_no_records_of_other_types_and_is_not_said_to_be_unknown(kind: str) -> None:
    async with open_proxy(STORE) as running:
        reply = await running.ask("www.google.com", kind)
        assert (reply.rcode(), reply.answer, running.resolver.heard) == (dns.rcode.NOERROR, [], [])
        assert reply.flags & dns.flags.AA


async def test_without_ipv6_there_are_no_ipv6_addresses() -> None:
    async with open_proxy(STORE, settings=Zone(ipv6=False)) as running:
        assert records(await running.ask("dual.ns1", "AAAA")) == []
        assert records(await running.ask("dual.ns1", "A")) == ["dual.ns1 A 14.14.14.14"]
