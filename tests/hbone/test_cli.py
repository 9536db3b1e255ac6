"""`hbone` at a shell: what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING

import pytest
import trio

import hbone.trio
from hbone.cli import build_parser, main
from hbone.errors import ConnectionLost, ConnectRejected
from hbone.identity import FileSource

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

HBONE = [sys.executable, "-c", "import sys; from hbone.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("ca")
    assert main(["dev-ca", str(directory), "client", "shop/orders"]) == 0
    return directory


def identity(ca: pathlib.Path, name: str) -> list[str]:
    return ["--cert", str(ca / f"{name}.pem"), "--key", str(ca / f"{name}.key"), "--roots", str(ca / "root.pem")]


@contextlib.contextmanager
def echo_once(answer: bytes = b"got ") -> Iterator[int]:
    """Takes one connection at a time, and answers when its input has ended."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionResetError):
                data = b""
                while part := connection.recv(65536):
                    data += part
                connection.sendall(answer + data)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def start_listening(ca: pathlib.Path, to: int, *options: str) -> tuple[subprocess.Popen[str], int]:
    where = ["--host", "127.0.0.1", "--to", f"127.0.0.1:{to}"]
    process = subprocess.Popen(
        [*HBONE, "listen", "0", *where, *options, *identity(ca, "orders")],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "listening on 127.0.0.1:" in line
    assert "as spiffe://cluster.local/ns/shop/sa/orders" in line
    return process, int(line.split("127.0.0.1:")[1].split()[0])


@contextlib.contextmanager
def listening(ca: pathlib.Path, to: int, allow: str = "spiffe://cluster.local/*") -> Iterator[int]:
    process, port = start_listening(ca, to, "--allow", allow)
    try:
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[1]
        assert process.returncode == 130
        assert "Traceback" not in rest


def connect(port: int, ca: pathlib.Path, *options: str, data: bytes = b"hello") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*HBONE, "connect", "10.0.0.7:8080", "--via", f"127.0.0.1:{port}", *options, *identity(ca, "client")],
        input=data,
        capture_output=True,
        timeout=30,
    )


def test_connect_and_listen_carry_bytes_both_ways(ca: pathlib.Path) -> None:
    with echo_once() as to, listening(ca, to) as port:
        done = connect(port, ca, "--peer", "spiffe://cluster.local/ns/shop/sa/orders")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"got hello", b"")
        done = connect(port, ca, data=b"x" * 3_000_000)
        assert len(done.stdout) == 3_000_004
        assert done.stderr == b"hbone: connected with spiffe://cluster.local/ns/shop/sa/orders\n"


def test_another_peer_than_expected_is_no(ca: pathlib.Path) -> None:
    with echo_once() as to, listening(ca, to) as port:
        done = connect(port, ca, "--peer", "spiffe://cluster.local/ns/shop/sa/payments")
        assert done.returncode == 1
        assert b"spiffe://cluster.local/ns/shop/sa/orders" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_a_peer_that_is_not_allowed_is_told_no(ca: pathlib.Path) -> None:
    with echo_once() as to, listening(ca, to, "spiffe://cluster.local/ns/other/*") as port:
        done = connect(port, ca)
        assert done.returncode == 1
        assert b"refused our certificate" in done.stderr


def test_a_target_that_is_down_is_no(ca: pathlib.Path) -> None:
    with listening(ca, 1) as port:
        done = connect(port, ca)
        assert done.returncode == 1
        assert b"status 503" in done.stderr


@pytest.mark.parametrize("ends", [True, False])
async def test_sigterm_lets_open_streams_finish_until_the_deadline(ca: pathlib.Path, ends: bool) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    source = FileSource(ca / "client.pem", ca / "client.key", roots=ca / "root.pem")
    to = listener.socket.getsockname()[1]
    drain = "60" if ends else "0.5"
    process, port = start_listening(ca, to, "--allow", "spiffe://cluster.local/*", "--drain", drain)
    assert process.stderr is not None
    async with listener, trio.open_nursery() as nursery, hbone.trio.ConnectionPool(source) as pool:
        try:
            nursery.start_soon(trio.serve_listeners, answer, [listener])
            via = ("127.0.0.1", port)
            stream = await pool.connect("10.0.0.7:80", via=via, peer=None)
            await stream.send_all(b"before")
            assert await stream.receive_some() == b"before"
            process.send_signal(signal.SIGTERM)
            assert "SIGTERM: no new streams; open ones have" in (
                await trio.to_thread.run_sync(lines_until, process.stderr, "SIGTERM")
            )
            with trio.fail_after(30):
                while await takes_streams(pool, via):  # the second GOAWAY is on its way
                    await trio.sleep(0.01)
            if ends:
                await stream.send_all(b"after")
                assert await stream.receive_some() == b"after"
                assert process.poll() is None
                await stream.send_eof()
                assert await stream.receive_some() == b""
            else:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
            with trio.fail_after(30):
                assert await trio.to_thread.run_sync(process.wait) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
            nursery.cancel_scope.cancel()


async def answer(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


async def takes_streams(pool: hbone.trio.ConnectionPool, via: tuple[str, int]) -> bool:
    try:
        stream = await pool.connect("10.0.0.7:80", via=via, peer=None)
    except (ConnectionLost, ConnectRejected):
        return False
    await stream.aclose()
    return True


def lines_until(file: IO[str], text: str) -> str:
    return next((line for line in file if text in line), "")


def test_inspect_shows_who_answers(ca: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with echo_once() as to, listening(ca, to) as port:
        assert main(["inspect", f"127.0.0.1:{port}"]) == 0
        text = capsys.readouterr().out
        assert "spiffe://cluster.local/ns/shop/sa/orders" in text
        assert "not checked" in text
        assert "TLSv1.3" in text
        assert main(["inspect", f"127.0.0.1:{port}", "--json", *identity(ca, "client")]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["verified"] is True
        assert report["alpn"] == "h2"
        assert report["settings"]["MAX_CONCURRENT_STREAMS"] == 200
        assert len(report["chain"]) == 1  # the root is not sent
        assert report["chain"][0]["expired"] is False


def test_inspect_says_why_it_does_not_believe(
    ca: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dev-ca", str(tmp_path), "client"]) == 0
    with echo_once() as to, listening(ca, to) as port:
        capsys.readouterr()
        assert main(["inspect", f"127.0.0.1:{port}", *identity(tmp_path, "client")]) == 1
        assert "verified  no: " in capsys.readouterr().out


def test_the_root_is_marked_and_keys_are_private(ca: pathlib.Path) -> None:
    from cryptography import x509

    root = x509.load_pem_x509_certificate((ca / "root.pem").read_bytes())
    assert "not for production" in root.subject.rfc4514_string()
    for name in ("root.key", "client.key", "orders.key"):
        assert (ca / name).stat().st_mode & 0o077 == 0


def test_a_directory_keeps_its_root(tmp_path: pathlib.Path) -> None:
    assert main(["dev-ca", str(tmp_path), "one"]) == 0
    root = (tmp_path / "root.pem").read_bytes()
    assert main(["dev-ca", str(tmp_path), "spiffe://cluster.local/ns/a/sa/two"]) == 0
    assert (tmp_path / "root.pem").read_bytes() == root


WRONG: list[tuple[list[str], int, str]] = [
    (["connect", "10.0.0.7", "--via", "127.0.0.1", "ID"], 2, "10.0.0.7"),
    (["connect", "10.0.0.7:0", "--via", "127.0.0.1", "ID"], 2, "port"),
    (["connect", "010.0.0.7:80", "--via", "127.0.0.1", "ID"], 2, "010.0.0.7"),
    (["connect", "10.0.0.7:80", "--via", "127.0.0.1:x", "ID"], 2, "127.0.0.1:x"),
    (["connect", "10.0.0.7:80", "--via", "[::1", "ID"], 2, "[::1"),
    (["connect", "10.0.0.7:80", "--via", "127.0.0.1", "--peer", "orders", "ID"], 2, "orders"),
    (["connect", "10.0.0.7:80", "--via", "127.0.0.1", "--timeout", "never", "ID"], 2, "never"),
    (["connect", "10.0.0.7:80", "--via", "127.0.0.1"], 2, "--cert (or HBONE_CERT)"),
    (["connect", "10.0.0.7:80", "--via", "127.0.0.1", "--cert", "a.pem"], 2, "--key (or HBONE_KEY)"),
    (
        ["connect", "10.0.0.7:80", "--via", "127.0.0.1", "--cert", "/nowhere", "--key", "k", "--roots", "r"],
        2,
        "/nowhere",
    ),
    (
        [
            "connect",
            "10.0.0.7:80",
            "--via",
            "127.0.0.1",
            "--cert",
            "CA/root.key",
            "--key",
            "CA/client.key",
            "--roots",
            "CA/root.pem",
        ],
        2,
        "root.key",
    ),
    (
        [
            "connect",
            "10.0.0.7:80",
            "--via",
            "127.0.0.1",
            "--cert",
            "CA/client.pem",
            "--key",
            "CA/orders.key",
            "--roots",
            "CA/root.pem",
        ],
        2,
        "client.pem",
    ),
    (["connect", "10.0.0.7:80", "--via", "127.0.0.1:1", "ID"], 3, "127.0.0.1:1"),
    (["connect", "10.0.0.7:80"], 2, "--via"),
    (["listen", "70000", "--to", "a:1", "--allow", "spiffe://a/b", "ID"], 2, "70000"),
    (["listen", "0", "--to", "127.0.0.1", "--allow", "spiffe://a/b", "ID"], 2, "HOST:PORT"),
    (["listen", "0", "--to", "127.0.0.1:80", "--allow", "*", "ID"], 2, "*"),
    (["listen", "0", "--to", "127.0.0.1:80", "ID"], 2, "--allow"),
    (["listen", "TAKEN", "--host", "127.0.0.1", "--to", "127.0.0.1:80", "--allow", "spiffe://a/b", "ID"], 2, "in use"),
    (["inspect", "127.0.0.1:99999"], 2, "99999"),
    (["inspect", "127.0.0.1:1"], 3, "127.0.0.1:1"),
    (["inspect", "127.0.0.1:PLAIN", "--timeout", "5"], 3, "TLS"),
    (["dev-ca", "CA", "client"], 2, "client.pem"),
    (["dev-ca", "CA", "spiffe://other.domain/ns/a/sa/b"], 2, "other.domain"),
    (["dev-ca", "CA", "--trust-domain", "other.domain", "x"], 2, "other.domain"),
    (["dev-ca", "CA", "a b"], 2, "a b"),
    (["dev-ca", "CA", "--days", "1000", "x"], 2, "1000"),
    (["dev-ca", "/dev/null/x", "x"], 2, "/dev/null"),
    (["dev-ca", "NEW", "--trust-domain", "Not A Domain", "x"], 2, "Not A Domain"),
    (["dev-ca", "NEW"], 2, "NAME"),
    (["frobnicate"], 2, "frobnicate"),
    ([], 2, "COMMAND"),
]


@pytest.mark.parametrize(("arguments", "code", "names"), WRONG)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str],
    code: int,
    names: str,
    ca: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("HBONE_CERT", "HBONE_KEY", "HBONE_ROOTS"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken, echo_once(b"not TLS\n" * 10) as plain:
        filled: list[str] = []
        for argument in arguments:
            if argument == "ID":
                filled += identity(ca, "client")
                continue
            argument = argument.replace("TAKEN", str(taken.getsockname()[1])).replace("PLAIN", str(plain))
            if argument.startswith("CA"):
                argument = str(ca) + argument.removeprefix("CA")
            filled.append(str(tmp_path / "new") if argument == "NEW" else argument)
        if "PLAIN" in "".join(arguments):
            plain_text(filled, code)
            return
        with pytest.raises(SystemExit) as caught:
            raise SystemExit(main(filled))
    error = capsys.readouterr().err
    assert int(caught.value.code or 0) == code
    assert error.count("\n") == 1
    assert names in error
    assert "Traceback" not in error


def plain_text(arguments: list[str], code: int) -> None:
    """A server that is not TLS waits for more than our hello; one that speaks at once is enough here."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"220 mail.example ESMTP\r\n")
                connection.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        arguments = ["inspect", f"127.0.0.1:{server.getsockname()[1]}", *arguments[2:]]
        done = subprocess.run([*HBONE, *arguments], capture_output=True, timeout=30)
        thread.join()
    assert done.returncode == code
    assert b"TLS" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", ["dev-ca", "connect", "listen", "inspect"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args([command, "--help"])
    assert caught.value.code == 0
    assert "Example: " in capsys.readouterr().out


def test_identity_may_come_from_the_environment(ca: pathlib.Path) -> None:
    environment = {
        **os.environ,
        "HBONE_CERT": str(ca / "client.pem"),
        "HBONE_KEY": str(ca / "client.key"),
        "HBONE_ROOTS": str(ca / "root.pem"),
    }
    with echo_once() as to, listening(ca, to) as port:
        done = subprocess.run(
            [*HBONE, "connect", "10.0.0.7:8080", "--via", f"127.0.0.1:{port}"],
            input=b"hello",
            capture_output=True,
            timeout=30,
            env=environment,
        )
    assert done.stdout == b"got hello"


def test_an_interrupt_is_quiet(ca: pathlib.Path) -> None:
    with echo_once() as to, listening(ca, to) as port:
        process = subprocess.Popen(
            [*HBONE, "connect", "10.0.0.7:8080", "--via", f"127.0.0.1:{port}", *identity(ca, "client")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"hbone: connected")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 130
        assert error == b""
