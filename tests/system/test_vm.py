"""A machine without a document of its own: token, certificate, reboot, absence, long sleep, and the way back."""

from __future__ import annotations

import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.shop import ECHO, LOOPBACK, closest_kind, echo, serve_echo

from hbone.testing.hosts import PACKET_MARK
from hbone.testing.mesh import Ztunnel, mesh
from miniistiod import admin_client
from miniistiod.store import ADMIN_SOCKET

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hbone.testing.mesh import Mesh

LIFETIME = 15
"""Seconds that its certificate lives; a restart right after a renewal must fit in."""
DOCUMENTS = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: client, namespace: shop}
spec: {address: "{alpha}", serviceAccount: client}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: orders, namespace: shop}
spec:
  metadata: {labels: {app: orders}}
  template: {serviceAccount: orders}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: orders, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  rules: [{from: [{source: {serviceAccounts: [client]}}]}]
"""


class Machine:
    """The host `beta`, which is in no document."""

    def __init__(self, running: Mesh) -> None:
        self.running = running
        self.host = running.hosts["beta"]
        self.state = running.directory / "vm"
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "VIRTUAL_ENV") if name in os.environ}
        settings = {"ZTUNNEL_STATE_DIR": str(self.state), "INSTANCE_IP": self.host.address, "LOG_FORMAT": "json"}
        settings |= {"SECRET_TTL": f"{LIFETIME}s", "UNSTABLE_ENABLE_SOCKS5": "true"}
        settings |= (
            {"PACKET_MARK": str(PACKET_MARK)} if running.namespaces else {"ZTUNNEL_BIND_ADDRESS": self.host.address}
        )
        self.ztunnel = Ztunnel(
            name="ztunnel beta",
            host=self.host,
            command=[sys.executable, "-m", "ztunnel", "run"],
            environment={**kept, **settings},
            log=running.directory / "beta.log",
        )
        running.ztunnels["beta"] = self.ztunnel

    async def command(self, text: str) -> None:
        """A command as it is told to people: settings before it; on the machine, without the daemon's environment."""
        words = shlex.split(text)
        settings = dict(word.split("=", 1) for word in words[: words.index("ztunnel")])
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        command = self.host.command(sys.executable, "-m", *words[len(settings) :])
        environment = {**kept, "SECRET_TTL": f"{LIFETIME}s", **settings}
        done = await trio.to_thread.run_sync(
            lambda: subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        )
        assert done.returncode == 0, done.stderr

    def machines(self) -> list[dict[str, Any]]:
        socket = self.running.directory / "state" / ADMIN_SOCKET
        found: list[dict[str, Any]] = admin_client.fetch(socket, "/registrations")
        return found

    async def until_state(self, wanted: str) -> dict[str, Any]:
        with trio.fail_after(30):
            while True:
                machines = await trio.to_thread.run_sync(self.machines)
                if [item["state"] for item in machines] == [wanted]:
                    return machines[0]
                await trio.sleep(0.1)

    async def until_answered(self) -> None:
        """Its workload answers over HBONE, which the policy for its label lets only one identity do."""
        with trio.fail_after(30):
            while await echo(self.running) != b"hello":
                await trio.sleep(0.1)

    def renewals(self) -> list[datetime.datetime]:
        """When the certificates that it got by renewals end."""
        found = (record for record in self.ztunnel.records() if record.get("message") == "svid_rotated")
        return [datetime.datetime.fromisoformat(record["expires"]) for record in found]


async def until(condition: Callable[[], Any]) -> Any:
    with trio.fail_after(30):
        while not (found := condition()):
            await trio.sleep(0.05)
    return found


@closest_kind
@pytest.mark.timeout(300)
async def test_the_life_of_a_machine(tmp_path: Path, namespaces: bool) -> None:
    started = mesh(
        tmp_path,
        ["alpha", "beta"],
        namespaces=namespaces,
        documents={"shop": DOCUMENTS},
        loopback=LOOPBACK,
        control_arguments=("--registration-grace", "1s", "--max-ttl", "1h"),
    )
    async with started as running, trio.open_nursery() as nursery:
        listener = await running.hosts["beta"].listen(ECHO)
        nursery.start_soon(trio.serve_listeners, serve_echo, [listener])
        await running.add_ztunnel("alpha", ("shop", "client", "client"), environment={"SECRET_TTL": "1h"})
        machine = Machine(running)
        ztunnel, state = machine.ztunnel, str(tmp_path / "state")
        own = f"ZTUNNEL_STATE_DIR={machine.state} " + (
            f"PACKET_MARK={PACKET_MARK}" if namespaces else f"ZTUNNEL_BIND_ADDRESS={machine.host.address}"
        )

        # It gets a token, joins, and is registered with its address and the group's labels.
        token = tmp_path / "vm.token"
        new = "token create --namespace shop --service-account orders --name vm-1"
        running.cli(*new.split(), "--group", "orders", "--state", state, "--out", str(token))
        await machine.command(f"{own} ztunnel enroll --server {running.server} --token-file {token}")
        ztunnel.start()
        await ztunnel.until_ready()
        joined = await machine.until_state("connected")
        assert (joined["name"], joined["group"], joined["address"]) == ("vm-1", "orders", machine.host.address)
        await machine.until_answered()

        # It renews by its certificate, and comes back from a reboot, without any token.
        token.unlink()
        await until(machine.renewals)
        await ztunnel.stop(signal.SIGKILL)
        ztunnel.start()
        await ztunnel.until_ready()
        await machine.until_answered()

        # It goes away, and is marked gone after the grace period.
        await ztunnel.stop()
        await machine.until_state("gone")

        # It sleeps longer than its certificate lives, and is told exactly how to come back.
        end = max(machine.renewals())
        await trio.sleep(1 + max(0.0, (end - datetime.datetime.now(datetime.UTC)).total_seconds()))
        ztunnel.log.unlink()
        ztunnel.start()
        told = await until(lambda: _told(ztunnel))
        await ztunnel.stop()
        assert {item["state"] for item in machine.machines()} == {"gone"}
        create, enrol = re.findall(r"'([^']*)'", told)
        assert create.startswith("miniistiod token create")
        running.cli(*shlex.split(create.replace("STATE", state))[1:], "--out", str(token))
        assert enrol.startswith(f"{own} ztunnel enroll")
        await machine.command(enrol.replace("FILE", str(token)))
        ztunnel.start()
        await ztunnel.until_ready()
        again = await machine.until_state("connected")
        assert again["group"] == "orders"
        await machine.until_answered()
        nursery.cancel_scope.cancel()


def _told(ztunnel: Ztunnel) -> str | None:
    """What the log says of the way back."""
    for record in ztunnel.records():
        error = record.get("error")
        if isinstance(error, str) and "ztunnel enroll" in error:
            return error
    return None
