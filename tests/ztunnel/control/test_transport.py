from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import trio

from hbone.errors import ConfigurationError
from hbone.grpc import GrpcError, StatusCode
from hbone.identity import Identity, ServerCertificate
from hbone.testing.ca import TestCa
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcCall, GrpcServer
from ztunnel.control.transport import (
    ControlPlaneError,
    RootSource,
    ServerAddress,
    TokenSource,
    Unreachable,
    grpc_dialer,
)
from ztunnel.mesh import parse_ip

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

PATH = "/test.Service/Echo"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("https://istiod.istio-system.svc:15012", "istiod.istio-system.svc", 15012),
        ("10.0.0.1:15010", "10.0.0.1", 15010),
        ("control", "control", 15012),
        ("https://[fd00::1]:15012/", "fd00::1", 15012),
    ],
)
def test_address_is_read_with_or_without_scheme_and_port(text: str, host: str, port: int) -> None:
    found = ServerAddress.parse(text, variable="XDS_ADDRESS")
    assert (found.host, found.port) == (host, port)


@pytest.mark.parametrize(
    "text", ["http://x:1", "https://", "https://x:0", "x:99999", "https://x/path", "https://u@x", ""]
)
def test_bad_address_names_the_variable(text: str) -> None:
    with pytest.raises(ConfigurationError, match="XDS_ADDRESS"):
        ServerAddress.parse(text, variable="XDS_ADDRESS")


def test_token_setting_is_a_file_a_text_or_nothing(tmp_path: Path) -> None:
    default = tmp_path / "default"
    assert TokenSource.from_setting(None, default) is None
    assert TokenSource.from_setting("", default) is None
    default.write_text("  from-default\n")
    for setting, value in ((None, "from-default"), (str(default), "from-default"), ("literal.token", "literal.token")):
        source = TokenSource.from_setting(setting, default)
        assert source is not None
        assert source.read() == value


@pytest.mark.parametrize("content", [b"", b"\n", b"a b", b"caf\xc3\xa9", b"a\nb", b"x" * 20_000])
def test_unusable_token_file_is_named_and_not_repeated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ControlPlaneError, match=str(path)) as caught:
        TokenSource(path=path).read()
    assert content.decode("latin-1").strip() not in str(caught.value) or not content.strip()


def test_missing_token_file_is_an_error_of_the_request(tmp_path: Path) -> None:
    with pytest.raises(ControlPlaneError, match="cannot be read"):
        TokenSource(path=tmp_path / "gone").read()


def test_roots_are_read_again_and_the_last_good_ones_stay(tmp_path: Path) -> None:
    first, second = TestCa(), TestCa()
    path = tmp_path / "root.pem"
    path.write_bytes(first.root_pem)
    source = RootSource(str(path), default=tmp_path / "default", variable="CA_ROOT_CA")
    assert source.load() == (first.root,)
    path.write_bytes(first.root_pem + second.root_pem)
    assert source.load() == (first.root, second.root)
    path.write_text("garbage")
    assert source.load() == (first.root, second.root)
    assert "holds no PEM certificate" in (source.problem or "")
    path.write_bytes(second.root_pem)
    assert source.load() == (second.root,)
    assert source.problem is None


def test_roots_are_inline_or_of_the_enrolment(tmp_path: Path) -> None:
    ca = TestCa()
    default = tmp_path / "default"
    assert RootSource(ca.root_pem.decode(), default=default, variable="V").load() == (ca.root,)
    assert RootSource(str(default), default=default, variable="V", extra=lambda: ca.root_pem).load() == (ca.root,)
    with pytest.raises(ControlPlaneError, match="set V to its path, or run 'ztunnel enroll'"):
        RootSource(str(default), default=default, variable="V").load()
    with pytest.raises(ControlPlaneError, match="cannot be read"):
        RootSource(str(tmp_path / "named"), default=default, variable="V", extra=lambda: ca.root_pem).load()


async def echo(call: GrpcCall) -> None:
    async for message in call:
        await call.send(message + b" " + str(call.peer).encode())
        if message == b"fail":
            raise GrpcError(StatusCode.PERMISSION_DENIED, "no")


@contextlib.asynccontextmanager
async def server(context: TlsContext) -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(GrpcServer({PATH: echo}).serve, listeners, lambda: context)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def presented(ca: TestCa, *names: str) -> TlsContext:
    issued = ca.server(*names)
    return TlsContext.server(ServerCertificate(issued.chain, issued.key), "optional", bundles=[ca.bundle])


def address(port: int, host: str = "127.0.0.1", alternative: str | None = None) -> ServerAddress:
    return ServerAddress(host=host, port=port, alternative=alternative)


async def test_calls_go_through_and_the_certificate_is_shown() -> None:
    ca = TestCa()
    me: Identity = ca.identity("web")
    async with server(presented(ca, "127.0.0.1")) as port:
        dial = grpc_dialer(address(port), RootSource.of(ca.root), source=parse_ip("127.0.0.1"))
        async with dial(None) as channel:
            assert await channel.unary(PATH, b"hello", ()) == b"hello None"
        async with dial(me) as channel, channel.stream(PATH, ()) as stream:
            await stream.send(b"one")
            assert await stream.receive() == f"one {me.svid.id}".encode()
            await stream.send(b"fail")
            assert (await stream.receive() or b"").startswith(b"fail")
            with pytest.raises(GrpcError, match="PERMISSION_DENIED"):
                await stream.receive()


async def test_workload_with_a_certificate_of_the_same_root_does_not_pass_as_the_control_plane() -> None:
    ca = TestCa()
    me = ca.identity("evil")
    async with server(TlsContext.server(me)) as port:
        with pytest.raises(ControlPlaneError, match=r"not for 127\.0\.0\.1"):
            async with grpc_dialer(address(port), RootSource.of(ca.root))(ca.identity("web")):
                pass


async def test_server_of_another_root_or_name_is_refused_and_an_alternative_name_will_do() -> None:
    ca = TestCa()
    async with server(presented(ca, "istiod.test")) as port:
        with pytest.raises(ControlPlaneError, match="no root of ours"):
            async with grpc_dialer(address(port), RootSource.of(TestCa().root))(None):
                pass
        with pytest.raises(ControlPlaneError, match="is not for 127"):
            async with grpc_dialer(address(port), RootSource.of(ca.root))(None):
                pass
        dial = grpc_dialer(address(port, alternative="istiod.test"), RootSource.of(ca.root))
        async with dial(None) as channel:
            assert await channel.unary(PATH, b"x", ()) == b"x None"


async def test_nobody_there_is_unreachable() -> None:
    sock = trio.socket.socket()
    await sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    with pytest.raises(Unreachable, match="connection refused"):
        async with grpc_dialer(address(port), RootSource.of(TestCa().root))(None):
            pass
    sock.close()
    with pytest.raises(Unreachable, match="has no address"):
        async with grpc_dialer(address(1, "no-such-name.invalid"), RootSource.of(TestCa().root))(None):
            pass


async def test_server_that_says_nothing_is_given_up(autojump_clock: object) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def silent(stream: trio.SocketStream) -> None:
            await trio.sleep_forever()

        await nursery.start(trio.serve_listeners, silent, listeners)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(Unreachable, match="longer than 5 seconds"):
            async with grpc_dialer(address(port), RootSource.of(TestCa().root))(None):
                pass
        nursery.cancel_scope.cancel()
