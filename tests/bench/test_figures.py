from __future__ import annotations

from typing import Any

import pytest
from bench.catalogue import WORKLOADS, of_stage
from bench.figures import (
    FACTS,
    Limits,
    Round,
    Sample,
    Samples,
    fact_ratio,
    judge,
    quietest,
    ratio,
    ratios,
    spread,
    summary,
    values,
)

RR, BULK, PACED = WORKLOADS["rr_1"], WORKLOADS["bulk_up_1"], WORKLOADS["paced"]
QUIET = {"steal": 0.01, "foreign": 0.02}


def sample(cpu: float = 0.8, **more: float) -> Sample:
    made = {"units": 10_000.0, "seconds": 1.0, "user": cpu / 4, "system": cpu * 3 / 4, "p50": 1e-4, "p99": 3e-4}
    return made | more


def rounds(ours: list[float], envoy: list[float], direct: list[float] | None = None) -> Samples:
    by_peer = {"ours": [sample(cpu) for cpu in ours], "envoy": [sample(cpu) for cpu in envoy]}
    if direct:
        by_peer["direct"] = [sample(0.0, units=units) for units in direct]
    return {"rr_1": by_peer}


def test_cpu_counts_per_unit_in_microseconds_and_per_gigabyte_in_seconds() -> None:
    assert values([sample(0.8)], "cpu", RR) == [pytest.approx(80)]
    assert values([sample(1.2, units=5e8)], "cpu", BULK) == [pytest.approx(2.4)]


def test_user_and_system_stand_apart() -> None:
    assert values([sample(0.8)], "user", RR) == [pytest.approx(20)]
    assert values([sample(0.8)], "system", RR) == [pytest.approx(60)]


def test_a_percentile_that_a_turn_does_not_have_is_left_out() -> None:
    assert values([sample(), sample(p999=1e-3)], "p999_us", RR) == [pytest.approx(1000)]
    assert "p999_us" not in summary([sample()], RR)


def test_best_is_the_highest_rate_and_the_lowest_cost() -> None:
    found = summary([sample(0.8), sample(1.0, seconds=0.5), sample(0.9, seconds=2.0)], RR)
    assert found["rate"] == {"median": 10_000, "best": 20_000}
    assert found["cpu"] == {"median": pytest.approx(90), "best": pytest.approx(80)}


def test_ratio_is_the_median_of_turns_side_by_side() -> None:
    # The machine is twice as slow in the second round; turn by turn the ratio is steady.
    samples = rounds([0.8, 1.6, 0.8], [1.0, 2.0, 1.0])
    assert ratios(samples, RR, "envoy") == [pytest.approx(0.8)] * 3
    assert ratio(samples, RR, "envoy") == pytest.approx(0.8)


def test_paced_workloads_are_compared_by_their_tail() -> None:
    samples = {"paced": {"ours": [sample(9.0, p99=2e-4)], "envoy": [sample(1.0, p99=4e-4)]}}
    assert ratio(samples, PACED, "envoy") == pytest.approx(0.5)


def test_nothing_to_compare_is_no_ratio() -> None:
    assert ratio(rounds([1.0], [0.0]), RR, "envoy") is None
    assert ratio({}, RR, "envoy") is None


def test_fact_ratio_goes_by_medians() -> None:
    assert fact_ratio({"rss_mb": {"ours": [40, 41, 90], "envoy": [82]}}, "rss_mb", "envoy") == pytest.approx(0.5)
    assert fact_ratio({"rss_mb": {"ours": [40]}}, "rss_mb", "envoy") is None


def test_spread_is_that_of_the_middle_half() -> None:
    assert spread([10, 10, 10, 10, 1000]) == 0
    assert spread([8, 9, 10, 11, 12]) == pytest.approx(0.2)
    assert spread([1, 2]) == 0


STEADY = [1.0] * 6


def test_a_steady_run_is_quiet() -> None:
    verdict = judge(rounds(STEADY, STEADY, [1000.0] * 6), QUIET)
    assert verdict.quiet
    assert not verdict.shaky


@pytest.mark.parametrize(
    ("samples", "host", "said"),
    [
        (rounds(STEADY, STEADY, [500, 600, 800, 1000, 1200, 1400]), QUIET, "without a proxy the rate spread"),
        (rounds([0.5, 0.7, 1.0, 1.3, 1.6, 2.0], STEADY), QUIET, "1 of 1 ratios spread"),
        (rounds(STEADY, STEADY), {"steal": 0.2, "foreign": 0.0}, "the hypervisor took 20.0%"),
        (rounds(STEADY, STEADY), {"steal": 0.0, "foreign": 0.3}, "other processes used 30.0%"),
        (rounds([1.0], [1.0]), QUIET, "1 rounds were made"),
    ],
)
def test_noise_is_named_with_its_limit(samples: Samples, host: dict[str, float], said: str) -> None:
    verdict = judge(samples, host)
    assert not verdict.quiet
    assert any(said in problem for problem in verdict.problems)
    assert all("limit" in problem or "fewer than" in problem for problem in verdict.problems)


def test_one_shaky_ratio_of_many_is_marked_and_forgiven() -> None:
    samples: Samples = {}
    for workload in of_stage("load", None)[:8]:
        samples[workload.name] = rounds(STEADY, STEADY)["rr_1"]
    samples["rr_1"] = rounds([0.5, 0.7, 1.0, 1.3, 1.6, 2.0], STEADY)["rr_1"]
    verdict = judge(samples, QUIET)
    assert verdict.quiet
    assert verdict.shaky == {("rr_1", "envoy")}


def test_tails_at_a_given_pace_are_not_judged() -> None:
    swinging = [sample(p99=value) for value in (1e-4, 9e-4, 2e-4, 8e-4, 1e-3)]
    assert judge({"paced": {"ours": swinging, "envoy": [sample()] * 5}}, QUIET, Limits(rounds=1)).quiet


def test_a_tail_that_a_run_has_once_does_not_make_the_rounds_too_few() -> None:
    samples = rounds(STEADY, STEADY, [1000.0] * 6) | {"steady_push": {"ours": [sample()]}}
    assert judge(samples, QUIET).quiet
    assert not judge(samples | {"rr_64": {"ours": [sample()]}}, QUIET).quiet
    assert not judge({}, QUIET).quiet


def test_names_are_one_of_a_kind() -> None:
    keys = [workload.key or workload.name for workload in WORKLOADS.values()]
    assert len(keys) == len(set(keys))
    assert not set(keys) & set(FACTS)


def test_every_workload_can_be_run() -> None:
    import inspect

    from bench.workloads import RUNNERS

    for workload in WORKLOADS.values():
        placeholders: list[Any] = [None, None, 0.0]
        inspect.signature(RUNNERS[workload.runner]).bind(*placeholders, **workload.arguments)


@pytest.mark.parametrize(
    ("steal", "kept"),
    [
        ([0.0, 0.0, 0.0], [0, 1, 2]),
        ([0.3, 0.0, 0.1, 0.0], [1, 2, 3]),
        ([0.3, 0.2, 0.1, 0.0, 0.4], [1, 2, 3]),
        ([0.1, 0.1, 0.1, 0.1], [0, 1, 2]),
        ([0.1], [0]),
    ],
)
def test_rounds_that_count_are_those_the_hypervisor_left_alone(steal: list[float], kept: list[int]) -> None:
    made = [Round(share, {"ours": sample(number)}) for number, share in enumerate(steal)]
    assert quietest(made, 3) == [made[number] for number in kept]
