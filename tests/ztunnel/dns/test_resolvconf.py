from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from tests.support.mesh import at

from ztunnel.dns.resolvconf import ResolvConf, Resolvers, parse_resolv_conf

if TYPE_CHECKING:
    from pathlib import Path


def test_servers_search_domains_and_options_are_read() -> None:
    text = """
# by hand
nameserver 10.0.0.1   # first
nameserver fe80::1%eth0
nameserver nonsense
nameserver 10.0.0.1
nameserver 10.0.0.3
nameserver 10.0.0.4
domain old.example
search Mesh.Example. sub.example mesh.example
options edns0 timeout:2 attempts:3 ndots:5
"""
    assert parse_resolv_conf(text) == ResolvConf(
        servers=(at("10.0.0.1:53"), at("[fe80::1]:53"), at("10.0.0.3:53")),
        search=("mesh.example", "sub.example"),
        timeout=2.0,
        attempts=3,
    )


def test_options_have_limits_and_nothing_means_nothing() -> None:
    assert parse_resolv_conf("options timeout:0 attempts:99999999 timeout:x") == ResolvConf(timeout=1.0, attempts=5)
    assert parse_resolv_conf("search .\nnameserver") == ResolvConf()
    assert parse_resolv_conf("search a.example\ndomain b.example c.example") == ResolvConf(search=("b.example",))


@given(st.text())
def test_no_text_does_harm(text: str) -> None:
    found = parse_resolv_conf(text + "\noptions timeout:" + text)
    assert len(found.servers) <= 3
    assert 1 <= found.timeout <= 30


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_file_is_read_again_when_it_changed_and_the_last_good_one_kept(tmp_path: Path) -> None:
    path, clock = tmp_path / "resolv.conf", Clock()
    resolvers = Resolvers(clock, path=path)
    assert resolvers.current() == ResolvConf()
    assert "cannot be read: No such file or directory" in str(resolvers.error)
    path.write_text("nameserver 10.0.0.1\n")
    assert resolvers.current() == ResolvConf()  # not looked at yet
    clock.now += 2
    assert resolvers.current().servers == (at("10.0.0.1:53"),)
    assert not resolvers.error
    path.write_text("nameserver 10.0.0.22\n")
    clock.now += 2
    assert resolvers.current().servers == (at("10.0.0.22:53"),)
    path.write_text("search example\n")
    clock.now += 2
    assert resolvers.current() == ResolvConf(servers=(at("10.0.0.22:53"),), search=("example",))
    assert resolvers.error == f"{path} names no nameserver"
    path.unlink()
    clock.now += 2
    assert resolvers.current().servers == (at("10.0.0.22:53"),)


def test_named_servers_win_and_search_domains_stay(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("nameserver 127.0.0.53\nsearch example\n")
    resolvers = Resolvers(Clock(), path=path, servers=[at("10.0.0.1:5353")])
    assert resolvers.current() == ResolvConf(servers=(at("10.0.0.1:5353"),), search=("example",))
