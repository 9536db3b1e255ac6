from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.errors import ConfigurationError
from miniistiod import vips

HOSTS = st.lists(st.tuples(st.sampled_from("abc"), st.text("abcdef.", min_size=1, max_size=4)), max_size=30)


@given(HOSTS, st.randoms())
def test_order_does_not_matter(hosts: list[tuple[str, str]], random: object) -> None:
    shuffled = list(hosts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis' Random
    assert vips.allot({}, hosts, []) == vips.allot({}, shuffled, [])


@given(HOSTS, HOSTS, HOSTS)
def test_a_number_stays_and_is_nobody_elses(
    first: list[tuple[str, str]], second: list[tuple[str, str]], third: list[tuple[str, str]]
) -> None:
    kept: dict[tuple[str, str], int] = {}
    ever: dict[tuple[str, str], int] = {}
    for wanted in (first, second, third):
        kept = vips.allot(kept, wanted, [])
        assert set(wanted) <= kept.keys()
        assert len(set(kept.values())) == len(kept)
        for key, number in kept.items():
            assert ever.setdefault(key, number) == number
            assert 1 <= number <= vips.POOL_SIZE


def test_an_address_that_a_document_names_wins() -> None:
    before = vips.allot({}, [("shop", "a.mesh")], [])
    v4, v6 = vips.addresses_of(before["shop", "a.mesh"])
    for given_address in (v4, v6):
        after = vips.allot(before, [("shop", "a.mesh")], [given_address])
        assert after["shop", "a.mesh"] != before["shop", "a.mesh"]


def test_addresses_of_a_number_are_in_the_pools() -> None:
    assert vips.addresses_of(1) == (ipaddress.ip_address("240.240.0.1"), ipaddress.ip_address("2001:2::1"))
    assert vips.addresses_of(vips.POOL_SIZE)[0] == ipaddress.ip_address("240.240.255.254")
    assert vips.number_of(ipaddress.ip_address("2001:2::9")) == 9
    assert vips.number_of(ipaddress.ip_address("10.0.0.1")) is None


def test_a_full_pool_gives_up_what_is_gone_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vips, "POOL_SIZE", 3)
    kept = vips.allot({}, [("n", "a"), ("n", "b"), ("n", "c")], [])
    kept = vips.allot(kept, [("n", "a"), ("n", "d")], [])
    assert kept.keys() == {("n", "a"), ("n", "d")}
    with pytest.raises(ConfigurationError, match="4 hosts need"):
        vips.allot(kept, [("n", "a"), ("n", "b"), ("n", "c"), ("n", "d")], [])
