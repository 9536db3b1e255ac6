"""Bad input of every kind to `hbone`: one sentence on standard error, the right exit code, nothing left behind."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.support.commands import MISUSE, UNREACHABLE, UNREADABLE, Case, Commands, cases, commands

from hbone.testing.ca import TestCa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

CA = TestCa()
OTHER = TestCa()


@pytest.fixture(scope="module")
def shell() -> Iterator[Commands]:
    with commands() as found:
        yield found


def identity(directory: Path) -> None:
    """A certificate with its key and root."""
    issued = CA.issue(uris=["spiffe://cluster.local/ns/shop/sa/web"])
    (directory / "cert.pem").write_bytes(issued.cert_pem)
    (directory / "key.pem").write_bytes(issued.key_pem)
    (directory / "roots.pem").write_bytes(CA.root_pem)


def identity_but(name: str, make: Callable[[Path], object] | bytes) -> Callable[[Path], None]:
    """The same, with one file made another way, or of other bytes."""

    def prepare(directory: Path) -> None:
        identity(directory)
        path = directory / name
        path.unlink()
        path.write_bytes(make) if isinstance(make, bytes) else make(path)

    return prepare


def with_root(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A directory of `dev-ca` whose root is made so."""

    def prepare(directory: Path) -> None:
        (directory / "ca").mkdir(mode=0o700)
        (directory / "ca" / "root.key").write_bytes(b"")
        make(directory / "ca" / "root.pem")

    return prepare


def instead(argv: Sequence[str], option: str, value: str) -> tuple[str, ...]:
    """`argv` with another value of an option, or of a positional argument."""
    parts = list(argv)
    parts[parts.index(option) + option.startswith("--")] = value
    return tuple(parts)


def without(argv: Sequence[str], option: str) -> tuple[str, ...]:
    """`argv` without an option and its value."""
    at = list(argv).index(option)
    return (*argv[:at], *argv[at + 2 :])


IDENTITY = ("--cert", "cert.pem", "--key", "key.pem", "--roots", "roots.pem")
CONNECT = ("hbone", "connect", "10.0.0.7:80", "--via", "127.0.0.1:1", *IDENTITY)
LISTEN = ("hbone", "listen", "0", "--to", "127.0.0.1:1", "--allow", "spiffe://cluster.local/*", *IDENTITY)
INSPECT = ("hbone", "inspect", "127.0.0.1:1", *IDENTITY)
BAD_ADDRESSES = ["", ":", ":80", "host:0", "host:65536", "host:x", "[::1", "[::1]x", "a:b:c", "1.2.3.4:-1"]

GENERAL = [
    Case(name="nothing", argv=["hbone"], word="COMMAND"),
    Case(name="an unknown command", argv=["hbone", "frobnicate"], word="frobnicate"),
    Case(name="an unknown option", argv=["hbone", "inspect", "localhost", "--frobnicate"], word="--frobnicate"),
    Case(name="bytes that are no text", argv=["hbone", b"\xff\xfe"], word="invalid choice"),
]

BAD_NAMES = [
    "",
    " ",
    "a b",
    "..",
    "a/b/c",
    "/",
    "a/",
    "spiffe://",
    "spiffe://cluster.local",
    "spiffe://other.example/ns/a/sa/b",
    "spiffe://cluster.local/ns/a/../sa/b",
    "SPIFFE://cluster.local/x",
    "x" * 3000,
    "x" * 300,
    "bücher",
    "new\nline",
]
DEV_CA = [
    Case(name="dev-ca without names", argv=["hbone", "dev-ca", "ca"], word="NAME"),
    *(
        Case(name=f"dev-ca {where}", argv=["hbone", "dev-ca", path, "web"], word="file", prepare=_file)
        for where, path in (("in a file", "file"), ("below a file", "file/ca"))
        for _file in [lambda directory: (directory / "file").touch()]
    ),
    *(
        Case(name=f"dev-ca for {name[:40]!r} ({len(name)})", argv=["hbone", "dev-ca", "ca", "ok", name])
        for name in BAD_NAMES
    ),
    Case(name="dev-ca for one name twice", argv=["hbone", "dev-ca", "ca", "web", "shop/web"], word="web"),
    Case(name="dev-ca for the name of the root", argv=["hbone", "dev-ca", "ca", "root"], word="root"),
    *(
        Case(name=f"dev-ca for {days} days", argv=["hbone", "dev-ca", "ca", "web", "--days", days], word=days)
        for days in ("0", "91", "-1", "some", "1.5")
    ),
    *(
        Case(
            name=f"dev-ca in {td[:40]!r} ({len(td)})",
            argv=["hbone", "dev-ca", "ca", "web", "--trust-domain", td],
            word="domain",
        )
        for td in ("", "UPPER", "a b", "a/b", "spiffe://a", "x" * 300)
    ),
    *(
        Case(
            name=f"dev-ca with a root that is {how}",
            argv=["hbone", "dev-ca", "ca", "web"],
            word="root",
            prepare=with_root(make),
        )
        for how, make in UNREADABLE.items()
    ),
]

ARGUMENTS = [
    *(
        Case(name=f"connect to {address!r}", argv=instead(CONNECT, "10.0.0.7:80", address), word="authority")
        for address in [*BAD_ADDRESSES, "host", "host:", "Host:80", "127.1:80"]
    ),
    *(
        Case(name=f"connect via {address!r}", argv=instead(CONNECT, "--via", address), word="address")
        for address in BAD_ADDRESSES
    ),
    *(
        Case(name=f"connect to the peer {peer!r}", argv=[*CONNECT, "--peer", peer], word="spiffe")
        for peer in ("", "web", "spiffe://", "spiffe://A/b", "https://a/b", "spiffe://a/../b", "spiffe://a/b?c")
    ),
    *(
        Case(name=f"{command[1]} within {seconds!r}", argv=[*command, "--timeout", seconds], word="timeout")
        for command in (CONNECT, INSPECT)
        for seconds in ("", "0", "-1", "soon", "nan", "inf", "1e9")
    ),
    *(
        Case(name=f"listen on port {port!r}", argv=instead(LISTEN, "0", port), word="port")
        for port in ("", "-1", "65536", "http", "1.5", "٨٠")
    ),
    *(
        Case(name=f"listen and lead to {address!r}", argv=instead(LISTEN, "--to", address), word="address")
        for address in [*BAD_ADDRESSES, "host", "host:"]
    ),
    *(
        Case(name=f"listen for {pattern!r}", argv=instead(LISTEN, "--allow", pattern), word="spiffe")
        for pattern in (
            "",
            "*",
            "web",
            "spiffe://",
            "spiffe://*/ns/a",
            "spiffe://a/*/b",
            "spiffe://A/b",
            "spiffe://a/b*",
        )
    ),
    *(
        Case(name=f"listen at {host!r}", argv=[*LISTEN, "--host", host], word="listen", prepare=identity)
        for host in ("256.1.1.1", "192.0.2.1", "nobody.invalid", "[::1]", " ")
    ),
    *(
        Case(name=f"inspect {address!r}", argv=instead(INSPECT, "127.0.0.1:1", address), word="address")
        for address in BAD_ADDRESSES
    ),
]

FILES = [
    *(
        Case(name=f"{command[1]} without {option}", argv=without(command, option), word=option, prepare=identity)
        for command in (CONNECT, LISTEN, INSPECT)
        for option in ("--cert", "--key", "--roots")
    ),
    Case(name="connect without an identity", argv=CONNECT[:5], word="HBONE_CERT"),
    Case(
        name="connect with an empty variable",
        argv=CONNECT[:5],
        word="HBONE_KEY",
        environ={"HBONE_CERT": "cert.pem", "HBONE_KEY": "", "HBONE_ROOTS": "roots.pem"},
    ),
    *(
        Case(
            name=f"{command[1]} with a {name} that is {how}",
            argv=command,
            word=name,
            prepare=identity_but(name, make),
        )
        for command in (CONNECT, LISTEN, INSPECT)
        for name in ("cert.pem", "key.pem", "roots.pem")
        for how, make in UNREADABLE.items()
        if command is CONNECT or how in ("missing", "binary")  # the code is the same
    ),
    *(
        Case(
            name=f"{command[1]} with {what}",
            argv=command,
            prepare=identity_but(name, content),
        )
        for command in (CONNECT, LISTEN, INSPECT)
        for what, name, content in (
            ("another key", "key.pem", CA.issue(uris=["spiffe://cluster.local/ns/a/sa/b"]).key_pem),
            ("a certificate without a SPIFFE ID", "cert.pem", CA.server("localhost").cert_pem),
            ("a CA as certificate", "cert.pem", CA.root_pem),
            ("a leaf as root", "roots.pem", CA.issue(uris=["spiffe://cluster.local/ns/a/sa/b"]).cert_pem),
            ("a key as root", "roots.pem", CA.issue(uris=["spiffe://cluster.local/ns/a/sa/b"]).key_pem),
            ("a key as certificate", "cert.pem", CA.issue(uris=["spiffe://cluster.local/ns/a/sa/b"]).key_pem),
            ("a certificate as key", "key.pem", CA.root_pem),
        )
    ),
]

REACH = [
    *(
        Case(name=f"{name} to a closed port", argv=command, code=UNREACHABLE, word="127.0.0.1", prepare=identity)
        for name, command in (("connect", CONNECT), ("inspect", INSPECT), ("inspect bare", INSPECT[:3]))
    ),
    Case(
        name="connect to a name that is not found",
        argv=instead(CONNECT, "--via", "nobody.invalid"),
        code=UNREACHABLE,
        word="nobody.invalid",
        prepare=identity,
    ),
    Case(
        name="inspect a name that is not found",
        argv=["hbone", "inspect", "nobody.invalid"],
        code=UNREACHABLE,
        word="nobody.invalid",
    ),
    Case(name="inspect a name of 300 letters", argv=["hbone", "inspect", "x" * 300], code=UNREACHABLE),
    Case(name="inspect a name in UTF-8", argv=["hbone", "inspect", "bü cher"], code=UNREACHABLE),
]


@cases(GENERAL, DEV_CA, ARGUMENTS, FILES, REACH)
def test_bad_input_to_hbone_is_told_in_one_sentence(case: Case, shell: Commands, tmp_path: Path) -> None:
    case.check(shell, tmp_path)


@pytest.mark.parametrize(
    "says", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28", bytes(500)]
)
def test_a_peer_that_speaks_no_tls_is_unreachable(shell: Commands, tmp_path: Path, says: bytes) -> None:
    identity(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        via = f"127.0.0.1:{server.getsockname()[1]}"
        script = "import socket,sys;s=socket.socket(fileno=int(sys.argv[1]));c=[];d=bytes.fromhex(sys.argv[2])\n"
        script += "while 1:\n c.append(s.accept()[0]); c[-1].recv(99); c[-1].sendall(d); c[-1].shutdown(1)"
        peer = subprocess.Popen(
            [sys.executable, "-c", script, str(server.fileno()), says.hex()], pass_fds=[server.fileno()]
        )
        with peer:
            for argv in (
                instead(CONNECT, "--via", via),
                instead(INSPECT, "127.0.0.1:1", via),
                ["hbone", "inspect", via],
            ):
                Case(name="", argv=argv, code=UNREACHABLE).judge(shell.run(argv, tmp_path))
            peer.kill()


def test_a_port_in_use_is_told(shell: Commands, tmp_path: Path) -> None:
    identity(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        argv = (*instead(LISTEN, "0", port), "--host", "127.0.0.1")
        Case(name="", argv=argv, word=f"127.0.0.1:{port}", code=MISUSE).judge(shell.run(argv, tmp_path))


def test_another_domain_than_that_of_the_root_is_told(shell: Commands, tmp_path: Path) -> None:
    assert shell.run(["hbone", "dev-ca", "ca", "web"], tmp_path).code == 0
    argv = ["hbone", "dev-ca", "ca", "db", "--trust-domain", "other.example"]
    Case(name="", argv=argv, word="other.example").check(shell, tmp_path)
    Case(name="", argv=["hbone", "dev-ca", "ca", "web"], word="web.pem").check(shell, tmp_path)
