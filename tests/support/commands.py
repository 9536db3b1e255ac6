"""Run the console commands many times over: one process imports them and forks for each run.

A forked run is a process of its own, with its own arguments, environment, directory, standard streams and exit; only
the second that importing takes is shared.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["MISUSE", "NO", "RUNS_ON", "UNREACHABLE", "UNREADABLE", "Case", "Commands", "Finished", "cases", "commands"]

NO, MISUSE, UNREACHABLE = 1, 2, 3

_SERVER = """\
import json, os, sys, time
import hbone.cli, hbone.devca, hbone.trio, hbone.inspect, hbone.identity
import ztunnel.cli, ztunnel.app, miniistiod.cli, miniistiod.app
import gc

gc.freeze()

def child(case):
    os.setsid()
    for fd, path, flags in (
        (0, case["stdin"], os.O_RDONLY),
        (1, case["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, case["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(case["cwd"])
    os.environ.clear()
    os.environ.update(case["environ"])
    sys.argv = [os.fsdecode(part.encode("latin-1")) for part in case["argv"]]
    module = sys.modules[sys.argv[0] + ".cli"]
    sys.exit(module.main())

for line in sys.stdin:
    case = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    end = time.monotonic() + case["seconds"]
    code = None
    while code is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            os.killpg(pid, 9)
            os.waitpid(pid, 0)
            code = 1000
        else:
            time.sleep(0.002)
    sys.stdout.write(json.dumps(code) + "\\n")
    sys.stdout.flush()
else:
    sys.exit()
child(case)
"""

RUNS_ON = 1000
"""Instead of an exit code: it was still running after the time it had."""


@attrs.frozen
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


class Commands:
    """The forking process."""

    def __init__(self, server: subprocess.Popen[str], scratch: Path) -> None:
        self._server = server
        self._scratch = scratch

    def run(
        self,
        argv: Sequence[str | bytes],
        cwd: Path,
        *,
        environ: Mapping[str, str] | None = None,
        stdin: str = "",
        seconds: float = 20.0,
    ) -> Finished:
        """Run a command; `argv[0]` is its name."""
        (self._scratch / "stdin").write_text(stdin)
        case = {
            "argv": [os.fsencode(part).decode("latin-1") for part in argv],
            "cwd": str(cwd),
            "environ": {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(environ or {})},
            "seconds": seconds,
            **{name: str(self._scratch / name) for name in ("stdin", "stdout", "stderr")},
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(case) + "\n")
        self._server.stdin.flush()
        code = json.loads(self._server.stdout.readline())
        return Finished(
            code,
            (self._scratch / "stdout").read_text(errors="replace"),
            (self._scratch / "stderr").read_text(errors="replace"),
        )


@attrs.frozen(kw_only=True)
class Case:
    """One wrong way to call a command."""

    name: str
    argv: Sequence[str | bytes]
    word: str = ""
    """What the sentence must say, in any case of letters: the thing that is wrong."""
    code: int = MISUSE
    environ: Mapping[str, str] = attrs.field(factory=dict)
    stdin: str = ""
    prepare: Callable[[Path], object] = lambda _: None
    """Makes files in the directory that the command is run in."""
    leaves: bool = False
    """The command may leave files behind: a lock, a directory that it made."""

    def check(self, shell: Commands, directory: Path) -> None:
        """Run it: one sentence on standard error, the exit code, and no file more or less than before."""
        self.prepare(directory)
        before = _tree(directory)
        done = shell.run(self.argv, directory, environ=self.environ, stdin=self.stdin, seconds=8.0)
        self.judge(done)
        if not self.leaves:
            assert _tree(directory) == before

    def judge(self, done: Finished) -> None:
        """How a command must end that was given bad input."""
        assert "Traceback" not in done.err, done.err
        assert done.code == self.code, (done.code, done.err, done.out[-500:])
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith(f"{self.argv[0]!s}"), lines[0]
        assert self.word.lower() in lines[0].lower(), lines[0]
        assert len(lines[0]) < 1000, lines[0]
        assert lines[0] == lines[0].strip()


def _tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Everything below, with mode and size."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_mode, path.lstat().st_size if path.is_file() else 0)
        for path in sorted(directory.rglob("*"))
    }


def cases(*groups: Sequence[Case]) -> pytest.MarkDecorator:
    """The parameter `case`, each with its name."""
    found = [case for group in groups for case in group]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})
    return pytest.mark.parametrize("case", found, ids=names)


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "missing": lambda _: None,
    "a directory": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 50),
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "not UTF-8": lambda path: path.write_bytes(b"caf\xe9: [\n"),
    "words": lambda path: path.write_text("this is not what you want\n"),
}
"""Ways in which a file is none."""


@contextlib.contextmanager
def commands() -> Iterator[Commands]:
    """A forking process for the body."""
    with tempfile.TemporaryDirectory() as scratch:
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with server:
            try:
                yield Commands(server, Path(scratch))
            finally:
                assert server.stdin is not None
                server.stdin.close()
                server.wait(30)
