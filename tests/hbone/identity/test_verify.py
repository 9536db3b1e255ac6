"""Peers: what a certificate proves, and who may come."""

from __future__ import annotations

import datetime

import pytest

from hbone.errors import IdentityError, PeerIdentityError
from hbone.identity import SpiffeId, TrustBundles, allow, any_peer, same_trust_domain, verify_peer_chain
from hbone.testing.ca import WRONG_SVIDS, TestCa

CA = TestCa("cluster.local")
OTHER = TestCa("other.example")
BUNDLES = TrustBundles([CA.bundle, OTHER.bundle])


def test_a_right_certificate_proves_its_id() -> None:
    issued = CA.svid("shop", "orders")
    assert verify_peer_chain(issued.leaf, (), CA.root, BUNDLES) == SpiffeId.istio("cluster.local", "shop", "orders")


def test_a_leaf_without_extended_key_usage_is_right() -> None:
    issued = CA.issue(uris=[str(CA.id("a", "b"))], extended_key_usage=None)
    assert verify_peer_chain(issued.leaf, (), CA.root, BUNDLES) == CA.id("a", "b")


def test_other_kinds_of_names_beside_the_id_are_passed_over() -> None:
    issued = CA.issue(uris=[str(CA.id("a", "b"))], dns=["x.example"], ips=["10.0.0.1"])
    assert verify_peer_chain(issued.leaf, (), CA.root, BUNDLES) == CA.id("a", "b")


@pytest.mark.parametrize("kind", WRONG_SVIDS)
def test_each_wrong_certificate_is_refused(kind: str) -> None:
    with pytest.raises(PeerIdentityError) as caught:
        verify_peer_chain(CA.wrong(kind).leaf, (), CA.root, BUNDLES)
    assert "\n" not in str(caught.value)


def test_a_root_signs_for_its_own_trust_domain_only() -> None:
    stolen = OTHER.issue(uris=["spiffe://cluster.local/ns/shop/sa/orders"])
    with pytest.raises(PeerIdentityError, match=r"not a root of trust domain cluster\.local"):
        verify_peer_chain(stolen.leaf, (), OTHER.root, BUNDLES)


def test_a_trust_domain_without_bundle_is_named_with_those_we_hold() -> None:
    peer = TestCa("third.example").svid("a", "b")
    with pytest.raises(PeerIdentityError, match=r"third\.example.*no roots.*cluster\.local, other\.example"):
        verify_peer_chain(peer.leaf, (), CA.root, BUNDLES)


def test_a_leaf_in_the_place_of_an_intermediate_is_refused() -> None:
    with pytest.raises(PeerIdentityError, match="not a CA"):
        verify_peer_chain(CA.svid("a", "b").leaf, (CA.svid("a", "c").leaf,), CA.root, BUNDLES)


def test_validity_is_judged_at_the_given_moment() -> None:
    leaf = CA.svid("a", "b", ttl=3600).leaf
    end = leaf.not_valid_after_utc
    assert verify_peer_chain(leaf, (), CA.root, BUNDLES, end)
    with pytest.raises(PeerIdentityError, match="expired at"):
        verify_peer_chain(leaf, (), CA.root, BUNDLES, end + datetime.timedelta(seconds=1))
    with pytest.raises(PeerIdentityError, match="not valid before"):
        verify_peer_chain(leaf, (), CA.root, BUNDLES, leaf.not_valid_before_utc - datetime.timedelta(seconds=1))


OWN = SpiffeId.istio("cluster.local", "shop", "web")


def peer(text: str) -> SpiffeId:
    return SpiffeId.parse(text)


def test_same_trust_domain_knows_its_own() -> None:
    assert same_trust_domain(peer("spiffe://cluster.local/x"), OWN)
    assert not same_trust_domain(peer("spiffe://other.example/ns/shop/sa/web"), OWN)


def test_any_peer_lets_everyone_in() -> None:
    assert any_peer(peer("spiffe://other.example/x"), OWN)


def test_allow_matches_whole_ids() -> None:
    authorize = allow("spiffe://cluster.local/ns/shop/sa/orders", SpiffeId("other.example", "/x"))
    assert authorize(peer("spiffe://cluster.local/ns/shop/sa/orders"), OWN)
    assert authorize(peer("spiffe://other.example/x"), OWN)
    assert not authorize(peer("spiffe://cluster.local/ns/shop/sa/orders2"), OWN)
    assert not authorize(peer("spiffe://cluster.local/ns/shop/sa"), OWN)


def test_a_star_stands_for_whole_segments() -> None:
    authorize = allow("spiffe://cluster.local/ns/shop/*")
    assert authorize(peer("spiffe://cluster.local/ns/shop/sa/orders"), OWN)
    assert not authorize(peer("spiffe://cluster.local/ns/shop2/sa/orders"), OWN)
    assert not authorize(peer("spiffe://cluster.local/ns/shop"), OWN)
    assert not authorize(peer("spiffe://other.example/ns/shop/sa/orders"), OWN)


def test_a_star_below_a_trust_domain_is_all_of_it() -> None:
    authorize = allow("spiffe://cluster.local/*")
    assert authorize(peer("spiffe://cluster.local/x"), OWN)
    assert not authorize(peer("spiffe://cluster.local.evil/x"), OWN)


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "spiffe://*",
        "spiffe://*/ns/shop",
        "spiffe://cluster.*",
        "spiffe://cluster.local*",
        "spiffe://cluster.local/ns/*/sa/x",
        "spiffe://cluster.local/ns/shop*",
        "spiffe://cluster.local/ns/shop/**",
        "spiffe://cluster.local//*",
        "cluster.local/*",
        "",
    ],
)
def test_a_pattern_that_could_mean_more_is_refused(pattern: str) -> None:
    with pytest.raises(IdentityError):
        allow(pattern)


def test_allow_without_anyone_is_refused() -> None:
    with pytest.raises(IdentityError, match="at least one"):
        allow()
