from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import pytest

from hbone.identity import SpiffeId
from miniistiod import auth, issue_tokens
from miniistiod.auth import (
    Authenticator,
    BadNode,
    Caller,
    Presented,
    RateLimiter,
    Refused,
    check_node,
    parse_node_id,
)
from miniistiod.store import Store
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
T = NOW.timestamp()
ORDERS = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/orders")
KEY, OTHER_KEY = "a" * 64, "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        yield store


def one_time(store: Store, name: str | None = "orders-1", lifetime: float | None = None) -> tuple[str, str]:
    token = issue_tokens.create(
        store,
        namespace="shop",
        service_account="orders",
        name=name,
        lifetime=lifetime,
        reusable=False,
        now=T,
    )
    return token.id, parse_enrolment_token(token.text).secret


def reusable(store: Store) -> tuple[str, str]:
    token = issue_tokens.create(
        store, namespace="shop", service_account="orders", name=None, lifetime=None, reusable=True, now=T
    )
    return token.id, token.text


def bearer(text: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "tonic"), ("authorization", f"Bearer {text}"), ("clusterid", "Kubernetes")]


def test_a_certificate_is_enough_for_both(store: Store) -> None:
    authenticator = Authenticator(store)
    shown = Presented(identity=ORDERS, serial="1f", not_before=T)
    assert authenticator.for_stream(shown, [], T) == Caller(identity=ORDERS, how="certificate", serial="1f", since=T)
    assert authenticator.for_certificate(shown, [], KEY, T).identity == ORDERS


@pytest.mark.parametrize(
    "peer",
    ["spiffe://elsewhere/ns/shop/sa/orders", "spiffe://cluster.local/host/a", "spiffe://cluster.local/ns/a/sa/b/c"],
)
def test_a_certificate_of_something_else_is_refused(store: Store, peer: str) -> None:
    with pytest.raises(Refused, match="not a workload of"):
        Authenticator(store).for_stream(Presented(identity=SpiffeId.parse(peer)), bearer(reusable(store)[1]), T)


def test_a_reusable_token_is_enough_for_both(store: Store) -> None:
    token_id, text = reusable(store)
    for _ in range(3):
        caller = Authenticator(store).for_stream(None, bearer(text), T + 5)
        assert caller == Caller(identity=ORDERS, how=f"reusable token {token_id}", token=token_id)
        assert caller.kind == "reusable token"
        assert Authenticator(store).for_certificate(None, bearer(text), KEY, T + 5).identity == ORDERS


def test_a_revoked_reusable_token_is_refused(store: Store) -> None:
    token_id, text = reusable(store)
    assert store.revoke_token(token_id, T + 1)
    with pytest.raises(Refused, match="is revoked"):
        Authenticator(store).for_stream(None, bearer(text), T + 2)


def test_a_reusable_token_ends_after_ninety_days(store: Store) -> None:
    _, text = reusable(store)
    assert Authenticator(store).for_stream(None, bearer(text), T + 89 * 86_400)
    with pytest.raises(Refused, match="expired"):
        Authenticator(store).for_stream(None, bearer(text), T + 90 * 86_400)


def test_a_signed_token_that_is_not_listed_is_refused(store: Store, tmp_path: Path) -> None:
    with Store.create(tmp_path / "other", "cluster.local", NOW) as other:
        other.token_key = store.token_key
        _, text = reusable(other)
    with pytest.raises(Refused, match="is not listed"):
        Authenticator(store).for_stream(None, bearer(text), T)


def test_a_one_time_token_is_good_for_one_key(store: Store) -> None:
    token_id, secret = one_time(store)
    caller = Authenticator(store).for_certificate(None, bearer(secret), KEY, T + 10)
    assert caller == Caller(
        identity=ORDERS, how=f"one-time token {token_id}", name="orders-1", enrolled=True, token=token_id
    )
    assert caller.kind == "one-time token"
    with pytest.raises(Refused, match="was used already"):
        Authenticator(store).for_certificate(None, bearer(secret), OTHER_KEY, T + 11)


def test_the_same_key_may_come_again_within_a_minute(store: Store) -> None:
    _, secret = one_time(store)
    for later in (0.0, 1.0, 60.0):
        assert Authenticator(store).for_certificate(None, bearer(secret), KEY, T + later).enrolled
    for later in (60.1, 3000.0, -1.0):
        with pytest.raises(Refused, match="was used already"):
            Authenticator(store).for_certificate(None, bearer(secret), KEY, T + later)


def test_to_look_at_a_one_time_token_spends_nothing(store: Store) -> None:
    _, secret = one_time(store, lifetime=600.0)
    authenticator = Authenticator(store)
    for _ in range(2):
        assert authenticator.for_certificate(None, bearer(secret), None, T).enrolled
    assert authenticator.for_certificate(None, bearer(secret), KEY, T).enrolled
    assert authenticator.for_certificate(None, bearer(secret), None, T + 1).enrolled  # the same key may come again
    with pytest.raises(Refused, match="was used already"):
        authenticator.for_certificate(None, bearer(secret), OTHER_KEY, T + 1)
    with pytest.raises(Refused, match="was used already"):
        authenticator.for_certificate(None, bearer(secret), None, T + 61)


def test_a_one_time_token_ends(store: Store) -> None:
    _, secret = one_time(store, lifetime=60.0)
    with pytest.raises(Refused, match="is expired"):
        Authenticator(store).for_certificate(None, bearer(secret), KEY, T + 60)


def test_a_revoked_one_time_token_is_refused_even_to_its_key(store: Store) -> None:
    token_id, secret = one_time(store)
    Authenticator(store).for_certificate(None, bearer(secret), KEY, T)
    store.revoke_token(token_id, T + 1)
    with pytest.raises(Refused, match="is revoked"):
        Authenticator(store).for_certificate(None, bearer(secret), KEY, T + 2)


def test_a_one_time_token_opens_no_stream_and_stays_unspent(store: Store) -> None:
    _, secret = one_time(store)
    with pytest.raises(Refused, match="first certificate only"):
        Authenticator(store).for_stream(None, bearer(secret), T)
    assert Authenticator(store).for_certificate(None, bearer(secret), KEY, T).enrolled


def test_a_guessed_secret_of_a_known_id_is_refused_and_spends_nothing(store: Store) -> None:
    token_id, secret = one_time(store)
    with pytest.raises(Refused, match="unknown one-time token"):
        Authenticator(store).for_certificate(None, bearer(f"once.{token_id}.{'x' * 43}"), KEY, T)
    assert Authenticator(store).for_certificate(None, bearer(secret), KEY, T).enrolled


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ([], "neither a client certificate nor a token"),
        ([("authorization", "Basic eA==")], "without a bearer token"),
        ([("authorization", "bearer x")], "without a bearer token"),
        ([("authorization", "Bearer é")], "without a bearer token"),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], "2 authorization headers"),
        ([("authorization", "Bearer ")], "not a token of this control plane"),
        ([("authorization", "Bearer once.nobody." + "x" * 43)], "unknown one-time token"),
    ],
)
def test_a_caller_without_proof_is_refused(store: Store, metadata: list[tuple[str, str | bytes]], why: str) -> None:
    with pytest.raises(Refused, match=why):
        Authenticator(store).for_certificate(None, metadata, KEY, T)


def test_what_is_refused_never_repeats_the_token(store: Store) -> None:
    _, text = reusable(store)
    token_id, secret = one_time(store)
    store.revoke_token(token_id, T)
    for shown in (text[:-2] + "xx", secret):
        with pytest.raises(Refused) as caught:
            Authenticator(store).for_certificate(None, bearer(shown), KEY, T + 1)
        assert shown[30:60] not in str(caught.value)


def test_a_node_id_is_taken_apart() -> None:
    node = parse_node_id(
        "ztunnel~10.0.0.1~vm1.app~app.svc.cluster.local", {"NAME": "vm1", "NAMESPACE": "app", "NODE_NAME": ""}
    )
    assert (node.kind, node.name, node.namespace, node.node_name) == ("ztunnel", "vm1", "app", "")
    assert parse_node_id("ztunnel~1.1.1.1~a~shop.svc.cluster.local", {}).namespace == "shop"


@pytest.mark.parametrize("text", ["", "ztunnel", "ztunnel~1.1.1.1~a", "a~b~c~d", "ztunnel~1.1.1.1~a~b~c"])
def test_a_wrong_node_id_is_refused(text: str) -> None:
    with pytest.raises(BadNode):
        parse_node_id(text, {})


@pytest.mark.parametrize(
    ("metadata", "fits"),
    [
        ({"NAMESPACE": "shop"}, True),
        ({"NAMESPACE": "shop", "SERVICE_ACCOUNT": "orders"}, True),
        ({"NAMESPACE": "shop", "SERVICE_ACCOUNT": "other"}, False),
        ({"NAMESPACE": "web"}, False),
        ({"NAMESPACE": ""}, False),
        ({}, False),
    ],
)
def test_a_node_may_claim_its_own_namespace_and_account_only(metadata: dict[str, str], fits: bool) -> None:
    node = parse_node_id("ztunnel~1.1.1.1~a~web.svc.cluster.local", metadata)
    caller = Caller(identity=ORDERS, how="certificate")
    if fits:
        check_node(node, caller)
    else:
        with pytest.raises(Refused, match="the node claims"):
            check_node(node, caller)


def test_a_node_without_names_claims_nothing() -> None:
    """A stock ztunnel without POD_NAME and POD_NAMESPACE."""
    node = parse_node_id("ztunnel~1.1.1.1~.~.svc.cluster.local", {"NAME": "", "NAMESPACE": ""})
    check_node(node, Caller(identity=ORDERS, how="reusable token x"))


def test_the_limiter_lets_a_burst_pass_and_then_a_rate() -> None:
    limiter = RateLimiter(per_second=2, burst=3)
    assert [limiter.allow("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limiter.allow("b", 0.0)
    assert [limiter.allow("a", 1.0) for _ in range(3)] == [True, True, False]
    assert not limiter.allow("a", 0.5)  # a clock that goes back gives nothing


def test_the_limiter_forgets_the_longest_unused() -> None:
    limiter = RateLimiter(per_second=1, burst=1, keys=100)
    for number in range(1000):
        limiter.allow(str(number), 0.0)
    assert len(limiter._buckets) == 100
    assert auth.RateLimiter is RateLimiter
