"""SPIFFE IDs: one spelling each, everything else refused."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hbone.errors import IdentityError
from hbone.identity import SpiffeId, TrustDomain

GOOD = [
    "spiffe://cluster.local/ns/shop/sa/orders",
    "spiffe://cluster.local",
    "spiffe://a/b",
    "spiffe://td_1-x.example/A/b.c/-/_/...",
    "spiffe://1.2.3.4/x",
    "spiffe://" + "t" * 255 + "/x",
    "spiffe://t/" + "p" * (2048 - len("spiffe://t/")),
]

BAD = [
    "",
    "spiffe",
    "spiffe:",
    "spiffe:/",
    "spiffe://",
    "spiffe:///",
    "spiffe:///ns/a/sa/b",
    "/ns/a/sa/b",
    "cluster.local/ns/a/sa/b",
    "://cluster.local/x",
    "http://cluster.local/x",
    "SPIFFE://cluster.local/x",
    "Spiffe://cluster.local/x",
    " spiffe://cluster.local/x",
    "spiffe://cluster.local/x ",
    "spiffe://cluster.local/x\n",
    "spiffe://cluster.local\n",
    "spiffe:// cluster.local/x",
    "spiffe://Cluster.local/x",
    "spiffe://cluster.local:443/x",
    "spiffe://cluster.local:/x",
    "spiffe://user@cluster.local/x",
    "spiffe://user:pw@cluster.local/x",
    "spiffe://clüster.local/x",
    "spiffe://cluster%2Elocal/x",
    "spiffe://[::1]/x",
    "spiffe://cluster.local/",
    "spiffe://cluster.local//x",
    "spiffe://cluster.local/x/",
    "spiffe://cluster.local/x//y",
    "spiffe://cluster.local/.",
    "spiffe://cluster.local/..",
    "spiffe://cluster.local/./x",
    "spiffe://cluster.local/x/../y",
    "spiffe://cluster.local/%65vil",
    "spiffe://cluster.local/a%2Fb",
    "spiffe://cluster.local/x?y",
    "spiffe://cluster.local?y",
    "spiffe://cluster.local/x#y",
    "spiffe://cluster.local#y",
    "spiffe://cluster.local/x;y",
    "spiffe://cluster.local/x,spiffe://cluster.local/y",
    "spiffe://cluster.local/x=y",
    "spiffe://cluster.local/x y",
    "spiffe://cluster.local/x\\y",
    "spiffe://cluster.local/x\x00y",
    "spiffe://cluster.local/ö",
    "spiffe://cluster.local/ns/*/sa/b",
    "spiffe://cluster.local/~x",
    "spiffe://cluster.local/é",
    "spiffe://clusterⅠ.local/x",
    "spiffe://" + "t" * 256 + "/x",
    "spiffe://t/" + "p" * (2049 - len("spiffe://t/")),
]


@pytest.mark.parametrize("text", GOOD, ids=lambda t: t[:60])
def test_a_well_formed_id_reads_and_writes_the_same(text: str) -> None:
    assert str(SpiffeId.parse(text)) == text


@pytest.mark.parametrize("text", BAD, ids=lambda t: repr(t[:60]))
def test_a_malformed_id_is_refused_in_one_short_sentence(text: str) -> None:
    with pytest.raises(IdentityError) as caught:
        SpiffeId.parse(text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300


@given(st.text() | st.from_regex(r"spiffe://[a-z0-9./A-Z%@:_-]{0,40}", fullmatch=True))
@example("spiffe://a/\ud800")
def test_parsing_raises_nothing_but_identity_error(text: str) -> None:
    try:
        parsed = SpiffeId.parse(text)
    except IdentityError:
        return
    assert str(parsed) == text
    assert SpiffeId(parsed.trust_domain, parsed.path) == parsed
    assert hash(SpiffeId(parsed.trust_domain, parsed.path)) == hash(parsed)


def test_the_istio_form_has_namespace_and_service_account() -> None:
    spiffe_id = SpiffeId.istio("cluster.local", "shop", "orders")
    assert str(spiffe_id) == "spiffe://cluster.local/ns/shop/sa/orders"
    assert (spiffe_id.namespace, spiffe_id.service_account) == ("shop", "orders")


@pytest.mark.parametrize(
    "path",
    ["", "/ns/shop", "/ns/shop/sa", "/ns/shop/sa/a/b", "/sa/orders/ns/shop", "/NS/shop/SA/orders", "/x/ns/shop/sa/a"],
)
def test_any_other_form_has_no_namespace(path: str) -> None:
    spiffe_id = SpiffeId("cluster.local", path)
    assert spiffe_id.namespace is None
    assert spiffe_id.service_account is None


def test_a_namespace_that_looks_like_the_form_is_not_read_again() -> None:
    spiffe_id = SpiffeId.istio("cluster.local", "sa", "ns")
    assert (spiffe_id.namespace, spiffe_id.service_account) == ("sa", "ns")


@pytest.mark.parametrize(
    ("namespace", "account"), [("", "a"), ("a", ""), ("a/sa/b", "c"), ("a", "b/c"), ("a b", "c"), ("..", "c")]
)
def test_parts_cannot_smuggle_segments(namespace: str, account: str) -> None:
    with pytest.raises(IdentityError):
        SpiffeId.istio("cluster.local", namespace, account)


def test_a_constructor_checks_as_the_parser_does() -> None:
    with pytest.raises(IdentityError):
        SpiffeId("Cluster.Local", "/x")
    with pytest.raises(IdentityError):
        SpiffeId("cluster.local", "x")
    with pytest.raises(IdentityError):
        TrustDomain("a/b")
    assert str(TrustDomain("a.b")) == "a.b"
