"""What OpenSSL's own command sees of us, and what we see of it."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from typing import IO, TYPE_CHECKING

import pytest
from tests.support.tls import read, take

from hbone.errors import PeerIdentityError, TlsError
from hbone.testing.ca import TestCa
from hbone.testing.envoy import free_port
from hbone.tls import MAX_READS_WITHOUT_DATA, TlsConnection, TlsContext

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hbone.identity import Identity

OPENSSL = shutil.which("openssl")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(OPENSSL is None, reason="the openssl command is missing: apt-get install openssl"),
]

CA = TestCa()
SERVER = CA.identity("shop", "orders")
CLIENT = CA.identity("shop", "web")


class Files:
    """PEM files for the command, and the processes that use them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "root.pem").write_bytes(CA.root_pem)
        for name, identity in (("client", CLIENT), ("server", SERVER)):
            self.write(name, identity)

    def write(self, name: str, identity: Identity) -> None:
        cert, key = identity.svid.to_pem()
        (self.directory / f"{name}.pem").write_bytes(cert)
        (self.directory / f"{name}.key").write_bytes(key)

    @contextlib.contextmanager
    def openssl(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        assert OPENSSL is not None
        process = subprocess.Popen(
            [OPENSSL, *arguments],
            cwd=self.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()

    @contextlib.contextmanager
    def s_client(
        self, *arguments: str, certificate: str | None = "client"
    ) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
        """`openssl s_client`, and the socket that it came in on."""
        own = ["-cert", f"{certificate}.pem", "-key", f"{certificate}.key"] if certificate else []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(10)
            to = f"127.0.0.1:{listener.getsockname()[1]}"
            with self.openssl("s_client", "-connect", to, "-CAfile", "root.pem", *own, *arguments) as process:
                accepted, _ = listener.accept()
                with accepted:
                    accepted.settimeout(10)
                    yield process, accepted


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def shake(tls: TlsConnection, sock: socket.socket) -> None:
    """Shake hands over a blocking socket; what is left to send is sent in any case."""
    try:
        while not tls.handshake():
            sock.sendall(take(tls))
            data = sock.recv(65536)
            assert data, "the peer closed the connection"
            tls.receive_data(data)
    finally:
        sock.sendall(take(tls))


def receive(tls: TlsConnection, sock: socket.socket) -> bytes:
    """The next plaintext."""
    while True:
        plain = read(tls)
        if plain or tls.closed_by_peer:
            return plain
        data = sock.recv(65536)
        if not data:
            return b""
        tls.receive_data(data)


def output(process: subprocess.Popen[bytes], sock: socket.socket) -> str:
    """Close, and read all that the command has printed."""
    sock.close()
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdin = None
    printed, _ = process.communicate(timeout=10)
    return printed.decode("utf-8", "replace")


def test_s_client_sees_tls_1_3_h2_and_a_certificate_request(files: Files) -> None:
    with files.s_client("-alpn", "h2,http/1.1") as (process, sock):
        tls = TlsConnection(TlsContext.server(SERVER), server=True)
        shake(tls, sock)
        assert tls.peer_id == CLIENT.id
        tls.write(b"hello from us\n")
        sock.sendall(take(tls))
        assert process.stdin is not None
        process.stdin.write(b"hello from it\n")
        process.stdin.flush()
        assert receive(tls, sock) == b"hello from it\n"
        tls.shutdown()
        sock.sendall(take(tls))
        seen = output(process, sock)
    assert re.search(r"^New, TLSv1\.3, Cipher is TLS_AES_128_GCM_SHA256$", seen, re.MULTILINE)
    assert "ALPN protocol: h2" in seen
    assert "Requested Signature Algorithms:" in seen  # printed for a CertificateRequest only
    assert "Verify return code: 0 (ok)" in seen
    assert "hello from us" in seen


def test_s_client_without_certificate_is_told_that_one_is_required(files: Files) -> None:
    with files.s_client("-alpn", "h2", certificate=None) as (process, sock):
        with pytest.raises(PeerIdentityError, match="no certificate"):
            shake(TlsConnection(TlsContext.server(SERVER), server=True), sock)
        assert "alert certificate required" in output(process, sock)


def test_s_client_with_a_wrong_certificate_is_told_so(files: Files) -> None:
    files.write("wrong", CA.wrong_identity("two URI names"))
    with files.s_client("-alpn", "h2", certificate="wrong") as (process, sock):
        with pytest.raises(PeerIdentityError, match="2 URI names"):
            shake(TlsConnection(TlsContext.server(SERVER), server=True), sock)
        assert "alert bad certificate" in output(process, sock)


@pytest.mark.parametrize("version", ["-tls1_2", "-no_tls1_3"])
def test_s_client_with_an_older_version_is_refused(files: Files, version: str) -> None:
    with files.s_client("-alpn", "h2", version) as (process, sock):
        with pytest.raises(TlsError, match=r"TLS 1\.3"):
            shake(TlsConnection(TlsContext.server(SERVER), server=True), sock)
        assert "alert protocol version" in output(process, sock)


def test_s_client_gets_no_ticket_and_resumes_nothing(files: Files) -> None:
    context = TlsContext.server(SERVER)
    session = files.directory / "session.pem"
    for arguments in (["-sess_out", str(session)], ["-sess_in", str(session)]):
        if "-sess_in" in arguments and not session.exists():
            break  # nothing was given that could be brought back
        with files.s_client("-alpn", "h2", *arguments) as (process, sock):
            tls = TlsConnection(context, server=True)
            shake(tls, sock)
            assert tls.peer_id == CLIENT.id
            tls.write(b"x\n")
            tls.shutdown()
            sock.sendall(take(tls))
            seen = output(process, sock)
        assert "Reused" not in seen
        assert "New, TLSv1.3" in seen


def test_a_flood_of_key_updates_by_s_client_is_cut(files: Files) -> None:
    with files.s_client("-alpn", "h2") as (process, sock):
        tls = TlsConnection(TlsContext.server(SERVER), server=True)
        shake(tls, sock)
        assert process.stdin is not None
        sent = _key_updates(process.stdin, tls, sock)
        assert sent <= MAX_READS_WITHOUT_DATA
        sock.sendall(take(tls))


def _key_updates(stdin: IO[bytes], tls: TlsConnection, sock: socket.socket) -> int:
    """KeyUpdates, one by one, until they are cut."""
    for number in range(1, 200):
        stdin.write(b"K\n" if number % 2 else b"k\n")
        stdin.flush()
        tls.receive_data(sock.recv(65536))
        try:
            assert read(tls) == b""
        except TlsError:
            return number
        sock.sendall(take(tls))
    return 200


@contextlib.contextmanager
def s_server(files: Files, *arguments: str, certificate: str = "server") -> Iterator[socket.socket]:
    """A socket connected to `openssl s_server`."""
    port = free_port()
    own = ["-cert", f"{certificate}.pem", "-key", f"{certificate}.key"]
    with files.openssl("s_server", "-accept", f"127.0.0.1:{port}", *own, "-CAfile", "root.pem", *arguments) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) and not line.startswith(b"ACCEPT"):
            pass
        with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
            yield sock


def test_a_client_meets_s_server(files: Files) -> None:
    with s_server(files, "-Verify", "3", "-alpn", "h2", "-rev") as sock:
        tls = TlsConnection(TlsContext.client(CLIENT), server=False)
        shake(tls, sock)
        assert tls.peer_id == SERVER.id
        tls.write(b"hello\n")
        sock.sendall(take(tls))
        assert receive(tls, sock) == b"olleh\n"


def test_a_client_refuses_s_server_without_alpn(files: Files) -> None:
    with s_server(files) as sock:
        with pytest.raises(TlsError, match="h2 is required"):
            shake(TlsConnection(TlsContext.client(CLIENT), server=False), sock)


def test_a_client_learns_from_its_first_read_that_it_was_refused(files: Files) -> None:
    (files.directory / "root.pem").write_bytes(TestCa().root_pem)
    with s_server(files, "-Verify", "3", "-verify_return_error", "-alpn", "h2") as sock:
        tls = TlsConnection(TlsContext.client(CLIENT), server=False)
        shake(tls, sock)
        with pytest.raises(TlsError, match=r"the peer refused our certificate: unknown ca \(we are spiffe://"):
            receive(tls, sock)


def test_classic_groups_are_enough(files: Files) -> None:
    with s_server(files, "-alpn", "h2", "-groups", "P-256", "-www") as sock:
        tls = TlsConnection(TlsContext.client(CLIENT), server=False)
        shake(tls, sock)
        assert tls.group is not None
        assert tls.peer_id == SERVER.id
