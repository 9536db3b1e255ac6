"""The bench as a whole, at sizes that say nothing about speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from bench.catalogue import WORKLOADS
from bench.figures import DIRECT, OURS
from bench.peers import ENVOY, Plan
from bench.run import run
from tests.support.sizes import FULL

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.interop

CHOSEN = tuple(WORKLOADS) if FULL else ("bulk_up_16", "bulk_down_1", "rr_64", "connect_32", "paced_bulk")


async def test_every_peer_takes_its_turns(tmp_path: Path) -> None:
    plan = Plan(
        namespaces=False,
        rounds=1,
        seconds=0.1,
        idle_streams=10,
        idle_tunnels=10,
        pushed=10,
        workloads=CHOSEN,
    )
    outcome = await run(tmp_path, plan)
    assert outcome.notes == []
    assert outcome.peers == [DIRECT, OURS, ENVOY]
    assert set(outcome.samples) == set(CHOSEN)
    for name, by_peer in outcome.samples.items():
        assert {OURS, ENVOY} <= {*by_peer, *([ENVOY] if name == "steady_push" else [])}
        for peer, (sample,) in by_peer.items():
            assert sample["units"] > 0, (name, peer)
            assert (sample["user"] + sample["system"] > 0) is (peer != DIRECT), (name, peer)
    assert outcome.facts["rss_mb"][OURS][0] > 0
