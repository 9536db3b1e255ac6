from __future__ import annotations

import base64
import datetime
from typing import Any

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hbone.errors import IdentityError
from hbone.identity import SpiffeId
from hbone.identity.svid import svid_id
from miniistiod import ca

NOW = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
ORDERS = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/orders")
DAY = datetime.timedelta(days=1)


def request_for(key: Any, **names: Any) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for extension in names.values():
        builder = builder.add_extension(extension, critical=True)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def root() -> ca.Signer:
    return ca.make_root("cluster.local", NOW)


@pytest.fixture(scope="module")
def leaf(root: ca.Signer) -> x509.Certificate:
    return ca.issue(root, ca.parse_request(request_for(p256())), ORDERS, DAY, NOW)


def test_root_is_a_ca_of_ten_years(root: ca.Signer) -> None:
    certificate = root.certificate
    assert certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert not usage.value.digital_signature
    assert certificate.not_valid_after_utc == NOW + datetime.timedelta(days=3650)
    assert certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "cluster.local"
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


def test_a_signer_is_read_back_from_the_state(root: ca.Signer) -> None:
    again = ca.Signer.from_pem(ca.certificate_pem(root.certificate).encode(), root.key_pem())
    assert again.certificate == root.certificate
    assert "key" not in repr(again)


def test_profile_of_a_leaf(root: ca.Signer, leaf: x509.Certificate) -> None:
    leaf.verify_directly_issued_by(root.certificate)
    assert svid_id(leaf) == ORDERS
    assert leaf.version is x509.Version.v3
    assert list(leaf.subject) == []
    assert [(item.oid.dotted_string, item.critical) for item in leaf.extensions] == [
        ("2.5.29.15", True),
        ("2.5.29.37", False),
        ("2.5.29.19", True),
        ("2.5.29.35", False),
        ("2.5.29.17", True),
    ]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [type(name) for name in names] == [x509.UniformResourceIdentifier]
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.digital_signature, usage.key_encipherment, usage.key_cert_sign) == (True, True, False)
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


def test_serials_differ_and_have_128_bits(root: ca.Signer) -> None:
    key = p256().public_key()
    serials = [ca.issue(root, key, ORDERS, DAY, NOW).serial_number for _ in range(50)]
    assert len(set(serials)) == 50
    assert max(serial.bit_length() for serial in serials) > 120
    assert all(0 < serial < 1 << 128 for serial in serials)


@pytest.mark.parametrize(
    ("lifetime", "backdate"), [(86_400, 120), (1200, 120), (600, 60), (60, 6), (10, 1), (4, 0.4), (1, 0.1)]
)
def test_backdate_is_two_minutes_or_a_tenth(root: ca.Signer, lifetime: float, backdate: float) -> None:
    leaf = ca.issue(root, p256().public_key(), ORDERS, datetime.timedelta(seconds=lifetime), NOW)
    earliest = NOW - datetime.timedelta(seconds=backdate)
    assert leaf.not_valid_before_utc == earliest.replace(microsecond=0)
    assert leaf.not_valid_after_utc == NOW + datetime.timedelta(seconds=lifetime)


def test_a_part_of_a_second_does_not_shorten_a_leaf(root: ca.Signer) -> None:
    now = NOW + datetime.timedelta(microseconds=900_000)
    leaf = ca.issue(root, p256().public_key(), ORDERS, datetime.timedelta(seconds=2), now)
    assert leaf.not_valid_after_utc - now >= datetime.timedelta(seconds=2)


def test_a_leaf_never_outlives_its_root() -> None:
    root = ca.make_root("cluster.local", NOW - datetime.timedelta(days=3649, hours=20))
    leaf = ca.issue(root, p256().public_key(), ORDERS, 90 * DAY, NOW)
    assert leaf.not_valid_after_utc == root.certificate.not_valid_after_utc


def test_an_expired_root_signs_nothing() -> None:
    root = ca.make_root("cluster.local", NOW - datetime.timedelta(days=3651))
    with pytest.raises(ca.SigningError, match="expired at 2026"):
        ca.issue(root, p256().public_key(), ORDERS, DAY, NOW)


@pytest.mark.parametrize("seconds", [0, -1, -(2**63)])
def test_no_lifetime_means_the_default(seconds: int) -> None:
    assert ca.lifetime_for(seconds) == DAY


def test_lifetimes_up_to_ninety_days_are_as_requested() -> None:
    assert ca.lifetime_for(7_776_000) == 90 * DAY
    assert ca.lifetime_for(1) == datetime.timedelta(seconds=1)
    for seconds in (7_776_001, 2**63 - 1):
        with pytest.raises(ca.LifetimeError, match="greater than the max allowed TTL 7776000s"):
            ca.lifetime_for(seconds)


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "ed25519", "rsa2048"],
)
def test_allowed_keys_are_taken(key: Any) -> None:
    assert ca.parse_request(request_for(key)) == key.public_key()


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (rsa.generate_private_key(65537, 1024), "1024 bits"),
        (rsa.generate_private_key(3, 2048), "exponent 65537"),
        (ec.generate_private_key(ec.SECP521R1()), "secp521r1"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (dsa.generate_private_key(1024), "kind of key"),
    ],
    ids=["rsa1024", "exponent", "p521", "k1", "dsa"],
)
def test_other_keys_are_refused(key: Any, why: str) -> None:
    with pytest.raises(ca.CertificateRequestError, match=why):
        ca.parse_request(request_for(key))


def test_names_and_extensions_of_a_request_are_left_unread(root: ca.Signer) -> None:
    pem = request_for(
        p256(),
        names=x509.SubjectAlternativeName([x509.DNSName("istiod.istio-system.svc"), x509.DNSName("a")]),
        constraints=x509.BasicConstraints(ca=True, path_length=None),
    )
    leaf = ca.issue(root, ca.parse_request(pem), ORDERS, DAY, NOW)
    assert svid_id(leaf) == ORDERS
    assert not leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    )


def test_a_request_signed_by_another_key_is_refused() -> None:
    mine, other = request_for(p256()), request_for(p256())
    first, second = (x509.load_pem_x509_csr(pem.encode()) for pem in (mine, other))
    der = first.public_bytes(serialization.Encoding.DER)
    forged = der.replace(first.signature, second.signature[: len(first.signature)].ljust(len(first.signature), b"\0"))
    pem = (
        "-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(forged).decode()
        + "-----END CERTIFICATE REQUEST-----\n"
    )
    with pytest.raises(ca.CertificateRequestError):
        ca.parse_request(pem)


@pytest.mark.parametrize("pem", ["", "nonsense", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END X-----", "é"])
def test_what_is_no_request_is_refused(pem: str) -> None:
    with pytest.raises(ca.CertificateRequestError, match="not properly encoded"):
        ca.parse_request(pem)


def test_a_huge_request_is_refused_unread() -> None:
    with pytest.raises(ca.CertificateRequestError, match="over the limit"):
        ca.parse_request("x" * 100_000)


def test_the_control_planes_certificate_is_no_svid(root: ca.Signer) -> None:
    names = ["mesh.example.com", "10.0.0.1", "::1", "localhost", "localhost"]
    server = ca.issue_server(root, p256().public_key(), names, NOW, 30 * DAY)
    found = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.DNSName) == ["mesh.example.com", "localhost"]
    assert [str(address) for address in found.get_values_for_type(x509.IPAddress)] == ["10.0.0.1", "::1"]
    assert list(server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    with pytest.raises(IdentityError):
        svid_id(server)


def test_order_of_the_answer(root: ca.Signer, leaf: x509.Certificate) -> None:
    chain = ca.response_chain(leaf, root, [root.certificate])
    assert [len(x509.load_pem_x509_certificates(item.encode())) for item in chain] == [1, 1]
    assert all(item.endswith("\n") for item in chain)
    other = ca.make_root("cluster.local", NOW)
    chain = ca.response_chain(leaf, root, [root.certificate, other.certificate])
    assert [len(x509.load_pem_x509_certificates(item.encode())) for item in chain] == [1, 2]
    middle = attrs.evolve(other, issuers=(root.certificate,))
    chain = ca.response_chain(leaf, middle, [root.certificate])
    assert x509.load_pem_x509_certificate(chain[1].encode()) == other.certificate
    assert [len(x509.load_pem_x509_certificates(item.encode())) for item in chain] == [1, 1, 1]


def test_a_request_of_an_unknown_version_is_refused() -> None:
    der = base64.b64decode("".join(request_for(p256()).splitlines()[1:-1]))
    at = der.index(b"\x02\x01\x00")  # INTEGER 0
    damaged = base64.b64encode(der[:at] + b"\x02\x01\x01" + der[at + 3 :]).decode()
    with pytest.raises(ca.CertificateRequestError, match="not properly encoded"):
        ca.parse_request(f"-----BEGIN CERTIFICATE REQUEST-----\n{damaged}\n-----END CERTIFICATE REQUEST-----\n")


def test_a_list_of_what_was_revoked(root: ca.Signer) -> None:
    crl = ca.make_crl(root, [(7, NOW.timestamp()), (1 << 127, NOW.timestamp() - 5)], number=3, now=NOW)
    assert crl.is_signature_valid(root.certificate.public_key())  # type: ignore[arg-type]  # it is a P-256 key
    assert [item.serial_number for item in crl] == [7, 1 << 127]
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3
    assert crl.next_update_utc == NOW + datetime.timedelta(days=7)
    assert crl.issuer == root.certificate.subject


@pytest.mark.parametrize(
    ("key", "digest"),
    [
        (ec.generate_private_key(ec.SECP384R1()), hashes.SHA384),
        (rsa.generate_private_key(65537, 2048), hashes.SHA256),
        (ed25519.Ed25519PrivateKey.generate(), None),
    ],
    ids=["P-384", "RSA", "Ed25519"],
)
def test_signing_keys_of_every_kind(root: ca.Signer, key: ca.SigningKey, digest: Any) -> None:
    builder = (
        x509.CertificateBuilder()
        .serial_number(5)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "middle")]))
        .issuer_name(root.certificate.subject)
        .public_key(key.public_key())
        .not_valid_before(NOW)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    middle = ca.Signer(builder.sign(root.key, hashes.SHA256()), key, (root.certificate,))
    leaf = ca.issue(middle, ca.parse_request(request_for(p256())), ORDERS, 2 * DAY, NOW)
    leaf.verify_directly_issued_by(middle.certificate)
    assert leaf.not_valid_after_utc == NOW + DAY  # not beyond what signed it
    found = leaf.signature_hash_algorithm
    assert found is None if digest is None else isinstance(found, digest)
    assert ca.make_crl(middle, [(1, NOW.timestamp())], number=1, now=NOW).is_signature_valid(key.public_key())
    assert (
        ca.Signer.from_pem(ca.certificate_pem(middle.certificate).encode(), middle.key_pem()).root == middle.certificate
    )
