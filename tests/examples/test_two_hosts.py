"""The mesh that examples/two_hosts sets up by hand, set up by a test with the same scripts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.dns import ask_from

from hbone.testing.hosts import NamespaceHost, hosts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hbone.testing.hosts import Host

EXAMPLE = Path(__file__).parents[2] / "examples" / "two_hosts"

pytestmark = pytest.mark.netns


def _environment() -> dict[str, str]:
    """The commands on the path, as after `pip install`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@contextlib.contextmanager
def _started(host: Host, log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            host.command(*command), env=_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _miniistiod(host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        host.command("miniistiod", *arguments),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


async def test_two_hosts_by_hand(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with hosts(["web", "orders", "control"], namespaces=True) as machines, trio.open_nursery() as nursery:
        web, orders, control = (machines[name] for name in ("web", "orders", "control"))
        assert isinstance(web, NamespaceHost)

        async def answer(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                await stream.send_all(b"orders here")

        nursery.start_soon(trio.serve_listeners, answer, [await orders.listen(8080)])
        with contextlib.ExitStack() as stack:
            script = str(EXAMPLE / "control.sh")
            stack.enter_context(_started(control, tmp_path / "control.log", script, control.address, str(state)))
            for host in (web, orders):
                token = tmp_path / f"{host.name}.token"
                identity = ["--namespace", "shop", "--service-account", host.name, "--name", host.name]
                with trio.fail_after(20):
                    while _miniistiod(
                        control, "token", "create", "--state", str(state), *identity, "--out", str(token)
                    ).returncode:
                        await trio.sleep(0.2)
                command = [str(EXAMPLE / "host.sh"), control.address, str(token), str(tmp_path / f"{host.name}-state")]
                stack.enter_context(_started(host, tmp_path / f"{host.name}.log", *command))
            for address, port in ((orders.address, 8080), ("10.96.0.10", 80)):
                assert await _asked(web, address, port) == b"orders here", _logs(tmp_path)
            ask = partial(ask_from, web.make, "127.0.0.53", "orders.shop.mesh", tcp=False)  # where nobody hears
            assert await trio.to_thread.run_sync(ask) == ["10.96.0.10"]
        log = (tmp_path / "orders.log").read_text()
        assert "spiffe://cluster.local/ns/shop/sa/web" in log
        nursery.cancel_scope.cancel()


async def _asked(host: Host, address: str, port: int) -> bytes:
    """What the service says, within twenty seconds of the mesh's start."""
    with trio.move_on_after(20):
        while True:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await host.connect(address, port) as stream:
                    await stream.send_all(b"?")
                    answer = await stream.receive_some()
                    if answer:
                        return bytes(answer)
            await trio.sleep(0.2)
    return b""


def _logs(directory: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in directory.glob("*.log"))
