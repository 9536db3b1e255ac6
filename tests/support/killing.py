"""A control plane that is killed again and again: a process that has imported everything forks it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ZYGOTE = """
import json, os, sys
from miniistiod import app, cli, commands_authority

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), 1)
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = 70
        try:
            code = cli.main(request["arguments"])
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Victim:
    """One life of the control plane."""

    def __init__(self, zygote: subprocess.Popen[str], pid: int, log: Path) -> None:
        self._zygote = zygote
        self._log = log
        self.pid = pid
        self.ended = False

    async def port(self) -> int:
        """Where it listens, once it does."""
        with trio.fail_after(30):
            while True:
                for line in self._log.read_text().splitlines():
                    if '"listening"' in line:
                        return int(json.loads(line)["addresses"][0].rpartition(":")[2])
                os.kill(self.pid, 0)  # it has not ended
                await trio.sleep(0.005)

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it; how it ended."""
        os.kill(self.pid, number)
        assert self._zygote.stdout is not None
        self.ended = True
        return int(self._zygote.stdout.readline())


class Zygote:
    """Starts control planes quickly."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._victim: Victim | None = None

    def stop(self) -> None:
        """End what is still running."""
        if self._victim is not None and not self._victim.ended:
            self._victim.kill()

    def start(self, log: Path, *arguments: object) -> Victim:
        """Run a command of miniistiod."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        log.write_text("")  # of the life before
        request = {"log": str(log), "arguments": [str(item) for item in arguments]}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        self._victim = Victim(self._process, int(self._process.stdout.readline()), log)
        return self._victim


@contextlib.contextmanager
def zygote() -> Iterator[Zygote]:
    """A process that forks control planes."""
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    with process:
        forks = Zygote(process)
        try:
            yield forks
        finally:
            forks.stop()
            assert process.stdin is not None
            process.stdin.close()
