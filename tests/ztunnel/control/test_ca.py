from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.control_plane import START, Authority, ScriptedControlPlane, utc, wall

from hbone.grpc import GrpcError, StatusCode
from hbone.identity import SpiffeId
from ztunnel.control.ca import CREATE_CERTIFICATE, CaClient, make_csr, read_answer
from ztunnel.control.transport import ControlPlaneError, TokenSource
from ztunnel.wire import ca_pb2

if TYPE_CHECKING:
    import datetime
    from pathlib import Path

    from hbone.identity import Identity

ME = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
OTHER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/cart")
NOW = utc(START)
CA = Authority()


def signed(key: ec.EllipticCurvePrivateKey, *uris: str, lifetime: float = 3600, at: float = START) -> str:
    return CA.leaf(key.public_key(), uris or (str(ME),), lifetime=lifetime, at=at)


def read(chain: list[str], key: ec.EllipticCurvePrivateKey, now: datetime.datetime = NOW) -> Identity:
    return read_answer(chain, key, ME, now=now)


def test_csr_has_empty_subject_and_one_critical_uri() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.load_pem_x509_csr(make_csr(key, ME).encode())
    assert csr.is_signature_valid
    assert not list(csr.subject)
    assert csr.public_key() == key.public_key()
    (extension,) = csr.extensions
    assert extension.critical
    assert isinstance(extension.value, x509.SubjectAlternativeName)
    assert extension.value.get_values_for_type(x509.UniformResourceIdentifier) == [str(ME)]
    assert len(list(extension.value)) == 1


def test_answer_becomes_identity_with_its_roots() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    identity = read([signed(key), CA.root_pem], key)
    assert identity.svid.id == ME
    assert identity.bundles["cluster.local"].roots == (CA.root,)


def test_all_roots_of_the_last_element_are_taken_and_a_broken_one_is_only_a_warning() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    other = Authority(name="next root")
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    warnings: list[str] = []
    chain = [signed(key), other.root_pem + broken + CA.root_pem]
    identity = read_answer(chain, key, ME, now=NOW, warn=warnings.append)
    assert identity.bundles["cluster.local"].roots == (other.root, CA.root)
    assert len(warnings) == 1


KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        ([], "answer is empty"),
        ([signed(KEY)], "no root"),
        (["garbage", CA.root_pem], "no PEM certificate"),
        (["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----", CA.root_pem], "cannot be read"),
        ([signed(KEY), "garbage"], "no usable root"),
        ([signed(KEY), "garbage", CA.root_pem], "intermediate"),
        ([signed(KEY, str(OTHER)), CA.root_pem], "we asked for spiffe://cluster.local/ns/shop/sa/web"),
        ([signed(KEY, str(ME), str(OTHER)), CA.root_pem], "2 URI names"),
        ([signed(KEY, "https://example.com/"), CA.root_pem], "not a SPIFFE ID"),
        ([signed(ec.generate_private_key(ec.SECP256R1())), CA.root_pem], "does not belong"),
        ([signed(KEY), Authority(name="stranger").root_pem], "does not end in any of the roots"),
        ([signed(KEY, lifetime=60, at=START - 3600), CA.root_pem], "expired"),
        ([signed(KEY, at=START + 3600), CA.root_pem], "not valid before"),
        ([CA.root_pem, CA.root_pem], "CA certificate"),
        ([signed(KEY)] + [CA.root_pem] * 20, "at most 16"),
    ],
)
def test_unusable_answer_is_refused_with_a_reason(chain: list[str], words: str) -> None:
    with pytest.raises(ControlPlaneError, match=words):
        read(chain, KEY)


async def test_token_file_is_read_for_every_request_and_trimmed(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    control = ScriptedControlPlane()
    control.sign_with(CA)
    client = CaClient(
        control.dial,
        lifetime=7200,
        token=TokenSource(path=token),
        cluster_id="c1",
        headers=[("X-Extra", "1")],
        wall=wall,
    )
    await client.create(ME, None)
    token.write_text("second\n")
    identity = await client.create(ME, None)
    path, raw, metadata = control.requests[0]
    assert path == CREATE_CERTIFICATE
    assert metadata == (("authorization", "Bearer first"), ("clusterid", "c1"), ("x-extra", "1"))
    assert dict(control.requests[1][2])["authorization"] == "Bearer second"
    request = ca_pb2.IstioCertificateRequest.FromString(raw)
    assert request.validity_duration == 7200
    assert not request.HasField("metadata")
    assert identity.svid.id == ME
    assert control.presented == [None, None]


async def test_without_token_a_valid_certificate_is_presented_and_an_expired_one_is_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    control = ScriptedControlPlane()
    control.sign_with(CA, lifetime=60)
    client = CaClient(control.dial, lifetime=60, wall=wall)
    first = await client.create(ME, None)
    await client.create(ME, first)
    await trio.sleep(61)
    await client.create(ME, first)
    assert control.presented == [None, first, None]
    assert control.requests[0][2] == ()


async def test_each_request_has_a_key_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    control = ScriptedControlPlane()
    control.sign_with(CA)
    client = CaClient(control.dial, lifetime=60, wall=wall)
    first, second = await client.create(ME, None), await client.create(ME, None)
    assert first.svid.key.public_key() != second.svid.key.public_key()


async def test_ca_that_refuses_is_named_with_its_reason(autojump_clock: trio.testing.MockClock) -> None:
    control = ScriptedControlPlane()

    def refuse(_: bytes) -> bytes:
        raise GrpcError(StatusCode.UNAUTHENTICATED, "authentication failure")

    control.on_unary = refuse
    with pytest.raises(ControlPlaneError, match=r"UNAUTHENTICATED: authentication failure.* run 'ztunnel enroll'"):
        await CaClient(control.dial, lifetime=60, wall=wall).create(ME, None)
    with pytest.raises(ControlPlaneError, match=r"UNAUTHENTICATED: authentication failure$"):
        await CaClient(control.dial, lifetime=60, wall=wall, token=TokenSource(value="t")).create(ME, None)


async def test_ca_that_hangs_is_given_up_after_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    control = ScriptedControlPlane()
    control.hangs = True
    with pytest.raises(ControlPlaneError, match="within 10 s"):
        await CaClient(control.dial, lifetime=60, wall=wall).create(ME, None)
    assert trio.current_time() == pytest.approx(10)


@pytest.mark.parametrize(
    "error", [OSError("connection refused"), trio.BrokenResourceError("gone"), ControlPlaneError("not trusted")]
)
async def test_lost_connection_is_an_error_of_the_control_plane(
    autojump_clock: trio.testing.MockClock, error: Exception
) -> None:
    control = ScriptedControlPlane()
    control.dial_error = error
    with pytest.raises(ControlPlaneError, match=str(error)):
        await CaClient(control.dial, lifetime=60, wall=wall).create(ME, None)


async def test_garbage_instead_of_an_answer_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    control = ScriptedControlPlane()
    control.on_unary = lambda _: b"\xff\xff\xff"
    with pytest.raises(ControlPlaneError, match="no IstioCertificateResponse"):
        await CaClient(control.dial, lifetime=60, wall=wall).create(ME, None)
