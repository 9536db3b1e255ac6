"""Hostile clients of miniistiod, and a workload that poses as miniistiod toward a ztunnel: real processes all."""

from __future__ import annotations

import base64
import contextlib
import itertools
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from hpack import Decoder
from OpenSSL import SSL
from tests.support.hostile import HostilePeer, Siege, exchange, rss, siege
from tests.support.miniistiod import ADDRESS, CREATE_CERTIFICATE, DELTA, Applicant, bearer, subscribe
from tests.support.shop import descriptors, until
from tests.system.test_hostile import FLOODS, GARBAGE
from tests.system.test_hostile_local import BAD_REQUESTS

from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode, TlsError
from hbone.grpc import GrpcError, StatusCode
from hbone.identity import SpiffeId
from hbone.testing import frames
from hbone.testing.ca import WRONG_SVIDS, TestCa
from hbone.tls import IoBuffer, TlsConnection, TlsContext
from hbone.trio.grpc import GrpcClient, GrpcStream
from ztunnel.control.ca import CaClient
from ztunnel.control.transport import ControlPlaneError, RootSource, ServerAddress, TokenSource, grpc_dialer
from ztunnel.wire import ca_pb2, discovery_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from hbone.identity import Identity

MIB = 1 << 20


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with siege(tmp_path_factory.mktemp("siege")) as found:
        yield found


def context(besieged: Siege, identity: Identity | None = None) -> TlsContext:
    roots = (besieged.mesh.directory / "state" / "root-cert.pem").read_bytes()
    return TlsContext.client(identity, roots=roots, server_name=besieged.control)


@contextlib.asynccontextmanager
async def client(besieged: Siege, identity: Identity | None = None) -> AsyncIterator[GrpcClient]:
    async with GrpcClient.connect(besieged.control, 15012, context(besieged, identity)) as found:
        yield found


async def still_serves(besieged: Siege) -> None:
    """A well-behaved host gets its certificate, and nobody's discovery was cut."""
    assert besieged.mesh.control.running
    async with client(besieged, besieged.friend) as good:
        with trio.fail_after(30):
            answer = await good.unary(CREATE_CERTIFICATE, Applicant().request(600))
    assert ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain
    status, _ = await besieged.mesh.control.http(15014, "/ready", address=besieged.control)
    assert status == 200


@contextlib.asynccontextmanager
async def costs_nothing(besieged: Siege, *, grows: int = 8 * MIB) -> AsyncIterator[None]:
    """The control plane serves on, with the descriptors and about the memory of before."""
    pid = besieged.mesh.control.pid
    resting, memory = descriptors(pid), rss(pid)
    yield
    await still_serves(besieged)
    assert await until(lambda: descriptors(pid) <= resting)
    assert rss(pid) - memory <= grows


async def peer(besieged: Siege, identity: Identity | None = None, **options: Any) -> HostilePeer:
    found = await HostilePeer.connect(besieged.control, identity, port=15012, **options)
    await found.handshake()
    return found


# --- TLS and HTTP/2


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage_instead_of_tls_costs_its_connection(besieged: Siege, name: str) -> None:
    async with costs_nothing(besieged):
        await exchange(besieged.control, 15012, GARBAGE[name], eof=False)


@pytest.mark.parametrize("alpn", [[], [b"http/1.1"], [b"h2c"]], ids=str)
async def test_a_client_without_h2_is_refused(besieged: Siege, alpn: list[bytes]) -> None:
    async with costs_nothing(besieged):
        assert await _refused(await HostilePeer.connect(besieged.control, None, port=15012, alpn=alpn))


async def _refused(hostile: HostilePeer) -> bool:
    async with hostile:
        try:
            await hostile.handshake()
        except SSL.Error:
            return True
        await hostile.send(frames.PREFACE + frames.settings())
        await hostile.until_closed(12)
        return not hostile.received


@pytest.mark.parametrize("kind", WRONG_SVIDS)
async def test_a_wrong_certificate_of_the_right_root_is_refused(besieged: Siege, kind: str) -> None:
    identity = besieged.ca().wrong_identity(kind)
    assert await _refused(await HostilePeer.connect(besieged.control, identity, port=15012))


async def test_certificates_of_other_roots_are_refused(besieged: Siege) -> None:
    async with costs_nothing(besieged):
        for ca in (TestCa(), TestCa("other.example")):
            identity = ca.identity("shop", "client")
            assert await _refused(await HostilePeer.connect(besieged.control, identity, port=15012))


@pytest.mark.parametrize("name", [*FLOODS, "CONTINUATION", "rapid reset", "made-you-reset"])
async def test_a_flood_of_frames_is_cut_off(besieged: Siege, name: str) -> None:
    async with costs_nothing(besieged):
        async with await peer(besieged) as hostile:
            await hostile.start()
            first = headers(1)
            if name == "CONTINUATION":
                first = frames.headers(1, b"\x83", end_headers=False)
                supply: Iterator[bytes] = itertools.repeat(frames.continuation(1, b"\x00\x01a\x01b"))
            elif name == "rapid reset":
                supply = (headers(stream) + frames.rst_stream(stream) for stream in itertools.count(3, 2))
            elif name == "made-you-reset":
                supply = (headers(stream) + frames.window_update(stream, 2**31 - 1) for stream in itertools.count(3, 2))
            else:
                supply = itertools.repeat(FLOODS[name])
            await hostile.send(first + (headers(3) + frames.rst_stream(3) if name.startswith("RST") else b""))
            sent = await hostile.burst(itertools.islice(supply, 50_000), at_once=50)
            await hostile.until_closed(10)
            assert sent < 50_000
            assert hostile.goaway is not ErrorCode.INTERNAL_ERROR


# --- gRPC

FIELDS: dict[bytes, bytes] = {
    b":method": b"POST",
    b":scheme": b"https",
    b":path": CREATE_CERTIFICATE.encode(),
    b":authority": b"localhost:15012",
    b"te": b"trailers",
    b"content-type": b"application/grpc",
}


def headers(stream: int, *, end_stream: bool = False, **changes: bytes | None) -> bytes:
    """Request headers; a change by a name with `_` for `-` and `p_` for `:`, None to leave a field out."""
    fields = dict(FIELDS)
    for key, value in changes.items():
        name = (":" + key[2:] if key.startswith("p_") else key.replace("_", "-")).encode()
        if value is None:
            fields.pop(name)
        else:
            fields[name] = value
    return frames.headers(stream, tuple(fields.items()), end_stream=end_stream)


def message(body: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", flag, len(body) if length is None else length) + body


def good() -> bytes:
    return Applicant().request(600)


def call(body: bytes, *, end: bool = True, **changes: bytes | None) -> bytes:
    return headers(1, end_stream=False, **changes) + frames.data(1, body, end_stream=end)


BAD_CALLS: dict[str, tuple[bytes, set[int]]] = {
    "no message": (headers(1, end_stream=True), {3, 13}),
    "half a prefix": (call(b"\x00\x00"), {3, 13}),
    "half a message": (call(message(b"abc", length=100)), {3, 13}),
    "compressed without saying so": (call(message(good(), flag=1)), {12, 13}),
    "compressed by gzip": (call(message(good(), flag=1), grpc_encoding=b"gzip"), {12}),
    "an unknown flag": (call(message(good(), flag=0xFE)), {12, 13}),
    "a message of 4 GiB": (call(message(b"", length=2**32 - 1), end=False), {8}),
    "a message of 5 MiB": (call(message(b"", length=5 * MIB), end=False), {8}),
    "no protobuf": (call(message(b"\xff" * 100)), {3}),
    "a field without its end": (call(message(b"\x0a\xff\xff\xff\xff\x0f")), {3}),
    "text that is not UTF-8": (call(message(b"\x0a\x02\xff\xfe")), {3}),
    "an unknown method": (call(message(good()), p_path=b"/a.B/C"), {12}),
    "an unknown service of istiod": (call(message(b""), p_path=b"/istio.v1.auth.IstioCertificateService/X"), {12}),
    "a path without a slash": (call(message(b""), p_path=b"a"), {12, 13}),
    "the older discovery": (call(message(b""), p_path=DELTA.replace("Delta", "Stream").encode()), {16}),
    "a time-out that is none": (call(message(good()), grpc_timeout=b"soon"), {3, 13}),
    "a time-out of nothing": (call(message(good()), grpc_timeout=b"0n", end=False), {4}),
    "metadata that is not base64": (call(message(good()), x_bin=b"\x01\x02"), {3, 7, 13, 16}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
async def test_a_bad_call_gets_its_status(besieged: Siege, name: str) -> None:
    wire, expected = BAD_CALLS[name]
    async with costs_nothing(besieged):
        async with await peer(besieged) as hostile:
            await hostile.start()
            await hostile.send(wire)
            await hostile.until(lambda: grpc_status(hostile) is not None or hostile.reset_code(1) is not None)
            assert grpc_status(hostile) in expected


def grpc_status(hostile: HostilePeer) -> int | None:
    """`grpc-status` of stream 1."""
    decoder = Decoder()
    for kind, _, _, payload in hostile.frames():
        if kind == FrameType.HEADERS:
            fields = dict(decoder.decode(payload, raw=True))
            if b"grpc-status" in fields:
                return int(fields[b"grpc-status"])
    return None


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(call(b"", p_method=b"GET"), id="GET"),
        pytest.param(call(b"", content_type=b"text/html"), id="HTML"),
        pytest.param(call(b"", content_type=None), id="no content type"),
        pytest.param(call(b"", p_path=None), id="no path"),
        pytest.param(call(b"", p_scheme=None), id="no scheme"),
        pytest.param(call(b"", p_method=b"CONNECT"), id="CONNECT"),
        pytest.param(call(b"", connection=b"close"), id="a field of HTTP/1.1"),
        pytest.param(call(b"", X_Upper=b"x"), id="upper case"),
        pytest.param(call(b"", x=b"a\r\nb"), id="a line end in a value"),
        pytest.param(call(b"", x=b"y" * 17_000), id="17 kB of headers"),
        pytest.param(frames.headers(1, tuple((b"x%d" % i, b"y") for i in range(2000))), id="2000 fields"),
    ],
)
async def test_what_is_no_grpc_is_refused(besieged: Siege, wire: bytes) -> None:
    async with costs_nothing(besieged), await peer(besieged) as hostile:
        await hostile.start()
        await hostile.send(wire)
        with trio.move_on_after(10):
            while grpc_status(hostile) is None and hostile.reset_code(1) is None and hostile.status(1) is None:
                if not await hostile.read():
                    break
        assert hostile.goaway is not ErrorCode.INTERNAL_ERROR
        assert grpc_status(hostile) != 0


async def test_large_messages_of_strangers_stay_within_a_budget(besieged: Siege) -> None:
    """A hundred calls without a certificate, each with 4 MiB less a byte of a message of 4 MiB."""
    async with costs_nothing(besieged, grows=96 * MIB):
        async with await peer(besieged) as hostile:
            await hostile.start()
            streams = list(itertools.islice(itertools.count(1, 2), 100))
            await hostile.send(*(headers(stream) for stream in streams))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hostile.until_closed, 60)
                with trio.move_on_after(4):
                    for _ in range(16):
                        for stream in streams:
                            first = message(b"", length=4 * MIB) if not _ else b""
                            await hostile.send(frames.data(stream, first + bytes(16_000)))
                nursery.cancel_scope.cancel()


# --- certificates


def csr(key: Any, *, uris: tuple[str, ...] = (), algorithm: Any = None) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uris:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(names, critical=True)
    return builder.sign(key, algorithm or hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def leaf_of(answer: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain[0].encode())


def forged() -> str:
    """A request whose signature is another key's."""
    der = x509.load_pem_x509_csr(csr(ec.generate_private_key(ec.SECP256R1())).encode()).public_bytes(
        serialization.Encoding.DER
    )
    broken = bytearray(der)
    broken[-3] ^= 0xFF
    body = base64.encodebytes(bytes(broken)).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


def p256() -> Any:
    return ec.generate_private_key(ec.SECP256R1())


BAD_CSRS: dict[str, Callable[[Siege], str]] = {
    "empty": lambda _: "",
    "text": lambda _: "give me a certificate",
    "no base64": lambda _: "-----BEGIN CERTIFICATE REQUEST-----\n!!!!\n-----END CERTIFICATE REQUEST-----\n",
    "not ASN.1": lambda _: "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    "a certificate": lambda besieged: besieged.ca().root_pem.decode(),
    "cut": lambda _: csr(p256())[:200],
    "a forged signature": lambda _: forged(),
    "RSA of 1024 bits": lambda _: csr(rsa.generate_private_key(65537, 1024)),
    "DSA": lambda _: csr(dsa.generate_private_key(2048)),
    "P-192": lambda _: csr(ec.generate_private_key(ec.SECP192R1())),
    "a curve of Bitcoin's": lambda _: csr(ec.generate_private_key(ec.SECP256K1())),
    "1 MB of text": lambda _: csr(p256()) + "x" * 1_000_000,
    "NULs": lambda _: "\x00" * 1000,
}


@pytest.mark.parametrize("name", BAD_CSRS)
async def test_a_bad_csr_is_refused_with_a_reason(besieged: Siege, name: str) -> None:
    request = ca_pb2.IstioCertificateRequest(csr=BAD_CSRS[name](besieged), validity_duration=600)
    async with client(besieged, besieged.hostile) as hostile:
        with pytest.raises(GrpcError) as caught:
            await hostile.unary(CREATE_CERTIFICATE, request.SerializeToString())
    too_large = name == "1 MB of text"
    assert caught.value.code is (StatusCode.RESOURCE_EXHAUSTED if too_large else StatusCode.INVALID_ARGUMENT)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("seconds", [90 * 86_400 + 1, 2**62])
async def test_a_lifetime_beyond_the_limits_is_refused(besieged: Siege, seconds: int) -> None:
    async with client(besieged, besieged.hostile) as hostile:
        with pytest.raises(GrpcError) as caught:
            await hostile.unary(CREATE_CERTIFICATE, Applicant().request(seconds))
    assert caught.value.code is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("seconds", [0, -1, -(2**62)])
async def test_no_lifetime_means_a_day(besieged: Siege, seconds: int) -> None:
    async with client(besieged, besieged.hostile) as hostile:
        answer = await hostile.unary(CREATE_CERTIFICATE, Applicant().request(seconds))
    leaf = leaf_of(answer)
    assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds() <= 86_400 + 121


async def test_names_in_a_csr_are_not_signed(besieged: Siege) -> None:
    wanted = csr(
        p256(), uris=("spiffe://cluster.local/ns/shop/sa/client", "spiffe://cluster.local/ns/istio-system/sa/x")
    )
    request = ca_pb2.IstioCertificateRequest(csr=wanted, validity_duration=600)
    async with client(besieged, besieged.hostile) as hostile:
        answer = await hostile.unary(CREATE_CERTIFICATE, request.SerializeToString())
    names = leaf_of(answer).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("spiffe://cluster.local/ns/shop/sa/mallory")]


@pytest.mark.parametrize(
    "wanted",
    ["spiffe://cluster.local/ns/shop/sa/client", "spiffe://cluster.local/ns/shop/sa/mallory/x", "x" * 5000, ""],
    ids=lambda text: text[:50],
)
async def test_nobody_is_impersonated(besieged: Siege, wanted: str) -> None:
    async with client(besieged, besieged.hostile) as hostile:
        with pytest.raises(GrpcError) as caught:
            await hostile.unary(CREATE_CERTIFICATE, Applicant().request(600, impersonate=wanted))
    assert caught.value.code is StatusCode.UNAUTHENTICATED
    assert "client" not in caught.value.message


# --- tokens


def token(besieged: Siege, *arguments: str) -> str:
    state = ("--state", str(besieged.mesh.directory / "state"))
    identity = ("--namespace", "shop", "--service-account", "mallory")
    return besieged.mesh.cli("token", "create", *state, *identity, *arguments).strip()


def revoked(besieged: Siege) -> str:
    state = ("--state", str(besieged.mesh.directory / "state"))
    before = {line.split()[0] for line in besieged.mesh.cli("token", "list", *state).splitlines()}
    text = token(besieged, "--reusable")
    (new,) = {line.split()[0] for line in besieged.mesh.cli("token", "list", *state).splitlines()} - before
    besieged.mesh.cli("token", "revoke", *state, new)
    return text


def flipped(text: str) -> str:
    """One letter of the signature changed."""
    return text[:-5] + ("A" if text[-5] != "A" else "B") + text[-4:]


BAD_TOKENS: dict[str, Callable[[Siege], list[tuple[str, str]]]] = {
    "none": lambda _: [],
    "an empty header": lambda _: [("authorization", "")],
    "no word after Bearer": lambda _: [("authorization", "Bearer")],
    "no bearer": lambda besieged: [("authorization", token(besieged, "--reusable"))],
    "Basic": lambda _: [("authorization", "Basic bWFsbG9yeTp4")],
    "garbage": lambda _: [("authorization", "Bearer garbage")],
    "a JWT without a signature": lambda _: [
        ("authorization", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6c2hvcDpjbGllbnQifQ.")
    ],
    "revoked": lambda besieged: [("authorization", f"Bearer {revoked(besieged)}")],
    "one letter changed": lambda besieged: [("authorization", f"Bearer {flipped(token(besieged, '--reusable'))}")],
    "two": lambda besieged: [("authorization", f"Bearer {token(besieged, '--reusable')}")] * 2,
    "8 kB": lambda _: [("authorization", "Bearer " + "x" * 8000)],
}


@pytest.mark.parametrize("name", BAD_TOKENS)
async def test_a_bad_token_is_refused_without_a_reason(besieged: Siege, name: str) -> None:
    metadata = BAD_TOKENS[name](besieged)
    async with client(besieged) as hostile:
        with pytest.raises(GrpcError) as caught:
            await hostile.unary(CREATE_CERTIFICATE, Applicant().request(600), metadata)
        assert (caught.value.code, caught.value.message) == (
            StatusCode.UNAUTHENTICATED,
            "request authenticate failure",
        )
        async with hostile.stream(DELTA, metadata) as stream:
            with contextlib.suppress(GrpcError):
                await stream.send(subscribe())
            with pytest.raises(GrpcError) as told:
                await stream.receive()
        assert (told.value.code, told.value.message) == (StatusCode.UNAUTHENTICATED, "authentication failure")


async def test_an_expired_token_is_refused(besieged: Siege) -> None:
    text = token(besieged, "--reusable", "--ttl", "1s")
    await trio.sleep(1.2)
    async with client(besieged) as hostile:
        with pytest.raises(GrpcError) as caught:
            await hostile.unary(CREATE_CERTIFICATE, Applicant().request(600), bearer(text))
    assert caught.value.code is StatusCode.UNAUTHENTICATED


async def test_a_one_time_token_makes_one_host_and_opens_no_discovery(besieged: Siege) -> None:
    printed = token(besieged, "--name", "mallory-1")
    text = printed.split("'")[1]
    async with client(besieged) as hostile:
        async with hostile.stream(DELTA, bearer(text)) as stream:
            with pytest.raises(GrpcError) as caught:
                await stream.receive()
            assert caught.value.code is StatusCode.UNAUTHENTICATED
        first = Applicant()
        assert await hostile.unary(CREATE_CERTIFICATE, first.request(600), bearer(text))
        assert await hostile.unary(CREATE_CERTIFICATE, first.request(600), bearer(text))  # its answer was lost
        with pytest.raises(GrpcError) as caught:
            await hostile.unary(CREATE_CERTIFICATE, Applicant().request(600), bearer(text))
        assert caught.value.code is StatusCode.UNAUTHENTICATED


async def test_guessing_tokens_is_slowed_down(besieged: Siege) -> None:
    source = besieged.control.rpartition(".")[0] + ".88"
    codes: list[StatusCode] = []
    sock = trio.socket.socket()
    await sock.bind((source, 0))
    await sock.connect((besieged.control, 15012))
    async with GrpcClient(trio.SocketStream(sock), context(besieged)) as hostile:
        request = Applicant().request(600)
        for number in range(1200):
            with pytest.raises(GrpcError) as caught:
                await hostile.unary(CREATE_CERTIFICATE, request, [("authorization", f"Bearer guess{number}")])
            codes.append(caught.value.code)
            if codes[-1] is StatusCode.RESOURCE_EXHAUSTED:
                break
    assert codes[-1] is StatusCode.RESOURCE_EXHAUSTED
    await still_serves(besieged)


# --- discovery


async def end_of(stream: GrpcStream) -> GrpcError:
    """The error that a call ends with."""
    with trio.fail_after(10):
        try:
            while await stream.receive() is not None:
                pass
        except GrpcError as error:
            return error
    raise AssertionError("the call ended well")


def node(text: str, **metadata: str) -> bytes:
    request = discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS)
    request.node.id = text
    request.node.metadata.update(metadata)
    return request.SerializeToString()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        pytest.param(b"\xff\xff\xff", StatusCode.INVALID_ARGUMENT, id="no protobuf"),
        pytest.param(b"", StatusCode.INVALID_ARGUMENT, id="no node"),
        pytest.param(node("ztunnel"), StatusCode.INVALID_ARGUMENT, id="a node of one part"),
        pytest.param(node("~~~"), StatusCode.INVALID_ARGUMENT, id="a node of no parts"),
        pytest.param(node("x" * 100_000), StatusCode.INVALID_ARGUMENT, id="a node of 100 kB"),
        pytest.param(
            node("ztunnel~1.1.1.1~a.istio-system~istio-system.svc"), StatusCode.PERMISSION_DENIED, id="a namespace"
        ),
        pytest.param(
            node("ztunnel~1.1.1.1~a.shop~shop.svc", SERVICE_ACCOUNT="client"),
            StatusCode.PERMISSION_DENIED,
            id="a service account",
        ),
    ],
)
async def test_a_bad_first_request_ends_its_stream(besieged: Siege, first: bytes, code: StatusCode) -> None:
    async with costs_nothing(besieged), client(besieged, besieged.hostile) as hostile:
        async with hostile.stream(DELTA) as stream:
            await stream.send(first)
            error = await end_of(stream)
        assert error.code is code
        assert len(error.message) < 1000


async def test_a_million_names_are_too_many(besieged: Siege) -> None:
    async with costs_nothing(besieged, grows=64 * MIB), client(besieged, besieged.hostile) as hostile:
        async with hostile.stream(DELTA) as stream:
            await stream.send(subscribe(name="mallory", resource_names_subscribe=["/10.9.9.9"]))
            try:
                for start in itertools.count(0, 50_000):
                    names = [f"/10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}" for n in range(start, start + 50_000)]
                    more = discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS, resource_names_subscribe=names)
                    await stream.send(more.SerializeToString())
                    assert start < 2_000_000
            except GrpcError as error:
                assert error.code is StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017


async def test_wrong_nonces_and_unknown_types_change_nothing(besieged: Siege) -> None:
    async with costs_nothing(besieged), client(besieged, besieged.hostile) as hostile:
        async with hostile.stream(DELTA) as stream:
            await stream.send(subscribe(name="mallory"))
            assert await stream.receive()
            for nonce in ("", "x", "0", "9" * 10_000):
                for url in (ADDRESS, "type.googleapis.com/envoy.config.listener.v3.Listener", "x" * 10_000):
                    request = discovery_pb2.DeltaDiscoveryRequest(type_url=url, response_nonce=nonce)
                    request.error_detail.message = "no" * 1000
                    await stream.send(request.SerializeToString())
            await stream.end()


async def test_more_streams_than_a_node_may_have_end_the_oldest(besieged: Siege) -> None:
    async with costs_nothing(besieged, grows=16 * MIB), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client(besieged, besieged.hostile)) for _ in range(5)]
        streams = [await stack.enter_async_context(each.stream(DELTA)) for each in clients]
        for stream in streams:
            await stream.send(subscribe(name="mallory"))
            assert await stream.receive()
        error = await end_of(streams[0])
        assert error.code is StatusCode.UNAVAILABLE


# --- silence, and the page


async def test_silence_is_ended_in_time(besieged: Siege) -> None:
    late: list[str] = []

    async def judge(name: str, limit: float) -> None:
        async with await HostilePeer.connect(besieged.control, None, port=15012) as hostile:
            if name == "half a handshake":
                with contextlib.suppress(SSL.WantReadError):
                    hostile.client.connection.do_handshake()
                await hostile.raw(hostile.client.output()[:100])
            elif name != "TCP":
                await hostile.handshake()
                if name == "no SETTINGS answer":
                    await hostile.send(frames.PREFACE + frames.settings())
                elif name == "an open header block":
                    await hostile.start()
                    await hostile.send(frames.headers(1, b"\x83", end_headers=False))
            if not await hostile.closes_within(limit + 5):
                late.append(name)

    async with costs_nothing(besieged), trio.open_nursery() as nursery:
        for name, limit in (
            ("TCP", 10),
            ("half a handshake", 10),
            ("no preface", 5),
            ("no SETTINGS answer", 10),
            ("an open header block", 5),
        ):
            nursery.start_soon(judge, name, float(limit))
        for _ in range(3):
            await still_serves(besieged)
            await trio.sleep(1)
    assert late == []


async def test_a_hundred_silent_strangers_keep_nobody_out(besieged: Siege) -> None:
    source = besieged.control.rpartition(".")[0] + ".99"
    async with costs_nothing(besieged):
        strangers = []
        for _ in range(100):
            stream = await trio.open_tcp_stream(besieged.control, 15012, local_address=source)
            strangers.append(stream)
        await still_serves(besieged)
        for stream in strangers:
            await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_garbage_on_the_page_costs_its_connection(besieged: Siege, name: str) -> None:
    answer = await exchange(besieged.control, 15014, BAD_REQUESTS[name])
    first = answer.partition(b"\r\n")[0]
    assert not answer or first.startswith(b"HTTP/1.1 ")
    assert not first.startswith(b"HTTP/1.1 500")
    assert besieged.mesh.control.running


# --- somebody who poses as the control plane


class Impostor:
    """A server of TLS with any certificate; what it was told."""

    def __init__(self, server: TlsContext) -> None:
        self.context = server
        self.connections = 0
        self.completed = 0
        self.heard = bytearray()

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        tls = TlsConnection(self.context, server=True)
        buffer = IoBuffer(64 * 1024)
        done = False
        async with stream:
            with contextlib.suppress(TlsError, trio.BrokenResourceError):
                while data := await stream.receive_some():
                    tls.receive_data(data)
                    if not done:
                        done = tls.handshake()
                        if done:
                            self.completed += 1
                            tls.write(frames.settings())
                    if done:
                        while nbytes := tls.read_into(buffer, 0, buffer.size):
                            self.heard += buffer.view[:nbytes]
                    while nbytes := tls.data_to_send_into(buffer):
                        await stream.send_all(bytes(buffer.view[:nbytes]))


def impostors(besieged: Siege) -> dict[str, TlsContext]:
    ca, other = besieged.ca(), TestCa()
    address = besieged.spare
    bundle = ca.bundle
    workload = besieged.hostile
    return {
        "a workload of the mesh": TlsContext.server(workload, "optional"),
        "a workload with the control plane's name in its path": TlsContext.server(
            ca.identity("istio-system", "istiod"), "optional"
        ),
        "a certificate for another address": TlsContext.server(
            ca.server("10.9.9.9").server_certificate(), "optional", bundles=bundle
        ),
        "a certificate for a name alone": TlsContext.server(
            ca.server("istiod.istio-system.svc").server_certificate(), "optional", bundles=bundle
        ),
        "another root": TlsContext.server(other.server(address).server_certificate(), "optional", bundles=bundle),
        "an expired one": TlsContext.server(
            ca.server(address, ttl=-10.0).server_certificate(), "optional", bundles=bundle
        ),
    }


IMPOSTORS = [
    "a workload of the mesh",
    "a workload with the control plane's name in its path",
    "a certificate for another address",
    "a certificate for a name alone",
    "another root",
    "an expired one",
]


@contextlib.asynccontextmanager
async def posing(besieged: Siege, name: str) -> AsyncIterator[Impostor]:
    """An impostor on the spare host; nothing may be said to it."""
    impostor = Impostor(impostors(besieged)[name])
    listener = await besieged.mesh.hosts["gamma"].listen(15012)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, impostor.serve, [listener])
        yield impostor
        nursery.cancel_scope.cancel()
    assert impostor.connections
    assert not impostor.heard


@pytest.mark.parametrize("name", IMPOSTORS)
async def test_nobody_passes_as_the_control_plane(besieged: Siege, name: str) -> None:
    roots = RootSource(
        str(besieged.mesh.directory / "state" / "root-cert.pem"), default=Path("nowhere"), variable="CA_ROOT_CA"
    )
    dial = grpc_dialer(ServerAddress(host=besieged.spare, port=15012), roots)
    async with posing(besieged, name):
        asking = CaClient(dial, lifetime=600, token=TokenSource(value=token(besieged, "--reusable")))
        with pytest.raises(ControlPlaneError):
            await asking.create(SpiffeId.istio("cluster.local", "shop", "mallory"), None)


async def test_a_ztunnel_tells_its_token_to_no_workload_that_poses_as_the_control_plane(
    besieged: Siege, tmp_path: Path
) -> None:
    async with posing(besieged, "a workload of the mesh") as impostor:
        url = f"https://{besieged.spare}:15012"
        victim = await besieged.mesh.add_ztunnel(
            "gamma",
            ("shop", "other", "other"),
            environment={"XDS_ADDRESS": url, "CA_ADDRESS": url, "ZTUNNEL_STATE_DIR": str(tmp_path / "state")},
            wait=False,
        )
        try:
            told = await victim.until_logged(error="certificate")
            assert told["level"] in ("warn", "error")
            assert besieged.spare in told["error"]
            assert impostor.connections
            status, body = await victim.http(15021, "/healthz/ready")
            assert (status, "state manager" in body) == (500, True)
        finally:
            await victim.stop()
        enroll = await trio.to_thread.run_sync(_enroll, besieged, tmp_path)
        assert enroll.returncode in (1, 2, 3)
        assert enroll.stderr.count("\n") == 1
        assert not list((tmp_path / "enrolled").glob("*.pem"))


def _enroll(besieged: Siege, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ztunnel", "enroll", "--server", besieged.spare, "--token-file", "-"],
        input=token(besieged, "--name", "other").split("'")[1],
        env={"ZTUNNEL_STATE_DIR": str(directory / "enrolled"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


async def test_after_all_this_the_process_is_as_it_was(besieged: Siege) -> None:
    """Runs last: nothing was logged as a fault of ours."""
    assert besieged.mesh.control.running
    text = besieged.mesh.control.log.read_text(errors="replace")
    assert "Traceback" not in text
    assert [record for record in besieged.mesh.control.records() if record.get("level") == "error"] == []
    for daemon in besieged.mesh.ztunnels.values():
        if daemon.running:
            status, _ = await daemon.http(15021, "/healthz/ready")
            assert status == 200
