from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from tests.support.mesh import at, hbone

from hbone.identity import SpiffeId
from ztunnel.mesh import Authorization, Connection, RejectedResource, Store, decide, parse_ip
from ztunnel.mesh.policy import Action, Kind, Match, PolicyScope, ServiceAccount, StringMatch
from ztunnel.mesh.rbac import compile_policy

WEB = hbone("web", "10.2.0.1")
ME = SpiffeId.parse("spiffe://td/ns/shop/sa/cart")


def connection(
    identity: SpiffeId | None = ME, source: str = "10.1.0.1", destination: str = "10.2.0.1:8080"
) -> Connection:
    return Connection(parse_ip(source), identity, at(destination))


def exact(text: str) -> StringMatch:
    return StringMatch(Kind.EXACT, text)


def matches(found: Connection | None = None, /, **fields: Any) -> bool:
    return compile_policy((((Match(**fields),),),))(found or connection())


def policy(name: str, action: Action = Action.ALLOW, *, match: Match | None = None, **values: Any) -> Authorization:
    values.setdefault("rules", (((match,),),) if match else ())
    values.setdefault("scope", PolicyScope.NAMESPACE)
    return Authorization(name=name, namespace="default", action=action, **values)


def store_with(*policies: Authorization) -> Store:
    store = Store()
    store.apply_policies(policies)
    return store


YES = Match(destination_ports=(8080,))
NO = Match(destination_ports=(1,))


def test_policy_without_rules_matches_nothing() -> None:
    for identity in (ME, None):
        assert not compile_policy(())(connection(identity))


def test_rule_without_clauses_and_clause_without_matches_hold() -> None:
    assert compile_policy(((),))(connection())
    assert compile_policy((((),),))(connection())


def test_empty_match_does_not_hold_but_its_siblings_may() -> None:
    assert not compile_policy((((Match(),),),))(connection())
    assert compile_policy((((Match(), YES),),))(connection())


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((((YES,), (NO,)),), False),  # clauses are AND
        ((((YES, NO), (NO, YES)),), True),  # matches are OR
        ((((NO,),), ((YES,),)), True),  # rules are OR
        ((((NO,),), ((NO,), (YES,))), False),
    ],
)
def test_rules_and_matches_are_or_and_clauses_are_and(rules: Any, expected: bool) -> None:
    assert compile_policy(rules)(connection()) is expected


def test_fields_of_a_match_are_and() -> None:
    assert matches(destination_ports=(8080,), namespaces=(exact("shop"),))
    assert not matches(destination_ports=(8080,), namespaces=(exact("other"),))


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("namespaces", exact("shop"), exact("other")),
        ("principals", exact("td/ns/shop/sa/cart"), exact("td/ns/shop/sa/other")),
        ("service_accounts", ServiceAccount("shop", "cart"), ServiceAccount("shop", "other")),
    ],
)
def test_identity_fields_with_and_without_identity(field: str, good: Any, bad: Any) -> None:
    plaintext = connection(None)
    assert matches(**{field: (bad, good)})
    assert not matches(**{field: (bad,)})
    assert not matches(plaintext, **{field: (good,)})
    assert not matches(**{f"not_{field}": (good,)})
    assert matches(**{f"not_{field}": (bad,)})
    assert matches(plaintext, **{f"not_{field}": (good,)})


def test_trust_domain_does_not_count_for_service_accounts() -> None:
    other = SpiffeId.parse("spiffe://other/ns/shop/sa/cart")
    assert matches(connection(other), service_accounts=(ServiceAccount("shop", "cart"),))
    assert not matches(connection(other), principals=(exact("td/ns/shop/sa/cart"),))


def test_principal_with_its_scheme_never_matches() -> None:
    assert not matches(principals=(exact(str(ME)),))


def test_identity_without_service_account_has_no_namespace() -> None:
    host = SpiffeId.parse("spiffe://td/host/a")
    assert not matches(connection(host), namespaces=(StringMatch(Kind.PRESENCE),))
    assert not matches(connection(host), service_accounts=(ServiceAccount("", ""),))
    assert matches(connection(host), principals=(exact("td/host/a"),))


@pytest.mark.parametrize(
    ("match", "value", "expected"),
    [
        (exact("abc"), "abc", True),
        (exact("abc"), "ABC", False),
        (exact("abc"), "abcd", False),
        (exact(""), "", True),
        (StringMatch(Kind.PREFIX, "ab"), "abc", True),
        (StringMatch(Kind.PREFIX, "bc"), "abc", False),
        (StringMatch(Kind.PREFIX, ""), "abc", True),
        (StringMatch(Kind.SUFFIX, "bc"), "abc", True),
        (StringMatch(Kind.SUFFIX, "ab"), "abc", False),
        (StringMatch(Kind.PRESENCE), "abc", True),
        (StringMatch(Kind.PRESENCE), "", False),
    ],
)
def test_string_match_compiled_and_by_itself(match: StringMatch, value: str, expected: bool) -> None:
    assert match.matches(value) is expected
    identity = SpiffeId.istio("td", value, "x") if value else None
    assert matches(connection(identity), namespaces=(match,)) is expected


@pytest.mark.parametrize("side", ["source", "destination"])
def test_ips_match_by_prefix_and_family(side: str) -> None:
    ips = f"{side}_ips"
    seen = {"source": "10.1.0.1", "destination": "10.2.0.1"}[side]
    wide, other, v6 = ip_network("10.0.0.0/8"), ip_network("192.168.0.0/16"), ip_network("::/0")
    assert matches(**{ips: (other, wide)})
    assert matches(**{ips: (ip_network(seen),)})
    assert matches(**{ips: (ip_network("0.0.0.0/0"),)})
    assert not matches(**{ips: (other, v6)})
    assert not matches(**{f"not_{ips}": (wide,)})
    assert matches(**{f"not_{ips}": (other, v6)})


def test_ipv6_prefix() -> None:
    found = connection(source="fd00:1::5")
    assert matches(found, source_ips=(ip_network("fd00:1::/32"),))
    assert not matches(found, source_ips=(ip_network("fd00:2::/32"),))
    assert not matches(found, source_ips=(ip_network("0.0.0.0/0"),))


def test_destination_ports_are_equal_or_not() -> None:
    assert matches(destination_ports=(1, 8080))
    assert not matches(destination_ports=(1,))
    assert matches(not_destination_ports=(1,))
    assert not matches(not_destination_ports=(1, 8080))


def test_without_policies_everything_is_allowed() -> None:
    decision = decide(Store(), WEB, connection(None))
    assert decision.allowed
    assert decision.message == "no allow policies, allow"


def test_deny_comes_before_allow() -> None:
    decision = decide(store_with(policy("a", match=YES), policy("d", Action.DENY, match=YES)), WEB, connection())
    assert (decision.allowed, decision.policy, decision.message) == (False, "default/d", "deny policy match")
    assert str(decision.error()) == "connection closed due to policy rejection: explicitly denied by: default/d"


def test_deny_that_does_not_match_leaves_it_to_allow() -> None:
    decision = decide(store_with(policy("d", Action.DENY, match=NO), policy("a", match=YES)), WEB, connection())
    assert (decision.allowed, decision.policy, decision.message) == (True, "default/a", "allow policy match")


@pytest.mark.parametrize("allow", [policy("a", match=NO), policy("a")])
def test_allow_policies_that_do_not_match_deny(allow: Authorization) -> None:
    decision = decide(store_with(allow), WEB, connection())
    assert not decision.allowed
    error = decision.error()
    assert error.status == 401
    assert error.flag == "DENY"
    assert str(error) == ("connection closed due to policy rejection: allow policies exist, but none allowed")


def test_only_deny_policies_that_do_not_match_allow() -> None:
    assert decide(store_with(policy("d", Action.DENY), policy("e", Action.DENY, match=NO)), WEB, connection()).allowed


def test_dry_run_is_told_and_changes_nothing() -> None:
    dry = [
        policy("dd", Action.DENY, match=YES, dry_run=True),
        policy("da", match=NO, dry_run=True),
    ]
    decision = decide(store_with(*dry), WEB, connection())
    assert decision.allowed
    assert decision.dry_run == (
        ("dry-run: deny policy match", "default/dd"),
        ("dry-run: no allow policies match", None),
    )
    decision = decide(
        store_with(*dry, policy("a", match=YES), policy("db", match=YES, dry_run=True)), WEB, connection()
    )
    assert (decision.allowed, decision.policy) == (True, "default/a")
    assert decision.dry_run == (
        ("dry-run: deny policy match", "default/dd"),
        ("dry-run: allow policy match", "default/db"),
    )
    denied = decide(store_with(*dry, policy("d", Action.DENY, match=YES)), WEB, connection())
    assert (denied.allowed, denied.dry_run) == (False, (("dry-run: deny policy match", "default/dd"),))


def test_selector_policy_rules_only_who_names_it() -> None:
    store = store_with(policy("s", Action.DENY, match=YES, scope=PolicyScope.WORKLOAD_SELECTOR))
    assert decide(store, WEB, connection()).allowed
    named = hbone("web", "10.2.0.1", authorization_policies=("default/s",))
    assert not decide(store, named, connection()).allowed


def test_named_policy_that_nobody_sent_neither_allows_nor_denies() -> None:
    assert decide(Store(), hbone("web", authorization_policies=("default/gone",)), connection()).allowed


@pytest.mark.parametrize("namespace", ["default", ""])
def test_policy_that_cannot_be_read_denies_what_it_rules(namespace: str) -> None:
    store = store_with(policy("a", match=YES))
    store.apply_policies([], [], [RejectedResource("default/bad", "port is 70000", namespace=namespace)])
    decision = decide(store, WEB, connection())
    assert (decision.allowed, decision.policy) == (False, "default/bad")
    assert decision.reason == "policy default/bad could not be read and denies until it is mended: port is 70000"
    other = hbone("other", "10.2.0.9", namespace="other")
    assert decide(store, other, connection()).allowed is (namespace != "")
    store.apply_policies([], ["default/bad"])
    assert decide(store, WEB, connection()).allowed


def test_unreadable_selector_policy_denies_who_names_it() -> None:
    store = Store()
    store.apply_policies([], [], [RejectedResource("default/bad", "broken", namespace=None)])
    assert decide(store, WEB, connection()).allowed
    assert not decide(store, hbone("web", authorization_policies=("default/bad",)), connection()).allowed


def test_unreadable_dry_run_policy_denies_nothing() -> None:
    store = Store()
    store.apply_policies([], [], [RejectedResource("default/bad", "broken", namespace="default", enforced=False)])
    assert decide(store, WEB, connection()).allowed


def test_decision_follows_a_change_of_policy() -> None:
    store = store_with(policy("p", match=YES))
    assert decide(store, WEB, connection()).allowed
    store.apply_policies([policy("p", Action.DENY, match=YES)])
    assert not decide(store, WEB, connection()).allowed
    store.apply_policies([], ["default/p"])
    assert decide(store, WEB, connection()).allowed
