from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.miniistiod import MESH, control_plane

from miniistiod import cli
from miniistiod.explain import ExplainError, MeshView, Question, effective, reachability
from miniistiod.registry import Registry
from miniistiod.resources import load

if TYPE_CHECKING:
    from pathlib import Path

    from ztunnel.mesh.store import Store

HBONE = MESH.replace("labels: {app: orders}}", "labels: {app: orders, networking.istio.io/tunnel: http}}")


def view(text: str = HBONE) -> Store:
    registry = Registry.of(load({"a.yaml": text}))
    seen = MeshView()
    return seen.take(seen.news(registry.catalog))


def ask(source: str, destination: str, text: str = HBONE) -> dict[str, Any]:
    return Question(source, destination).answer(view(text), "cluster.local")


@pytest.mark.parametrize(
    "source", ["shop/web-1", "shop/sa/web", "spiffe://cluster.local/ns/shop/sa/web"], ids=["workload", "account", "id"]
)
def test_a_source_is_named_in_three_ways(source: str) -> None:
    found = ask(source, "orders.mesh:80")
    assert found["allowed"]
    assert found["route"]["kind"] == "tunnel"
    assert found["route"]["expectedPeers"] == ["spiffe://cluster.local/ns/shop/sa/orders"]
    assert found["policy"]["policy"] == "shop/orders"
    topics = [step["topic"] for step in found["steps"]]
    assert topics.index("name") < topics.index("destination") < topics.index("route") < topics.index("policy")


def test_what_no_policy_allows_is_refused_and_says_by_which() -> None:
    found = ask("shop/orders-1", "10.1.0.1:8080")
    assert not found["allowed"]
    assert "none allowed" in found["policy"]["reason"]
    assert "shop/orders" in json.dumps(found["steps"])


def test_plaintext_shows_no_identity_so_a_policy_about_identities_refuses_it() -> None:
    assert not ask("shop/web-1", "orders.mesh:80", MESH)["allowed"]


def test_an_identity_without_workload_can_be_asked_about() -> None:
    found = ask("elsewhere/sa/nobody", "10.1.0.1:8080")
    assert not found["allowed"]
    assert "no workload has the identity" in found["steps"][0]["text"]


@pytest.mark.parametrize(
    ("source", "destination", "error"),
    [
        ("shop/nobody", "10.1.0.1:80", "there is no workload 'shop/nobody'"),
        ("web-1", "10.1.0.1:80", "write NAMESPACE/WORKLOAD"),
        ("shop/sa/A b", "10.1.0.1:80", "no identity"),
        ("spiffe://x/y", "10.1.0.1:80", "not of the form"),
        ("spiffe://", "10.1.0.1:80", "no identity"),
        ("shop/web-1", "10.1.0.1", "write HOST:PORT"),
        ("shop/web-1", "nothing.mesh:80", "no service is called 'nothing.mesh'"),
        ("", "", "write NAMESPACE/WORKLOAD"),
    ],
)
def test_a_question_without_answer_says_why(source: str, destination: str, error: str) -> None:
    with pytest.raises(ExplainError, match=error):
        ask(source, destination)


def test_a_view_follows_the_catalog() -> None:
    registry = Registry.of(load({"a.yaml": HBONE}))
    seen = MeshView()
    assert Question("shop/web-1", "orders.mesh:80").answer(seen.take(seen.news(registry.catalog)), "")["allowed"]
    registry.catalog.apply(registry.change({}, [("WorkloadEntry", "shop", "orders-1")]))
    store = seen.take(seen.news(registry.catalog))
    assert not Question("shop/web-1", "orders.mesh:80").answer(store, "")["allowed"]
    assert len(store.workloads) == 1


DENY = """---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: never, namespace: istio-system}
spec: {action: DENY, rules: [{to: [{operation: {ports: ["22"]}}]}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"""


def test_effective_policies_stand_in_the_order_in_which_they_decide() -> None:
    found = effective(view(HBONE + DENY), "shop/orders-1")
    assert [(item["name"], item["action"]) for item in found["policies"]] == [
        ("istio-system/never", "DENY"),
        ("istio-system/istio_converted_static_strict", "DENY"),
        ("shop/orders", "ALLOW"),
    ]
    assert found["otherwise"] == "denied"
    assert effective(view(HBONE + DENY), "shop/web-1")["otherwise"] == "allowed"


def test_who_may_reach_what() -> None:
    found = reachability(view())
    assert found == {
        "targets": ["shop/orders.mesh:80"],
        "rows": [
            {"identity": "spiffe://cluster.local/ns/shop/sa/orders", "cells": ["no"]},
            {"identity": "spiffe://cluster.local/ns/shop/sa/web", "cells": ["yes"]},
        ],
        "cut": False,
    }


async def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    def run() -> int:
        try:
            return cli.main(list(arguments))
        except SystemExit as ended:
            return int(ended.code or 0)

    code = await trio.to_thread.run_sync(run)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


async def test_the_command_explains_and_says_no_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with control_plane(tmp_path, HBONE):
        state = ("--state", str(tmp_path / "state"))
        code, out, _ = await command(capsys, "explain", *state, "shop/web-1", "orders.mesh:80")
        assert code == 0
        assert out.endswith("allowed\n")
        assert "HBONE tunnel to workload shop/orders-1" in out
        code, out, _ = await command(capsys, "explain", *state, "shop/orders-1", "orders.mesh:80", "--json")
        assert code == 1
        assert json.loads(out)["allowed"] is False
        code, _, err = await command(capsys, "explain", *state, "shop/nobody", "orders.mesh:80")
        assert code == 2
        assert "there is no workload 'shop/nobody'" in err


async def test_get_shows_the_policies_of_one_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path, HBONE + DENY):
        state = ("--state", str(tmp_path / "state"))
        code, out, err = await command(capsys, "get", "policies", *state, "--workload", "shop/orders-1")
        assert code == 0
        assert [line.split()[:2] for line in out.splitlines()[1:]] == [
            ["istio-system/never", "DENY"],
            ["istio-system/istio_converted_static_strict", "DENY"],
            ["shop/orders", "ALLOW"],
        ]
        assert "what none of them decides is denied" in err
        assert (await command(capsys, "get", "services", *state, "--workload", "shop/orders-1"))[0] == 2
        code, out, _ = await command(capsys, "get", "policies", *state)
        assert code == 0
        assert [line.split()[3:] for line in out.splitlines()] == [
            ["WORKLOADS", "SAYS"],
            ["2", "no", "identity"],
            ["2", "to", "port", "22"],
            ["1", "from", "account", "shop/web"],
        ]
