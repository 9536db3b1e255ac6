from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.dns.names import Alias, aliases, expansions, has_domain, normal, strip_domain, wildcards

D = "cluster.local"


@pytest.mark.parametrize(
    ("name", "domain", "left"),
    [
        ("a.b.c", "b.c", "a"),
        ("a.b.c", "c", "a.b"),
        ("b.c", "b.c", None),
        ("xb.c", "b.c", None),
        ("a.b.c", "", None),
        ("a.b.c", "d", None),
        ("c", "b.c", None),
    ],
)
def test_domain_is_a_suffix_of_whole_labels_and_no_name_lies_below_itself(
    name: str, domain: str, left: str | None
) -> None:
    assert has_domain(name, domain) is (left is not None)
    assert strip_domain(name, domain) == left


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a", ["a.ns1.svc.cluster.local"]),
        ("a.b", ["a.b.svc.cluster.local", "a.b.ns1.svc.cluster.local"]),
        ("a.b.c", ["a.b.c.svc.cluster.local"]),
        ("a.b.svc", ["a.b.svc.cluster.local", "a.b.svc.svc.cluster.local"]),
        ("a.b.c.svc", ["a.b.c.svc.cluster.local"]),
        ("a.b.c.d", []),
        ("a.b.svc.cluster.local", []),
    ],
)
def test_short_names_expand_as_in_kubernetes(name: str, expected: list[str]) -> None:
    assert list(expansions(name, "ns1", D)) == expected


@pytest.mark.parametrize(("name", "expected"), [("a.b.c", ["*.b.c", "*.c"]), ("a", []), ("*.b.c", ["*.b.c", "*.c"])])
def test_wildcards_come_most_specific_first(name: str, expected: list[str]) -> None:
    assert list(wildcards(name)) == expected


def test_what_was_asked_comes_first_then_its_expansions_then_those_without_a_search_domain() -> None:
    found = list(aliases("web.ns2.ns1.svc.cluster.local", "ns1", D, ["ns1.svc.cluster.local", "cluster.local"]))
    assert found == [
        Alias("web.ns2.ns1.svc.cluster.local"),
        Alias("web.ns2", "web.ns2"),
        Alias("web.ns2.svc.cluster.local", "web.ns2"),
        Alias("web.ns2.ns1.svc", "web.ns2.ns1.svc"),
    ]


def test_a_final_dot_and_case_make_no_difference() -> None:
    assert normal("Web.Example.") == "web.example"


@given(st.lists(st.text("ab.", min_size=1, max_size=12), max_size=4), st.text("ab.", min_size=1, max_size=20))
def test_every_alias_comes_once(search: list[str], name: str) -> None:
    found = [alias.name for alias in aliases(name, "ns", D, search)]
    assert len(found) == len(set(found))
    assert found[0] == name
