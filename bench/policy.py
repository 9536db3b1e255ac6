"""How long one decision takes among many policies."""

from __future__ import annotations

import time

from hbone.identity import SpiffeId
from ztunnel.mesh import Authorization, Connection, Store, decide, parse_ip
from ztunnel.mesh.policy import Action, Kind, Match, PolicyScope, StringMatch
from ztunnel.mesh.workload import Workload

__all__ = ["microseconds", "store_of"]

TIMES = 50


def store_of(count: int) -> tuple[Store, Workload, Connection]:
    """`count` policies that allow one principal each, a workload that they are for, and whom the last allows."""
    store = Store()
    made = []
    for number in range(count):
        who = "client" if number == count - 1 else f"other-{number}"
        match = Match(principals=(StringMatch(Kind.EXACT, f"cluster.local/ns/bench/sa/{who}"),))
        made.append(
            Authorization(
                name=f"p{number:05}",
                namespace="bench",
                scope=PolicyScope.NAMESPACE,
                action=Action.ALLOW,
                rules=(((match,),),),
            )
        )
    store.apply_policies(made)
    server = Workload(uid="server", name="server", namespace="bench", addresses=(parse_ip("10.0.0.2"),))
    store.apply_addresses([server])
    client = SpiffeId.istio("cluster.local", "bench", "client")
    return store, server, Connection(parse_ip("10.0.0.1"), client, (parse_ip("10.0.0.2"), 8080))


def microseconds(count: int, rounds: int) -> list[float]:
    """Microseconds of a decision, for each round."""
    store, server, connection = store_of(count)
    assert decide(store, server, connection).allowed
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(TIMES):
            decide(store, server, connection)
        found.append((time.perf_counter() - began) / TIMES * 1e6)
    return found
