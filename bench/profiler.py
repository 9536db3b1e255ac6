"""Where time goes: each workload through each peer once more, watched by `perf`, `strace` and `py-spy`.

A pass of its own for each tool, because being watched costs time; no figure of the timing comes from here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from bench.breakdown import Breakdown, python_functions, report, samples, system_calls
from bench.catalogue import WORKLOADS
from bench.errors import BenchError
from bench.measure import descendants
from bench.peers import stage
from bench.run import LoadProcess, progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.catalogue import Workload
    from bench.peers import Peer, Plan

__all__ = ["profile"]

USUAL = ("bulk_up_1", "bulk_down_1", "bulk_up_16", "rr_1", "rr_64", "rr_1000", "connect_1", "connect_32")
RATE = 997
"""Samples a second; not a divisor of anything else that happens."""
RESULT = Path(__file__).parent / "results" / "profile.txt"


@contextlib.asynccontextmanager
async def watching(command: list[str]) -> AsyncIterator[None]:
    """Run a tool beside the body, and let it write its report afterwards.

    Raises:
        BenchError: it ended before the body did.
    """
    process = _start(command)
    try:
        await trio.sleep(1.0)  # it attaches to every thread
        yield
        if process.poll() is not None:
            assert process.stderr is not None
            said = process.stderr.read().decode(errors="replace").strip()
            raise BenchError(f"{command[0]} ended by itself: {said.splitlines()[-1] if said else 'without a word'}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with trio.CancelScope(shield=True), trio.move_on_after(30):
                await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _everyone(peer: Peer) -> list[int]:
    return [one for pid in peer.pids for one in (pid, *descendants(pid))]


def _python(pid: int) -> bool:
    try:
        return "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return False


def _py_spy() -> str | None:
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def counter(pids: list[int], output: Path) -> list[str]:
    """The command line that counts system calls by whichever tool is here.

    Raises:
        BenchError: none is.
    """
    if shutil.which("perf"):
        return ["perf", "trace", "-s", "-p", ",".join(map(str, pids)), "-o", str(output)]
    if shutil.which("strace"):
        return ["strace", "-c", "-f", "-o", str(output), *(part for pid in pids for part in ("-p", str(pid)))]
    raise BenchError("neither perf nor strace is here to count system calls: apt-get install linux-perf strace")


async def _one(directory: Path, load: LoadProcess, peer: Peer, workload: Workload, seconds: float) -> Breakdown:
    pids = _everyone(peer)
    seconds = max(seconds, 1.0)
    found = Breakdown()
    if shutil.which("perf"):
        data = directory / "perf.data"
        record = ["perf", "record", "-q", "-F", str(RATE), "-e", "cpu-clock", "-g", "-o", str(data)]
        async with watching([*record, "-p", ",".join(map(str, pids))]):
            await load.turn(peer, workload, seconds)
        script = ["perf", "script", "-i", str(data), "-F", "ip,sym,dso"]
        done = await trio.run_process(script, capture_stdout=True, capture_stderr=True, check=False)
        found = samples(done.stdout.decode(errors="replace"))
    output = directory / "calls.txt"
    output.unlink(missing_ok=True)
    async with watching(counter(pids, output)):
        answer = await load.turn(peer, workload, seconds)
    found.calls = system_calls(output.read_text(errors="replace"))
    found.units = answer["units"]
    spy = _py_spy()
    if spy and all(map(_python, pids)):
        async with contextlib.AsyncExitStack() as stack:
            outputs = []
            for pid in pids:
                output = directory / f"spy-{pid}.txt"
                command = [spy, "record", "-p", str(pid), "-r", "400", "-d", "600", "-g", "-f", "raw"]
                command += ["-o", str(output)]
                await stack.enter_async_context(watching(command))
                outputs.append(output)
            await load.turn(peer, workload, seconds)
        # Only while they hold the interpreter: the others wait, or are in a system call, which perf tells.
        for output in outputs:
            found.python.update(python_functions(output.read_text(errors="replace")))
    return found


def _per(workload: Workload) -> tuple[str, float]:
    if workload.kind == "bulk":
        return "GB", 1e9
    return ("connection" if workload.runner in ("connects", "handshakes") else "round trip"), 1.0


async def profile(directory: Path, plan: Plan) -> int:
    """Print and keep where time goes.

    Returns:
        The exit code.

    Raises:
        BenchError: a tool is missing.
    """
    if os.geteuid() != 0:
        raise BenchError("--profile looks into other processes, so it needs root")
    names = plan.workloads or USUAL
    parts: list[str] = []
    for name in ("load", "tunnels"):
        workloads = [WORKLOADS[one] for one in names if WORKLOADS[one].stage == name]
        if not workloads:
            continue
        progress("starting the peers")
        async with stage(directory / name, name, plan) as running:
            load = LoadProcess(running.load)
            try:
                for workload in workloads:
                    for peer in running.peers:
                        if not peer.pids:
                            continue
                        progress(f"watching {workload.name} through {peer.name}")
                        found = await _one(directory, load, peer, workload, plan.seconds)
                        parts.append(report(f"{workload.name} through {peer.name}", found, *_per(workload)))
                        progress("")
                        print(parts[-1], flush=True)
            finally:
                load.close()
    if not parts:
        raise BenchError("none of these workloads can be watched; those of the stages load and tunnels can")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(parts) + "\n")
    print(f"written: {RESULT.relative_to(RESULT.parent.parent.parent)}")
    return 0
