"""Looking a host up past our own DNS proxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.support.daemon import settings
from tests.support.dns import Resolver

from ztunnel.dataplane.names import look_up, lookup_for
from ztunnel.dns.client import MarkedLookup, in_hosts
from ztunnel.errors import ResolutionFailed, address_text

if TYPE_CHECKING:
    from pathlib import Path

    import trio

ZONE = {
    ("two.example", "A"): ["198.51.100.1", "198.51.100.2"],
    ("two.example", "AAAA"): ["2001:db8::1"],
    ("six.example", "AAAA"): ["2001:db8::6"],
    ("big.example", "A"): [f"198.51.{number}.1" for number in range(120)],
    ("text.example", "TXT"): ["text"],
}


async def test_both_families_are_asked_and_what_is_too_long_again_over_tcp(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    resolver = Resolver(ZONE)
    await nursery.start(resolver.serve, "127.0.0.53")
    (tmp_path / "hosts").write_text("")

    async def find(name: str, **more: str) -> list[str]:
        config = settings(ZTUNNEL_DNS_SERVERS=address_text(resolver.server()), **more)
        return [str(ip) for ip in await MarkedLookup(config, hosts=tmp_path / "hosts")(name)]

    assert await find("two.example") == ["198.51.100.1", "198.51.100.2", "2001:db8::1"]
    assert await find("two.example", IPV6_ENABLED="false") == ["198.51.100.1", "198.51.100.2"]
    assert await find("six.example") == ["2001:db8::6"]
    assert len(await find("big.example")) == 120
    assert not resolver.heard[-1][1]  # over TCP
    assert await find("text.example") == []
    with pytest.raises(ResolutionFailed, match="NXDOMAIN"):
        await find("nobody.example")
    with pytest.raises(ResolutionFailed):
        await find("a" * 64 + ".example")
    nursery.cancel_scope.cancel()


async def test_a_name_of_the_hosts_file_is_asked_of_nobody(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n\n10.0.0.7 Db.example db # main\nfe80::1%eth0 db.example\nbad db.example\n")
    assert [str(ip) for ip in in_hosts("DB.example.", hosts)] == ["10.0.0.7", "fe80::1"]
    assert in_hosts("db.exampl", hosts) == []
    assert in_hosts("db", tmp_path / "none") == []
    found = await MarkedLookup(settings(ZTUNNEL_DNS_SERVERS="127.0.0.254:9"), hosts=hosts)("db")
    assert [str(ip) for ip in found] == ["10.0.0.7"]


def test_without_a_mark_or_a_dns_proxy_nothing_can_be_in_the_way() -> None:
    assert lookup_for(settings()) is look_up
    assert lookup_for(settings(PACKET_MARK="1337", ISTIO_META_DNS_CAPTURE="false")) is look_up
    assert lookup_for(settings(PACKET_MARK="1337")) is not look_up
