"""The figures as tables: for a terminal, and for the README. Pure."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench.catalogue import WORKLOADS, Workload
from bench.figures import DIRECT, FACTS, OURS, Facts, Samples, Verdict, fact_ratio, ratio, summary

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["markdown", "terminal"]

DASH = "-"
HEAD = ("workload", "peer", "per second", "CPU", "", "user", "system", "p50", "p99", "p99.9", "ours/it")
LEFT = {0, 1, 4}
"""Columns of text."""


def _number(value: float | None, digits: int = 0) -> str:
    if value is None:
        return DASH
    return f"{value:,.{digits}f}"


def _cost(value: float | None, workload: Workload) -> str:
    return _number(value, 2 if workload.kind == "bulk" else 1)


def _row(samples: Samples, workload: Workload, peer: str, verdict: Verdict) -> list[str]:
    found = {name: figure["median"] for name, figure in summary(samples[workload.name][peer], workload).items()}
    rate = found["rate"]
    row = [workload.name, peer, f"{rate / 1e6:,.0f} MB" if workload.kind == "bulk" else _number(rate)]
    if peer == DIRECT or workload.kind == "latency":
        row += [""] * 4
    else:
        row += [_cost(found["cpu"], workload), workload.unit]
        row += [_cost(found["user"], workload), _cost(found["system"], workload)]
    row += [_number(found[name]) if name in found else "" for name in ("p50_us", "p99_us", "p999_us")]
    share = ratio(samples, workload, peer) if peer not in (OURS, DIRECT) else None
    if share is None:
        row.append("")
    else:
        row.append(f"{share:.2f}" + ("~" if (workload.name, peer) in verdict.shaky else " "))
    return row


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def terminal(samples: Samples, facts: Facts, peers: Sequence[str], verdict: Verdict) -> str:
    """The table that people read: medians, and the median of the ratios; `~` marks a ratio that swung."""
    rows = [list(HEAD)]
    for name, by_peer in samples.items():
        rows += [_row(samples, WORKLOADS[name], peer, verdict) for peer in peers if by_peer.get(peer)]
    lines = _aligned(rows, LEFT)
    others = [peer for peer in peers if peer != DIRECT]
    rows = [["", *others, *(f"ours/{peer}" for peer in others if peer != OURS)]]
    for key, measured in facts.items():
        fact = FACTS[key]
        row = [f"{fact.title} ({fact.unit})"]
        for peer in others:
            numbers = measured.get(peer)
            row.append(_number(statistics.median(numbers), 1 if fact.unit != "s" else 2) if numbers else DASH)
        row += [_share(fact_ratio(facts, key, peer)) for peer in others if peer != OURS]
        rows.append(row)
    if len(rows) > 1:
        lines += ["", *_aligned(rows, {0})]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}"


def markdown(samples: Samples, facts: Facts, peers: Sequence[str], verdict: Verdict) -> str:
    """The table of the README: what stands for each workload, and the ratio to each other peer."""
    shown = [peer for peer in peers if peer != DIRECT]
    others = [peer for peer in shown if peer != OURS]
    lines = [
        "| | unit | " + " | ".join([*shown, *(f"ours / {peer}" for peer in others)]) + " |",
        "| --- | --- |" + " ---: |" * (len(shown) + len(others)),
    ]
    for name, by_peer in samples.items():
        workload = WORKLOADS[name]
        cells = []
        for peer in shown:
            found = summary(by_peer.get(peer, []), workload).get(workload.headline)
            if found is None:
                cells.append(DASH)
            elif workload.headline == "cpu":
                cells.append(_cost(found["median"], workload))
            else:
                cells.append(_number(found["median"]))
        for peer in others:
            share = ratio(samples, workload, peer)
            cells.append(_share(share) + ("~" if (name, peer) in verdict.shaky else ""))
        unit = f"CPU {workload.unit}" if workload.headline == "cpu" else "us"
        lines.append(f"| {workload.title} | {unit} | " + " | ".join(cells) + " |")
    for key, measured in facts.items():
        fact = FACTS[key]
        cells = [_number(statistics.median(measured[peer]), 1) if measured.get(peer) else DASH for peer in shown]
        cells += [_share(fact_ratio(facts, key, peer)) for peer in others]
        lines.append(f"| {fact.title} | {fact.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
