from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import yaml
from bench import policy, rust
from bench.__main__ import ended_by, main, parser, plan_of
from bench.envoys import CLIENT, bootstrap
from bench.errors import BenchError
from bench.load import percentile
from bench.measure import HostLoad, cpu, descendants, resident
from bench.peers import free_port, named, policies

from hbone.testing.envoy import EnvoyPorts
from ztunnel.mesh import decide

if TYPE_CHECKING:
    from pathlib import Path


def test_a_named_pair_is_reached_from_where_its_first_process_is() -> None:
    me = os.getpid()
    (peer,) = named(f"spike=10.0.0.2:23001,{me},{os.getppid()}")
    assert peer.name == "spike"
    assert peer.pids == (me, os.getppid())
    assert peer.job == {"host": "10.0.0.2", "port": 23001, "netns": f"/proc/{me}/ns/net"}


def test_several_pairs_may_be_named_and_none_need_be() -> None:
    assert [peer.name for peer in named("a=h:1 b=[::1]:2")] == ["a", "b"]
    assert named("b=[::1]:2")[0].job["host"] == "::1"
    assert named("") == []


@pytest.mark.parametrize("text", ["spike", "=h:1", "a=h", "a=h:port", "a=h:1,pid", "a=h:1,"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="name=host:port,pid,pid"):
        named(text)


def test_a_pair_that_does_not_run_is_refused() -> None:
    with pytest.raises(BenchError, match="no process 4194999"):
        named("a=h:1,4194999")


def stand_in(directory: Path) -> Path:
    """A program that answers as a ztunnel would, and says how it was called."""
    path = directory / "ztunnel"
    path.write_text('#!/bin/sh\n[ "$1" = version ] && { echo "version.Info 1.30"; exit; }\necho "$@ $PROXY_MODE"\n')
    path.chmod(0o755)
    return path


def test_rust_ztunnel_is_called_as_it_expects(tmp_path: Path) -> None:
    path = rust.binary({rust.VARIABLE: str(stand_in(tmp_path))})
    assert path is not None
    assert rust.version(path) == "version.Info 1.30"
    environment = {"PATH": os.defpath} | rust.environment(workers=2)
    done = subprocess.run(rust.command(path), env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "proxy dedicated\n"
    assert environment["ZTUNNEL_WORKER_THREADS"] == "2"


def test_no_rust_ztunnel_is_fine_and_a_wrong_path_is_not(tmp_path: Path) -> None:
    assert rust.binary({}) is None
    (tmp_path / "text").write_text("no program")
    for wrong in (tmp_path / "absent", tmp_path / "text", tmp_path):
        with pytest.raises(BenchError, match="which is no program"):
            rust.binary({rust.VARIABLE: str(wrong)})


def test_envoy_has_policy_log_and_room(tmp_path: Path) -> None:
    made = bootstrap(
        tmp_path,
        EnvoyPorts(),
        application=("10.0.0.2", 8081),
        tunnel_to=("10.0.0.2", 9),
        bind="0.0.0.0",
        policies=1000,
        streams=1,
        reuse=False,
    )
    terminate, originate = (
        listener["filter_chains"][0]["filters"][0]["typed_config"] for listener in made["static_resources"]["listeners"]
    )
    rules = terminate["http_filters"][0]["typed_config"]["rules"]["policies"]
    assert len(rules) == 1000
    assert rules[max(rules)]["principals"] == [{"authenticated": {"principal_name": {"exact": CLIENT}}}]
    assert terminate["access_log"] == originate["access_log"]
    for cluster in made["static_resources"]["clusters"]:
        assert cluster["circuit_breakers"]["thresholds"][0]["max_requests"] > 10_000


def test_documents_allow_the_client_last() -> None:
    found = list(yaml.safe_load_all(policies(1000)))
    assert len(found) == 1000
    last = max(found, key=lambda document: document["metadata"]["name"])
    assert last["spec"]["rules"][0]["from"][0]["source"]["principals"] == ["cluster.local/ns/bench/sa/client"]


def test_a_thousand_policies_are_asked_until_the_last_allows() -> None:
    store, server, connection = policy.store_of(1000)
    assert decide(store, server, connection).policy == "bench/p00999"


def test_cpu_of_a_process_and_its_children_is_counted() -> None:
    before = cpu([os.getpid()])
    work = "sum(range(300000)); import sys; sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        assert process.pid in descendants(os.getpid())
        spent = cpu([os.getpid()]).since(before)
        childs = cpu([process.pid]).since(cpu([]))
        assert resident([process.pid]) > 1
        process.communicate()
    assert spent.total >= childs.total > 0
    assert spent.total == pytest.approx(spent.user + spent.system)


def test_a_process_that_is_gone_costs_nothing() -> None:
    assert cpu([4194999]).since(cpu([4194999])).total == 0
    assert resident([4194999]) == 0


def test_shares_of_the_machine_are_shares() -> None:
    assert all(0 <= share <= 1 for share in HostLoad().shares().values())


def test_percentiles_are_taken_from_sorted_values() -> None:
    numbers = [float(number) for number in range(100)]
    assert percentile(numbers, 0.5) == 50
    assert percentile(numbers, 0.999) == 99
    assert percentile([], 0.99) == 0


def test_sizes_stay_below_what_the_machine_lets_open() -> None:
    options = parser().parse_args(["--loopback"])
    assert plan_of(options, 1 << 20).idle_streams == 10_000
    assert plan_of(options, 4096).idle_streams == 4096 - 1500
    assert plan_of(parser().parse_args(["--loopback", "--quick"]), 1 << 20).idle_streams == 500


@pytest.mark.parametrize("arguments", [["--publish", "--quick"], ["--publish", "--loopback"], ["--rounds", "0"]])
def test_a_run_that_makes_no_sense_is_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    assert main() == 2
    assert capsys.readouterr().err.startswith("make bench: --")


def test_an_error_is_one_sentence_and_a_fault_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    error = BenchError("no application")
    assert ended_by(BaseExceptionGroup("", [BaseExceptionGroup("", [error])])) == 1
    assert capsys.readouterr().err == "make bench: no application\n"
    assert ended_by(BaseExceptionGroup("", [error, KeyboardInterrupt()])) == 130
    with pytest.raises(ExceptionGroup):
        ended_by(ExceptionGroup("", [error, ValueError()]))


def test_a_port_in_use_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", free_port(13_000, "127.0.0.1"))) as taken:
        port = taken.getsockname()[1]
        assert free_port(port, "127.0.0.1") > port
