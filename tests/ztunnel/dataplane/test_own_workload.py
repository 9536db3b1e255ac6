"""The workload that is served: known, awaited, or unknown."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from tests.support.mesh import hbone, store_of

from ztunnel.config import WorkloadInfo
from ztunnel.dataplane.local import LocalWorkload
from ztunnel.errors import UnknownLocalWorkload

ME = hbone("web", "10.2.0.1", node="n1")
SERVED = WorkloadInfo(namespace="default", name="web", service_account="web")


async def test_a_known_workload_is_there_at_once(autojump_clock: trio.testing.MockClock) -> None:
    local = LocalWorkload(store_of(ME), SERVED, None)
    assert local.current is ME
    assert await local.wait() is ME
    assert trio.current_time() == 0


async def test_an_unknown_workload_is_waited_for_five_seconds(autojump_clock: trio.testing.MockClock) -> None:
    local = LocalWorkload(store_of(hbone("other", "10.2.0.2")), SERVED, None)
    with pytest.raises(UnknownLocalWorkload, match="web"):
        await local.wait()
    assert trio.current_time() == pytest.approx(5)


@pytest.mark.parametrize("node", [None, "n1"])
async def test_who_waits_wakes_for_its_own_workload_and_no_other(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery, node: str | None
) -> None:
    store = store_of()
    local = LocalWorkload(store, SERVED, node)
    found: list[object] = []

    async def wait() -> None:
        found.append(await local.wait())

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    for other in (hbone("other", "10.2.0.2"), hbone("web", "10.2.0.3", namespace="another")):
        store.apply_addresses([other])
        await trio.testing.wait_all_tasks_blocked()
        assert not found
    store.apply_addresses([ME])
    await trio.testing.wait_all_tasks_blocked()
    assert found == [ME]
    store.apply_addresses([], [ME.uid])
    assert local.current is None
