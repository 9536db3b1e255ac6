"""Which rounds are made, and which of them count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import attrs
from bench import run
from bench.catalogue import WORKLOADS
from bench.errors import BenchError
from bench.peers import Peer, Plan
from bench.run import LoadProcess, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest
    from bench.catalogue import Workload
    from bench.peers import Stage

PEERS = [Peer(name=name, job={}, pids=pids) for name, pids in (("direct", ()), ("ours", (1,)), ("envoy", (2,)))]


@attrs.frozen
class Running:
    peers: Sequence[Peer] = tuple(PEERS)


class Load:
    """Gives each turn its number as its units; `failing` turns fail."""

    def __init__(self, failing: int = -1) -> None:
        self.turns = 0
        self.failing = failing

    async def turn(self, peer: Peer, workload: Workload, seconds: float) -> dict[str, float]:
        self.turns += 1
        if self.turns == self.failing:
            raise BenchError("it fell over")
        return {"units": self.turns}


async def rounds(monkeypatch: pytest.MonkeyPatch, steal: list[float], *, spare: int, load: Load) -> Outcome:
    shares = iter(steal)
    monkeypatch.setattr(run, "stolen", lambda _: next(shares))
    plan = Plan(namespaces=False, rounds=2, seconds=1, idle_streams=1, idle_tunnels=1, pushed=1, spare=spare)
    outcome = Outcome(plan)
    stage = cast("Stage", cast("Any", Running()))
    await run._rounds(outcome, stage, cast("LoadProcess", cast("Any", load)), [WORKLOADS["rr_1"]])
    assert next(shares, None) is None
    return outcome


def units(outcome: Outcome) -> dict[str, list[float]]:
    return {peer: [one["units"] for one in samples] for peer, samples in outcome.samples["rr_1"].items()}


async def test_rounds_on_a_quiet_machine_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = await rounds(monkeypatch, [0.0, 0.05], spare=2, load=Load())
    assert units(outcome) == {"direct": [1, 4], "ours": [2, 5], "envoy": [3, 6]}
    assert (outcome.again, outcome.steal) == (0, [0.0, 0.05])


async def test_a_disturbed_round_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = await rounds(monkeypatch, [0.2, 0.01, 0.02], spare=2, load=Load())
    assert units(outcome) == {"direct": [4, 7], "ours": [5, 8], "envoy": [6, 9]}
    assert (outcome.again, outcome.steal) == (1, [0.01, 0.02])


async def test_rounds_to_spare_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = await rounds(monkeypatch, [0.2, 0.3, 0.4, 0.1], spare=2, load=Load())
    assert units(outcome)["ours"] == [2, 11]
    assert (outcome.again, outcome.steal) == (2, [0.2, 0.1])


async def test_none_is_made_again_where_none_is_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = await rounds(monkeypatch, [0.2, 0.3], spare=0, load=Load())
    assert (outcome.again, outcome.steal) == (0, [0.2, 0.3])


async def test_a_peer_that_failed_once_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(failing=6)
    outcome = await rounds(monkeypatch, [0.0, 0.2, 0.0], spare=2, load=load)
    assert units(outcome) == {"direct": [1, 7], "ours": [2, 8]}
    assert outcome.notes == ["left out: it fell over"]
    assert load.turns == 8
