"""A large mesh beside a small one, at sizes that say nothing about either."""

from __future__ import annotations

from bench.crowd import figures
from bench.figures import FACTS


def test_a_crowd_is_measured_in_a_process_of_its_own() -> None:
    found = figures(2, 300, 20)
    assert set(found) <= set(FACTS)
    assert {name: len(each) for name, each in found.items() if len(each) != 2} == {"workload_kb": 1}
    assert all(value > 0 for name, each in found.items() if name != "workload_kb" for value in each)
