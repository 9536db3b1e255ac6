"""A Rust ztunnel as a peer, where `ZTUNNEL_RS` names its binary.

Each stands on a host of its own, because its ports are fixed, and gets workloads, policies and certificates from the
miniistiod that serves our pair.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from bench.errors import BenchError

__all__ = ["VARIABLE", "binary", "command", "environment", "version"]

VARIABLE = "ZTUNNEL_RS"


def binary(environ: dict[str, str] | None = None) -> Path | None:
    """The binary that the environment names; None where it names none.

    Raises:
        BenchError: it can't be run.
    """
    named = (os.environ if environ is None else environ).get(VARIABLE, "")
    if not named:
        return None
    path = Path(named).absolute()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise BenchError(f"{VARIABLE} is {named!r}, which is no program; give the path of a ztunnel binary")
    return path


def command(path: Path) -> list[str]:
    """Its command line."""
    return [str(path), "proxy"]


def environment(workers: int) -> dict[str, str]:
    """What its environment has beyond that of ours: what ours takes for granted, or finds out."""
    return {
        "PROXY_MODE": "dedicated",
        "ENABLE_ORIG_SRC": "false",
        "IPV6_ENABLED": "false",
        "RUST_LOG": "info",
        "ZTUNNEL_WORKER_THREADS": str(workers),
    }


def version(path: Path) -> str:
    """What it says it is.

    Raises:
        BenchError: it doesn't say within ten seconds.
    """
    try:
        done = subprocess.run([str(path), "version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BenchError(f"{VARIABLE}: {path} version failed: {error}") from error
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0].strip() if lines else "unknown"
