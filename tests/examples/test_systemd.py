"""The unit files of examples/systemd, and what systemd does with them, done by a test in its place."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.shop import echo, shop, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hbone.testing.mesh import Ztunnel

EXAMPLE = Path(__file__).parents[2] / "examples" / "systemd"

ACTIVATE = """\
import os, sys
fds, command = [int(fd) for fd in sys.argv[1].split(",")], sys.argv[2:]
for fd in fds:
    os.dup2(fd, fd + 100)
for number, fd in enumerate(fds):
    os.dup2(fd + 100, 3 + number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds))}
os.execv(command[0], command)
"""


def unit(name: str) -> list[tuple[str, str]]:
    """Its settings; a key may come several times."""
    lines = (EXAMPLE / name).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines) if value and key[0] != "#"]


def sockets(stack: contextlib.ExitStack, host: str) -> list[socket.socket]:
    """Those of ztunnel.socket, on an address of the test's own."""
    found = []
    for key, value in unit("ztunnel.socket"):
        kind = {"ListenStream": socket.SOCK_STREAM, "ListenDatagram": socket.SOCK_DGRAM}.get(key)
        if kind is not None:
            sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, int(value.rpartition(":")[2])))
            if kind == socket.SOCK_STREAM:
                sock.listen(4096)
            found.append(sock)
    return found


def activate(ztunnel: Ztunnel, given: Sequence[socket.socket]) -> None:
    """Start it as systemd would, which keeps the sockets itself."""
    fds = [sock.fileno() for sock in given]
    start = [sys.executable, "-c", ACTIVATE, ",".join(map(str, fds)), *ztunnel.command]
    with ztunnel.log.open("ab") as output:
        ztunnel.process = subprocess.Popen(
            start, env=ztunnel.environment, pass_fds=fds, stdout=output, stderr=output, start_new_session=True
        )


def test_the_units_are_read_by_systemd(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    for name in ("ztunnel.service", "ztunnel.socket"):
        text = (EXAMPLE / name).read_text()
        configparser.ConfigParser(strict=False, interpolation=None).read_string(text)
        (tmp_path / name).write_text(text.replace("/usr/local/bin/ztunnel", sys.executable))
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / "ztunnel.service"), str(tmp_path / "ztunnel.socket")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert [line for line in (done.stdout + done.stderr).splitlines() if "ztunnel" in line] == []


@pytest.mark.timeout(180)
async def test_a_restart_and_a_reload_of_the_unit_refuse_nobody(tmp_path: Path) -> None:
    settings = dict(unit("ztunnel.service"))
    assert settings["ExecStart"] == "/usr/local/bin/ztunnel run"
    assert (settings["Type"], settings["NotifyAccess"]) == ("notify", "all")
    environment = {"UNSTABLE_ENABLE_SOCKS5": "true", "ISTIO_META_DNS_CAPTURE": "true"}
    with contextlib.ExitStack() as stack:
        async with shop(tmp_path, namespaces=False, environment=environment) as running:
            alpha = running.ztunnels["alpha"]
            assert await alpha.stop() == 0
            given = sockets(stack, running.hosts["alpha"].address)
            socks = stack.enter_context(socket.create_server((running.hosts["alpha"].address, 15080)))
            activate(alpha, [*given, socks])
            await alpha.until_ready()
            assert await echo(running) == b"hello"

            # systemctl restart: nobody runs for a while, and who connects waits
            assert await alpha.stop() == 0
            async with trio.open_nursery() as nursery:
                answers: list[bytes] = []

                async def ask() -> None:
                    answers.append(await echo(running))

                for _ in range(10):
                    nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked(0.05)
                activate(alpha, [*given, socks])
            assert answers == [b"hello"] * 10

            # systemctl reload
            notified = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            notified.bind(str(tmp_path / "notify"))
            notified.settimeout(30)
            program, *arguments = shlex.split(settings["ExecReload"])
            assert program == "/usr/local/bin/ztunnel"
            reload = [sys.executable, "-m", "ztunnel", *arguments]
            environment = alpha.environment | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
            messages: list[str] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hear, notified, messages, 3)
                with (tmp_path / "journal").open("wb") as journal:  # the daemon's own output goes there, too
                    await trio.run_process(reload, env=environment, stdout=journal, stderr=journal)
            (told,) = re.findall(r"^ztunnel serves, process (\d+)$", (tmp_path / "journal").read_text(), re.MULTILINE)
            pid = int(told)
            try:
                assert messages[:2] == [f"MAINPID={pid}", "BARRIER=1"]
                assert messages[2].startswith("READY=1\n")
                assert await echo(running) == b"hello"
                assert await until(lambda: not alpha.running, seconds=30)
                notified.setblocking(False)
                with pytest.raises(BlockingIOError):
                    notified.recv(1000)  # the old one did not say that it stops
            finally:
                os.kill(pid, signal.SIGTERM)
                assert await until(lambda: not Path(f"/proc/{pid}/fd").exists() or zombie(pid), seconds=30)


async def hear(sock: socket.socket, messages: list[str], count: int) -> None:
    """Read as systemd does, at once: closing what came with a barrier lifts it."""
    for _ in range(count):
        messages.append((await trio.to_thread.run_sync(sock.recv, 1000)).decode())


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True
