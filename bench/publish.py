"""What a run leaves behind: `latest.json`, the picture, and the block of figures in the README."""

from __future__ import annotations

import json
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.catalogue import WORKLOADS, Workload
from bench.errors import BenchError
from bench.figures import DIRECT, FACTS, METRICS, OURS, fact_ratio, ratio, summary
from bench.measure import host_facts
from bench.peers import ENVOY, RUST
from bench.plot import Bar, svg
from bench.tables import markdown

if TYPE_CHECKING:
    from bench.figures import Verdict
    from bench.run import Outcome

__all__ = ["BEGIN", "END", "bars", "document", "key_of", "put_block", "readme_block", "write"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "latest.json"
PICTURE = ROOT / "docs" / "bench.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"

METHOD = (
    "Method: client and server in two network namespaces joined by a bridge, nftables redirect, one worker a proxy; "
    "peers take turns in every round, and a figure is the median of the rounds, a ratio the median of the ratios of "
    "turns that stood side by side. CPU is user and system of both proxies from the kernel's clock of each process; "
    "its split into user and system goes by ticks of 4 ms. Both write an access log to a file, keep statistics and ask "
    "a policy for each connection: Envoy by an RBAC filter on the CONNECT's principal, ours by an AuthorizationPolicy. "
    "Times are microseconds at the client. Rounds of which the hypervisor took more than 5 % of the machine are made "
    "again, and the quietest count, whatever they show. `~`: the ratio swung by more than 15 % between rounds."
)


def key_of(workload: Workload, metric: str) -> str:
    """Name of a metric in `latest.json`."""
    name = workload.key or workload.name
    if metric == "rate":
        return f"{name}_mb_s" if workload.kind == "bulk" else f"{name}_per_s"
    if metric in ("cpu", "user", "system"):
        return f"{name}_{metric}_{'s_per_gb' if workload.kind == 'bulk' else 'us'}"
    return f"{name}_{metric}"


def document(outcome: Outcome, verdict: Verdict) -> dict[str, Any]:
    """`latest.json`: median and best by peer, ratios of ours to the others."""
    peers: dict[str, dict[str, Any]] = {peer: {} for peer in outcome.peers}
    ratio_to: dict[str, dict[str, float]] = {p: {} for p in outcome.peers if p not in (OURS, DIRECT)}
    for name, by_peer in outcome.samples.items():
        workload = WORKLOADS[name]
        for peer, samples in by_peer.items():
            for metric, figure in summary(samples, workload).items():
                without_cpu = peer == DIRECT or workload.kind == "latency"
                if without_cpu and metric in ("cpu", "user", "system"):
                    continue
                factor = 1e-6 if metric == "rate" and workload.kind == "bulk" else 1.0
                peers[peer][key_of(workload, metric)] = {k: _short(v * factor) for k, v in figure.items()}
        for other, ratios in ratio_to.items():
            for metric in METRICS:
                if workload.kind == "latency" and not metric.startswith("p"):
                    continue
                found = ratio(outcome.samples, workload, other, metric)
                if found is not None:
                    ratios[key_of(workload, metric)] = _short(found)
    for name, facts in outcome.facts.items():
        for peer, numbers in facts.items():
            peers[peer][name] = {"median": _short(statistics.median(numbers)), "best": _short(min(numbers))}
        for other, ratios in ratio_to.items():
            found = fact_ratio(outcome.facts, name, other)
            if found is not None:
                ratios[name] = _short(found)
    plan = outcome.plan
    return {
        "host": host_facts() | {"python": platform.python_version(), "versions": outcome.versions},
        "rounds": plan.rounds,
        "turn_s": plan.seconds,
        "workers": plan.workers,
        "namespaces": plan.namespaces,
        "sizes": {"idle_streams": plan.idle_streams, "idle_tunnels": plan.idle_tunnels, "pushed": plan.pushed},
        "noise": {name: round(value, 4) for name, value in verdict.noise.items()},
        "too_noisy": list(verdict.problems),
        "notes": outcome.notes,
        "peers": peers,
        "ratio_to": ratio_to,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def shown(outcome: Outcome) -> list[str]:
    """The peers that are published; pairs that somebody brought are in `latest.json` only."""
    return [peer for peer in outcome.peers if peer in (DIRECT, OURS, ENVOY, RUST)]


def bars(outcome: Outcome) -> tuple[list[Bar], list[str]]:
    """What the picture shows, and whom it compares to."""
    others = [peer for peer in shown(outcome) if peer not in (OURS, DIRECT)]
    made = []
    for name in outcome.samples:
        workload = WORKLOADS[name]
        group = "latency (p99)" if workload.headline == "p99_us" else "CPU of both proxies"
        ratios = tuple(ratio(outcome.samples, workload, other) for other in others)
        if any(value is not None for value in ratios):
            made.append(Bar(group=group, title=workload.title.removeprefix("p99, "), ratios=ratios))
    for name in outcome.facts:
        ratios = tuple(fact_ratio(outcome.facts, name, other) for other in others)
        if any(value is not None for value in ratios):
            fact = FACTS[name]
            group = "memory" if fact.unit in ("MB", "kB") else "time"
            title = fact.title.removeprefix("memory of ").removesuffix(", both proxies")
            made.append(Bar(group=group, title=title, ratios=ratios))
    order = ["CPU of both proxies", "latency (p99)", "memory", "time"]
    return sorted(made, key=lambda bar: order.index(bar.group)), others


def _machine(host: dict[str, Any]) -> str:
    return f"{host['cpu']}, {host['cores']} cores, Linux {host['kernel']}, Python {platform.python_version()}"


def picture(outcome: Outcome) -> str:
    """The SVG."""
    lines, others = bars(outcome)
    names = [f"{name} {outcome.versions[name]}" if name in outcome.versions else name for name in others]
    return svg(lines, names, title=f"hbone beside {' and '.join(names)}", subtitle=_machine(host_facts()))


def readme_block(outcome: Outcome, verdict: Verdict) -> str:
    """The figures as the README shows them."""
    plan = outcome.plan
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    host = host_facts()
    return "\n\n".join(
        [
            f"`{host['name']}`: {_machine(host)}; {versions}; {plan.rounds} rounds, "
            f"{plan.idle_streams:,} idle streams, {plan.idle_tunnels:,} idle tunnels, {plan.pushed:,} workloads "
            "pushed.",
            "![ours to theirs, by workload](docs/bench.svg)",
            markdown(outcome.samples, outcome.facts, shown(outcome), verdict),
            METHOD,
            "Again with `make bench ARGS=--publish`.",
        ]
    )


def put_block(text: str, block: str) -> str:
    """The README's text with another block of figures.

    Raises:
        BenchError: its markers are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BenchError(f"README.md must have {BEGIN} and after it {END}, once each")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{block}\n\n{END}{tail}"


def write(outcome: Outcome, verdict: Verdict, *, publish: bool) -> list[Path]:
    """Write the results, and with `publish` the picture and the README's block.

    Returns:
        What was written.

    Raises:
        BenchError: the run was too noisy; nothing was written.
    """
    if not verdict.quiet:
        raise BenchError("nothing was written, the run was too noisy: " + "; ".join(verdict.problems))
    texts = {RESULTS: json.dumps(document(outcome, verdict), indent=1) + "\n"}
    if publish:
        texts[PICTURE] = picture(outcome)
        texts[README] = put_block(README.read_text(), readme_block(outcome, verdict))
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text)
        temporary.rename(path)
    return list(texts)
