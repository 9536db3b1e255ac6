"""From samples to figures: medians, ratios turn by turn, and whether the run was quiet enough to be believed. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import attrs

from bench.catalogue import WORKLOADS, Workload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "FACTS",
    "METRICS",
    "OURS",
    "Fact",
    "Facts",
    "Limits",
    "Round",
    "Sample",
    "Samples",
    "Verdict",
    "fact_ratio",
    "judge",
    "quietest",
    "ratio",
    "spread",
    "summary",
    "values",
]

OURS, DIRECT = "ours", "direct"

Sample = dict[str, float]
"""One turn of one peer, as the load process measured it."""
Samples = dict[str, dict[str, list[Sample]]]
"""By workload and peer, one sample a round."""
Facts = dict[str, dict[str, list[float]]]
"""By fact and peer, each time that it was measured."""

METRICS = ("rate", "cpu", "user", "system", "p50_us", "p99_us", "p999_us")


@attrs.frozen
class Fact:
    """Something that is measured beside the workloads; less is better."""

    title: str
    unit: str


FACTS: dict[str, Fact] = {
    "start_s": Fact("start until ready, one proxy", "s"),
    "rss_idle_mb": Fact("memory of one proxy, idle", "MB"),
    "rss_mb": Fact("memory of one proxy, after the load", "MB"),
    "idle_stream_kb": Fact("memory of one idle stream, both proxies", "kB"),
    "idle_tunnel_kb": Fact("memory of one idle tunnel, both proxies", "kB"),
    "push_s": Fact("push of workloads, from files to both proxies", "s"),
    "push_cpu_us": Fact("CPU of a pushed workload, both proxies", "us"),
    "workload_kb": Fact("memory of a workload, in a large mesh", "kB"),
    "lookup_us": Fact("where a connection goes, in that mesh, one of 100 destinations", "us"),
    "lookup_ratio": Fact("the same, against a mesh of 100 workloads", "x"),
    "first_us": Fact("where a connection goes, in that mesh, not asked before", "us"),
    "change_us": Fact("change of one workload, in that mesh", "us"),
    "change_ratio": Fact("the same, against a mesh of 100 workloads", "x"),
    "policy_us": Fact("decision among 1,000 policies, the last matches", "us"),
}


def values(samples: Sequence[Sample], metric: str, workload: Workload) -> list[float]:
    """One metric of each turn; turns that don't have it are left out."""
    found = []
    for sample in samples:
        units = sample["units"]
        if metric == "rate":
            value = units / sample["seconds"]
        elif metric == "cpu":
            value = (sample["user"] + sample["system"]) / units * workload.scale
        elif metric in ("user", "system"):
            value = sample[metric] / units * workload.scale
        else:
            percentile = metric.removesuffix("_us")
            if not sample.get(percentile):
                continue
            value = sample[percentile] * 1e6
        found.append(value)
    return found


def summary(samples: Sequence[Sample], workload: Workload) -> dict[str, dict[str, float]]:
    """Median and best of each metric over the rounds."""
    found = {}
    for metric in METRICS:
        numbers = values(samples, metric, workload)
        if numbers:
            best = max(numbers) if metric == "rate" else min(numbers)
            found[metric] = {"median": statistics.median(numbers), "best": best}
    return found


def ratios(samples: Samples, workload: Workload, theirs: str, metric: str = "") -> list[float]:
    """Ours to theirs in each round, turn beside turn, by `metric` or else by the workload's headline."""
    metric = metric or workload.headline
    by_peer = samples.get(workload.name, {})
    found = []
    for mine, other in zip(by_peer.get(OURS, []), by_peer.get(theirs, []), strict=False):
        a, b = values([mine], metric, workload), values([other], metric, workload)
        if a and b and a[0] and b[0]:
            found.append(a[0] / b[0])
    return found


def ratio(samples: Samples, workload: Workload, theirs: str, metric: str = "") -> float | None:
    """Median over the rounds of ours to theirs; None where there is nothing to compare."""
    found = ratios(samples, workload, theirs, metric)
    return statistics.median(found) if found else None


def fact_ratio(facts: Facts, name: str, theirs: str) -> float | None:
    """Ours to theirs, by medians; None where one of them has no figure."""
    mine, other = facts.get(name, {}).get(OURS), facts.get(name, {}).get(theirs)
    if not mine or not other or not statistics.median(other):
        return None
    return statistics.median(mine) / statistics.median(other)


def spread(numbers: Sequence[float]) -> float:
    """How far the middle half of the numbers lies apart, as a share of their median; 0 for fewer than three."""
    if len(numbers) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


@attrs.frozen
class Round:
    """One turn of each peer at one workload."""

    steal: float
    """Share of the machine that the hypervisor took away meanwhile."""
    samples: dict[str, Sample]
    """By peer."""


def quietest(made: Sequence[Round], rounds: int) -> list[Round]:
    """So many of the rounds that were made: those of which the hypervisor took least, in the order they were made.

    A round is kept or dropped as a whole, and not for what it found, so this favours no peer.
    """
    kept = sorted(range(len(made)), key=lambda number: made[number].steal)[:rounds]
    return [made[number] for number in sorted(kept)]


@attrs.frozen(kw_only=True)
class Limits:
    """What a run may be like and still be published. Spreads are those of `spread`."""

    rounds: int = 5
    """Turns of each peer, at least."""
    direct: float = 0.15
    """Spread of the rate without a proxy, in the middle one of the workloads."""
    ratio: float = 0.15
    """Spread of the ratio of CPU to another peer from round to round."""
    shaky: float = 0.25
    """Share of the workloads whose ratio may be over that."""
    steal: float = 0.05
    """Share of the machine that the hypervisor took away, in the mean of the rounds that count."""
    foreign: float = 0.10
    """Share of the machine that processes used which are not the bench's."""


@attrs.frozen(kw_only=True)
class Verdict:
    """Whether a run can be believed."""

    problems: tuple[str, ...]
    """Why not, a sentence each."""
    shaky: frozenset[tuple[str, str]]
    """Workloads, with a peer's name, whose ratio swung."""
    noise: dict[str, float]
    """What was judged."""

    @property
    def quiet(self) -> bool:
        """Whether the figures may be published."""
        return not self.problems


def judge(samples: Samples, host: Mapping[str, float], limits: Limits | None = None) -> Verdict:
    """Whether a run was quiet enough.

    Latencies at a given pace are left out: their tails swing by nature, and are shown with that; beside a push, which
    there is once a run, they have one turn.

    Args:
        samples: of every workload.
        host: shares of the machine that went elsewhere: `steal` and `foreign`.
        limits: what is allowed.
    """
    limits = limits or Limits()
    problems: list[str] = []
    direct: list[float] = []
    shaky: set[tuple[str, str]] = set()
    compared = 0
    fewest: list[int] = []
    for name, by_peer in samples.items():
        workload = WORKLOADS[name]
        if workload.kind == "latency":
            continue
        fewest += [len(turns) for turns in by_peer.values() if turns]
        if by_peer.get(DIRECT):
            direct.append(spread(values(by_peer[DIRECT], "rate", workload)))
        for peer in by_peer:
            found = ratios(samples, workload, peer) if peer not in (OURS, DIRECT) else []
            if found:
                compared += 1
                if spread(found) > limits.ratio:
                    shaky.add((name, peer))
    noise = {
        "direct_spread": statistics.median(direct) if direct else 0.0,
        "shaky": len(shaky) / compared if compared else 0.0,
        "steal": host.get("steal", 0.0),
        "foreign": host.get("foreign", 0.0),
    }
    if (rounds := min(fewest, default=limits.rounds if samples else 0)) < limits.rounds:
        problems.append(f"{rounds} rounds were made; fewer than {limits.rounds} say too little")
    if noise["direct_spread"] > limits.direct:
        problems.append(
            f"without a proxy the rate spread by {noise['direct_spread']:.0%} between rounds; "
            f"the limit is {limits.direct:.0%}"
        )
    if noise["shaky"] > limits.shaky:
        problems.append(
            f"{len(shaky)} of {compared} ratios spread by over {limits.ratio:.0%} between rounds; "
            f"the limit is {limits.shaky:.0%} of them"
        )
    for key, who in (("steal", "the hypervisor took"), ("foreign", "other processes used")):
        limit = getattr(limits, key)
        if noise[key] > limit:
            problems.append(f"{who} {noise[key]:.1%} of the machine; the limit is {limit:.0%}")
    return Verdict(problems=tuple(problems), shaky=frozenset(shaky), noise=noise)
