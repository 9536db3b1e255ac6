"""Bad input of every kind to `ztunnel`: one sentence on standard error, the right exit code, nothing left behind."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.commands import MISUSE, RUNS_ON, UNREACHABLE, UNREADABLE, Case, Commands, cases, commands
from tests.support.sizes import FULL

from hbone.testing.ca import TestCa
from ztunnel.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PORTS = ("OUTBOUND", "INBOUND", "HBONE", "SOCKS5", "ADMIN", "STATS", "READY")
RUN = {
    "PROXY_WORKLOAD_INFO": "shop/web-1/web",
    "XDS_ADDRESS": "",
    "CA_ADDRESS": "https://127.0.0.1:1",
    "UNSTABLE_ENABLE_SOCKS5": "true",
    "ISTIO_META_DNS_CAPTURE": "false",
    "ZTUNNEL_STATE_DIR": "state",
    "ZTUNNEL_BIND_ADDRESS": "127.0.0.1",
    **{f"ZTUNNEL_{name}_PORT": "0" for name in PORTS},
}


@pytest.fixture(scope="module")
def shell() -> Iterator[Commands]:
    with commands() as found:
        yield found


# --- variables

BOOLEANS = ("", "True", "1", "yes", "true ")
NUMBERS = ("", "-1", "1.5", "0x10", "many", "1e3", "9" * 30, "٣")
TIMES = ("", "10", "s", "-5s", "5 s", "soon", "1y", "9" * 400 + "s")
PORT_NUMBERS = (*NUMBERS, "65536")
ADDRESSES = (
    "http://h:1",
    "https://",
    "https://h:x",
    "https://h:70000",
    "https://h/path",
    "https://u@h",
    "h:0",
    "::1:2:x",
)

WRONG: dict[str, tuple[str, ...]] = {
    "PROXY_MODE": ("", "shared", "Dedicated", "both"),
    "ENABLE_PROXY": (*BOOLEANS, "false"),
    "PROXY_WORKLOAD_INFO": ("", "web", "shop/web", "shop/web/web/web", "//", "shop//web"),
    "XDS_ADDRESS": ADDRESSES,
    "CA_ADDRESS": ("", *ADDRESSES),
    "SECRET_TTL": (*TIMES, "0s", "91d"),
    "PACKET_MARK": (*NUMBERS, "4294967296"),
    "KEEPALIVE_ENABLED": BOOLEANS,
    "KEEPALIVE_TIME": (*TIMES, "0s", "10h"),
    "KEEPALIVE_INTERVAL": (*TIMES, "0s"),
    "KEEPALIVE_RETRIES": (*NUMBERS, "0", "128"),
    "USER_TIMEOUT_ENABLED": BOOLEANS,
    "POOL_MAX_STREAMS_PER_CONNECTION": (*NUMBERS, "0", "65536"),
    "POOL_UNUSED_RELEASE_TIMEOUT": (*TIMES, "0s"),
    "HTTP2_STREAM_WINDOW_SIZE": (*NUMBERS, "65534", "2147483648"),
    "HTTP2_CONNECTION_WINDOW_SIZE": (*NUMBERS, "65534", "2147483648"),
    "HTTP2_FRAME_SIZE": (*NUMBERS, "16383", "16777216"),
    "CONNECTION_TERMINATION_DEADLINE": (*TIMES, "2d"),
    "TERMINATION_GRACE_PERIOD_SECONDS": NUMBERS,
    "ENABLE_ORIG_SRC": BOOLEANS,
    "IPV6_ENABLED": BOOLEANS,
    "UNSTABLE_ENABLE_SOCKS5": BOOLEANS,
    "LOCALHOST_APP_TUNNEL": BOOLEANS,
    "ENABLE_RESPONSE_BAGGAGE": BOOLEANS,
    "LOG_FORMAT": ("", "xml", "JSON"),
    "RUST_LOG": ("loud", "info,loud"),
    "ZTUNNEL_BIND_ADDRESS": ("", "localhost", "1.2.3", "1.2.3.4:5", "256.1.1.1", "fe80::1%eth0x", "192.0.2.1"),
    **{f"ZTUNNEL_{name}_PORT": PORT_NUMBERS for name in (*PORTS, "DNS")},
    "ZTUNNEL_DNS_SERVERS": ("", "dns.example", "1.2.3.4:x", "1.2.3.4:0", ","),
    "ZTUNNEL_STATE_DIR": ("",),
    "ZTUNNEL_WORKER_THREADS": ("", "-1", "many", "1.5", "0%", "101%", "%"),
    "ZTUNNEL_CPU_LIMIT": (*NUMBERS, "0"),
    "ZTUNNEL_RESOURCE_CPU_LIMIT": ("", "0", "-1", "many", "1k", "0m"),
    "ZTUNNEL_WINDOW_BUDGET": (*NUMBERS, "1099511627777"),
    "LOCAL_XDS_PATH": ("", "missing.yaml"),
    "LOCAL_XDS": ("[", "- x", "workloads: 5", "workloads: [5]", "\x01", "workloads: [{name: a}]"),
    "PROXY_CONFIG": (
        "[",
        "- x",
        "5",
        "proxyAdminPort: x",
        "statsPort: 70000",
        "discoveryAddress: 5",
        "proxyMetadata: [1]",
    ),
    "XDS_HEADER_x y": ("v",),
    "XDS_HEADER_ok": ("line\nend", "\x7f"),
    "CA_HEADER_": ("v",),
    "CA_HEADER_ok": ("bücher",),
    "ISTIO_META_DNS_PROXY_ADDR": ("x", "localhost", "localhost:x", "1.2.3.4:70000", ":53"),
    "CRL_PATH": ("/", "/etc/passwd"),
    "TLS12_ENABLED": ("true",),
    "COMPLIANCE_POLICY": ("pqc",),
    "FAKE_CA": ("true",),
    "XDS_ROOT_CA": ("missing.pem", "", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----"),
    "CA_ROOT_CA": ("missing.pem", "", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----"),
    "AUTH_TOKEN": ("/nowhere/token", "./token", "to ken", "tok\nen", "tökén"),
}
"""Values that each variable does not take."""

ANYTHING = {
    "NETWORK",
    "NODE_NAME",
    "CLUSTER_ID",
    "CLUSTER_DOMAIN",
    "ALT_XDS_HOSTNAME",
    "ALT_CA_HOSTNAME",
    "PREFERED_SERVICE_NAMESPACE",
    "AUTHZ_POLICY_INFO_LOGGING",
    "POD_NAMESPACE",
    "POD_NAME",
    "SERVICE_ACCOUNT",
    "TRUST_DOMAIN",
    "INSTANCE_IP",
    "ISTIO_META_CLUSTER_ID",
    "ISTIO_META_DNS_CAPTURE",
    "KUBERNETES_SERVICE_HOST",
    "ISTIO_META_<key>",
    "ISTIO_METAJSON_<key>",  # what is no JSON is passed over with a warning, as ztunnel does
    "XDS_ON_DEMAND",
    "INPOD_UDS",
    "INPOD_PORT_REUSE",
    "ZTUNNEL_RESOURCE_CPU_REQUEST",
}
"""Variables that are text, are told to others as they are, or are ignored with a warning."""


def word_of(variable: str, value: str) -> str:
    """What the sentence says: the variable, or the address that cannot be had."""
    if variable == "ZTUNNEL_BIND_ADDRESS" and value in ("192.0.2.1", "fe80::1%eth0x"):
        return "cannot listen on"
    return variable.partition("_HEADER_")[0].split("_META_")[-1]


VARIABLES = [
    Case(
        name=f"{variable}={value[:30]!r} ({len(value)})",
        argv=["ztunnel", "run"],
        word=word_of(variable, value),
        environ={
            **RUN,
            **({"XDS_ADDRESS": "127.0.0.1:1"} if variable == "XDS_ROOT_CA" else {}),
            **({"ISTIO_META_DNS_CAPTURE": "true"} if "DNS" in variable else {}),
            variable: value,
        },
        leaves=True,
    )
    for variable, values in WRONG.items()
    for value in (values if FULL else dict.fromkeys((*values[:2], values[-1])))
]


def test_every_variable_is_in_the_table() -> None:
    known = {re.sub(r"(_HEADER_).*", r"\1<name>", name) for name in (*WRONG, *ANYTHING)}
    assert {variable.name for variable in Config.variables()} == known


# --- files


def file(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Make a file of that name."""

    def prepare(directory: Path) -> None:
        path = directory / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        make(path)

    return prepare


def state(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Make a state directory, and then something of it."""

    def prepare(directory: Path) -> None:
        (directory / "state").mkdir(mode=0o700)
        make(directory / "state")

    return prepare


def given_away(path: Path) -> None:
    """Another user's directory, or as near as we come to that."""
    if os.geteuid() == 0:
        os.chown(path, 4242, 4242)
    else:
        path.chmod(0o750)


def enrolment(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """An enrolment file that is made so."""
    return state(lambda path: make(path / "enrolment.json"))


def locked(directory: Path) -> None:
    """Another process holds the state directory; it ends with the test's process."""
    script = "import fcntl,os,sys\nf=os.open(sys.argv[1],os.O_RDWR|os.O_CREAT,384)\nfcntl.flock(f,2)\n"
    script += "print(1,flush=True)\nsys.stdin.read()"
    (directory / "state").mkdir(mode=0o700)
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(directory / "state" / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    _holders.append(holder)


_holders: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    yield
    while _holders:
        with _holders.pop() as holder:
            holder.communicate()


FILES = [
    *(
        Case(
            name=f"{variable} that is {how}",
            argv=["ztunnel", "run"],
            word="given",
            environ={**RUN, "XDS_ADDRESS": "127.0.0.1:1", variable: "given"},
            prepare=file("given", make),
            leaves=True,
        )
        for variable in ("LOCAL_XDS_PATH", "XDS_ROOT_CA", "CA_ROOT_CA")
        for how, make in UNREADABLE.items()
        if (variable, how) != ("LOCAL_XDS_PATH", "empty")  # an empty mesh
    ),
    *(
        Case(
            name=f"AUTH_TOKEN that is {how}",
            argv=["ztunnel", "run"],
            word="AUTH_TOKEN",
            environ={**RUN, "AUTH_TOKEN": "./given"},
            prepare=file("given", make),
            leaves=True,
        )
        for how, make in UNREADABLE.items()
    ),
    *(
        Case(
            name=f"the mesh file that is {how}",
            argv=["ztunnel", "run"],
            word="etc/istio/config/mesh",
            environ=RUN,
            prepare=file("etc/istio/config/mesh", make),
            leaves=True,
        )
        for how, make in UNREADABLE.items()
        if how not in ("missing", "empty", "a dangling link")  # it may be missing
    ),
    *(
        Case(name=f"state that is {how}", argv=[*argv], word="state", environ=RUN, prepare=prepare)
        for argv in (("ztunnel", "run"),)
        for how, prepare in (
            ("a file", file("state", lambda path: path.write_text("x"))),
            ("a link to itself", file("state", lambda path: path.symlink_to("state"))),
            ("a dangling link", file("state", lambda path: path.symlink_to("nowhere"))),
            ("open to others", state(lambda path: path.chmod(0o755))),
            (
                "another user's",
                state(lambda path: os.chown(path, 4242, 4242) if os.geteuid() == 0 else path.chmod(0o750)),
            ),
        )
    ),
    Case(name="state in use", argv=["ztunnel", "run"], word="state", environ=RUN, prepare=locked),
    Case(
        name="state below a file",
        argv=["ztunnel", "run"],
        word="file/state",
        environ={**RUN, "ZTUNNEL_STATE_DIR": "file/state"},
        prepare=file("file", lambda path: path.write_text("x")),
    ),
    Case(
        name="state with a path of 300 letters",
        argv=["ztunnel", "run"],
        word="state",
        environ={**RUN, "ZTUNNEL_STATE_DIR": "state/" + "/".join(["x" * 50] * 6)},
        leaves=True,
    ),
    *(
        Case(
            name=f"an enrolment that is {how}",
            argv=["ztunnel", "run"],
            word="enrolment.json",
            environ={key: value for key, value in RUN.items() if key != "PROXY_WORKLOAD_INFO"},
            prepare=enrolment(make),
        )
        for how, make in {**UNREADABLE, "a list": lambda path: path.write_text("[]")}.items()
        if how not in ("missing", "a dangling link")
    ),
    Case(
        name="a lock that is a directory",
        argv=["ztunnel", "run"],
        word="state",
        environ=RUN,
        prepare=state(lambda path: (path / "lock").mkdir()),
    ),
    Case(
        name="an admin socket that is a file",
        argv=["ztunnel", "run"],
        word="admin.sock",
        environ=RUN,
        prepare=state(lambda path: (path / "admin.sock").write_text("x")),
        leaves=True,
    ),
    Case(
        name="no workload",
        argv=["ztunnel"],
        word="PROXY_WORKLOAD_INFO",
        environ={key: value for key, value in RUN.items() if key != "PROXY_WORKLOAD_INFO"},
    ),
]

# --- the other commands

TOKEN = "enrol1.eyJucyI6InNob3AifQ.00000000"
ENROLL = ["ztunnel", "enroll", "--server", "127.0.0.1:1", "--token-file"]
COMMANDS = [
    Case(name="an unknown command", argv=["ztunnel", "frobnicate"], word="frobnicate"),
    Case(name="an unknown option", argv=["ztunnel", "run", "--port", "1"], word="--port"),
    Case(name="status with an argument", argv=["ztunnel", "status", "now"], word="now"),
    *(
        Case(name=f"{argv[1]} without a daemon", argv=argv, environ=RUN, code=UNREACHABLE, word="is ztunnel running")
        for argv in (["ztunnel", "status"], ["ztunnel", "status", "--json"], ["ztunnel", "explain", "a:1"])
        if argv[-1] != "--json"
    ),
    Case(
        name="status with a wrong variable",
        argv=["ztunnel", "status"],
        environ={**RUN, "ZTUNNEL_ADMIN_PORT": "x"},
        word="ZTUNNEL_ADMIN_PORT",
    ),
    *(
        Case(name=f"explain {target!r}", argv=["ztunnel", "explain", target], environ=RUN, word="destination")
        for target in ("", "host", "host:", ":80", "host:0", "host:x", "[::1:80", "http://host:80", "a b:80")
    ),
    Case(name="explain nothing", argv=["ztunnel", "explain"], word="HOST:PORT"),
    Case(name="enroll without a server", argv=["ztunnel", "enroll", "--token-file", "-"], word="--server"),
    Case(name="enroll without a token", argv=["ztunnel", "enroll", "--server", "a"], word="--token-file"),
    *(
        Case(
            name=f"enroll at {server!r}",
            argv=["ztunnel", "enroll", "--server", server, "--token-file", "-"],
            word="--server",
        )
        for server in ("", "http://a", "a:0", "a:x", "a:70000", "a/b", "u@a")
    ),
    *(
        Case(name=f"enroll with {what}", argv=[*ENROLL, "-"], environ=RUN, stdin=text, word="token")
        for what, text in {
            "nothing": "",
            "white space": " \n\t\n",
            "words": "give me a certificate",
            "10 kB": "x" * 10_000,
            "a cut token": TOKEN[:12],
            "a token whose sum is wrong": TOKEN,
            "control characters": "enrol1.\x00\x1b[31m.00000000",
            "another alphabet": "enrol1.bücher.00000000",
        }.items()
    ),
    *(
        Case(
            name=f"enroll with a token file that is {how}",
            argv=[*ENROLL, "given"],
            environ=RUN,
            word="token",
            prepare=file("given", make),
        )
        for how, make in UNREADABLE.items()
    ),
]


@cases(VARIABLES, FILES, COMMANDS)
def test_bad_input_to_ztunnel_is_told_in_one_sentence(case: Case, shell: Commands, tmp_path: Path) -> None:
    case.check(shell, tmp_path)


@pytest.mark.parametrize("name", [*PORTS, "DNS"])
def test_a_port_in_use_is_told(shell: Commands, tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        environ = {**RUN, f"ZTUNNEL_{name}_PORT": port}
        if name == "DNS":
            environ["ISTIO_META_DNS_CAPTURE"] = "true"
        done = shell.run(["ztunnel", "run"], tmp_path, environ=environ)
    Case(name="", argv=["ztunnel"], word=port, code=MISUSE).judge(done)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["lock"]


@pytest.mark.parametrize("name", ["svid.pem", "roots.pem", "mesh.snapshot"])
@pytest.mark.parametrize("how", [how for how in UNREADABLE if how != "missing"])
def test_a_damaged_file_of_the_last_run_is_passed_over(shell: Commands, tmp_path: Path, name: str, how: str) -> None:
    """It is worth a warning and no more: the control plane has it all."""
    ca = TestCa()
    issued = ca.issue(uris=["spiffe://cluster.local/ns/shop/sa/web"])
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    (directory / "svid.pem").write_bytes(issued.key_pem + issued.cert_pem)
    (directory / "roots.pem").write_bytes(ca.root_pem)
    (directory / name).unlink(missing_ok=True)
    UNREADABLE[how](directory / name)
    done = shell.run(["ztunnel", "run"], tmp_path, environ={**RUN, "XDS_ADDRESS": "127.0.0.1:1"}, seconds=1.0)
    assert done.code == RUNS_ON
    assert "Traceback" not in done.out + done.err
    assert done.err == ""


@pytest.mark.parametrize("package", ["google", "h11", "prometheus_client", "structlog", "yaml"])
@pytest.mark.parametrize("command", ["ztunnel", "miniistiod"])
def test_a_missing_extra_is_named_with_its_remedy(command: str, package: str) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; sys.argv = [{command!r}, 'version']\n"
    script += f"from {command}.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"pip install 'hbone[{command}]'" in done.stderr
