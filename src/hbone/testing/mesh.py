"""A whole mesh of real processes on this machine: one miniistiod and a ztunnel for each host.

Demos, end-to-end tests and benches start it; it knows the commands and files that people see, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import trio

from hbone.errors import HboneError
from hbone.testing.hosts import PACKET_MARK, Host, NamespaceHost, hosts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["Daemon", "Mesh", "MeshError", "Ztunnel", "mesh"]

CONTROL_PLANE = "control"
"""Name of the host that miniistiod runs on."""


class MeshError(HboneError):
    """A process of the mesh did not start, did not become ready, or ended on its own."""


@attrs.define(eq=False)
class Daemon:
    """One process, with its log, ended by its own process id."""

    name: str
    host: Host
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; its output is appended to the log."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.host.command(*self.command),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the daemon; `ip netns exec` became the daemon itself."""
        if self.process is None:
            raise MeshError(f"{self.name} was not started")
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process is not None and self.process.poll() is None

    async def stop(self, signum: int = signal.SIGTERM, timeout: float = 15.0) -> int:
        """End the process with `signum`, and by SIGKILL after `timeout` seconds.

        Returns:
            Its exit code; negative when a signal ended it.
        """
        process = self.process
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(signum)
            with trio.CancelScope(shield=True):
                with trio.move_on_after(timeout):
                    await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
                if process.poll() is None:
                    process.kill()
                    process.wait()
        return process.returncode

    def records(self) -> list[dict[str, Any]]:
        """The JSON lines of the log."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    found.append(record)
        return found

    async def until_logged(self, timeout: float = 30.0, **fields: Any) -> dict[str, Any]:
        """The first log record that has all of `fields`.

        A string matches where it is contained, a function where it says so; `__` in a name stands for a dot.

        Raises:
            MeshError: none came within `timeout` seconds.
        """
        with trio.move_on_after(timeout):
            while True:
                for record in self.records():
                    if all(_matches(record.get(key.replace("__", ".")), value) for key, value in fields.items()):
                        return record
                await trio.sleep(0.05)
        raise MeshError(f"{self.name} logged nothing with {fields} within {timeout} s; its log: {self.tail()}")

    def tail(self, nbytes: int = 2000) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-nbytes:] if self.log.exists() else ""

    async def http(self, port: int, path: str, *, address: str | None = None) -> tuple[int, str]:
        """GET a page of this daemon from its own host.

        Returns:
            Status and body; status 0 when it could not be reached.
        """
        try:
            with trio.fail_after(30):
                where = address or self.host.proxy_address
                stream = await self.host.connect(where, port, source=self.host.source_address)
                async with stream:
                    request = f"GET {path} HTTP/1.1\r\nhost: localhost:{port}\r\nconnection: close\r\n\r\n"
                    await stream.send_all(request.encode())
                    answer = b"".join([part async for part in stream])
        except (OSError, trio.TooSlowError, trio.BrokenResourceError):
            return 0, ""
        head, _, body = answer.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        if b"transfer-encoding: chunked" in head.lower():
            body = _unchunk(body)
        return int(status[0]) if status else 0, body.decode(errors="replace")


def _matches(found: Any, wanted: Any) -> bool:
    if callable(wanted):
        return bool(wanted(found))
    if isinstance(found, str) and isinstance(wanted, str):
        return wanted in found
    return bool(found == wanted)


def _unchunk(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        if not length:
            break
        whole += rest[:length]
        body = rest[length + 2 :]
    return whole


@attrs.define(eq=False)
class Ztunnel(Daemon):
    """A ztunnel and the workload that it serves."""

    workload: tuple[str, str, str] = ("", "", "")
    """Namespace, name and service account."""

    async def until_ready(self, timeout: float = 30.0) -> None:
        """Wait for the readiness port.

        Raises:
            MeshError: not ready within `timeout` seconds, or the process ended.
        """
        status, body = 0, ""
        with trio.move_on_after(timeout):
            while self.running:
                status, body = await self.http(15021, "/healthz/ready")
                if status == 200:
                    return
                await trio.sleep(0.05)
        raise MeshError(f"{self.name} is not ready ({status} {body.strip()}); its log: {self.tail()}")

    async def metrics(self) -> dict[str, float]:
        """Samples of the metrics page, by name with labels."""
        _, body = await self.http(15020, "/metrics")
        samples = {}
        for line in body.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples


@attrs.define(eq=False)
class Mesh:
    """A running mesh."""

    directory: Path
    hosts: dict[str, Host]
    control: Daemon
    namespaces: bool
    ztunnels: dict[str, Ztunnel] = attrs.field(factory=dict)
    extra: dict[str, str] = attrs.field(factory=dict)

    @property
    def documents(self) -> Path:
        """The directory of YAML documents that miniistiod watches."""
        return self.directory / "config"

    @property
    def server(self) -> str:
        """Address of the control plane."""
        return self.hosts[CONTROL_PLANE].address

    def apply(self, name: str, text: str) -> None:
        """Put a document into force, by rename as an editor would."""
        temporary = self.documents / f".{name}.tmp"
        temporary.write_text(text)
        temporary.rename(self.documents / f"{name}.yaml")

    def withdraw(self, name: str) -> None:
        """Remove a document."""
        (self.documents / f"{name}.yaml").unlink()

    def cli(self, *arguments: str, check: bool = True) -> str:
        """Run a miniistiod command on its host and return what it printed.

        Raises:
            MeshError: it failed.
        """
        command = [sys.executable, "-m", "miniistiod", *arguments]
        host = self.hosts[CONTROL_PLANE]
        done = subprocess.run(host.command(*command), capture_output=True, text=True, timeout=30, check=False)
        if check and done.returncode:
            raise MeshError(f"miniistiod {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    async def start_control_plane(self, timeout: float = 30.0) -> None:
        """Start miniistiod and wait until it is ready.

        Raises:
            MeshError: it is not ready within `timeout` seconds.
        """
        self.control.start()
        with trio.move_on_after(timeout):
            while self.control.running:
                status, _ = await self.control.http(15014, "/ready", address=self.server)
                if status == 200:
                    return
                await trio.sleep(0.05)
        raise MeshError(f"miniistiod is not ready; its log: {self.control.tail()}")

    async def add_ztunnel(
        self,
        host: str,
        workload: tuple[str, str, str],
        *,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        wait: bool = True,
    ) -> Ztunnel:
        """Start the ztunnel of `workload` (namespace, name, service account) on `host`, with a token of its own.

        Args:
            host: name of its host.
            workload: whom it serves.
            environment: settings beyond those that the mesh gives.
            command: another program that takes the same settings.
            wait: until it is ready.

        Raises:
            MeshError: it does not become ready.
        """
        namespace, name, account = workload
        token = self.directory / f"{host}.token"
        state = ("--state", str(self.directory / "state"))
        identity = ("--namespace", namespace, "--service-account", account)
        self.cli("token", "create", *state, *identity, "--reusable", "--out", str(token))
        machine = self.hosts[host]
        settings = {
            "PROXY_WORKLOAD_INFO": f"{namespace}/{name}/{account}",
            "POD_NAME": name,
            "POD_NAMESPACE": namespace,
            "INSTANCE_IP": machine.address,
            "XDS_ADDRESS": f"https://{self.server}:15012",
            "CA_ADDRESS": f"https://{self.server}:15012",
            "XDS_ROOT_CA": str(self.directory / "state" / "root-cert.pem"),
            "CA_ROOT_CA": str(self.directory / "state" / "root-cert.pem"),
            "AUTH_TOKEN": str(token),
            "UNSTABLE_ENABLE_SOCKS5": "true",
            "ZTUNNEL_STATE_DIR": str(self.directory / f"{host}-state"),
            "LOG_FORMAT": "json",
        }
        if isinstance(machine, NamespaceHost):
            settings["PACKET_MARK"] = str(PACKET_MARK)
        else:
            settings["ZTUNNEL_BIND_ADDRESS"] = machine.address
        settings |= self.extra
        settings |= dict(environment or {})
        ztunnel = Ztunnel(
            name=f"ztunnel {host}",
            host=machine,
            command=list(command or [sys.executable, "-m", "ztunnel", "run"]),
            environment=_environment(settings),
            log=self.directory / f"{host}.log",
            workload=workload,
        )
        self.ztunnels[host] = ztunnel
        ztunnel.start()
        if wait:
            await ztunnel.until_ready()
        return ztunnel

    async def connect(self, host: str, address: str, port: int) -> trio.SocketStream:
        """Connect as an application on `host` would, through its ztunnel."""
        machine = self.hosts[host]
        if machine.captured:
            return await machine.connect(address, port)
        return await machine.connect_by_proxy(address, port)


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    kept = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "COVERAGE_PROCESS_START")
    return {key: os.environ[key] for key in kept if key in os.environ} | dict(settings)


@contextlib.asynccontextmanager
async def mesh(
    directory: Path,
    names: Sequence[str],
    *,
    namespaces: bool,
    documents: Mapping[str, str],
    capture: bool = True,
    network: str = "10.77.0",
    loopback: str = "127.0.1",
    control_arguments: Sequence[str] = (),
) -> AsyncIterator[Mesh]:
    """Make the hosts `names` and start miniistiod beside them; on leaving, end every process and remove every host.

    Args:
        directory: for configuration, state and logs; must exist.
        names: hosts for workloads, numbered from 1. The control plane's host comes after them.
        namespaces: network namespaces, or else loopback addresses.
        documents: YAML documents by name, in force from the start; `{name}` stands for a host's address.
        capture: put nftables rules in place on namespace hosts.
        network: first three numbers of the namespaces' addresses.
        loopback: first three numbers of the loopback hosts' addresses.
        control_arguments: more arguments for `miniistiod run`.

    Raises:
        MeshError: a process did not become ready.
        HostsError: a host could not be made.
    """
    async with hosts([*names, CONTROL_PLANE], namespaces=namespaces, network=network, loopback=loopback) as machines:
        if capture:
            for name in names:
                machine = machines[name]
                if isinstance(machine, NamespaceHost):
                    machine.capture()
        config, state = directory / "config", directory / "state"
        config.mkdir(exist_ok=True)
        addresses = {name: machine.address for name, machine in machines.items()}
        for name, text in documents.items():
            (config / f"{name}.yaml").write_text(_fill(text, addresses))
        machine = machines[CONTROL_PLANE]
        command = [sys.executable, "-m", "miniistiod", "run", "--config", str(config), "--state", str(state), "--init"]
        command += ["--listen", f"{machine.address}:15012", "--monitoring", f"{machine.address}:15014"]
        command += control_arguments
        control = Daemon(
            name="miniistiod",
            host=machine,
            command=command,
            environment=_environment({"LOG_FORMAT": "json"}),
            log=directory / "miniistiod.log",
        )
        running = Mesh(directory, machines, control, namespaces)
        try:
            await running.start_control_plane()
            yield running
        finally:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for daemon in [*running.ztunnels.values(), control]:
                        nursery.start_soon(daemon.stop)


def _fill(text: str, addresses: Mapping[str, str]) -> str:
    for name, address in addresses.items():
        text = text.replace("{" + name + "}", address)
    return text
