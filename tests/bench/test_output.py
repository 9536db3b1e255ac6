from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

import pytest
from bench import publish
from bench.catalogue import WORKLOADS
from bench.errors import BenchError
from bench.figures import FACTS, Verdict, judge
from bench.peers import Plan
from bench.plot import Bar, svg
from bench.run import Outcome
from bench.tables import markdown, terminal

if TYPE_CHECKING:
    from pathlib import Path

QUIET = {"steal": 0.0, "foreign": 0.0}


def outcome(rounds: int = 6) -> Outcome:
    plan = Plan(namespaces=True, rounds=rounds, seconds=1, idle_streams=10_000, idle_tunnels=1000, pushed=100_000)
    made = Outcome(plan, host=QUIET, versions={"envoy": "1.40.0"}, peers=["direct", "ours", "envoy", "spike"])
    for name, workload in WORKLOADS.items():
        for peer, cpu in (("direct", 0.0), ("ours", 0.9), ("envoy", 1.0), ("spike", 1.1)):
            if peer == "direct" and not workload.direct:
                continue
            units = 1e9 if workload.kind == "bulk" else 1e4
            sample = {"units": units, "seconds": 1.0, "user": cpu / 2, "system": cpu / 2, "p50": 1e-4, "p99": 3e-4}
            for _ in range(rounds):
                made.add(name, peer, sample)
    for name in FACTS:
        made.fact(name, "ours", 30.0)
        made.fact(name, "envoy", 60.0)
    return made


def verdict_of(found: Outcome) -> Verdict:
    return judge(found.samples, found.host)


def test_latest_json_has_the_names_that_readers_know() -> None:
    found = outcome()
    document = json.loads(json.dumps(publish.document(found, verdict_of(found))))
    names = {"bulk_cpu_s_per_gb", "rr_cpu_us", "connect_cpu_us", "bulk_mb_s", "rr_p50_us", "rr_p99_us", "rss_mb"}
    assert names <= set(document["peers"]["ours"])
    assert document["peers"]["ours"]["bulk_mb_s"] == {"median": 1000, "best": 1000}
    assert document["ratio_to"]["envoy"]["bulk_cpu_s_per_gb"] == pytest.approx(0.9)
    assert document["ratio_to"]["spike"]["rr_cpu_us"] == pytest.approx(0.9 / 1.1, rel=1e-3)
    assert document["rounds"] == 6
    assert document["host"]["cores"] > 0
    assert document["too_noisy"] == []


def test_what_runs_without_a_proxy_has_no_cpu() -> None:
    found = outcome()
    direct = publish.document(found, verdict_of(found))["peers"]["direct"]
    assert "rr_p99_us" in direct
    assert not [name for name in direct if "cpu" in name]


def test_terminal_table_has_a_line_for_each_peer_of_each_workload() -> None:
    found = outcome()
    text = terminal(found.samples, found.facts, found.peers, verdict_of(found))
    rows = [line.split() for line in text.splitlines() if line.startswith("rr_1 ")]
    assert [row[1] for row in rows] == ["direct", "ours", "envoy", "spike"]
    assert rows[2][-1] == "0.90"
    assert "memory of one proxy, idle (MB)" in text


def test_a_shaky_ratio_is_marked() -> None:
    found = outcome()
    shaky = Verdict(problems=(), shaky=frozenset({("rr_1", "envoy")}), noise={})
    line = next(
        row
        for row in terminal(found.samples, {}, found.peers, shaky).splitlines()
        if "rr_1    " in row and "envoy" in row
    )
    assert line.endswith("0.90~")
    assert "| 1-byte round trip | CPU us | 90.0 | 100.0 | 0.90~ |" in markdown(
        found.samples, {}, ["direct", "ours", "envoy"], shaky
    )


def test_what_a_peer_cannot_do_is_a_dash() -> None:
    found = outcome()
    del found.samples["steady_push"]["envoy"]
    table = markdown(found.samples, found.facts, ["direct", "ours", "envoy"], verdict_of(found))
    assert next(line for line in table.splitlines() if "beside a push" in line).endswith("| 300 | - | - |")


def test_picture_is_well_formed_and_names_each_bar() -> None:
    bars = [
        Bar(group="CPU", title="a < b & c", ratios=(0.5, None)),
        Bar(group="CPU", title="far over", ratios=(7.25, 1.0)),
    ]
    text = svg(bars, ["envoy", "other"], title='"this" beside <that>', subtitle="a machine")
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    rects = [rect for rect in root.iter(f"{name}rect") if rect.get("x")]
    assert [float(rect.get("width", "0")) for rect in rects] == [119.0, 476.0, 238.0]
    titles = [title.text for title in root.iter(f"{name}title")]
    assert titles == ["a < b & c: 0.50 of envoy", "far over: 7.25 of envoy", "far over: 1.00 of other"]
    assert "prefers-color-scheme: dark" in text


def test_picture_shows_published_peers_only() -> None:
    bars, others = publish.bars(outcome())
    assert others == ["envoy"]
    assert {bar.group for bar in bars} == {"CPU of both proxies", "latency (p99)", "memory", "time"}


def test_block_is_put_between_its_marks() -> None:
    text = f"before\n{publish.BEGIN}\nold\n{publish.END}\nafter\n"
    assert publish.put_block(text, "new") == f"before\n{publish.BEGIN}\n\nnew\n\n{publish.END}\nafter\n"
    assert publish.put_block(publish.put_block(text, "a"), "b") == publish.put_block(text, "b")


@pytest.mark.parametrize("text", ["", publish.BEGIN, f"{publish.END} {publish.BEGIN}", publish.BEGIN * 2 + publish.END])
def test_a_readme_without_marks_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="once each"):
        publish.put_block(text, "new")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, place in (("RESULTS", "latest.json"), ("PICTURE", "bench.svg"), ("README", "README.md")):
        monkeypatch.setattr(publish, name, tmp_path / place)
    (tmp_path / "README.md").write_text(f"{publish.BEGIN}\n{publish.END}\n")
    return tmp_path


def test_a_quiet_run_is_published(files: Path) -> None:
    found = outcome()
    publish.write(found, verdict_of(found), publish=True)
    assert json.loads((files / "latest.json").read_text())["rounds"] == 6
    assert "| 1-byte round trip | CPU us | 90.0 | 100.0 | 0.90 |" in (files / "README.md").read_text()
    ElementTree.parse(files / "bench.svg")


def test_without_publish_only_the_results_are_written(files: Path) -> None:
    found = outcome()
    publish.write(found, verdict_of(found), publish=False)
    assert sorted(path.name for path in files.iterdir()) == ["README.md", "latest.json"]


def test_a_noisy_run_leaves_everything_as_it_was(files: Path) -> None:
    found = outcome()
    found.host = {"steal": 0.4, "foreign": 0.0}
    (files / "latest.json").write_text("the last good one")
    with pytest.raises(BenchError, match=r"too noisy: the hypervisor took 40\.0%"):
        publish.write(found, verdict_of(found), publish=True)
    assert (files / "latest.json").read_text() == "the last good one"
    assert not (files / "bench.svg").exists()


def test_the_readme_has_the_marks() -> None:
    assert publish.put_block(publish.README.read_text(), "new").count("new") >= 1
