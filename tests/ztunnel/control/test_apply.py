from __future__ import annotations

import gc
import itertools
import sys
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tests.support.sizes import size

from ztunnel.control.apply import apply
from ztunnel.control.lanes import Lanes
from ztunnel.control.pace import ITEMS, Pace, QuietCollector, settle
from ztunnel.control.response import SMALL, read
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE, Change, Store, decode_address, parse_ip
from ztunnel.wire import discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

MANY = size(100_000, 3000)


def frozen_clock() -> float:
    return 0.0


def uid(number: int) -> str:
    return f"c1//Pod/crowd/w{number}"


def workload(number: int, *, namespace: str = "crowd") -> bytes:
    message = workload_pb2.Workload(
        uid=uid(number), name=f"w{number}", namespace=namespace, addresses=[bytes([10, *number.to_bytes(3, "big")])]
    )
    return workload_pb2.Address(workload=message).SerializeToString()


def raw_response(
    resources: Iterable[tuple[str, bytes]] = (), removed: Iterable[str] = (), url: str = ADDRESS_TYPE
) -> bytes:
    message = discovery_pb2.DeltaDiscoveryResponse(type_url=url, nonce="n", removed_resources=removed)
    for name, payload in resources:
        message.resources.add(name=name, version="1").resource.value = payload
    return message.SerializeToString()


async def settled(store: Store) -> None:
    while store.unsettled:
        await trio.lowlevel.checkpoint()


async def put(store: Store, raw: bytes, pace: Pace) -> None:
    await apply(store, await read(raw, pace), pace)


async def test_large_push_is_seen_whole_or_not_at_all_and_never_keeps_the_loop_for_long() -> None:
    store, pace = Store(), Pace(clock=frozen_clock)
    everything = raw_response((uid(n), workload(n)) for n in range(MANY))
    changes: list[Change] = []
    store.subscribe(changes.append)
    seen: set[tuple[int, str]] = set()

    async def look() -> None:
        while True:
            found = store.workload_by_address("", parse_ip("10.0.0.7"))
            seen.add((len(store.workloads), found.namespace if found else ""))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        nursery.start_soon(settle, store, pace)
        await put(store, everything, pace)
        assert pace.longest <= ITEMS
        assert pace.slices >= 2 * (MANY // ITEMS)  # once to see what there is, once to read it
        await settled(store)
        changed = ((uid(n), workload(n, namespace="moved")) for n in range(MANY // 2))
        await put(store, raw_response(changed, [uid(n) for n in range(MANY // 2, MANY)]), pace)
        assert store.unsettled  # in force, and not worked in yet
        await settled(store)
        nursery.cancel_scope.cancel()
    assert seen == {(0, ""), (MANY, "crowd"), (MANY // 2, "moved")}
    assert pace.longest <= ITEMS
    assert [len(change.workloads) for change in changes] == [MANY, MANY]


async def test_slow_items_make_short_slices() -> None:
    pace = Pace(clock=itertools.count().__next__)  # every look at it is a second
    await put(Store(), raw_response((uid(n), workload(n)) for n in range(1000)), pace)
    assert pace.longest == 1


async def test_putting_a_push_in_force_takes_no_longer_for_more() -> None:
    def calls_of_commit(count: int) -> int:
        store = Store()
        store.apply_addresses([])
        push = store.prepare()
        for number in range(count):
            push.upsert(decode_address(uid(number), workload(number)))
        calls = 0

        def count_them(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count_them)
        try:
            push.commit()
        finally:
            sys.setprofile(None)
        return calls

    assert calls_of_commit(1000) == calls_of_commit(10)


async def test_cancelled_push_leaves_nothing() -> None:
    store = Store()
    with trio.move_on_after(30) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, store, raw_response((uid(n), workload(n)) for n in range(1000)), Pace())
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    assert not scope.cancelled_caught
    assert not store.workloads
    await put(store, raw_response([(uid(1), workload(1))]), Pace())
    assert set(store.workloads) == {uid(1)}


async def test_objects_of_a_push_are_set_aside_and_freed_with_the_last_reference() -> None:
    thresholds = gc.get_threshold()
    store, pace = Store(), Pace(collector=QuietCollector())
    try:
        gc.freeze()
        before = gc.get_freeze_count()
        await put(store, raw_response((uid(n), workload(n)) for n in range(1000)), pace)
        assert gc.get_threshold() == thresholds
        assert gc.get_freeze_count() - before >= 1000
        await put(store, raw_response((), [uid(n) for n in range(1000)]), pace)
        while store.settle(1000):
            pass
        assert gc.get_freeze_count() - before < 1000
    finally:
        gc.unfreeze()


async def test_no_old_objects_are_walked_while_a_push_is_taken_in() -> None:
    collector = QuietCollector()
    with collector.quiet(1), collector.quiet(1):
        assert gc.get_threshold()[2] > 1_000_000
    assert gc.get_threshold()[2] < 1_000_000


BIG = [("f", bytes(SMALL))]


@given(
    st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=200)), max_size=5),
    st.lists(st.text(max_size=5), max_size=3),
    st.permutations(range(4)),
)
def test_large_response_is_read_as_protobuf_reads_it(
    resources: list[tuple[str, bytes]], removed: list[str], order: list[int]
) -> None:
    unknown = b"\x08\x96\x01" + b"\x51" + bytes(8) + b"\x55" + bytes(4) + b"\xfa\x01\x02hi"  # of four wire types
    parts = [raw_response(resources, removed), raw_response(BIG, ["r"], "other"), unknown, raw_response((), (), "")]
    raw = b"".join(parts[index] for index in order)
    expected = discovery_pb2.DeltaDiscoveryResponse.FromString(raw)
    found = trio.run(read, raw, Pace())
    assert (found.type_url, found.nonce, found.removed) == (
        expected.type_url,
        expected.nonce,
        list(expected.removed_resources),
    )
    assert list(found.resources()) == list(expected.resources)
    assert found.count == len(expected.resources)


@pytest.mark.parametrize("bad", [b"\x12\x7f", b"\xff" * 11, b"\x09\x01", b"\x13", b"\x22\x01\xff", b"\x80"])
async def test_large_response_that_is_cut_or_no_protobuf_is_refused(bad: bytes) -> None:
    raw = raw_response(BIG) + bad
    with pytest.raises(DecodeError):
        discovery_pb2.DeltaDiscoveryResponse.FromString(raw)
    with pytest.raises(DecodeError):
        await read(raw, Pace())


async def test_policies_overtake_workloads_unless_one_is_taken_away() -> None:
    done: list[str] = []
    gates = {name: trio.Event() for name in ("a1", "p1", "p2", "a2")}

    def work(name: str) -> object:
        async def wait() -> None:
            await gates[name].wait()
            done.append(name)

        return wait

    async with trio.open_nursery() as nursery:
        lanes = Lanes(nursery)
        for name, url, removes in (
            ("a1", ADDRESS_TYPE, True),
            ("p1", AUTHORIZATION_TYPE, False),
            ("p2", AUTHORIZATION_TYPE, True),
            ("a2", ADDRESS_TYPE, False),
        ):
            lanes.start(work(name), (url,), lanes.after(url, removes=removes), 10)  # type: ignore[arg-type]
        for name in ("a2", "p2", "p1"):
            gates[name].set()
            await trio.testing.wait_all_tasks_blocked()
        assert done == ["p1"]
        assert lanes.waiting == 30
        gates["a1"].set()
        await lanes.below(1)
    assert done == ["p1", "a1", "p2", "a2"]


async def test_what_is_left_of_a_push_is_worked_in_a_little_at_a_time_before_the_next() -> None:
    store, pace = Store(), Pace(clock=frozen_clock)
    for namespace in ("one", "two", "three"):
        raw = raw_response((uid(n), workload(n, namespace=namespace)) for n in range(1000))
        rests = pace.slices
        await put(store, raw, pace)
        assert pace.longest <= ITEMS
        # To see what there is, to read it, and for the third to work in the second; the first stands alone.
        assert pace.slices - rests >= (1000 // ITEMS) * (3 if namespace == "three" else 2)
    found = store.workload_by_address("", parse_ip("10.0.0.7"))
    assert found is not None
    assert found.namespace == "three"
