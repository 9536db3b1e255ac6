"""SVIDs, bundles, and the sources that a program gets them from."""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hbone.errors import IdentityError
from hbone.identity import FileSource, Identity, ServerCertificate, StaticSource, TrustBundle, TrustBundles, X509Svid
from hbone.testing.ca import WRONG_SVIDS, TestCa

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from hbone.identity import IdentitySource

CA = TestCa()
BY_DATE = ("expired", "not yet valid")  # judged when it is used, against a clock
BY_BUNDLE = ("another trust domain",)


# SVIDs


@pytest.mark.parametrize("key", ["p256", "p384", "ed25519", "rsa2048"])
def test_an_svid_survives_pem(key: str) -> None:
    svid = CA.svid("shop", "orders", key=key)
    again = X509Svid.from_pem(*svid.to_pem())
    assert again.id == svid.id == CA.id("shop", "orders")
    assert again.chain == svid.chain
    assert again.serial == svid.leaf.serial_number


def test_half_life_is_in_the_middle() -> None:
    svid = CA.svid("shop", "orders", ttl=3600, backdate=60)
    assert svid.expires_at - svid.half_life() == svid.half_life() - svid.not_before == datetime.timedelta(seconds=1830)


@pytest.mark.parametrize("kind", [kind for kind in WRONG_SVIDS if kind not in BY_DATE + BY_BUNDLE])
def test_a_certificate_that_breaks_a_rule_is_no_svid(kind: str) -> None:
    with pytest.raises(IdentityError, match=r"not an X\.509-SVID"):
        CA.wrong(kind).svid()


def test_the_key_of_another_certificate_is_refused() -> None:
    with pytest.raises(IdentityError, match="private key does not belong"):
        X509Svid.from_pem(CA.svid("a", "b").to_pem()[0], CA.svid("a", "b").to_pem()[1])


def test_a_certificate_for_another_id_is_refused() -> None:
    svid = CA.svid("a", "b")
    with pytest.raises(IdentityError, match=r"is for spiffe://cluster\.local/ns/a/sa/b, not for"):
        X509Svid(CA.id("a", "c"), svid.chain, svid.key)


def test_a_root_in_the_chain_is_left_out() -> None:
    issued = CA.intermediate().issue(uris=[str(CA.id("a", "b"))])
    svid = X509Svid.from_pem(issued.cert_pem + CA.root_pem, issued.key_pem)
    assert svid.chain == issued.chain
    assert len(svid.chain) == 2


def test_a_chain_out_of_order_is_refused() -> None:
    issued = CA.intermediate("one").intermediate("two").issue(uris=[str(CA.id("a", "b"))])
    leaf, two, one = issued.chain
    with pytest.raises(IdentityError, match="certificate 2 of the chain did not sign certificate 1"):
        X509Svid(CA.id("a", "b"), (leaf, one, two), issued.key)


def test_a_chain_has_an_end() -> None:
    signer = CA
    for number in range(10):
        signer = signer.intermediate(f"number {number}")
    with pytest.raises(IdentityError, match="11 certificates; at most 10"):
        signer.svid("a", "b")


def test_a_key_stays_out_of_every_representation() -> None:
    svid = CA.svid("a", "b")
    identity = Identity(svid, CA.bundle)
    server = CA.server("localhost").server_certificate()
    for shown in (repr(svid), repr(identity), repr(server), str(identity)):
        assert "PrivateKey" not in shown
        assert "PRIVATE" not in shown


@pytest.mark.parametrize(
    ("pem", "why"),
    [
        (b"", "cannot be parsed"),
        (b"nothing", "cannot be parsed"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "cannot be parsed"),
        (
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            ),
            "is encrypted",
        ),
        (
            rsa.generate_private_key(65537, 1024).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            "is not usable",
        ),
    ],
)
def test_a_useless_key_is_named_and_not_quoted(pem: bytes, why: str) -> None:
    with pytest.raises(IdentityError, match=why) as caught:
        X509Svid.from_pem(CA.svid("a", "b").to_pem()[0], pem)
    assert "AAAA" not in str(caught.value)


@pytest.mark.parametrize(
    "pem",
    [b"", b"nothing", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "-----BEGIN CERTIFICATE-----"],
)
def test_a_useless_certificate_is_refused(pem: str | bytes) -> None:
    with pytest.raises(IdentityError):
        X509Svid.from_pem(pem, CA.svid("a", "b").to_pem()[1])


def test_a_server_certificate_needs_no_id() -> None:
    issued = CA.server("istiod.example", "10.0.0.1")
    server = ServerCertificate.from_pem(issued.cert_pem, issued.key_pem)
    assert server.expires_at == issued.leaf.not_valid_after_utc
    with pytest.raises(IdentityError, match="does not belong"):
        ServerCertificate.from_pem(issued.cert_pem, CA.server("istiod.example").key_pem)


# Bundles


def test_a_bundle_survives_pem_and_drops_repetition() -> None:
    bundle = TrustBundle.from_pem("cluster.local", CA.root_pem + CA.root_pem)
    assert bundle.roots == (CA.root,)
    assert TrustBundle.from_pem("cluster.local", bundle.to_pem()).roots == bundle.roots


def test_a_bundle_holds_roots_only() -> None:
    with pytest.raises(IdentityError, match="is not a CA"):
        TrustBundle("cluster.local", (CA.svid("a", "b").leaf,))
    with pytest.raises(IdentityError, match="is an intermediate, not a root"):
        TrustBundle("cluster.local", (CA.intermediate().certificate,))
    with pytest.raises(IdentityError, match="malformed"):
        TrustBundle("Cluster.local", (CA.root,))


def test_a_bundle_may_be_empty_and_then_believes_nobody() -> None:
    assert TrustBundle("cluster.local", ()).roots == ()


def test_bundles_go_by_their_own_trust_domain() -> None:
    bundles = TrustBundles([CA.bundle, TestCa("b").bundle])
    assert set(bundles) == {"cluster.local", "b"}
    assert TrustBundles(dict(bundles)).keys() == bundles.keys()
    with pytest.raises(IdentityError, match="listed under 'b'"):
        TrustBundles({"b": CA.bundle})


def test_each_identity_has_a_greater_version() -> None:
    first, second = CA.identity("a", "b"), CA.identity("a", "b")
    assert second.version > first.version


# Sources


def test_a_static_source_tells_of_each_rotation_until_unsubscribed() -> None:
    source = StaticSource(CA.svid("a", "b"), CA.bundle)
    checked: IdentitySource = source
    seen: list[Identity] = []
    end = checked.subscribe(seen.append)
    first = source.current()
    second = source.rotate(CA.svid("a", "b"))
    assert source.current() is second
    assert second.bundles == first.bundles
    end()
    end()
    source.rotate(CA.svid("a", "b"), [CA.bundle, TestCa("other").bundle])
    assert seen == [second]
    assert set(source.current().bundles) == {"cluster.local", "other"}


class Files:
    """cert.pem, key.pem, roots.pem in a directory; each write looks older than the last, so none is racy."""

    def __init__(self, directory: Path, ca: TestCa = CA) -> None:
        self.directory = directory
        self.ca = ca
        self.writes = 0
        self.write_svid(ca.svid("a", "b"))
        self.write("roots", ca.root_pem)

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def write(self, name: str, data: bytes) -> None:
        self.path(name).write_bytes(data)
        self.writes += 1
        os.utime(self.path(name), (1_000_000 + self.writes, 1_000_000 + self.writes))

    def write_svid(self, svid: X509Svid) -> None:
        cert, key = svid.to_pem()
        self.write("cert", cert)
        self.write("key", key)

    def source(self, bundles: Mapping[str, Path] | None = None) -> FileSource:
        roots = self.path("roots") if bundles is None else None
        return FileSource(self.path("cert"), self.path("key"), roots, bundles=bundles)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_files_give_an_identity(files: Files) -> None:
    source = files.source()
    identity = source.current()
    assert identity.id == CA.id("a", "b")
    assert identity.bundles["cluster.local"].roots == (CA.root,)
    assert source.current() is identity
    assert source.error is None


def test_changed_files_are_read_again_and_told(files: Files) -> None:
    source = files.source()
    seen: list[Identity] = []
    source.subscribe(seen.append)
    before = source.current()
    files.write_svid(CA.svid("a", "b"))
    after = source.current()
    assert after.svid.serial != before.svid.serial
    assert seen == [after]
    assert source.current() is after


def test_files_touched_without_a_change_keep_the_identity(files: Files) -> None:
    source = files.source()
    before = source.current()
    files.write("cert", files.path("cert").read_bytes())
    assert source.current() is before


def test_a_file_replaced_by_rename_is_seen_with_the_same_time_and_size(files: Files) -> None:
    source = files.source()
    status = files.path("roots").stat()
    other = files.directory / "new"
    other.write_bytes(CA.root_pem.rstrip(b"\n") + b" ")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    before = source.current()
    other.rename(files.path("roots"))
    assert source.current() is not before


def test_a_file_written_just_now_is_not_taken_for_unchanged(tmp_path: Path) -> None:
    files = Files(tmp_path)
    moment = datetime.datetime.now(datetime.UTC).timestamp()
    for name in ("cert", "key", "roots"):
        os.utime(files.path(name), (moment, moment))
    source = FileSource(files.path("cert"), files.path("key"), files.path("roots"), now=lambda: moment)
    before = source.current()
    # The same length within the same tick of the file system's clock.
    files.path("roots").write_bytes(CA.root_pem[:-1] + b" ")
    os.utime(files.path("roots"), (moment, moment))
    assert source.current() is not before


@pytest.mark.parametrize("broken", ["cert", "key", "roots"])
def test_a_bad_write_keeps_the_last_good_and_says_why(files: Files, broken: str) -> None:
    source = files.source()
    good = source.current()
    before = files.path(broken).read_bytes()
    files.write(broken, b"half a fi")
    assert source.current() is good
    assert str(files.path(broken)) in str(source.error)
    files.write(broken, before)
    assert source.current().svid.serial == good.svid.serial
    assert source.error is None


def test_a_half_written_pair_keeps_the_last_good(files: Files) -> None:
    source = files.source()
    good = source.current()
    fresh = CA.svid("a", "b")
    cert, key = fresh.to_pem()
    files.write("cert", cert)
    assert source.current() is good
    assert "does not belong" in str(source.error)
    files.write("key", key)
    assert source.current().svid.serial == fresh.serial
    assert source.error is None


def test_a_vanished_file_keeps_the_last_good(files: Files) -> None:
    source = files.source()
    good = source.current()
    files.path("key").unlink()
    assert source.current() is good
    assert "key.pem cannot be read: No such file" in str(source.error)


def test_a_missing_file_is_refused_at_first(files: Files) -> None:
    files.path("roots").unlink()
    with pytest.raises(IdentityError, match=r"roots\.pem cannot be read: No such file or directory"):
        files.source()


def test_an_expired_certificate_is_refused(files: Files) -> None:
    files.write_svid(CA.svid("a", "b", ttl=-10))
    with pytest.raises(IdentityError, match=r"cert\.pem holds the certificate of .*it expired at"):
        files.source()


def test_expired_roots_are_passed_over_and_refused_when_alone(files: Files) -> None:
    dead = TestCa(ttl=-10)
    files.write("roots", dead.root_pem + CA.root_pem)
    assert files.source().current().bundles["cluster.local"].roots == (CA.root,)
    files.write("roots", dead.root_pem)
    with pytest.raises(IdentityError, match=r"none of the roots in .*roots\.pem is valid now: it expired"):
        files.source()


def test_roots_that_did_not_sign_our_certificate_are_refused(files: Files) -> None:
    files.write("roots", TestCa().root_pem)
    with pytest.raises(IdentityError, match=r"cert\.pem was signed by .*none of the roots in .*roots\.pem"):
        files.source()


def test_bundles_are_files_by_trust_domain(files: Files) -> None:
    other = TestCa("other.example")
    files.write("other", other.root_pem)
    bundles = {"cluster.local": files.path("roots"), "other.example": files.path("other")}
    identity = files.source(bundles).current()
    assert identity.bundles["other.example"].roots == (other.root,)


def test_whom_to_believe_has_no_default(files: Files) -> None:
    cert, key, roots = files.path("cert"), files.path("key"), files.path("roots")
    with pytest.raises(IdentityError, match="no default"):
        FileSource(cert, key)
    with pytest.raises(IdentityError, match="no default"):
        FileSource(cert, key, bundles={})
    with pytest.raises(IdentityError, match="no default"):
        FileSource(cert, key, roots, bundles={"cluster.local": roots})
