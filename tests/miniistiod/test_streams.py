"""Discovery streams over TLS: who reads slowly, whose connection grows old, and who sends too much."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
from tests.miniistiod.test_registrar import GROUPS, state_of, until, workload
from tests.miniistiod.test_vm import join, machine, token
from tests.support.callers import dial, discovery
from tests.support.miniistiod import (
    ADDRESS,
    AUTHORIZATION,
    CREATE_CERTIFICATE,
    DELTA,
    MESH,
    bearer,
    control_plane,
    subscribe,
    uid,
)

from hbone.grpc import GrpcConfig, GrpcError, StatusCode
from hbone.trio.grpc import GrpcServer
from miniistiod import app, certificates
from ztunnel.wire import ca_pb2, discovery_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.callers import Stream

    import miniistiod

CROWD = 1500
"""Workloads, so that the first answer is larger than all windows and buffers on the way."""
CHANGES = 20


def entry(name: str, address: str) -> str:
    head = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n"
    return f"{head}metadata: {{name: {name}, namespace: shop}}\nspec: {{address: {address}}}\n"


def put(cp: miniistiod.MiniIstiod, name: str, text: str) -> None:
    """Put a document in place in one step: nobody sees half of it."""
    unseen = cp.config.config_dir / f".{name}"
    unseen.write_text(text)
    unseen.rename(cp.config.config_dir / name)


async def addresses(stream: Stream) -> list[str]:
    """Names in the next answer about addresses."""
    while True:
        response = await stream.response()
        if response.type_url == ADDRESS:
            return [item.name for item in response.resources]


async def test_who_does_not_read_holds_up_nobody_and_catches_up_in_one_answer(tmp_path: Path) -> None:
    crowd = "---\n".join(entry(f"w{number}", f"10.1.{number >> 8}.{number & 255}") for number in range(CROWD))
    async with control_plane(tmp_path, crowd) as cp:
        caller = bearer(cp.create_token("shop", "orders", reusable=True))
        async with discovery(cp, None, caller, name="slow") as slow, discovery(cp, None, caller, name="quick") as quick:
            assert len(await addresses(quick)) == CROWD
            await until(lambda: len(cp.mesh._listeners) == 2)
            for number in range(CHANGES):
                text = entry("new", f"10.2.0.{number}") + "---\n" + entry(f"new-{number}", f"10.3.0.{number}")
                put(cp, "new.yaml", text)
                await cp.reload()
                assert uid("new") in await addresses(quick)
            assert len(await addresses(slow)) == CROWD
            assert set(await addresses(slow)) == {uid("new"), uid(f"new-{CHANGES - 1}")}


def settled(stream: Any) -> bool:
    """It has acknowledged everything, and nothing is to be done for it."""
    told = all(item["acknowledged"] for item in stream.subscriber.describe().values())
    return told and stream.idle and not stream.wake.is_set()


async def test_who_gets_nothing_of_a_change_sleeps_on(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        caller = bearer(cp.create_token("shop", "orders", reusable=True))
        async with (
            discovery(cp, None, caller, types=(AUTHORIZATION,), name="a") as one,
            discovery(cp, None, caller, name="b") as other,
        ):
            name = uid("orders-1")
            asking = discovery_pb2.DeltaDiscoveryRequest.FromString(subscribe(ADDRESS, name="a"))
            asking.resource_names_subscribe.append(name)
            await one.stream.send(asking.SerializeToString())
            assert await addresses(one) == [name]
            assert len(await addresses(other)) == 3
            streams = cp.api.discovery.streams.values()
            await until(lambda: all(settled(stream) for stream in streams))
            (sleeper,) = (stream for stream in streams if "~a." in stream.node.id)
            event = sleeper.wake
            put(cp, "new.yaml", entry("new", "10.2.0.9"))
            await cp.reload()
            assert await addresses(other) == [uid("new")]
            assert sleeper.wake is event
            assert not event.is_set()
            put(cp, "mesh.yaml", MESH.replace("10.1.0.1", "10.1.0.7"))
            await cp.reload()
            assert await addresses(one) == [name]


async def test_a_connection_that_grew_old_ends_gracefully_and_its_machine_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    young = GrpcConfig(max_connection_age=0.3, drain_grace=0.1)
    monkeypatch.setattr(app, "GrpcServer", functools.partial(GrpcServer, config=young))
    async with control_plane(tmp_path, GROUPS) as cp:
        await join(cp, tmp_path / "vm", token(cp, group="carts").text)
        async with machine(cp, tmp_path / "vm") as mesh:
            await until(lambda: mesh.own_workload() is not None)
            seen: set[str] = set()

            def three_streams() -> bool:
                seen.update(cp.api.discovery.streams)
                assert workload(cp) is not None
                assert mesh.own_workload() is not None
                return len(seen) >= 3

            await until(three_streams)
            put(cp, "new.yaml", entry("new", "10.2.0.9"))
            await until(lambda: uid("new") in mesh.store.workloads)
            assert state_of(cp) == "connected"


async def refusal(cp: miniistiod.MiniIstiod, path: str, message: bytes) -> StatusCode:
    """What becomes of a stranger's call with a message."""

    async def call() -> None:
        async with dial(cp) as client, client.stream(path, [("authorization", "Bearer nonsense")]) as stream:
            await stream.send(message)
            await stream.receive()

    with pytest.raises(GrpcError) as caught:
        await call()
    return caught.value.code


async def test_nobody_who_is_not_known_is_read_out(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        assert await refusal(cp, DELTA, b"x" * (8 << 20)) is StatusCode.UNAUTHENTICATED
        message = ca_pb2.IstioCertificateRequest(csr="x" * certificates.MAX_REQUEST).SerializeToString()
        assert await refusal(cp, CREATE_CERTIFICATE, message) is StatusCode.RESOURCE_EXHAUSTED
