from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.miniistiod import MESH

from miniistiod import cli
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture
def state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("init", "--state", tmp_path / "state", "--trust-domain", "mesh.example") == 0
    assert "mesh.example" in capsys.readouterr().out
    return tmp_path / "state"


COMMANDS = [
    [],
    ["run"],
    ["init"],
    ["check"],
    ["token"],
    ["token", "create"],
    ["token", "list"],
    ["token", "renew"],
    ["token", "revoke"],
    ["revoke"],
    ["root"],
    ["root", "show"],
    ["root", "rotate"],
    ["backup"],
    ["restore"],
    ["get"],
    ["version"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, "--help") == 0
    assert "miniistiod " in capsys.readouterr().out.partition("examples:")[2]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run", "--config", "x"], "the following arguments are required: --state"),
        (["run", "--config", "nowhere", "--state", "s"], "'nowhere' cannot be read: no such file or directory"),
        (["run", "--config", "c", "--state", "s", "--listen", "a:b"], "'a:b' is not an address"),
        (["run", "--config", "c", "--state", "s", "--listen", ":70000"], "':70000' is not an address"),
        (["run", "--config", "c", "--state", "s", "--name", "a b"], "names has 'a b'"),
        (["run", "--config", "c", "--state", "c"], "config_dir and state_dir are the same directory"),
        (["run", "--config", "c", "--state", "s", "--default-ttl", "24"], "'24' is not a duration"),
        (["run", "--config", "c", "--state", "s", "--max-ttl", "91d"], "max_lifetime is 91 days"),
        (["init", "--state", "s", "--trust-domain", "A B"], "trust domain 'A B' is malformed"),
        (["check", "nowhere.yaml"], "'nowhere.yaml' cannot be read: no such file or directory; check the path"),
        (["backup", "--state", "nowhere", "x"], "the state directory 'nowhere' does not exist"),
        (["restore", "--state", "s", "nowhere"], "there is no file 'nowhere'"),
        (["root", "rotate", "--state", "s", "--finish", "it"], "invalid choice: 'it'"),
        (["revoke", "--state", "s", "--serial", "1", "--name", "a/b"], "not allowed with argument --serial"),
        (["run", "--config", "c", "--state", "s", "--registration-grace", "2d"], "registration_grace is 2 days"),
        (["token", "list", "--state", "nowhere"], "the state directory 'nowhere' does not exist"),
        (["get", "workloads"], "the following arguments are required: --state"),
        (["get", "nothing", "--state", "s"], "invalid choice: 'nothing'"),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_2(
    arguments: list[str], what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert what in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_run_without_a_state_needs_init(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "a.yaml").write_text(MESH)
    assert run("run", "--config", tmp_path / "mesh", "--state", tmp_path / "state", "--log-level", "off") == 2
    assert "start a new mesh with --init" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()


def test_init_never_makes_a_second_root(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = (state / "root-cert.pem").read_bytes()
    assert run("init", "--state", state) == 2
    assert "a second root would split the mesh" in capsys.readouterr().err
    assert (state / "root-cert.pem").read_bytes() == root


def test_nobody_running_is_exit_code_3(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("get", "workloads", "--state", state) == 3
    assert "no control plane answers" in capsys.readouterr().err


def test_a_one_time_token_comes_with_the_command_to_run(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["token", "create", "--state", state, "--namespace", "shop", "--service-account", "orders"]
    assert run(*arguments, "--name", "orders-1", "--server", "mesh.example.com") == 0
    shown = capsys.readouterr()
    (line,) = shown.out.splitlines()
    assert line.endswith("| ztunnel enroll --server mesh.example.com --token-file -")
    token = parse_enrolment_token(line.split("'")[1])
    assert (token.spiffe_id, token.name) == ("spiffe://mesh.example/ns/shop/sa/orders", "orders-1")
    assert token.secret not in shown.err


def test_a_reusable_token_is_written_private_and_without_a_newline(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "istio-token"
    arguments = ["token", "create", "--state", state, "--namespace", "shop", "--service-account", "orders"]
    assert run(*arguments, "--reusable", "--out", path) == 0
    text = path.read_text()
    assert text.startswith("eyJ")
    assert text == text.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = capsys.readouterr()
    assert text not in shown.out + shown.err


def test_a_token_that_cannot_be_written_is_revoked(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["token", "create", "--state", state, "--namespace", "shop", "--service-account", "orders"]
    assert run(*arguments, "--out", tmp_path / "no" / "file") == 2
    assert "the token was revoked" in capsys.readouterr().err
    assert run("token", "list", "--state", state, "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed["state"] == "revoked"


def test_tokens_are_listed_and_revoked(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["token", "create", "--state", state, "--namespace", "shop", "--service-account", "orders", "--json"]
    assert run(*arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert run("token", "list", "--state", state) == 0
    assert f"{made['id']}  one-time  valid" in capsys.readouterr().out
    assert run("token", "revoke", "--state", state, made["id"]) == 0
    assert run("token", "list", "--state", state) == 0
    assert "revoked" in capsys.readouterr().out
    assert run("token", "revoke", "--state", state, "none") == 1


def test_one_document_is_counted_in_the_singular(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("{apiVersion: v1, kind: Namespace, metadata: {name: shop}}")
    assert run("check", tmp_path) == 0
    assert "1 document, 0 errors, 0 warnings" in capsys.readouterr().err


def test_check_tells_file_line_what_and_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(MESH)
    assert run("check", tmp_path) == 0
    assert run("check", tmp_path, "--strict") == 1
    assert "4 documents, 0 errors, 2 warnings" in capsys.readouterr().err
    path.write_text(MESH.replace("serviceAccounts: [web]", "serviceAccounts: ['*']"))
    assert run("check", path) == 1
    line = 1 + path.read_text().splitlines().index("  rules: [{from: [{source: {serviceAccounts: ['*']}}]}]")
    assert f"{path}:{line}: error: spec.rules[0].from[0].source.serviceAccounts[0] is '*'" in capsys.readouterr().out
    assert run("check", path, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert [item["line"] for item in found if item["severity"] == "error"] == [line]


def test_run_serves_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "a.yaml").write_text(MESH)
    command = [sys.executable, "-m", "miniistiod", "run", "--config", "mesh", "--state", "state", "--init"]
    command += ["--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0", "--log-format", "json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if json.loads(line)["message"] == "listening":
                break
        os.kill(child.pid, signal.SIGTERM)
        out, err = child.communicate(timeout=20)
    assert child.returncode == 0, err.decode()
    assert b"stopping" in out
    assert err == b""


def test_a_missing_extra_is_told_with_the_pip_line(tmp_path: Path) -> None:
    (tmp_path / "google.py").write_text("raise ModuleNotFoundError('x', name='google')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "miniistiod", "version"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "miniistiod: protobuf is not installed; pip install 'hbone[miniistiod]'\n"


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("version") == 0
    assert capsys.readouterr().out == f"miniistiod {importlib.metadata.version('hbone')}\n"
