from __future__ import annotations

import json

from tests.support.mesh import at, gateway_at, gateway_named, hbone, service, store_of, tcp

from ztunnel.mesh import Authorization, Store
from ztunnel.mesh.explain import Explanation, explain
from ztunnel.mesh.policy import Action, Kind, Match, PolicyScope, StringMatch

CLIENT = hbone("client", "10.1.0.1")
WEB = "default/web.default.svc.cluster.local"


def told(store: Store, destination: str) -> Explanation:
    store.apply_addresses([CLIENT])
    return explain(store, CLIENT, at(destination))


def texts(found: Explanation, topic: str) -> list[str]:
    return [step.text for step in found.steps if step.topic == topic]


def test_service_is_told_with_each_endpoint_and_the_expected_peer() -> None:
    found = told(
        store_of(
            service("web", "10.96.0.1"),
            hbone("good", "10.2.0.1", services={WEB: {}}),
            hbone("sick", "10.2.0.2", services={WEB: {}}, healthy=False),
            hbone("idle", "10.2.0.3", services={WEB: {}}, capacity=0),
        ),
        "10.96.0.1:80",
    )
    assert found.allowed
    assert texts(found, "destination") == [f"10.96.0.1 is a virtual address of service {WEB}"]
    assert sorted(texts(found, "endpoints")) == [
        "c//Pod/default/idle is left out: its capacity is 0",
        "c//Pod/default/sick is left out: it is unhealthy",
        "default/good may be chosen, on port 8080, with weight 1",
    ]
    assert texts(found, "route") == [
        "HBONE tunnel to workload default/good at 10.2.0.1:15008, asking for 10.2.0.1:8080"
    ]
    assert texts(found, "peer") == ["it must prove to be spiffe://cluster.local/ns/default/sa/good"]


def test_denying_policy_is_named() -> None:
    store = store_of(hbone("web", "10.2.0.1"))
    match = Match(principals=(StringMatch(Kind.SUFFIX, "/sa/client"),))
    deny = Authorization(
        name="no", namespace="default", scope=PolicyScope.NAMESPACE, action=Action.DENY, rules=(((match,),),)
    )
    store.apply_policies([deny])
    found = told(store, "10.2.0.1:80")
    assert not found.allowed
    assert texts(found, "policy") == [
        "policies of default/web: default/no",
        "default/no, which denies, matches",
        "denied: explicitly denied by: default/no",
    ]
    assert json.loads(json.dumps(found.to_dict()))["policy"]["policy"] == "default/no"


def test_each_policy_is_told_with_whether_it_matches() -> None:
    store = store_of(hbone("web", "10.2.0.1"))

    def policy(name: str, action: Action, account: str, *, dry_run: bool = False) -> Authorization:
        match = Match(principals=(StringMatch(Kind.SUFFIX, f"/sa/{account}"),))
        return Authorization(
            name=name,
            namespace="default",
            scope=PolicyScope.NAMESPACE,
            action=action,
            rules=(((match,),),),
            dry_run=dry_run,
        )

    store.apply_policies(
        [
            policy("others", Action.ALLOW, "other"),
            policy("clients", Action.ALLOW, "client"),
            policy("not-others", Action.DENY, "other"),
            policy("soon", Action.DENY, "client", dry_run=True),
        ]
    )
    found = texts(told(store, "10.2.0.1:80"), "policy")
    assert [text for text in found if ", which " in text] == [
        "default/soon, which would deny but is a dry run, matches",
        "default/not-others, which denies, does not match",
        "default/others, which allows, does not match",
        "default/clients, which allows, matches",
    ]
    assert found[-1] == "allowed: allowed by: default/clients"


def test_plaintext_carries_no_identity_to_the_policies() -> None:
    store = store_of(tcp("web", "10.2.0.1"))
    match = Match(principals=(StringMatch(Kind.PRESENCE),))
    allow = Authorization(
        name="who", namespace="default", scope=PolicyScope.NAMESPACE, action=Action.ALLOW, rules=(((match,),),)
    )
    store.apply_policies([allow])
    found = told(store, "10.2.0.1:80")
    assert texts(found, "route") == ["plain TCP to default/web at 10.2.0.1:80: it takes no tunnels"]
    assert not found.allowed


def test_waypoint_passthrough_and_refusal_are_told() -> None:
    store = store_of(hbone("web", "10.2.0.1", waypoint=gateway_at("10.9.0.9")))
    found = told(store, "10.2.0.1:80")
    assert texts(found, "waypoint") == [
        "traffic to it belongs through waypoint /10.9.0.9:15008",
        "/10.9.0.9:15008 is neither a service nor a workload that is known here",
    ]
    assert texts(found, "route") == ["refused: unknown waypoint: /10.9.0.9:15008"]
    assert found.to_dict()["route"] == {"kind": "refused", "error": "unknown waypoint: /10.9.0.9:15008"}
    passed = told(store, "1.2.3.4:80")
    assert texts(passed, "destination") == ["1.2.3.4 is not in the mesh on network ''"]
    assert passed.allowed
    assert passed.decision is None


def test_many_endpoints_are_cut_short() -> None:
    many = [hbone(f"w{n}", f"10.2.0.{n}", services={WEB: {}}) for n in range(50)]
    found = told(store_of(service("web", "10.96.0.1"), *many), "10.96.0.1:80")
    assert len(texts(found, "endpoints")) == 21
    assert texts(found, "endpoints")[-1] == "and 30 more"


def test_gateway_is_named_with_the_alternatives_that_were_passed_over() -> None:
    source = hbone("client", "10.1.0.1", network="near")
    reference = gateway_named("istio", "gw.example", 15009)
    key = "istio/gw.example"
    store = store_of(
        source,
        service("web", "near/10.96.0.1"),
        hbone("far", "10.2.0.1", network="far", network_gateway=reference, services={WEB: {}}),
        hbone("lost", "10.2.0.2", network="third", services={WEB: {}}),
        service("gw", namespace="istio", hostname="gw.example", ports={15009: 15008}),
        tcp("gw-1", "9.9.9.1", network="far", services={key: {}}),
        tcp("gw-2", "9.9.9.2", network="far", services={key: {}}, capacity=0),
    )
    found = explain(store, source, at("10.96.0.1:80"), network="near")
    assert found.allowed
    assert texts(found, "endpoints") == [
        "default/far on network 'far' may be chosen, with weight 1",
        "c//Pod/default/lost is left out: it is on network 'third', and no gateway to there is known",
    ]
    assert texts(found, "gateway") == [
        "network 'far' is reached through istio/gw.example:15009",
        "default/gw-1 may be chosen, on port 15008, with weight 1",
        "c//Pod/default/gw-2 is left out: its capacity is 0",
    ]
    assert texts(found, "route") == [
        "HBONE tunnel to gateway default/gw-1 at 9.9.9.1:15008, asking for web.default.svc.cluster.local:80",
        "in it, a tunnel to whom the gateway chooses on network 'far'",
    ]
    assert texts(found, "peer") == [
        "it must prove to be spiffe://cluster.local/ns/default/sa/gw-1",
        "whoever answers behind it must prove to be spiffe://cluster.local/ns/default/sa/far",
    ]
    assert found.decision is None
    told = found.to_dict()["route"]
    assert told["network"] == "far"
    assert told["expectedPeersBehindGateway"] == ["spiffe://cluster.local/ns/default/sa/far"]


def test_unknown_gateway_is_told() -> None:
    source = hbone("client", "10.1.0.1", network="near")
    away = gateway_at("9.9.9.9", 15009, network="far")
    far = hbone("far", "10.2.0.1", network="far", network_gateway=away, services={WEB: {}})
    found = explain(store_of(source, service("web", "near/10.96.0.1"), far), source, at("10.96.0.1:80"), network="near")
    assert texts(found, "gateway")[1] == "far/9.9.9.9:15009 is neither a service nor a workload that is known here"
    assert texts(found, "route") == ["refused: unknown network gateway: far/9.9.9.9:15009"]
