"""Live connections are asked about again by what changed, however many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
from tests.support.compiled import plain_only
from tests.support.mesh import at, hbone

from ztunnel.dataplane.connections import Connections, InboundConnection
from ztunnel.mesh import Authorization, Connection, Store, parse_ip
from ztunnel.mesh.policy import Action, PolicyScope

if TYPE_CHECKING:
    from collections.abc import Callable

MANY = 500
ONE = hbone("one", "10.2.0.1")
OTHER = hbone("other", "10.2.0.2", namespace="elsewhere")


pytestmark = plain_only


class Counted(InboundConnection):
    """Counts how often it is asked about."""

    def __init__(self, plane: Any, workload: Any) -> None:
        super().__init__(plane, workload, Connection(parse_ip("10.1.0.1"), None, at("10.2.0.1:80")))
        self.asked = 0

    def recheck(self) -> None:
        self.asked += 1


class Bench:
    def __init__(self) -> None:
        self.store = Store()
        self.store.apply_addresses([ONE, OTHER])
        self.later: list[Callable[[], object]] = []
        self.now = 0.0
        self.connections = Connections(self.store, self.later.append, self.clock)
        self.store.subscribe(self.connections.recheck)
        self.of_one = [Counted(None, ONE) for _ in range(MANY)]
        self.of_other = [Counted(None, OTHER) for _ in range(MANY)]
        for connection in (*self.of_one, *self.of_other):
            self.connections.register(connection)

    def clock(self) -> float:
        self.now += 0.01
        return self.now

    def asked(self) -> tuple[int, int]:
        """How many were asked about since the last time, of each workload; the turns are in `later`."""
        while self.later:
            self.later.pop()()
        counts = (sum(each.asked for each in self.of_one), sum(each.asked for each in self.of_other))
        for each in (*self.of_one, *self.of_other):
            each.asked = 0
        return counts


@pytest.fixture
def bench() -> Bench:
    return Bench()


def policy(name: str, namespace: str, scope: PolicyScope = PolicyScope.NAMESPACE) -> Authorization:
    return Authorization(name=name, namespace=namespace, scope=scope, action=Action.DENY)


def test_change_that_rules_no_workload_here_asks_about_no_connection(bench: Bench) -> None:
    bench.store.apply_policies([policy("p", "third"), policy("q", "default", PolicyScope.WORKLOAD_SELECTOR)])
    bench.store.apply_addresses([hbone("new", "10.2.0.9")])
    bench.store.apply_addresses([attrs.evolve(ONE, healthy=False)])
    assert not bench.later
    assert bench.asked() == (0, 0)


def test_same_policy_sent_again_asks_about_no_connection(bench: Bench) -> None:
    bench.store.apply_policies([policy("p", "default")])
    assert bench.asked() == (MANY, 0)
    bench.store.apply_policies([policy("p", "default")])
    assert bench.asked() == (0, 0)


def test_policy_asks_about_the_connections_that_it_rules(bench: Bench) -> None:
    bench.store.apply_policies([policy("p", "elsewhere")])
    assert bench.asked() == (0, MANY)
    bench.store.apply_policies([policy("g", "", PolicyScope.GLOBAL)])
    assert bench.asked() == (MANY, MANY)
    bench.store.apply_policies([], list(bench.store.policies))
    assert bench.asked() == (MANY, MANY)


def test_policy_list_of_a_workload_asks_about_its_connections(bench: Bench) -> None:
    bench.store.apply_policies([policy("q", "default", PolicyScope.WORKLOAD_SELECTOR)])
    assert bench.asked() == (0, 0)
    bench.store.apply_addresses([attrs.evolve(ONE, authorization_policies=tuple(bench.store.policies))])
    assert bench.asked() == (MANY, 0)
    bench.store.apply_addresses([], [ONE.uid])  # ruled by what it was until it comes back
    assert bench.asked() == (0, 0)


def test_change_in_the_middle_begins_anew_and_is_awaited(bench: Bench) -> None:
    bench.store.apply_policies([policy("p", "default")])
    done: list[str] = []
    bench.connections.when_checked(lambda: done.append("first"))
    bench.later.pop()()  # one slice
    some = sum(each.asked for each in bench.of_one)
    assert 0 < some < MANY
    bench.store.apply_policies([policy("p2", "default"), policy("p3", "elsewhere")])
    assert not done
    assert bench.asked() == (some + MANY, MANY)
    assert done == ["first"]
    bench.connections.when_checked(lambda: done.append("second"))
    assert done == ["first", "second"]


def test_connections_that_ended_are_not_asked_about(bench: Bench) -> None:
    for each in bench.of_one:
        bench.connections.forget(each)
    bench.store.apply_policies([policy("g", "", PolicyScope.GLOBAL)])
    assert bench.asked() == (0, MANY)
