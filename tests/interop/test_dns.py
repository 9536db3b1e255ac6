"""The C library's resolver, and dig where it is, on a host beside a resolver like systemd-resolved."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import dns.flags
import dns.message
import dns.rcode
import pytest
from tests.support.dns_host import MESH_NAMES, NAMES
from tests.support.dns_libc import FORWARDED, OWNED

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.interop, pytest.mark.netns]
MESH = {
    "web": ["10.96.0.1", "2001:db8::1"],
    "web.ns1": ["10.96.0.1", "2001:db8::1"],
    "web.ns1.svc.cluster.local": ["10.96.0.1", "2001:db8::1"],
    "cart.ns2": ["10.96.0.2"],
    "cart": [],  # of another namespace, whose name has to be said
    "api.partner.example": ["240.240.0.1"],
    "large": sorted(f"10.97.0.{number}" for number in range(200)),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory: Path = tmp_path_factory.mktemp("dns")
    command = ["unshare", "--net", "--mount", sys.executable, "-m", "tests.support.dns_host", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", ["nameserver", "captured", "elsewhere"])
def test_names_outside_the_mesh_resolve_as_without_the_proxy(found: Any, way: str) -> None:
    table = {f"{name} {protocol}" for name in NAMES for protocol in ("udp", "tcp")}
    assert {key: found[way][key] for key in table} == {key: found["direct"][key] for key in table}
    assert found[way].get("dig") == found["direct"].get("dig")
    assert len(found[way]["big.example udp"]) == 100  # cut over UDP, asked again over TCP
    assert found[way]["printer udp"] == ["192.0.2.9"]  # by the search list


@pytest.mark.parametrize("way", ["nameserver", "captured", "elsewhere"])
def test_names_of_the_mesh_resolve_by_the_proxy_alone(found: Any, way: str) -> None:
    for protocol in ("udp", "tcp"):
        assert {name: found[way][f"{name} {protocol}"] for name in MESH_NAMES} == MESH
        assert not any(found["direct"][f"{name} {protocol}"] for name in MESH_NAMES)


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("way", ["nameserver", "captured", "elsewhere"])
def test_messages_about_other_names_are_answered_as_without_the_proxy(found: Any, way: str, protocol: str) -> None:
    ours, theirs = found[way][f"messages {protocol}"], found["direct"][f"messages {protocol}"]
    assert {question: ours[question] for question in FORWARDED} == {
        question: theirs[question] for question in FORWARDED
    }
    answered = {question: dns.message.from_wire(b"\1\1" + bytes.fromhex(ours[question])) for question in FORWARDED}
    assert len(answered["big.example A"].answer[0]) == 100
    assert len(answered["huge.example TXT edns"].answer[0]) == 40
    assert answered["nobody.example A"].rcode() == dns.rcode.NXDOMAIN
    assert answered["pod-0.headless.ns1.svc.cluster.local A"].answer


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("way", ["nameserver", "captured", "elsewhere"])
def test_owned_names_are_answered_for_every_type_and_the_resolver_knows_none(
    found: Any, way: str, protocol: str
) -> None:
    for question in OWNED:
        name, kind = question.split()
        reply = dns.message.from_wire(b"\1\1" + bytes.fromhex(found[way][f"messages {protocol}"][question]))
        addresses = {
            "A": [address for address in MESH[name] if "." in address],
            "AAAA": [address for address in MESH[name] if ":" in address],
        }.get(kind, [])
        assert [record.to_text() for rrset in reply.answer for record in rrset] == addresses, question
        assert reply.rcode() == dns.rcode.NOERROR
        assert reply.flags & dns.flags.AA
        theirs = found["direct"][f"messages {protocol}"][question]
        assert dns.message.from_wire(b"\1\1" + bytes.fromhex(theirs)).rcode() == dns.rcode.NXDOMAIN


def test_a_port_that_the_proxy_used_leads_no_application_past_it(found: Any) -> None:
    assert found["used port"] == ["NXDOMAIN", "NOERROR"]


def test_what_the_proxy_asks_and_is_led_back_to_it_is_no_storm(found: Any) -> None:
    assert found["storm"] == 0
    assert found["misled"] == []
