from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from tests.support.control_plane import ScriptedControlPlane
from tests.support.daemon import CA, running, workload

from hbone.errors import ConfigurationError
from hbone.grpc import GrpcError, StatusCode
from hbone.identity import ServerCertificate
from hbone.testing.ca import TestCa
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcCall, GrpcServer
from ztunnel import cli, reach
from ztunnel.control.ca import CREATE_CERTIFICATE
from ztunnel.control.cache import StateDir
from ztunnel.control.enroll import Enrolment, enroll, fetch_chain, load_enrolment, pinned_root
from ztunnel.control.enroll import settings as enrolled_settings
from ztunnel.control.transport import ControlPlaneError, ServerAddress, Unreachable
from ztunnel.wire import ca_pb2
from ztunnel.wire.token import EnrolmentToken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

COMMANDS = ("run", "proxy", "status", "explain", "enroll", "version")


def run(*argv: str, **environ: str) -> tuple[int, str, str]:
    """The command in a process of its own, with nothing but `environ` set."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "ztunnel", *argv],
        env=kept | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str, **environ: str) -> Any:
    """The command in this process: exit code, output, errors."""
    for name in list(os.environ):
        if name not in ("PATH", "HOME", "LANG", "PYTEST_CURRENT_TEST"):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hbone.daemon.logs.configure", lambda *_: None)  # it would last beyond this test
    try:
        code = cli.main(argv)
    except SystemExit as ended:
        code = int(ended.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(capsys, monkeypatch, command, "--help")
    assert code == 0
    assert "example:\n  " in out
    assert "ztunnel" in out


WORKLOAD = {"PROXY_WORKLOAD_INFO": "shop/web-1/web"}
TOKEN = "enrol1.abc.00000000"


@pytest.mark.parametrize(
    ("argv", "environ", "code", "words"),
    [
        ([], {}, 2, "PROXY_WORKLOAD_INFO is not set"),
        (["run"], {}, 2, "PROXY_WORKLOAD_INFO is not set"),
        (["proxy"], {}, 2, "PROXY_WORKLOAD_INFO is not set"),
        (["run"], {"PROXY_WORKLOAD_INFO": "shop/web-1"}, 2, "namespace/name/service-account"),
        (["run"], {"PROXY_MODE": "shared"}, 2, "not built yet"),
        (["run"], WORKLOAD | {"XDS_ADDRESS": "http://x"}, 2, "https"),
        (["run"], WORKLOAD | {"CA_ADDRESS": ""}, 2, "CA_ADDRESS is empty"),
        (["run"], WORKLOAD | {"SECRET_TTL": "10"}, 2, "SECRET_TTL"),
        (["run"], WORKLOAD | {"LOCAL_XDS": "workloads: 3"}, 2, "LOCAL_XDS"),
        (["run"], WORKLOAD | {"LOCAL_XDS_PATH": "/no/such/file"}, 2, "/no/such/file"),
        (["run"], WORKLOAD | {"ZTUNNEL_STATE_DIR": "/dev/null/x"}, 2, "/dev/null/x"),
        (["run", "now"], {}, 2, "unrecognized arguments: now"),
        (["dance"], {}, 2, "invalid choice: 'dance'"),
        (["capture", "enable"], {}, 2, "invalid choice: 'capture'"),
        (["status", "--yaml"], {}, 2, "unrecognized arguments: --yaml"),
        (["explain"], {}, 2, "HOST:PORT"),
        (["explain", "10.0.0.1"], {}, 2, "write HOST:PORT"),
        (["explain", "10.0.0.1:0"], {}, 2, "write HOST:PORT"),
        (["enroll"], {}, 2, "--server"),
        (["enroll", "--server", "http://x", "--token-file", "-"], {}, 2, "https:// only"),
        (["enroll", "--server", "x:99999", "--token-file", "-"], {}, 2, "--server is 'x:99999'"),
        (["enroll", "--server", "x", "--token-file", "/no/such/token"], {}, 2, "/no/such/token"),
        (["enroll", "--server", "x", "--token-file", "/dev/null"], {}, 2, "token"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    argv: list[str],
    environ: dict[str, str],
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, out, err = call(capsys, monkeypatch, *argv, **environ)
    assert found == code
    assert words in err
    assert err.startswith("ztunnel")
    assert err.count("\n") == 1
    assert not out


def test_damaged_token_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    code, _, err = call(capsys, monkeypatch, "enroll", "--server", "x", "--token-file", str(tmp_path / "token"))
    assert code == 2
    assert TOKEN not in err


def test_status_without_a_daemon_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argv in (["status"], ["explain", "10.0.0.1:80"]):
        code, _, err = call(capsys, monkeypatch, *argv, ZTUNNEL_STATE_DIR=str(tmp_path), ZTUNNEL_ADMIN_PORT="1")
        assert code == 3
        assert "no daemon answers" in err


def test_version_and_module_run_in_a_process() -> None:
    code, out, err = run("version")
    assert (code, err) == (0, "")
    assert out.startswith("ztunnel ")


async def _command(state: Path, *argv: str) -> tuple[int, str, str]:
    return await trio.to_thread.run_sync(lambda: run(*argv, ZTUNNEL_STATE_DIR=str(state), **WORKLOAD))


async def test_status_and_explain_ask_the_daemon_by_its_socket(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with running(state=state) as ztunnel:
        await ztunnel.sync(workload(), workload("cart", "cart", "10.0.0.2"))
        await ztunnel.daemon.mesh.svids.fetch()
        await ztunnel.until_ready()
        code, out, err = await _command(state, "status", "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert found["identities"][0]["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
        assert found["controlPlane"]["connected"] is True
        assert found["mesh"]["workloads"] == 2
        assert "ports" in found["reach"]
        code, out, err = await _command(state, "status")
        assert (code, err) == (0, "")
        assert "spiffe://cluster.local/ns/shop/sa/web, Available" in out
        assert "past the mesh" in out
        code, out, _ = await _command(state, "explain", "10.0.0.2:80")
        assert code == 0
        assert out.endswith("allowed\n")
        code, _, err = await _command(state, "explain", "10.0.0.2:80", "--from", "nobody")
        assert code == 2
        assert "no workload is called 'nobody'" in err


# reach


PROC = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 0500000A:1F90 0600000A:C000 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
"""
PROC6 = """\
  sl  local_address                         remote_address                        st
   0: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A
   1: B80D0120000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A
"""


def test_listening_sockets_are_read_from_proc() -> None:
    found = [(str(address), port) for address, port in reach.listening([PROC, PROC6])]
    assert found == [("0.0.0.0", 22), ("::1", 80), ("2001:db8::1", 443), ("127.0.0.1", 8080)]


def test_own_listening_port_is_seen_as_reachable() -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        status: dict[str, Any] = {
            "pid": os.getpid(),
            "listeners": {"inbound": "0.0.0.0:15006", "outbound": "0.0.0.0:15001"},
        }
        assert any(entry["port"] == port for entry in reach.look(status)["ports"])
        status["listeners"]["hbone"] = f"0.0.0.0:{port}"
        assert not any(entry["port"] == port for entry in reach.look(status)["ports"])


def test_redirects_are_found_wherever_they_are_in_a_ruleset() -> None:
    ruleset = {
        "nftables": [
            {"metainfo": {"version": "1.0"}},
            {"rule": {"chain": "output", "expr": [{"match": {}}, {"redirect": {"port": 15001}}]}},
            {"rule": {"chain": "prerouting", "expr": [{"tproxy": {"family": "ip", "port": 15006}}, {"accept": None}]}},
        ]
    }
    assert reach.redirects(ruleset) == {15001, 15006}
    assert reach.redirects({}) == set()


@pytest.mark.parametrize(
    ("targets", "text"), [({15001, 15053}, "inbound no, outbound yes, DNS yes"), ({15006}, "DNS no")]
)
def test_what_is_captured_is_told_by_kind(targets: set[int], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_capture_targets", lambda _: (targets, None))
    ports = {"outbound": 15001, "inbound": 15006, "dns": 15053}
    status: dict[str, Any] = {
        "pid": os.getpid(),
        "listeners": {name: f"127.0.0.1:{port}" for name, port in ports.items()},
    }
    assert text in reach.capture_text(reach.look(status))
    del status["listeners"]["dns"]
    assert "DNS no" in reach.capture_text(reach.look(status))


# enrolment


def token_for(sha256: bytes, name: str | None = "web-1") -> EnrolmentToken:
    return EnrolmentToken(
        secret="once." + "a" * 12 + "." + "b" * 43,
        root_sha256=sha256,
        trust_domain="cluster.local",
        namespace="shop",
        service_account="web",
        name=name,
    )


class Server:
    """A control plane on loopback: TLS by `ca`, its root in the chain, and a CA that notes what it was asked."""

    def __init__(self, ca: TestCa, *, names: tuple[str, ...] = ("127.0.0.1",), lifetime: float = 86_400) -> None:
        self.ca = ca
        self.calls: list[str] = []
        self.refuse: GrpcError | None = None
        self.address = ServerAddress(host="127.0.0.1", port=1)
        self._signer = ScriptedControlPlane(time.time)
        self._signer.sign_with(CA, lifetime=lifetime)
        issued = ca.server(*names)
        certificate = ServerCertificate((*issued.chain[:1], ca.root), issued.key)
        self._context = TlsContext.server(certificate, "optional", bundles=[ca.bundle])

    async def create(self, call: GrpcCall) -> None:
        request = await call.receive()
        assert request is not None
        self.calls += [str(value) for value in call.metadata_values("authorization")]
        if self.refuse is not None:
            raise self.refuse
        assert self._signer.on_unary is not None
        await call.send(self._signer.on_unary(request))

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Self]:
        server = GrpcServer({CREATE_CERTIFICATE: self.create})
        async with trio.open_nursery() as nursery:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listeners[0].socket.getsockname()[1]
            self.address = ServerAddress(host="127.0.0.1", port=port)
            await nursery.start(server.serve, listeners, lambda: self._context)
            yield self
            nursery.cancel_scope.cancel()


def sha256(ca: TestCa) -> bytes:
    return ca.root.fingerprint(hashes.SHA256())


async def test_token_becomes_a_certificate_that_the_daemon_starts_from(tmp_path: Path) -> None:
    ca = TestCa()
    state = StateDir.open(tmp_path / "state")
    async with Server(ca).listening() as server:
        token = token_for(sha256(ca))
        identity, offset = await enroll(server.address, token, state, name="web-1")
    assert server.calls == [f"Bearer {token.secret}"]
    assert str(identity.svid.id) == "spiffe://cluster.local/ns/shop/sa/web"
    assert abs(offset) < 125
    kept = load_enrolment(state.path)
    assert kept == Enrolment(server=str(server.address), namespace="shop", name="web-1", service_account="web")
    found = state.load_identity(namespace="shop", service_account="web", now=time.time())
    assert found is not None
    assert found.svid.serial == identity.svid.serial
    assert (state.path / "enrolment.json").stat().st_mode & 0o777 == 0o600
    state.release()
    # The settings of an enrolled host need nothing but the directory; the environment still wins.
    config = enrolled_settings({"ZTUNNEL_STATE_DIR": str(state.path)})
    assert str(config.served) == "shop/web-1/web"
    assert config.ca_address == f"https://{server.address}"
    config = enrolled_settings({"ZTUNNEL_STATE_DIR": str(state.path), "CA_ADDRESS": "https://other:15012"})
    assert config.ca_address == "https://other:15012"


async def test_token_does_not_leave_for_a_server_of_another_mesh(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "state")
    async with Server(TestCa()).listening() as server:
        with pytest.raises(ControlPlaneError, match="the token was not sent"):
            await enroll(server.address, token_for(sha256(TestCa())), state, name="web-1")
    assert server.calls == []
    assert load_enrolment(state.path) is None
    state.release()


async def test_token_does_not_leave_for_a_workload_that_poses_as_the_server(tmp_path: Path) -> None:
    ca = TestCa()
    state = StateDir.open(tmp_path / "state")
    async with Server(ca, names=("other.host",)).listening() as server:
        with pytest.raises(ControlPlaneError, match=r"not for 127\.0\.0\.1"):
            await enroll(server.address, token_for(sha256(ca)), state, name="web-1")
    assert server.calls == []
    state.release()


async def test_refused_token_says_why(tmp_path: Path) -> None:
    ca = TestCa()
    state = StateDir.open(tmp_path / "state")
    async with Server(ca).listening() as server:
        server.refuse = GrpcError(StatusCode.UNAUTHENTICATED, "request authenticate failure")
        with pytest.raises(ControlPlaneError, match="UNAUTHENTICATED: request authenticate failure"):
            await enroll(server.address, token_for(sha256(ca)), state, name="web-1")
    assert not (state.path / "svid.pem").exists()
    state.release()


async def test_lost_answer_is_asked_for_again_with_the_same_key(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    state = StateDir.open(tmp_path / "state")
    ca = TestCa()
    control = ScriptedControlPlane(time.time)
    control.sign_with(CA, lifetime=86_400)
    sign = control.on_unary
    assert sign is not None
    asked: list[bytes] = []

    def lose_the_first(request: bytes) -> bytes:
        asked.append(request)
        if len(asked) == 1:
            raise trio.BrokenResourceError("gone")
        return sign(request)

    control.on_unary = lose_the_first
    identity, _ = await enroll(
        ServerAddress(host="control.test", port=15012),
        token_for(sha256(ca)),
        state,
        name="web-1",
        look=lambda _: _chain(ca),
        dial=lambda _: control.dial,
    )
    requests = [ca_pb2.IstioCertificateRequest.FromString(raw) for raw in asked]
    keys = [x509.load_pem_x509_csr(request.csr.encode()).public_key() for request in requests]
    assert len(asked) == 2
    assert keys == [identity.svid.key.public_key()] * 2
    state.release()


async def _chain(ca: TestCa) -> list[x509.Certificate]:
    return [ca.root]


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 7200.0])
async def test_wrong_clock_is_told_and_does_not_waste_the_token(tmp_path: Path, skew: float) -> None:
    ca = TestCa()
    state = StateDir.open(tmp_path / "state")
    async with Server(ca).listening() as server:
        _, offset = await enroll(
            server.address, token_for(sha256(ca)), state, name="web-1", wall=lambda: time.time() + skew
        )
    assert offset == pytest.approx(skew, abs=125)
    assert (state.path / "svid.pem").exists()
    state.release()


def test_clock_is_told_in_words() -> None:
    assert "agrees" in cli._clock_text(1.2)
    assert cli._clock_text(-5).startswith("this host's clock is 5 s behind")
    assert "set it" in cli._clock_text(3600)


async def test_server_that_speaks_no_tls_is_unreachable(nursery: trio.Nursery, tmp_path: Path) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(trio.serve_listeners, serve, listeners)
    address = ServerAddress(host="127.0.0.1", port=listeners[0].socket.getsockname()[1])
    with pytest.raises(Unreachable, match="15012"):
        await fetch_chain(address)
    nursery.cancel_scope.cancel()


def test_pinned_root_is_found_by_hash_alone() -> None:
    ca, other = TestCa(), TestCa()
    assert pinned_root([other.root, ca.root], sha256(ca), "x") is ca.root
    with pytest.raises(ControlPlaneError, match="none of the 1 certificates"):
        pinned_root([other.root], sha256(ca), "x")


def test_damaged_enrolment_is_one_sentence(tmp_path: Path) -> None:
    assert load_enrolment(tmp_path) is None
    for text in ("", "[]", "{}", '{"server": 1}'):
        (tmp_path / "enrolment.json").write_text(text)
        with pytest.raises(ConfigurationError, match="is damaged"):
            load_enrolment(tmp_path)
