"""Every program in examples/ runs and shows what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_echo_names_both_peers() -> None:
    done = run("-m", "examples.echo")
    assert done.returncode == 0, done.stderr
    assert "spiffe://cluster.local/ns/demo/sa/client asks for 10.0.0.7:8080" in done.stdout
    assert "'hello over HBONE' came back" in done.stdout


def test_a_web_application_knows_who_calls() -> None:
    done = run("-m", "examples.asgi_httpx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "shopper: 200 welcome, spiffe://cluster.local/ns/demo/sa/shopper",
        "stranger: 403 not for you, spiffe://cluster.local/ns/demo/sa/stranger",
    ]


def test_every_example_is_run_by_a_test() -> None:
    programs = {path.stem if path.is_file() else path.name for path in (ROOT / "examples").iterdir()}
    assert programs - {"__init__", "__pycache__"} == {"alerts", "echo", "asgi_httpx", "demo", "systemd", "two_hosts"}


@pytest.mark.netns
@pytest.mark.timeout(180)
def test_the_demo_is_as_expected_in_namespaces() -> None:
    done = run("-m", "examples.demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "network namespaces" in done.stdout
    assert "FAIL" not in done.stdout


@pytest.mark.timeout(180)
def test_the_demo_is_as_expected_without_privilege() -> None:
    done = run("-m", "examples.demo", "--loopback")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loopback" in done.stdout
    assert "FAIL" not in done.stdout
