"""A large push is laid over the tables and worked in: whenever somebody looks, it is as if it had come at once."""

from __future__ import annotations

import random
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.mesh import hbone, service, tcp

from ztunnel.mesh import RejectedResource, Store, parse_ip
from ztunnel.mesh.service import LoadBalancer

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = [f"w{n}" for n in range(5)]
IPS = [parse_ip(f"10.2.0.{n}") for n in range(4)]
HOSTS = ["api", "web"]
NAMESPACES = ["default", "other"]


def a_workload(rng: random.Random) -> Any:
    make = rng.choice([hbone, tcp])
    keys = [f"{namespace}/{host}.{namespace}.svc.cluster.local" for host in HOSTS for namespace in NAMESPACES]
    return make(
        rng.choice(["same", "name"]),
        *map(str, rng.sample(IPS, rng.randrange(3))),
        uid=rng.choice(["c//Pod/default/", "c/"]) + rng.choice(NAMES),
        services={key: {80: rng.randrange(3)} for key in rng.sample(keys, rng.randrange(3))},
        healthy=rng.random() < 0.7,
        hostname=rng.choice(["", "w.example"]),
        host_network=rng.random() < 0.1,
    )


def a_service(rng: random.Random) -> Any:
    return service(
        rng.choice(HOSTS),
        *map(str, rng.sample(IPS, rng.randrange(2))),
        namespace=rng.choice(NAMESPACES),
        cidrs=(("", ip_network(rng.choice(["10.2.0.0/30", "10.2.0.0/16"]))),) * rng.randrange(2),
        canonical=rng.random() < 0.5,
        namespace_only=rng.random() < 0.2,
        load_balancer=LoadBalancer(allow_unhealthy=rng.random() < 0.5),
    )


def a_push(rng: random.Random) -> list[tuple[str, Any]]:
    steps: list[tuple[str, Any]] = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.random()
        if kind < 0.5:
            steps.append(("upsert", a_workload(rng)))
        elif kind < 0.7:
            steps.append(("upsert", a_service(rng)))
        elif kind < 0.85:
            name = rng.choice(["c//Pod/default/", "c/"]) + rng.choice(NAMES)
            error = RejectedResource(name, "bad", addresses=(("", rng.choice(IPS)),), wire=b"x")
            steps.append(("reject", error))
        else:
            host, namespace = rng.choice(HOSTS), rng.choice(NAMESPACES)
            uid = rng.choice(["c//Pod/default/", "c/"]) + rng.choice(NAMES)
            steps.append(("remove", rng.choice([uid, f"{namespace}/{host}.{namespace}.svc.cluster.local"])))
    return steps


def view(store: Store) -> dict[str, Any]:
    """All that a connection, DNS or a page can ask for."""
    seen: dict[str, Any] = {
        "workloads": dict(store.workloads),
        "services": dict(store.services),
        "counts": (len(store.workloads), len(store.services)),
        "staged": store.staged(),
    }
    for ip in IPS:
        found = store.workload_by_address("", ip)
        seen[f"at {ip}"] = found
        seen[f"rejected at {ip}"] = store.rejection("", ip) is not None
        for namespace in (*NAMESPACES, None):
            seen[f"vip {ip} {namespace}"] = store.service_by_vip("", ip, namespace)
    for namespace in NAMESPACES:
        seen[f"hostname {namespace}"] = store.workload_by_hostname(namespace, "w.example")
        for host in HOSTS:
            name = f"{host}.{namespace}.svc.cluster.local"
            seen[f"host {name}"] = (store.service_by_host(name, namespace), list(store.services_by_host(name)))
    for name in ("same", "name"):
        seen[f"local {name}"] = store.find_local(name, "default", name)
    for key, one in store.services.items():
        seen[f"endpoints {key}"] = dict(store.endpoints(one))
        seen[f"members {key}"] = dict(store.members(one))
    return seen


def give(push: Any, steps: Sequence[tuple[str, Any]]) -> Any:
    for verb, argument in steps:
        getattr(push, verb)(argument)
    return push.commit()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_layered_pushes_look_like_direct_ones_at_every_step(seed: int) -> None:
    rng = random.Random(seed)
    direct, layered = Store(), Store()
    for _ in range(4):
        steps = a_push(rng)
        expected = give(direct.begin_small(), steps)
        if rng.random() < 0.7:
            push = layered.prepare()
            before = view(layered)
            for verb, argument in steps:
                getattr(push, verb)(argument)
            assert view(layered) == before  # nobody sees any of it
            assert push.commit() == expected
        else:
            assert give(layered.begin_small(), steps) == expected  # over a layer, if one is there
        assert view(layered) == view(direct)
        for _ in range(rng.randrange(30)):
            layered.settle(1)
            assert view(layered) == view(direct)
    while layered.settle(1):
        assert view(layered) == view(direct)
    assert not layered.unsettled
    assert view(layered) == view(direct)
    assert vars(layered._base).keys() == vars(direct._base).keys()
    for name, index in vars(direct._base).items():
        assert filled(vars(layered._base)[name]) == filled(index), name


def filled(index: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in index.items() if value != {}}
