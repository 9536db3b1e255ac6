"""What anybody can send to the authority: an error each, and no more."""

from __future__ import annotations

import base64
import datetime
from typing import TYPE_CHECKING, Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.miniistiod.test_ca import request_for
from tests.support.sizes import size

from hbone.errors import ConfigurationError
from hbone.grpc import GrpcError, StatusCode
from hbone.identity import SpiffeId
from miniistiod import auth, ca, issue_tokens, tokens
from miniistiod.authority import Authority
from miniistiod.callers import Callers
from miniistiod.catalog import Catalog
from miniistiod.certificates import CertificateService
from miniistiod.config import Config
from miniistiod.metrics import Metrics
from miniistiod.revocation import RevocationFeed
from miniistiod.store import Store
from ztunnel.wire import ca_pb2, discovery_pb2
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NOW = datetime.datetime.now(datetime.UTC)
MANY = settings(
    max_examples=size(4000, 300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

REQUESTS = [
    base64.b64decode("".join(request_for(key).splitlines()[1:-1]))
    for key in (
        ec.generate_private_key(ec.SECP256R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    )
]


def pem(der: bytes) -> str:
    text = base64.b64encode(der).decode()
    lines = "\n".join(text[start : start + 64] for start in range(0, len(text), 64))
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{lines}\n-----END CERTIFICATE REQUEST-----\n"


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A request with a few bytes changed, taken out or put in."""
    der = bytearray(draw(st.sampled_from(REQUESTS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(der) - 1))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            der[at] = draw(st.integers(0, 255))
        elif kind == 1:
            del der[at : at + draw(st.integers(1, 8))]
        elif kind == 2:
            der[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            del der[at:]
        if not der:
            break
    return pem(bytes(der))


@MANY
@given(damaged() | st.text(max_size=200) | st.binary(max_size=300).map(pem))
def test_requests(text: str) -> None:
    try:
        key = ca.parse_request(text)
    except ca.CertificateRequestError as error:
        assert len(str(error)) < 300  # noqa: PT017 - either is right
        return
    assert isinstance(key, ca.PublicKey)


@MANY
@given(
    st.text(max_size=300)
    | st.binary(max_size=300).map(lambda data: "enrol1." + base64.urlsafe_b64encode(data).decode())
)
def test_enrolment_tokens(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_enrolment_token(text)


HEAD = tokens._segment(tokens._HEADER)


@MANY
@given(
    st.text(max_size=200)
    | st.tuples(st.text(max_size=80), st.text(max_size=80)).map(lambda parts: ".".join((HEAD, *parts)))
)
def test_reusable_tokens(text: str) -> None:
    with pytest.raises(tokens.BadToken):
        tokens.verify_reusable(text, b"key", "cluster.local", 0.0)
    tokens.is_ours(text)
    tokens.split_secret(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@MANY
@given(st.dictionaries(st.sampled_from(["iss", "aud", "sub", "iat", "exp", "jti"]), JSON) | JSON)
def test_reusable_tokens_with_a_signature_of_ours(claims: Any) -> None:
    body = f"{HEAD}.{tokens._segment(claims)}"
    with pytest.raises(tokens.BadToken):
        tokens.verify_reusable(f"{body}.{tokens._signature(body, b'key')}", b"key", "cluster.local", 0.0)


# -- the service


class FakeTls:
    peer_chain: tuple[Any, ...] = ()


class FakeCall:
    """A call as it comes from gRPC, without a certificate."""

    tls = FakeTls()
    peer = None
    remote_address = ("192.0.2.1", 1)

    def __init__(self, message: bytes | None, metadata: list[tuple[str, str | bytes]]) -> None:
        self.message = message
        self.metadata = metadata
        self.sent: list[bytes] = []

    async def receive(self, max_bytes: int | None = None) -> bytes | None:
        await trio.lowlevel.checkpoint()
        return self.message

    async def send(self, message: bytes | Sequence[bytes], /) -> None:
        await trio.lowlevel.checkpoint()
        assert isinstance(message, bytes)
        self.sent.append(message)


class FakeMesh:
    snapshot = Catalog()

    async def enrolled(self, caller: auth.Caller) -> None:
        await trio.lowlevel.checkpoint()


class Service:
    def __init__(self, directory: Path) -> None:
        self.store = Store.create(directory / "state", "cluster.local", NOW)
        config = Config(config_dir=directory, state_dir=directory / "state")
        metrics = Metrics()
        callers = Callers(auth.Authenticator(self.store), metrics)
        callers.limit_anonymous = lambda call: None  # type: ignore[method-assign]  # it would be all that is tested
        mesh: Any = FakeMesh()
        self.create = CertificateService(config, Authority(self.store), mesh, callers, metrics).create
        self.token = issue_tokens.create(
            self.store, namespace="a", service_account="b", name=None, lifetime=None, reusable=True, now=NOW.timestamp()
        ).text


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.store.close()


VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=30) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
GOOD = request_for(ec.generate_private_key(ec.SECP256R1()))


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    message = ca_pb2.IstioCertificateRequest(
        csr=draw(damaged() | st.just(GOOD)), validity_duration=draw(st.integers(-(2**63), 2**63 - 1))
    )
    message.metadata.update(
        draw(st.dictionaries(st.sampled_from(["ImpersonatedIdentity", "CertSigner", "x"]), VALUES, max_size=3))
    )
    data = message.SerializeToString()
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@settings(max_examples=size(2000, 100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    message=messages() | st.binary(max_size=200) | st.none(),
    metadata=st.lists(
        st.tuples(
            st.sampled_from(["authorization", "clusterid", "x-bin"]),
            st.text(max_size=80) | st.text(max_size=60).map(lambda text: f"Bearer {text}") | st.binary(max_size=60),
        ),
        max_size=3,
    )
    | st.just(None),
)
def test_calls(service: Service, message: bytes | None, metadata: list[tuple[str, str | bytes]] | None) -> None:
    known = metadata is None
    call = FakeCall(message, [("authorization", f"Bearer {service.token}")] if metadata is None else metadata)
    before = len(service.store.certificates(0.0))
    try:
        trio.run(service.create, call)
    except GrpcError as error:
        assert error.code in (  # noqa: PT017 - either is right
            StatusCode.INVALID_ARGUMENT,
            StatusCode.UNAUTHENTICATED,
            StatusCode.RESOURCE_EXHAUSTED,
        )
        assert not call.sent
        return
    assert known
    issued = service.store.certificates(0.0)
    assert len(issued) == before + 1
    assert {item.spiffe_id for item in issued} == {str(SpiffeId.istio("cluster.local", "a", "b"))}


@MANY
@given(
    st.dictionaries(st.text(max_size=10), st.text(max_size=20), max_size=3), st.lists(st.text(max_size=20), max_size=3)
)
def test_requests_for_revocations(versions: dict[str, str], names: list[str]) -> None:
    feed = RevocationFeed(stream="s")
    message = discovery_pb2.DeltaDiscoveryRequest(initial_resource_versions=versions, resource_names_subscribe=names)
    feed.request(message)
    assert feed.take(None) is not None
    assert feed.take(None) is None
