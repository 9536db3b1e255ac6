"""Every workload: what the client does, in which stage, and which of its figures stands for it."""

from __future__ import annotations

from typing import Any, Literal

import attrs

__all__ = ["WORKLOADS", "Stage", "Workload", "of_stage"]

Kind = Literal["bulk", "count", "latency"]
Stage = Literal["load", "tunnels", "scale"]


@attrs.frozen(kw_only=True)
class Workload:
    """One thing that is measured."""

    name: str
    title: str
    """What people read in the plot."""
    runner: str
    """Function of `bench.workloads`."""
    arguments: dict[str, Any] = attrs.field(factory=dict)
    kind: Kind = "count"
    """`bulk` counts CPU per GB, `count` per unit; `latency` runs at a given pace, so its p99 stands for it."""
    stage: Stage = "load"
    key: str = ""
    """Its name in `latest.json`, where that is shorter."""
    direct: bool = True
    """Whether it says something without a proxy."""
    longer: float = 1.0
    """How much longer than others a turn takes."""

    @property
    def unit(self) -> str:
        """What CPU is counted in."""
        return "s/GB" if self.kind == "bulk" else "us"

    @property
    def scale(self) -> float:
        """How many units make one that CPU is counted per."""
        return 1e9 if self.kind == "bulk" else 1e6

    @property
    def headline(self) -> str:
        """The figure that peers are compared by."""
        return "p99_us" if self.kind == "latency" else "cpu"


def _load() -> list[Workload]:
    made = []
    for direction in ("up", "down"):
        for streams in (1, 16):
            made.append(
                Workload(
                    name=f"bulk_{direction}_{streams}",
                    title=f"bulk {direction}, {streams} stream{'s' * (streams > 1)}",
                    runner=f"bulk_{direction}",
                    arguments={"streams": streams},
                    kind="bulk",
                    key="bulk" if (direction, streams) == ("up", 1) else "",
                )
            )
    for name, title, connections, nbytes in (
        ("rr_1", "1-byte round trip", 1, 1),
        ("rr_1k", "1 KiB round trip", 1, 1024),
        ("rr_64", "round trips, 64 connections", 64, 100),
        ("rr_1000", "round trips, 1,000 connections", 1000, 100),
    ):
        arguments = {"connections": connections, "nbytes": nbytes}
        made.append(
            Workload(
                name=name,
                title=title,
                runner="round_trips",
                arguments=arguments,
                key="rr" if name == "rr_1" else "",
            )
        )
    for in_flight in (1, 32):
        title = "connect, one at a time" if in_flight == 1 else f"connect, {in_flight} in flight"
        made.append(
            Workload(
                name=f"connect_{in_flight}",
                title=title,
                runner="connects",
                arguments={"in_flight": in_flight},
                key="connect" if in_flight == 1 else "",
            )
        )
    for name, title, runner, connections in (
        ("paced", "p99, 1,000 round trips/s", "paced", 1),
        ("paced_bulk", "p99, 1,000 round trips/s beside bulk", "beside_bulk", 1),
        ("hundred", "p99, a hundred small streams", "paced", 100),
        ("hundred_bulk", "p99, a hundred small streams beside bulk", "beside_bulk", 100),
    ):
        arguments = {"connections": connections, "per_second": 1000}
        made.append(Workload(name=name, title=title, runner=runner, arguments=arguments, kind="latency"))
    return made


def _tunnels() -> list[Workload]:
    hundred = {"connections": 100, "per_second": 1000}
    return [
        Workload(
            name="handshake",
            title="new tunnel (TLS handshake)",
            runner="handshakes",
            stage="tunnels",
            direct=False,
        ),
        Workload(
            name="tunnels",
            title="p99, a hundred tunnels",
            runner="paced",
            arguments=hundred,
            kind="latency",
            stage="tunnels",
            direct=False,
        ),
        Workload(
            name="tunnels_hot",
            title="p99, a hundred tunnels beside a hot one",
            runner="beside_bulk",
            arguments=hundred,
            kind="latency",
            stage="tunnels",
            direct=False,
        ),
    ]


def _scale() -> list[Workload]:
    found = [
        Workload(
            name="connect_policies",
            title="connect with 1,000 policies",
            runner="connects",
            arguments={"in_flight": 1},
            stage="scale",
            direct=False,
        )
    ]
    for name, title in (
        ("steady", "p99, 100 round trips/s"),
        ("steady_flood", "p99, 100 round trips/s beside a flood"),
        ("steady_idle", "p99, 100 round trips/s beside idle streams"),
        ("steady_push", "p99, 100 round trips/s beside a push"),
    ):
        found.append(
            Workload(
                name=name,
                title=title,
                runner="paced",
                arguments={"connections": 1, "per_second": 100},
                kind="latency",
                stage="scale",
                direct=name == "steady",
                longer=2.0,
            )
        )
    return found


WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in [*_load(), *_tunnels(), *_scale()]}


def of_stage(stage: Stage, chosen: list[str] | None) -> list[Workload]:
    """The workloads of a stage, of those that were chosen."""
    return [one for one in WORKLOADS.values() if one.stage == stage and (not chosen or one.name in chosen)]
