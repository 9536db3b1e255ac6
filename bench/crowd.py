"""What a large mesh costs beside a small one: memory of a workload, time of a route and of a change.

Run as a process of its own, because memory is that of the process; prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import trio

from bench.errors import BenchError
from bench.measure import resident
from ztunnel.control.apply import apply
from ztunnel.control.pace import Pace, QuietCollector
from ztunnel.control.response import read
from ztunnel.mesh import ADDRESS_TYPE, Store, Workload, decode_address, parse_ip
from ztunnel.mesh.route import route
from ztunnel.wire import discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ztunnel.mesh import IpAddress

__all__ = ["SMALL", "figures"]

SMALL = 100
"""Workloads of the small mesh; its services are a tenth."""
DESTINATIONS = 100
LOOKUPS = 2000
CHANGES = 500


def _host(service: int) -> str:
    return f"svc-{service}.crowd.svc.cluster.local"


def workload(number: int, services: int, *, healthy: bool = True) -> tuple[str, bytes]:
    """Name and resource of a workload."""
    message = workload_pb2.Address()
    made = message.workload
    made.uid = f"Kubernetes/networking.istio.io/WorkloadEntry/crowd/crowd-{number}"
    made.name = made.workload_name = f"crowd-{number}"
    made.namespace = "crowd"
    made.addresses.append((0x0A000000 + number).to_bytes(4, "big"))
    made.tunnel_protocol = workload_pb2.HBONE
    made.service_account = made.canonical_name = f"app-{number % services}"
    made.trust_domain, made.cluster_id, made.canonical_revision = "cluster.local", "Kubernetes", "latest"
    made.status = workload_pb2.HEALTHY if healthy else workload_pb2.UNHEALTHY
    port = made.services[f"crowd/{_host(number % services)}"].ports.add()
    port.service_port, port.target_port = 80, 8080
    return made.uid, message.SerializeToString()


def service(number: int) -> tuple[str, bytes]:
    """Name and resource of a service."""
    message = workload_pb2.Address()
    made = message.service
    made.name, made.namespace, made.hostname = f"svc-{number}", "crowd", _host(number)
    made.addresses.add().address = (0xF0000000 + number).to_bytes(4, "big")
    port = made.ports.add()
    port.service_port, port.target_port = 80, 8080
    return f"crowd/{made.hostname}", message.SerializeToString()


def push(workloads: int, services: int) -> bytes:
    """A response of discovery with all of them."""
    parts = [discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="1").SerializeToString()]

    def everything() -> Iterator[tuple[str, bytes]]:
        yield from (service(number) for number in range(services))
        yield from (workload(number, services) for number in range(workloads))

    for name, payload in everything():
        one = discovery_pb2.DeltaDiscoveryResponse()
        resource = one.resources.add(name=name, version="0123456789abcdef")
        resource.resource.value = payload
        parts.append(one.SerializeToString())
    return b"".join(parts)


async def _store_of(workloads: int, services: int) -> Store:
    store, pace = Store(), Pace(collector=QuietCollector())
    await apply(store, await read(push(workloads, services), pace), pace)
    while store.settle(1000):
        pass
    return store


def _destinations(count: int, workloads: int, services: int, rng: random.Random) -> list[tuple[IpAddress, int]]:
    """Half of them workloads, half services; in objects of their own, as those of a new connection are."""
    some = [0x0A000000 + rng.randrange(workloads) for _ in range(count // 2)]
    some += [0xF0000000 + rng.randrange(services) for _ in range(count // 2)]
    found = [(parse_ip(".".join(map(str, ip.to_bytes(4, "big")))), 80) for ip in some]
    rng.shuffle(found)
    return found


def _lookup_us(store: Store, workloads: int, services: int, rng: random.Random) -> float:
    """Microseconds to find out where a connection goes, to one of a hundred destinations."""
    source = next(iter(store.workloads.values()))
    # The same ones in either mesh.
    destinations = _destinations(DESTINATIONS, min(workloads, SMALL), min(services, SMALL // 10), rng)
    for destination in destinations:
        route(store, source, destination)
    began = time.process_time()
    for number in range(LOOKUPS):
        route(store, source, destinations[number % DESTINATIONS])
    return (time.process_time() - began) / LOOKUPS * 1e6


def _first_us(store: Store, workloads: int, services: int, rng: random.Random) -> float:
    """Microseconds to find that out for the first time."""
    source = next(iter(store.workloads.values()))
    destinations = _destinations(LOOKUPS, workloads, services, rng)
    began = time.process_time()
    for destination in destinations:
        route(store, source, destination)
    return (time.process_time() - began) / LOOKUPS * 1e6


def _change_us(store: Store, workloads: int, services: int, rng: random.Random) -> float:
    changed = [workload(rng.randrange(workloads), services, healthy=bool(number % 2)) for number in range(CHANGES)]
    began = time.process_time()
    for name, payload in changed:
        found = decode_address(name, payload)
        assert isinstance(found, Workload)
        store.apply_addresses([found])
    return (time.process_time() - began) / CHANGES * 1e6


def measure(rounds: int, workloads: int, services: int) -> dict[str, list[float]]:
    """Figures of each round."""
    rng = random.Random(7)
    small = trio.run(_store_of, SMALL, SMALL // 10)
    gc.collect()
    before = resident([os.getpid()])
    large = trio.run(_store_of, workloads, services)
    gc.collect()
    found: dict[str, list[float]] = {"workload_kb": [(resident([os.getpid()]) - before) * 1e3 / workloads]}
    for _ in range(rounds):
        for name, measured in (("lookup", _lookup_us), ("change", _change_us)):
            few = measured(small, SMALL, SMALL // 10, rng)
            many = measured(large, workloads, services, rng)
            found.setdefault(f"{name}_us", []).append(many)
            found.setdefault(f"{name}_ratio", []).append(many / few)
        found.setdefault("first_us", []).append(_first_us(large, workloads, services, rng))
    return found


def figures(rounds: int, workloads: int, services: int) -> dict[str, list[float]]:
    """Figures of each round, measured in another process.

    Raises:
        BenchError: it failed.
    """
    command = [sys.executable, "-m", "bench.crowd", str(rounds), str(workloads), str(services)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise BenchError(f"a large mesh could not be measured: {done.stderr.strip()[-500:]}")
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:4]))))
