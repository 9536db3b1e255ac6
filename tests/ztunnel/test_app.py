from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from tests.support.control_plane import ScriptedControlPlane
from tests.support.daemon import Warnings, exchange, policy, running, settings, workload

from hbone.errors import ConfigurationError
from ztunnel.control.transport import ControlPlaneError
from ztunnel.systemd import notify


def away() -> ScriptedControlPlane:
    control = ScriptedControlPlane(time.time)
    control.dial_error = ControlPlaneError("the control plane cannot be reached: connection refused")
    return control


async def test_ready_after_the_first_picture_and_not_before() -> None:
    async with running() as ztunnel:
        assert await ztunnel.http("readiness", "/healthz/ready") == (
            500,
            "not ready, pending: dns proxy, proxy, state manager\n",
        )
        await ztunnel.sync()
        await ztunnel.until_ready()
        assert await ztunnel.http("readiness", "/healthz/ready") == (200, "ready\n")
        assert (await ztunnel.http("readiness", "/healthz/ready", "POST"))[0] == 405
        assert (await ztunnel.http("readiness", "/other"))[0] == 404


async def test_listens_before_it_is_ready_so_that_clients_wait_instead_of_being_refused() -> None:
    async with running() as ztunnel:
        stream = await trio.open_tcp_stream(*ztunnel.address("hbone"))
        await stream.aclose()


async def test_certificate_is_fetched_as_soon_as_the_workload_is_known() -> None:
    async with running() as ztunnel:
        await ztunnel.sync()
        identity = await ztunnel.daemon.mesh.svids.fetch()
        assert str(identity.svid.id) == "spiffe://cluster.local/ns/shop/sa/web"
        status = await ztunnel.status()
        assert status["identities"][0]["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
        assert status["identities"][0]["state"] == "Available"
        assert status["identities"][0]["expires"].endswith("Z")


async def test_ends_when_told_even_if_it_never_became_ready() -> None:
    with trio.fail_after(10):
        async with running(control=away()) as ztunnel:
            assert not ztunnel.daemon.readiness.ready


async def test_a_post_to_the_admin_page_ends_the_daemon() -> None:
    ended = trio.Event()
    async with running() as ztunnel:
        await ztunnel.sync()
        await ztunnel.until_ready()
        address = ztunnel.address("hbone")
        assert await ztunnel.http("admin", "/quitquitquit", "POST") == (200, "shutdown now\n")
        with trio.fail_after(30):
            while not ended.is_set():
                try:
                    await (await trio.open_tcp_stream(*address)).aclose()
                    await trio.sleep(0.02)
                except OSError:
                    ended.set()


async def test_restart_while_the_control_plane_is_away_serves_on_with_policy_and_certificate(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync(workload(), workload("cart", ip="10.0.0.2"), policies=(policy("p"), policy("q")))
        first = await ztunnel.daemon.mesh.svids.fetch()
    async with running(state=state, control=away()) as again:
        await again.until_ready()
        mesh = again.daemon.mesh
        assert set(mesh.store.policies) == {"shop/p", "shop/q"}
        assert len(mesh.store.workloads) == 2
        current = mesh.svids.current()
        assert current is not None
        assert current.svid.serial == first.svid.serial
        plane = (await again.status())["controlPlane"]
        assert not plane["connected"]
        assert plane["staleSince"] is not None
        assert "connection refused" in plane["error"]


async def test_age_of_the_picture_survives_restarts_while_the_control_plane_is_away(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync()
    os.utime(state / "mesh.snapshot", (1_700_000_000, 1_700_000_000))
    for _ in range(2):
        async with running(state=state, control=away()) as again:
            await again.until_ready()
            assert (await again.status())["controlPlane"]["staleSince"] == "2023-11-14T22:13:20Z"


async def test_policy_survives_a_kill_between_two_writes_of_the_debounce(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync(policies=(policy("p"),))
        with trio.fail_after(10):
            while not (state / "mesh.snapshot").exists():
                await trio.sleep(0.01)
        copy = (state / "mesh.snapshot").read_bytes()  # as a kill would leave it
    (state / "mesh.snapshot").write_bytes(copy)
    async with running(state=state, control=away()) as again:
        await again.until_ready()
        assert set(again.daemon.mesh.store.policies) == {"shop/p"}


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "foreign"])
async def test_damaged_picture_is_not_used(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = Warnings()
    monkeypatch.setattr("ztunnel.control.cache.log", warnings)
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync(policies=(policy("p"),))
    path = state / "mesh.snapshot"
    whole = path.read_bytes()
    config = settings()
    if damage == "torn":
        path.write_bytes(whole[:-10])
    elif damage == "garbage":
        path.write_bytes(b"\x00" * 1000)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        config = settings(PROXY_WORKLOAD_INFO="shop/cart-1/cart")
    async with running(config, state=state, control=away()) as again:
        assert not again.daemon.mesh.restored
        assert not again.daemon.mesh.store.policies
        assert not again.daemon.readiness.ready
    assert sum("saved mesh not used" in line for line in warnings.lines) == 1


async def test_certificate_of_another_workload_is_not_used(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync()
        await ztunnel.daemon.mesh.svids.fetch()
    async with running(settings(PROXY_WORKLOAD_INFO="shop/cart-1/cart"), state=state, control=away()) as again:
        assert again.daemon.mesh.svids.held() is None


async def test_key_and_picture_are_private(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync()
        await ztunnel.daemon.mesh.svids.fetch()
        assert (state / "admin.sock").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700
    for name in ("svid.pem", "roots.pem", "mesh.snapshot"):
        assert (state / name).stat().st_mode & 0o777 == 0o600
    assert not (state / "admin.sock").exists()


async def test_admin_pages_answer_on_the_unix_socket(tmp_path: Path) -> None:
    async with running(state=tmp_path / "state"):
        stream = await trio.open_unix_socket(str(tmp_path / "state" / "admin.sock"))
        code, body = await exchange(stream, "/status")
        assert code == 200
        assert json.loads(body)["workload"] == "shop/web-1/web"


async def test_two_daemons_cannot_share_a_state_directory(tmp_path: Path) -> None:
    async with running(state=tmp_path / "state"):
        with pytest.raises(ConfigurationError, match="in use by another ztunnel"):
            async with running(state=tmp_path / "state"):
                pass


async def test_address_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for variable, what in (
            ("ZTUNNEL_STATS_PORT", "stats"),
            ("ZTUNNEL_HBONE_PORT", "hbone"),
            ("ZTUNNEL_INBOUND_PORT", "inbound"),
            ("ZTUNNEL_OUTBOUND_PORT", "outbound"),
            ("ZTUNNEL_ADMIN_PORT", "admin"),
            ("ZTUNNEL_DNS_PORT", "dns"),
        ):
            with pytest.RaisesGroup(
                pytest.RaisesExc(ConfigurationError, match=rf"cannot listen on 127.0.0.1:{port} .*{what}"),
                allow_unwrapped=True,
                flatten_subgroups=True,
            ):
                async with running(settings(**{variable: str(port)})):
                    pass


async def test_unknown_workload_is_ready_but_says_so() -> None:
    async with running() as ztunnel:
        await ztunnel.sync(workload("other"))
        await ztunnel.until_ready()
        assert (await ztunnel.status())["mesh"]["knowsWorkload"] is False


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1", "STATUS=serving")
        assert sock.recv(100) == b"READY=1\nSTATUS=serving"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notify("READY=1")


LOCAL = """
workloads:
- {uid: c1//Pod/shop/web-1, name: web-1, namespace: shop, serviceAccount: web, workloadIps: [10.0.0.1], services: {}}
"""


def test_process_serves_by_a_local_file_and_ends_with_0_on_sigterm() -> None:
    environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "PYTHONPATH") if key in os.environ}
    ports = dict.fromkeys(("OUTBOUND", "INBOUND", "HBONE", "DNS", "ADMIN", "STATS", "READY"), "0")
    environ |= {f"ZTUNNEL_{name}_PORT": port for name, port in ports.items()} | {
        "PROXY_WORKLOAD_INFO": "shop/web-1/web",
        "XDS_ADDRESS": "",
        "CA_ADDRESS": "https://127.0.0.1:1",
        "LOCAL_XDS": LOCAL,
        "ZTUNNEL_BIND_ADDRESS": "127.0.0.1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "ztunnel"], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if '"ready"' in line:
                break
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert [name for name in ("_bz2", "_hashlib", "_lzma", "_ssl") if f"/{name}." in mapped] == []
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0, "".join(lines) + rest
        assert "stopped" in rest
        assert "Traceback" not in "".join(lines) + rest
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


RARELY_USED = [
    *("asyncio", "bz2", "dns.message", "google.protobuf.text_format", "html", "http.client", "importlib.metadata"),
    *("logging.config", "lzma", "multiprocessing", "pickle", "secrets", "structlog", "tomllib", "yaml"),
    *("_hashlib", "_ssl"),  # with the system's OpenSSL
    *("hbone.trio.grpcserver", "hbone.trio.server", "ztunnel.questions", "ztunnel.wire.token"),
]


def test_a_daemon_holds_no_modules_that_it_seldom_needs() -> None:
    """Together they are more than fifteen megabytes, which would stay for good."""
    code = (
        "import sys; from hbone.daemon.late import UNUSED, import_late; import_late(*UNUSED)\n"
        f"import ztunnel.cli, ztunnel.app, ztunnel.dns.server; print({{*{RARELY_USED}}} & {{*sys.modules}},"
        " [name for name in UNUSED if '__getattr__' not in vars(sys.modules[name])])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("set() []", "")
