"""A whole mesh on this host: two hosts, two identities, real traffic, and a check of everything it claims."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from examples.demo import services
from examples.demo.documents import ADMIN_PORT, DENY_TCP_TOO, DOCUMENTS, HTTP_PORT, SERVICE, TCP_PORT, VIP
from examples.demo.wiretap import PacketTap, RelayTap, Tap
from hbone.errors import HboneError
from hbone.testing.hosts import NamespaceHost, namespace_obstacle
from hbone.testing.mesh import Mesh, mesh

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

MARKER = b"the-plaintext-marker-of-the-demo"
CONNECTIONS = 50
HBONE_PORT, BEHIND_TAP = 15008, 25008


class Report:
    """Prints what was seen, one line a check, and remembers what was not as expected."""

    def __init__(self) -> None:
        self.failed = 0
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def paint(self, text: str, code: int) -> str:
        """`text` in a colour of the terminal."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text

    def say(self, text: str) -> None:
        """A line that claims nothing."""
        print(text, flush=True)

    def check(self, as_expected: bool, title: str, detail: str) -> None:
        """A line that was seen, or not."""
        self.failed += not as_expected
        mark = self.paint("ok  ", 32) if as_expected else self.paint("FAIL", 31)
        print(f" {mark} {self.paint(f'{title:<13}', 1)} {detail}", flush=True)


async def main(keep: bool, loopback: bool) -> int:
    """Run the demo.

    Args:
        keep: leave the mesh running until Ctrl-C.
        loopback: don't make namespaces even where that is possible.

    Returns:
        The exit code: 0 when everything was as expected.
    """
    report = Report()
    obstacle = "asked for" if loopback else namespace_obstacle()
    if obstacle:
        report.say(f"Hosts: loopback addresses, the client by SOCKS5 (no namespaces: {obstacle})")
    else:
        report.say("Hosts: two network namespaces joined by a bridge, traffic captured by nftables")
    with tempfile.TemporaryDirectory(prefix="hbone-demo-") as directory:
        started = mesh(Path(directory), ["alpha", "beta"], namespaces=not obstacle, documents=DOCUMENTS)
        async with started as running, trio.open_nursery() as nursery:
            await _start(running, nursery)
            tap = await _tap(running, nursery)
            await _show(running, tap, report)
            if keep:
                await _keep(running, directory)
            nursery.cancel_scope.cancel()
    if report.failed:
        report.say(f"{report.failed} of the checks were not as expected.")
        return 1
    report.say("Everything was as expected.")
    return 0


async def _start(running: Mesh, nursery: trio.Nursery) -> None:
    beta = running.hosts["beta"]
    for port, serve in ((HTTP_PORT, services.serve_http), (TCP_PORT, services.serve_tcp)):
        nursery.start_soon(serve, await beta.listen(port))
    nursery.start_soon(services.serve_tcp, await beta.listen(ADMIN_PORT))
    behind = {} if running.namespaces else {"ZTUNNEL_HBONE_PORT": str(BEHIND_TAP)}
    async with trio.open_nursery() as starting:
        for host, name, settings in (("alpha", "frontend", {}), ("beta", "orders", behind)):
            add = functools.partial(running.add_ztunnel, environment=settings)
            starting.start_soon(add, host, ("shop", name, name))


async def _tap(running: Mesh, nursery: trio.Nursery) -> Tap:
    beta = running.hosts["beta"]
    if isinstance(beta, NamespaceHost):
        packets = PacketTap(beta.tap(), HBONE_PORT)
        nursery.start_soon(packets.run)
        return packets
    relay = RelayTap(await beta.listen(HBONE_PORT), (beta.address, BEHIND_TAP))
    nursery.start_soon(relay.run)
    return relay


async def _show(running: Mesh, tap: Tap, report: Report) -> None:
    beta = running.ztunnels["beta"]
    where = VIP if running.namespaces else SERVICE

    async def call(port: int) -> trio.SocketStream:
        return await running.connect("alpha", where, port)

    with _explained(report, "allowed"):
        body = await services.http_get(await call(80), f"/orders/7?{MARKER.decode()}")
        record = await beta.until_logged(direction="inbound", dst__hbone_addr=f":{HTTP_PORT}", bytes_recv=_positive)
        report.check("you asked for /orders/7" in body, "allowed", f"GET http://{SERVICE}/orders/7 -> {body[:24]}...")
        identity = str(record.get("src.identity"))
        report.check(identity.endswith("/sa/frontend"), "server saw", f"{identity} from {record['src.addr']}")
    with _explained(report, "certificates"):
        for name in ("alpha", "beta"):
            line = await _certificate(running, name)
            report.check("spiffe://" in line, "certificate", f"{name}: {line}")
    with _explained(report, "plain TCP"):
        back = await services.ask(await call(TCP_PORT), MARKER * 100)
        report.check(back == MARKER * 100, "plain TCP", f"{len(back)} bytes to {SERVICE}:{TCP_PORT} and back")
    with _explained(report, "denied"):
        back = await _attempt(lambda: call(ADMIN_PORT))
        record = await beta.until_logged(error="policy rejection")
        report.check(not back, "denied", f"{SERVICE}:{ADMIN_PORT}: {record['error'].rpartition(': ')[2]}")
    with _explained(report, "wiretap"):
        seen = f"{tap.nbytes} bytes on port {HBONE_PORT}, the marker that was sent is not among them"
        report.check(tap.nbytes > len(MARKER) * 100 and not tap.contains(MARKER), "wiretap", seen)
    with _explained(report, "shared"):
        streams = [await call(TCP_PORT) for _ in range(CONNECTIONS)]
        answers = [await services.echo(stream, b"hello") for stream in streams]
        tunnels = await running.hosts["alpha"].established(HBONE_PORT)
        shared = f"{answers.count(b'hello')} connections at once in {tunnels} tunnel{'s' * (tunnels != 1)}"
        report.check(answers == [b"hello"] * CONNECTIONS and 1 <= tunnels <= 2, "shared", shared)
        for stream in streams[1:]:
            await stream.aclose()
    with _explained(report, "policy change"):
        started = time.monotonic()
        running.apply("policies", DENY_TCP_TOO)
        with trio.fail_after(10):
            ended = await services.echo(streams[0], b"") == b"" and await _closed(streams[0])
        seconds = time.monotonic() - started
        record = await beta.until_logged(error="policy change")
        report.check(ended, "policy change", f"a live connection ended after {seconds:.2f} s: {record['error']}")
    with _explained(report, "metrics"):
        await _metrics(running, report)


def _positive(value: object) -> bool:
    return isinstance(value, int) and value > 0


@contextlib.contextmanager
def _explained(report: Report, title: str) -> Iterator[None]:
    """A failure to show something is a failed check, not a traceback."""
    try:
        yield
    except (HboneError, OSError, trio.TooSlowError, trio.BrokenResourceError, KeyError) as error:
        report.check(False, title, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


async def _certificate(running: Mesh, host: str) -> str:
    ztunnel = running.ztunnels[host]
    state = ztunnel.environment["ZTUNNEL_STATE_DIR"]
    command = [sys.executable, "-m", "ztunnel", "status", "--json"]
    done = await trio.run_process(
        ztunnel.host.command(*command), env=ztunnel.environment, capture_stdout=True, capture_stderr=True, check=False
    )
    if done.returncode:
        raise HboneError(f"ztunnel status ({state}): {done.stderr.decode().strip()}")
    return _identity_line(done.stdout.decode())


def _identity_line(status: str) -> str:
    found = json.loads(status)["identities"][0]
    return f"{found['identity']}, until {found['expires']}"


async def _attempt(connect: Callable[[], Awaitable[trio.SocketStream]]) -> bytes:
    """What an echo gives that should be refused."""
    try:
        with trio.fail_after(10):
            return await services.ask(await connect(), b"let me in")
    except (OSError, trio.BrokenResourceError):
        return b""


async def _closed(stream: trio.SocketStream) -> bool:
    try:
        return not await stream.receive_some()
    except trio.BrokenResourceError:
        return True
    finally:
        await trio.aclose_forcefully(stream)


async def _metrics(running: Mesh, report: Report) -> None:
    for host, reporter in (("alpha", "source"), ("beta", "destination")):
        totals: dict[str, float] = collections.defaultdict(float)
        for name, value in (await running.ztunnels[host].metrics()).items():
            if f'reporter="{reporter}"' in name:
                totals[name.partition("{")[0]] += value
                if 'response_flags="DENY"' in name and name.startswith("istio_tcp_connections_failed"):
                    totals["denied"] += value
        opened, received = totals["istio_tcp_connections_opened_total"], totals["istio_tcp_received_bytes_total"]
        sent = totals["istio_tcp_sent_bytes_total"]
        line = f"{host}: {opened:.0f} connections, {received:.0f} B to the service, {sent:.0f} B back"
        line += f", {totals['denied']:.0f} denied" * (reporter == "destination")
        report.check(opened > CONNECTIONS and sent > 0, "metrics", line)


async def _keep(running: Mesh, directory: str) -> None:
    alpha = running.hosts["alpha"]
    if running.namespaces:
        print("Try:   " + " ".join(alpha.command("curl", f"http://{VIP}/hello")))
    else:
        print(f"Try:   curl --interface {alpha.address} --socks5-hostname {alpha.address}:15080 http://{SERVICE}/hello")
    print(f"Edit:  {running.documents}/policies.yaml")
    print(f"Logs:  tail -f {directory}/*.log")
    print("Ctrl-C stops it.", flush=True)
    await trio.sleep_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the mesh running until Ctrl-C")
    parser.add_argument("--loopback", action="store_true", help="use loopback addresses even where namespaces work")
    options = parser.parse_args()
    try:
        code = trio.run(main, options.keep, options.loopback)
    except KeyboardInterrupt:
        code = 0
    except HboneError as problem:
        print(f"make demo: {problem}", file=sys.stderr)
        code = 1
    raise SystemExit(code)
