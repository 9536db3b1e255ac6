"""The bench of the control plane, small: it counts what each subscriber gets, and fails when one gets too much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import control

if TYPE_CHECKING:
    from pathlib import Path


async def test_a_change_costs_each_that_has_it_one_resource(tmp_path: Path) -> None:
    scale = control.Scale(sizes=(50, 500), wildcard=2, on_demand=12, changes=1)
    found, grown = await control.measure(tmp_path, scale)
    assert [item.workloads for item in found] == [50, 500]
    assert all(item.subscribers == 14 and 0 < item.change_bytes < 1000 for item in found)
    assert set(grown) == {"cpu", "time"}
    shown = control.table(found, grown, scale)
    assert "bytes for each who has it" in shown
    assert len({len(line) for line in shown.splitlines()[1:-1]}) == 1
