"""What a change costs, and what of it reaches whom: counted, not timed."""

from __future__ import annotations

import contextlib
import cProfile
from typing import TYPE_CHECKING

import trio
from tests.support.miniistiod import ADDRESS, AUTHORIZATION, DELTA, MESH, acknowledge, bearer, control_plane, subscribe
from tests.support.sizes import FULL

from hbone.grpc import GrpcConfig
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from miniistiod.discovery import Subscriber
from miniistiod.registry import Registry
from miniistiod.resources import Loader, load
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    import miniistiod
    from hbone.trio.grpc import GrpcStream

STATE_OF_THE_WORLD = DELTA.replace("Delta", "Stream")
PER_FILE = 10


def entry(number: int, address: str | None = None) -> str:
    place = address or f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    labels = f"{{app: a{number % 50}, networking.istio.io/tunnel: http}}"
    head = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
    return f"{head}metadata: {{name: w{number}, namespace: shop, labels: {labels}}}\nspec: {{address: {place}}}\n"


def files_of(count: int) -> dict[str, str]:
    return {
        f"{first:06}.yaml": "---\n".join(entry(number) for number in range(first, first + PER_FILE))
        for first in range(0, count, PER_FILE)
    }


def work_of_one_change(count: int) -> tuple[int, int, int]:
    """Calls of functions, resources and bytes sent, when one of `count` workloads changes."""
    loader, registry = Loader(), Registry.of(load({}))
    loader.update(files_of(count))
    registry.catalog.apply(registry.change(loader.delta().changed))
    loader.taken()
    subscribers = [Subscriber(f"{number}", registry.catalog) for number in range(10)]
    for number, subscriber in enumerate(subscribers):
        first = discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS)
        if number % 2:  # on demand, and nothing asked for yet
            first.resource_names_subscribe.append("*")
            first.resource_names_unsubscribe.append("*")
        subscriber.request(first, 0.0)
        subscriber.request(discovery_pb2.DeltaDiscoveryRequest(type_url=AUTHORIZATION), 0.0)
        subscriber.take(0.0)
    text = files_of(PER_FILE)["000000.yaml"].replace("address: 10.0.0.3}", "address: 10.250.0.1}")
    profile = cProfile.Profile()
    with profile:
        loader.update({"000000.yaml": text})
        assert not loader.errors()
        registry.catalog.apply(registry.change(loader.delta().changed))
        loader.taken()
        responses = [response for subscriber in subscribers for response in subscriber.take(0.0)]
    calls = sum(item.callcount for item in profile.getstats())
    return calls, sum(item.resources for item in responses), sum(len(item.data) for item in responses)


def test_one_change_is_the_same_work_in_a_mesh_ten_times_as_large() -> None:
    small, large = (10_000, 100_000) if FULL else (200, 2_000)
    work_of_one_change(PER_FILE)  # what is done once in a process
    calls, sent, size = work_of_one_change(small)
    assert sent == 5
    assert work_of_one_change(large)[1:] == (sent, size)
    assert work_of_one_change(large)[0] <= 1.3 * calls


@contextlib.asynccontextmanager
async def stream(cp: miniistiod.MiniIstiod, path: str = DELTA) -> AsyncGenerator[GrpcStream]:
    token = bearer(cp.create_token("shop", "orders", reusable=True))
    tls = TlsContext.client(None, roots=cp.root_pem, server_name="localhost")
    with trio.fail_after(60):
        client = GrpcClient.connect("127.0.0.1", cp.port, tls)
        async with client as opened, opened.stream(path, token) as found:
            yield found


async def receive(found: GrpcStream) -> discovery_pb2.DeltaDiscoveryResponse:
    data = await found.receive(64 << 20)
    assert data is not None
    response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
    await found.send(acknowledge(response))
    return response


async def test_a_change_to_a_thousand_files_is_one_push(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp, stream(cp) as opened:
        await opened.send(subscribe(ADDRESS))
        await opened.send(subscribe(AUTHORIZATION))
        await receive(opened)
        await receive(opened)
        number = cp.mesh.catalog.number
        new = tmp_path / "new"
        new.mkdir()
        for count in range(1000):
            (new / f"{count}.yaml").write_text(entry(count + 1000, f"10.20.{count >> 8}.{count & 255}"))
        new.rename(cp.config.config_dir / "new")  # all at once, so that no look falls in between
        assert len((await receive(opened)).resources) == 1000
        assert cp.mesh.catalog.number == number + 1


async def test_a_hundred_thousand_retained_versions_can_come_back(tmp_path: Path) -> None:
    held = {
        f"Kubernetes/networking.istio.io/WorkloadEntry/shop/gone-{number:06}": "0" * 16 for number in range(100_000)
    }
    request = subscribe(ADDRESS, initial_resource_versions=held)
    assert len(request) > GrpcConfig().max_message_size
    async with control_plane(tmp_path) as cp, stream(cp) as opened:
        await opened.send(request)
        await opened.send(subscribe(AUTHORIZATION))
        await receive(opened)
        response = await receive(opened)
        assert len(response.resources) == 3
        assert len(response.removed_resources) == 100_000


async def test_the_older_form_of_discovery_is_answered(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp, stream(cp, STATE_OF_THE_WORLD) as opened:
        await opened.send(whole(AUTHORIZATION))
        assert [item.type_url for item in (await world(opened)).resources] == [AUTHORIZATION]
        await opened.send(whole(ADDRESS))
        assert len((await world(opened)).resources) == 3
        path = cp.config.config_dir / "mesh.yaml"
        path.write_text(MESH.replace("10.1.0.2", "10.1.0.3"))
        await cp.reload()
        changed = await world(opened)
        assert (changed.type_url, len(changed.resources)) == (ADDRESS, 3)


def whole(url: str) -> bytes:
    """The first request of the older form."""
    delta = discovery_pb2.DeltaDiscoveryRequest.FromString(subscribe(url))
    return discovery_pb2.DiscoveryRequest(node=delta.node, type_url=url).SerializeToString()


async def world(opened: GrpcStream) -> discovery_pb2.DiscoveryResponse:
    data = await opened.receive()
    assert data is not None
    return discovery_pb2.DiscoveryResponse.FromString(data)
