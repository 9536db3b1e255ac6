from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from tests.support.control_plane import START, ScriptedControlPlane, ScriptedStream, wall

from hbone.errors import IdentityError
from hbone.grpc import GrpcError, StatusCode
from ztunnel.control.discovery import DiscoveryClient, make_node
from ztunnel.control.pace import Pace
from ztunnel.control.response import read
from ztunnel.control.revocation import REVOCATION_TYPE
from ztunnel.control.transport import ControlPlaneError, TokenSource
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE, Change, Store
from ztunnel.wire import authorization_pb2, discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Callable


def workload(name: str, ip: int = 1, version: str = "1") -> tuple[str, str, bytes]:
    uid = f"c1//Pod/shop/{name}"
    message = workload_pb2.Workload(
        uid=uid, name=name, namespace="shop", addresses=[bytes([10, 0, ip // 256, ip % 256])]
    )
    return uid, version, workload_pb2.Address(workload=message).SerializeToString()


def service(name: str, version: str = "1") -> tuple[str, str, bytes]:
    message = workload_pb2.Service(name=name, namespace="shop", hostname=f"{name}.shop.internal")
    return f"shop/{name}.shop.internal", version, workload_pb2.Address(service=message).SerializeToString()


def policy(name: str) -> tuple[str, str, bytes]:
    message = authorization_pb2.Authorization(name=name, namespace="shop", scope=authorization_pb2.NAMESPACE)
    return f"shop/{name}", "", message.SerializeToString()


BAD = (
    "c1//Pod/shop/bad",
    "9",
    workload_pb2.Address(
        workload=workload_pb2.Workload(uid="c1//Pod/shop/bad", name="bad", namespace="shop", addresses=[b"abc"])
    ).SerializeToString(),
)


class Counters:
    def __init__(self) -> None:
        self.messages: list[tuple[str, int]] = []
        self.terminations: list[str] = []

    def xds_message(self, url: str, nbytes: int) -> None:
        self.messages.append((url, nbytes))

    def xds_terminated(self, reason: str) -> None:
        self.terminations.append(reason)


class Bench:
    """A discovery client on a scripted control plane."""

    def __init__(self, applied: Callable[[], None] = lambda: None, revocations: Sink | None = None) -> None:
        self.control = ScriptedControlPlane()
        self.store = Store()
        self.counters = Counters()
        self.client = DiscoveryClient(
            self.control.dial,
            self.store,
            node=make_node(
                name="web",
                namespace="shop",
                ip="10.0.0.1",
                node_name="",
                metadata={"A": "b"},
                json_metadata={"N": [1]},
            ),
            metrics=self.counters,
            token=TokenSource(value="secret"),
            cluster_id="c1",
            headers=[("X-Mesh", "m")],
            applied=applied,
            revocations=revocations,
            wall=wall,
            rng=random.Random(3),
        )

    async def opened(self) -> ScriptedStream:
        stream = await self.control.next_stream()
        await stream.opening()
        return stream

    async def synced(self, *addresses: tuple[str, str, bytes]) -> ScriptedStream:
        """A stream on which both types are accepted."""
        stream = await self.opened()
        stream.respond(AUTHORIZATION_TYPE, [policy("p")], nonce="b1")
        stream.respond(ADDRESS_TYPE, addresses or [workload("web")], nonce="a1")
        await stream.request()
        await stream.request()
        return stream


@pytest.fixture
async def bench(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> Bench:
    bench = Bench()
    nursery.start_soon(bench.client.run)
    return bench


async def test_opening_subscribes_to_both_types_as_wildcard_with_node_and_headers(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.control.next_stream()
    assert stream.metadata == {"authorization": "Bearer secret", "clusterid": "c1", "x-mesh": "m"}
    first, second = await stream.request(), await stream.request()
    assert [first.type_url, second.type_url] == [ADDRESS_TYPE, AUTHORIZATION_TYPE]
    for request in (first, second):
        assert not request.resource_names_subscribe
        assert not request.resource_names_unsubscribe
        assert not request.initial_resource_versions
        assert request.node.id == "ztunnel~10.0.0.1~web.shop~shop.svc.cluster.local"
        assert dict(request.node.metadata)["NAMESPACE"] == "shop"
        assert dict(request.node.metadata)["A"] == "b"
        assert request.node.metadata.fields["N"].list_value.values[0].number_value == 1


async def test_good_response_is_applied_and_acknowledged(autojump_clock: trio.testing.MockClock, bench: Bench) -> None:
    stream = await bench.opened()
    stream.respond(ADDRESS_TYPE, [workload("web"), service("api")], nonce="a1")
    ack = await stream.request()
    assert (ack.type_url, ack.response_nonce) == (ADDRESS_TYPE, "a1")
    assert not ack.HasField("error_detail")
    assert not ack.HasField("node")
    assert set(bench.store.workloads) == {"c1//Pod/shop/web"}
    assert set(bench.store.services) == {"shop/api.shop.internal"}
    stream.respond(ADDRESS_TYPE, removed=["c1//Pod/shop/web", "shop/api.shop.internal", "unknown"], nonce="a2")
    await stream.request()
    assert not bench.store.workloads
    assert not bench.store.services


async def test_what_is_kept_on_disk_has_both_types(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    kept: list[tuple[int, int]] = []

    def keep() -> None:
        kept.append((len(mesh.store.workloads), len(mesh.store.policies)))

    mesh = Bench(applied=keep)
    nursery.start_soon(mesh.client.run)
    for round_ in (1, 2):
        stream = await mesh.opened()
        stream.respond(ADDRESS_TYPE, [workload("web")], nonce="a1")
        await stream.request()
        await trio.testing.wait_all_tasks_blocked()
        assert len(kept) == (round_ - 1) * 2  # and once more when a stream is lost, for the time since
        stream.respond(AUTHORIZATION_TYPE, [policy("p")], nonce="b1")
        await stream.request()
        await trio.testing.wait_all_tasks_blocked()
        assert kept[-1] == (1, 1)
        stream.end()


async def test_bad_resource_is_rejected_by_name_and_the_good_ones_are_in_force(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.opened()
    stream.respond(ADDRESS_TYPE, [workload("web"), BAD, ("c1//Pod/shop/junk", "1", b"\xff\xff")], nonce="a1")
    nack = await stream.request()
    assert nack.response_nonce == "a1"
    assert nack.error_detail.code == 0
    assert nack.error_detail.message.startswith("c1//Pod/shop/bad: ")
    assert "; c1//Pod/shop/junk: " in nack.error_detail.message
    assert set(bench.store.workloads) == {"c1//Pod/shop/web"}
    assert bench.client.status().rejected == 2


async def test_ready_once_both_types_were_accepted_without_a_rejection(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.opened()
    stream.respond(AUTHORIZATION_TYPE, nonce="b1")
    await stream.request()
    assert not bench.client.ready.is_set()
    stream.respond(ADDRESS_TYPE, [BAD], nonce="a1")
    await stream.request()
    assert not bench.client.ready.is_set()
    stream.respond(ADDRESS_TYPE, [workload("web")], nonce="a2")
    await stream.request()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.client.ready.is_set()


async def test_response_becomes_visible_at_once_however_large(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    seen: list[Change] = []
    sizes: list[int] = []
    bench.store.subscribe(seen.append)
    bench.store.subscribe(lambda _: sizes.append(len(bench.store.workloads)))
    stream = await bench.opened()
    stream.respond(ADDRESS_TYPE, [workload(f"w{n}", n) for n in range(2000)], nonce="a1")
    await stream.request()
    assert sizes == [2000]
    assert len(seen) == 1


async def test_large_response_yields_while_it_is_read(autojump_clock: trio.testing.MockClock, bench: Bench) -> None:
    stream = await bench.opened()
    turns = 0
    stream.respond(ADDRESS_TYPE, [workload(f"w{n}", n) for n in range(5000)], nonce="a1")
    while not bench.store.workloads:
        turns += 1
        await trio.lowlevel.checkpoint()
    assert turns > 5


async def test_reconnect_tells_versions_of_what_was_accepted_and_keeps_it(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.synced(workload("web", version="7"), service("api", version="8"))
    stream.respond(ADDRESS_TYPE, [workload("web", version="9"), BAD], nonce="a2")
    await stream.request()
    stream.fail(GrpcError(StatusCode.UNAVAILABLE, "transport is closing"))
    again = await bench.control.next_stream()
    opening = await again.opening()
    assert dict(opening[ADDRESS_TYPE].initial_resource_versions) == {
        "c1//Pod/shop/web": "9",
        "shop/api.shop.internal": "8",
        "c1//Pod/shop/bad": "",
    }
    assert dict(opening[AUTHORIZATION_TYPE].initial_resource_versions) == {"shop/p": ""}
    assert set(bench.store.policies) == {"shop/p"}
    assert set(bench.store.workloads) == {"c1//Pod/shop/web"}


async def test_rejected_update_keeps_the_version_accepted_before(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.synced(workload("web", version="7"))
    _, _, bad = BAD
    stream.respond(ADDRESS_TYPE, [("c1//Pod/shop/web", "8", bad)], nonce="a2")
    assert (await stream.request()).HasField("error_detail")
    stream.end()
    opening = await (await bench.control.next_stream()).opening()
    assert dict(opening[ADDRESS_TYPE].initial_resource_versions) == {"c1//Pod/shop/web": "7"}
    assert "c1//Pod/shop/web" in bench.store.workloads


async def test_status_says_since_when_it_is_stale(autojump_clock: trio.testing.MockClock, bench: Bench) -> None:
    stream = await bench.synced()
    await trio.testing.wait_all_tasks_blocked()
    status = bench.client.status()
    assert status.connected
    assert status.synced
    assert status.stale_since is None
    assert (status.addresses, status.policies) == (1, 1)
    await trio.sleep(100)
    bench.control.dial_error = ControlPlaneError("the control plane cannot be reached: connection refused")
    stream.fail(GrpcError(StatusCode.UNAVAILABLE, "transport is closing"))
    await trio.sleep(50)
    status = bench.client.status()
    assert not status.connected
    assert status.stale_since == pytest.approx(START + 100)
    assert "connection refused" in (status.last_error or "")
    bench.control.dial_error = None
    await bench.synced()
    await trio.testing.wait_all_tasks_blocked()
    assert bench.client.status().stale_since is None


@pytest.mark.parametrize(
    ("error", "reason", "longest"),
    [
        (GrpcError(StatusCode.UNKNOWN, "x"), "Reconnect", 0.013),
        (GrpcError(StatusCode.CANCELLED, "x"), "Reconnect", 0.013),
        (GrpcError(StatusCode.DEADLINE_EXCEEDED, "x"), "Reconnect", 0.013),
        (GrpcError(StatusCode.UNAVAILABLE, "received prior goaway: code NO_ERROR"), "Reconnect", 0.013),
        (GrpcError(StatusCode.UNAVAILABLE, "not now"), "Error", 0.025),
        (GrpcError(StatusCode.PERMISSION_DENIED, "x"), "Error", 0.025),
        (trio.BrokenResourceError("gone"), "Error", 0.025),
        (None, "Complete", 0.013),
    ],
)
async def test_end_of_a_stream_is_counted_and_followed_by_another_soon(
    autojump_clock: trio.testing.MockClock, bench: Bench, error: Exception | None, reason: str, longest: float
) -> None:
    stream = await bench.synced()
    before = trio.current_time()
    if error is None:
        stream.end()
    else:
        stream.fail(error)
    await bench.control.next_stream()
    assert bench.counters.terminations == [reason]
    assert trio.current_time() - before <= longest


async def test_control_plane_that_cannot_be_reached_is_tried_ever_more_rarely(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    bench.control.dial_error = ControlPlaneError("connection refused")
    nursery.start_soon(bench.client.run)
    await trio.sleep(600)
    # 20 ms, 40 ms, ... 15 s: eleven in the first half minute, then one in 12 s at most
    assert 30 <= bench.control.dials <= 62
    assert set(bench.counters.terminations) == {"ConnectionError"}


async def test_server_that_ends_every_stream_at_once_is_not_called_without_pause(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    nursery.start_soon(bench.client.run)
    with trio.move_on_after(60):
        while True:
            (await bench.opened()).end()
    assert bench.control.dials <= 85


async def test_server_that_never_answers_is_left_after_a_minute(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    await bench.opened()
    await bench.control.next_stream()
    assert trio.current_time() == pytest.approx(60, abs=1)
    assert "no Address and no Authorization within 60 s" in (bench.client.status().last_error or "")


async def test_quiet_stream_stays_open_once_both_types_were_answered(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    await bench.synced()
    await trio.sleep(10_000)
    assert bench.control.dials == 1


async def test_bytes_that_are_no_response_end_the_stream_and_change_nothing(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.synced()
    stream.send_raw(b"\xff\xff\xff")
    await bench.control.next_stream()
    assert bench.counters.terminations == ["Error"]
    assert set(bench.store.workloads) == {"c1//Pod/shop/web"}


async def test_unknown_type_is_acknowledged_and_dropped(autojump_clock: trio.testing.MockClock, bench: Bench) -> None:
    stream = await bench.opened()
    stream.respond("type.googleapis.com/other.Thing", [("x", "1", b"x")], nonce="z")
    ack = await stream.request()
    assert (ack.type_url, ack.response_nonce) == ("type.googleapis.com/other.Thing", "z")
    assert not ack.HasField("error_detail")
    assert not bench.client.status().addresses


async def test_responses_are_counted_by_type_and_payload(autojump_clock: trio.testing.MockClock, bench: Bench) -> None:
    item = workload("web")
    stream = await bench.opened()
    stream.respond(ADDRESS_TYPE, [item], nonce="a1")
    await stream.request()
    assert bench.counters.messages == [(ADDRESS_TYPE, len(item[2]))]


async def test_restart_from_a_snapshot_has_every_policy_and_tells_its_versions(
    autojump_clock: trio.testing.MockClock,
) -> None:
    first, second = Bench(), Bench()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first.client.run)
        stream = await first.synced(workload("web", version="7"), service("api", version="8"))
        stream.respond(AUTHORIZATION_TYPE, [policy("q")], nonce="b2")
        await stream.request()
        nursery.cancel_scope.cancel()
    second.client.restore(b"".join(await first.client.snapshot()), START - 500)
    assert set(second.store.policies) == {"shop/p", "shop/q"}
    assert set(second.store.workloads) == {"c1//Pod/shop/web"}
    assert second.client.status().stale_since == START - 500
    assert not second.client.ready.is_set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(second.client.run)
        stream = await second.control.next_stream()
        opening = await stream.opening()
        assert dict(opening[ADDRESS_TYPE].initial_resource_versions) == {
            "c1//Pod/shop/web": "7",
            "shop/api.shop.internal": "8",
        }
        assert dict(opening[AUTHORIZATION_TYPE].initial_resource_versions) == {"shop/p": "", "shop/q": ""}
        stream.respond(AUTHORIZATION_TYPE, removed=["shop/q"], nonce="b1")
        stream.respond(ADDRESS_TYPE, nonce="a1")
        await stream.request()
        await stream.request()
        assert set(second.store.policies) == {"shop/p"}
        nursery.cancel_scope.cancel()


@given(
    payload=st.binary(max_size=200)
    | st.builds(
        lambda fields: workload_pb2.Address(workload=workload_pb2.Workload(**fields)).SerializeToString(),
        st.fixed_dictionaries(
            {
                "uid": st.sampled_from(["", "x", "y"]),
                "namespace": st.text(max_size=5),
                "service_account": st.text(max_size=5),
                "trust_domain": st.text(max_size=5),
                "addresses": st.lists(st.binary(max_size=17), max_size=3),
                "tunnel_protocol": st.integers(0, 9),
                "status": st.integers(0, 9),
            }
        ),
    ),
    url=st.sampled_from([ADDRESS_TYPE, AUTHORIZATION_TYPE]),
)
def test_any_payload_is_accepted_or_rejected_and_the_stream_goes_on(payload: bytes, url: str) -> None:
    async def converse() -> None:
        bench = Bench()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.client.run)
            stream = await bench.opened()
            stream.respond(url, [("x", "1", payload)], nonce="a1")
            assert (await stream.request()).response_nonce == "a1"
            stream.respond(url, [policy("p") if url == AUTHORIZATION_TYPE else workload("web")], nonce="a2")
            assert not (await stream.request()).HasField("error_detail")
            assert not bench.counters.terminations
            nursery.cancel_scope.cancel()

    trio.run(converse)


# Revocation lists


class Sink:
    """Takes lists; refuses `bad`."""

    def __init__(self) -> None:
        self.bodies: list[bytes | None] = []

    async def received(self, body: bytes | None) -> None:
        await trio.lowlevel.checkpoint()
        if body == b"bad":
            raise IdentityError("revocation list 1 cannot be parsed")
        self.bodies.append(body)


async def test_revocation_lists_are_taken_acknowledged_and_refused(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    sink = Sink()
    bench = Bench(revocations=sink)
    nursery.start_soon(bench.client.run)
    stream = await bench.opened()
    answers = []
    for resources, removed in (
        ([("mesh", "1", b"lists")], []),
        ([("mesh", "2", b"bad")], []),
        ([("another", "3", b"x")], []),
        ([], []),
        ([], ["mesh"]),
    ):
        stream.respond(REVOCATION_TYPE, resources, removed=removed, nonce="r")
        answers.append(await stream.request())
    assert stream.revocations_wanted == [["mesh"]]
    assert sink.bodies == [b"lists", None]
    assert [answer.error_detail.message for answer in answers] == [
        "",
        "mesh: revocation list 1 cannot be parsed",
        "",
        "",
        "",
    ]
    assert {(answer.type_url, answer.response_nonce) for answer in answers} == {(REVOCATION_TYPE, "r")}
    assert not bench.client.ready.is_set()  # the picture of the mesh is what it waits for
    assert bench.client.status().rejected == 1


async def test_changed_policy_is_in_force_before_a_crowd_that_came_first(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.synced()
    crowd = [workload(f"w{n}", n) for n in range(3000)]
    stream.respond(ADDRESS_TYPE, crowd, nonce="a2")
    stream.respond(AUTHORIZATION_TYPE, [policy("q")], nonce="b2")
    stream.respond(AUTHORIZATION_TYPE, [policy("r")], removed=["shop/p"], nonce="b3")
    assert (await stream.request()).response_nonce == "b2"
    assert set(bench.store.policies) == {"shop/p", "shop/q"}
    assert len(bench.store.workloads) == 1
    assert (await stream.request()).response_nonce == "a2"
    assert len(bench.store.workloads) == 3001
    assert "shop/p" in bench.store.policies  # those of before might have named it
    assert (await stream.request()).response_nonce == "b3"
    assert set(bench.store.policies) == {"shop/q", "shop/r"}


async def test_what_was_heard_is_in_force_before_the_stream_is_opened_again(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.synced()
    stream.respond(ADDRESS_TYPE, [workload(f"w{n}", n) for n in range(3000)], nonce="a2")
    stream.fail(GrpcError(StatusCode.UNAVAILABLE, "transport is closing"))
    opening = await (await bench.control.next_stream()).opening()
    assert len(bench.store.workloads) == 3001
    assert len(opening[ADDRESS_TYPE].initial_resource_versions) == 3001


TOO_LARGE = GrpcError(StatusCode.RESOURCE_EXHAUSTED, "a message of 9000000 bytes; the limit is 4194304 bytes")


async def test_opening_that_is_too_large_is_repeated_without_versions_and_what_is_not_listed_is_gone(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    crowd = [workload(f"{'w' * 50}{n}", n) for n in range(1000)]
    stream = await bench.synced(*crowd, workload("gone", 2000))
    stream.end()
    stream = await bench.control.next_stream()
    assert len((await stream.opening())[ADDRESS_TYPE].initial_resource_versions) == 1001
    stream.fail(TOO_LARGE)
    stream = await bench.control.next_stream()
    opening = await stream.opening()
    for url in (ADDRESS_TYPE, AUTHORIZATION_TYPE):
        assert not opening[url].initial_resource_versions
        assert not opening[url].resource_names_subscribe
    stream.respond(AUTHORIZATION_TYPE, [policy("q")], nonce="b2")
    stream.respond(ADDRESS_TYPE, [*crowd[1:], workload("new", 2001)], nonce="a2")
    await stream.request()
    await stream.request()
    assert set(bench.store.policies) == {"shop/q"}
    assert "c1//Pod/shop/new" in bench.store.workloads
    assert not {crowd[0][0], "c1//Pod/shop/gone"} & set(bench.store.workloads)
    assert len(bench.store.workloads) == 1000
    stream.respond(ADDRESS_TYPE, [workload("later", 2002)], nonce="a3")  # only the first lists everything
    await stream.request()
    assert len(bench.store.workloads) == 1001
    stream.end()
    opening = await (await bench.control.next_stream()).opening()
    assert len(opening[ADDRESS_TYPE].initial_resource_versions) == 1001  # without them once


async def test_server_that_has_had_enough_of_something_else_is_told_versions_all_the_same(
    autojump_clock: trio.testing.MockClock, bench: Bench
) -> None:
    stream = await bench.synced(workload("web", version="7"))
    stream.end()
    stream = await bench.control.next_stream()
    await stream.opening()
    stream.fail(GrpcError(StatusCode.RESOURCE_EXHAUSTED, "request rate limit exceeded: try again in a second"))
    opening = await (await bench.control.next_stream()).opening()
    assert dict(opening[ADDRESS_TYPE].initial_resource_versions) == {"c1//Pod/shop/web": "7"}


async def test_workers_are_told_what_a_full_answer_does_not_list(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    told: list[bytes] = []

    async def spread(raw: bytes, _: int) -> None:
        told.append(raw)
        await trio.lowlevel.checkpoint()

    bench.client._spread = spread
    bench.client._whole.add(ADDRESS_TYPE)
    bench.client._versions[ADDRESS_TYPE]["c1//Pod/shop/gone"] = "1"
    message = discovery_pb2.DeltaDiscoveryResponse(type_url=ADDRESS_TYPE, nonce="a")
    uid, version, payload = workload("web")
    message.resources.add(name=uid, version=version).resource.value = payload
    raw = message.SerializeToString()
    raw, response = await bench.client.completed(raw, await read(raw, Pace()))
    assert (await bench.client.put_in_force(raw, response)).response_nonce == "a"
    (seen,) = told
    assert list(discovery_pb2.DeltaDiscoveryResponse.FromString(seen).removed_resources) == ["c1//Pod/shop/gone"]
    assert set(bench.client._versions[ADDRESS_TYPE]) == {uid}
