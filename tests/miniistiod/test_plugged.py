"""A CA in files: what holds together, what is refused, and what happens when the files change."""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from tests.support.callers import certificate, dial, refusal
from tests.support.miniistiod import CREATE_CERTIFICATE, Applicant, bearer, control_plane

from hbone.errors import ConfigurationError, IdentityError
from hbone.grpc import StatusCode
from miniistiod import ca, cli, plugged
from miniistiod.plugged import CaDirectory, read_ca
from miniistiod.store import CRL_FILE, ROOT_FILE, Store
from ztunnel.wire import ca_pb2

if TYPE_CHECKING:
    from pathlib import Path

    import miniistiod

NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
DAY = datetime.timedelta(days=1)


def make_ca(
    name: str,
    issuer: ca.Signer | None = None,
    *,
    key: ca.SigningKey | None = None,
    path_length: int | None = None,
    begin: datetime.datetime = NOW - DAY,
    end: datetime.datetime = NOW + 300 * DAY,
    is_ca: bool = True,
    crl_sign: bool = True,
) -> ca.Signer:
    """A root, or with `issuer` an intermediate."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=path_length if is_ca else None), critical=True)
        .add_extension(ca._usage(key_cert_sign=True, crl_sign=crl_sign), critical=True)
        .sign(key if issuer is None else issuer.key, _digest(key if issuer is None else issuer.key))
    )
    return ca.Signer(certificate, key, () if issuer is None else (issuer.certificate, *issuer.issuers))


def _digest(key: Any) -> Any:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def pem(*certificates: x509.Certificate) -> bytes:
    return "".join(ca.certificate_pem(item) for item in certificates).encode()


def files_of(signer: ca.Signer, *roots: x509.Certificate) -> dict[str, bytes]:
    return {
        "ca-cert.pem": pem(signer.certificate),
        "ca-key.pem": signer.key_pem(),
        "cert-chain.pem": pem(signer.certificate, *signer.issuers[:-1]),
        "root-cert.pem": pem(*(roots or (signer.root,))),
    }


def write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(mode=0o700, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600)
    return directory


ROOT = make_ca("root")
MIDDLE = make_ca("middle", ROOT)
LOW = make_ca("low", MIDDLE)
OTHER = make_ca("other")


@pytest.mark.parametrize(
    ("signer", "above"), [(ROOT, 0), (MIDDLE, 1), (LOW, 2)], ids=["root", "intermediate", "two intermediates"]
)
def test_chains_of_any_length(signer: ca.Signer, above: int) -> None:
    found = read_ca(files_of(signer), "cluster.local", NOW)
    assert found.signer.issuers == signer.issuers
    assert len(found.signer.issuers) == above
    assert found.roots == (ROOT.certificate,)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf = ca.issue(found.signer, key, _orders(), DAY, NOW)
    chain = ca.response_chain(leaf, found.signer, found.roots)
    assert [len(x509.load_pem_x509_certificates(item.encode())) for item in chain] == [1] * (above + 2)
    assert x509.load_pem_x509_certificate(chain[-1].encode()) == ROOT.certificate


def _orders() -> Any:
    from hbone.identity import SpiffeId

    return SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/orders")


@pytest.mark.parametrize(
    "key",
    [
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["RSA", "P-384", "Ed25519"],
)
def test_keys_of_any_kind(key: ca.SigningKey) -> None:
    signer = make_ca("middle", ROOT, key=key)
    assert read_ca(files_of(signer), "cluster.local", NOW).signer.certificate == signer.certificate


def test_the_forms_that_openssl_writes_are_read() -> None:
    files = files_of(MIDDLE)
    assert isinstance(MIDDLE.key, ec.EllipticCurvePrivateKey)
    files["ca-key.pem"] = MIDDLE.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    files["cert-chain.pem"] = b"subject=CN = middle\n" + pem(ROOT.certificate, MIDDLE.certificate)
    assert read_ca(files, "cluster.local", NOW).signer.issuers == (ROOT.certificate,)
    files["cert-chain.pem"] = b"\n"
    assert read_ca(files, "cluster.local", NOW).signer.issuers == (ROOT.certificate,)


WRONG: list[tuple[str, dict[str, bytes], str]] = [
    ("key", {**files_of(MIDDLE), "ca-key.pem": OTHER.key_pem()}, "ca-key.pem does not belong to ca-cert.pem"),
    ("no key", {**files_of(MIDDLE), "ca-key.pem": b"x"}, "ca-key.pem cannot be parsed"),
    ("chain", {**files_of(LOW), "cert-chain.pem": pem(LOW.certificate)}, "does not lead to a root"),
    ("root", files_of(MIDDLE, OTHER.certificate), "does not lead to a root"),
    ("no root", {**files_of(MIDDLE), "root-cert.pem": b""}, "root-cert.pem holds no PEM certificate"),
    ("root is none", files_of(MIDDLE, MIDDLE.certificate), "is an intermediate, not a root"),
    ("leaf", files_of(make_ca("leaf", ROOT, is_ca=False)), "ca-cert.pem cannot be used: .* is not a CA"),
    ("expired", files_of(make_ca("old", ROOT, end=NOW - DAY / 2)), "ca-cert.pem cannot be used: it expired"),
    ("early", files_of(make_ca("new", ROOT, begin=NOW + DAY)), "is not valid before"),
    (
        "expired issuer",
        files_of(make_ca("low", make_ca("middle", ROOT, end=NOW - DAY / 2))),
        "cert-chain.pem cannot be used: it expired",
    ),
    (
        "path length",
        files_of(make_ca("low", make_ca("middle", make_ca("root", path_length=0)))),
        "allows 0 below it, and there are 2",
    ),
    ("no list", {**files_of(MIDDLE), "ca-crl.pem": b"x"}, "ca-crl.pem holds no list"),
    (
        "a stranger's list",
        {
            **files_of(MIDDLE),
            "ca-crl.pem": ca.make_crl(OTHER, [], number=1, now=NOW).public_bytes(serialization.Encoding.PEM),
        },
        "which is no CA of these files",
    ),
]


@pytest.mark.parametrize(("files", "why"), [item[1:] for item in WRONG], ids=[item[0] for item in WRONG])
def test_what_does_not_hold_together_is_refused(files: dict[str, bytes], why: str) -> None:
    with pytest.raises(IdentityError, match=why):
        read_ca(files, "cluster.local", NOW)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        yield store


@pytest.mark.parametrize("name", plugged.REQUIRED)
def test_a_missing_file_is_told(tmp_path: Path, store: Store, name: str) -> None:
    directory = write(tmp_path / "ca", files_of(MIDDLE))
    (directory / name).unlink()
    with pytest.raises(ConfigurationError, match=f"{name} is missing"):
        CaDirectory(directory, store)


@pytest.mark.parametrize(("name", "mode"), [("ca-key.pem", 0o640), (".", 0o755)])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, store: Store, name: str, mode: int) -> None:
    directory = write(tmp_path / "ca", files_of(MIDDLE))
    (directory / name).chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod"):
        CaDirectory(directory, store)


def settle(directory: CaDirectory) -> ca.Signer:
    directory.current()
    directory._since -= 1.0  # as if they had not moved for a second
    return directory.current()


def test_files_that_change_come_in_force_when_they_are_good(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "ca", files_of(MIDDLE))
    directory = CaDirectory(path, store)
    assert directory.current() is directory.current()
    fresh = make_ca("middle", ROOT)
    write(path, {"ca-cert.pem": pem(fresh.certificate)})
    assert settle(directory).certificate == MIDDLE.certificate
    assert "ca-key.pem does not belong" in directory.problem
    write(path, files_of(fresh))
    assert directory.current().certificate == MIDDLE.certificate  # they may still be moving
    assert settle(directory).certificate == fresh.certificate
    assert directory.problem == ""


def test_a_bundle_grows_and_shrinks_but_is_not_exchanged(tmp_path: Path, store: Store) -> None:
    path = write(tmp_path / "ca", files_of(MIDDLE))
    directory = CaDirectory(path, store)
    theirs = make_ca("theirs", OTHER)
    write(path, files_of(theirs))
    assert settle(directory).certificate == MIDDLE.certificate
    assert "lost roots and gained others" in directory.problem
    write(path, files_of(MIDDLE, ROOT.certificate, OTHER.certificate))
    settle(directory)
    assert directory.problem == ""
    write(path, files_of(theirs, ROOT.certificate, OTHER.certificate))
    assert settle(directory).certificate == theirs.certificate
    write(path, files_of(theirs, OTHER.certificate))
    settle(directory)
    assert directory.files.roots == (OTHER.certificate,)


async def run(*arguments: object) -> int:
    return await trio.to_thread.run_sync(lambda: cli.main([str(item) for item in arguments]))


async def test_a_mesh_on_a_ca_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "ca", files_of(LOW))
    async with control_plane(tmp_path, ca_dir=path) as cp:
        state = cp.config.state_dir
        assert cp.root_pem == pem(ROOT.certificate) == (state / ROOT_FILE).read_bytes()
        identity = await certificate(cp, bearer(cp.create_token("shop", "orders")))
        assert identity.svid.chain[1:] == (LOW.certificate, MIDDLE.certificate)
        applicant = Applicant()
        async with dial(cp, identity) as client:
            answer = await client.unary(CREATE_CERTIFICATE, applicant.request())
        assert len(ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain) == 4
        assert await run("root", "show", "--state", state) == 0
        assert ca.fingerprint(ROOT.certificate) in capsys.readouterr().out
        with pytest.raises(SystemExit):
            await run("root", "rotate", "--state", state)
        assert "the CA is plugged in from files" in capsys.readouterr().err
        serial = f"{identity.svid.serial:032x}"
        assert await run("revoke", "--state", state, "--serial", serial) == 0
        assert (await refusal(cp, identity=identity))[0] is StatusCode.UNAUTHENTICATED
        with trio.fail_after(10):
            while not (crl := list(x509.load_pem_x509_crl((state / CRL_FILE).read_bytes()))):
                await trio.sleep(0.02)
        assert identity.svid.serial in [item.serial_number for item in crl]
        assert len(crl) == 2  # with what was renewed with it
        assert b"PRIVATE" not in b"".join(item.read_bytes() for item in state.iterdir() if item.is_file())


async def test_a_new_intermediate_signs_as_soon_as_it_lies_there(tmp_path: Path) -> None:
    path = write(tmp_path / "ca", files_of(MIDDLE))
    async with control_plane(tmp_path, ca_dir=path) as cp:
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        first = await certificate(cp, token)
        write(path, files_of(LOW))
        with trio.fail_after(10):
            while cp.authority.view.signer.certificate != LOW.certificate:
                await trio.sleep(0.02)
        second = await certificate(cp, token)
        assert (first.svid.chain[1], second.svid.chain[1]) == (MIDDLE.certificate, LOW.certificate)
        async with dial(cp, first):
            pass


async def test_what_is_wrong_with_the_files_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "ca", files_of(MIDDLE))
    async with control_plane(tmp_path, ca_dir=path) as cp:
        write(path, {"ca-key.pem": OTHER.key_pem()})
        with trio.fail_after(10):
            while not cp.authority.problem:
                await trio.sleep(0.02)
        cp._refresh_metrics()
        text = cp._metrics.expose("")[0].decode()
        assert "miniistiod_ca_degraded 1.0" in text
        (line,) = [line for line in text.splitlines() if line.startswith("citadel_server_cert_chain_expiry_timestamp ")]
        assert float(line.split()[1]) == MIDDLE.certificate.not_valid_after_utc.timestamp()
        await certificate(cp, bearer(cp.create_token("shop", "orders")))


async def start(tmp_path: Path, **fields: Any) -> miniistiod.MiniIstiod:
    async with control_plane(tmp_path, **fields) as cp:
        return cp


async def test_a_mesh_keeps_its_ca_over_restarts(tmp_path: Path) -> None:
    path = write(tmp_path / "ca", files_of(MIDDLE))
    await start(tmp_path, ca_dir=path)
    await start(tmp_path, ca_dir=path)
    with pytest.raises(ConfigurationError, match="name their directory with --ca-dir"):
        await start(tmp_path)
    write(path, files_of(OTHER))
    with pytest.raises(ConfigurationError, match="lacks roots that the mesh lives on"):
        await start(tmp_path, ca_dir=path)


async def test_a_mesh_moves_from_its_own_root_to_a_ca_in_files(tmp_path: Path) -> None:
    path = write(tmp_path / "ca", files_of(MIDDLE))
    async with control_plane(tmp_path) as cp:
        own = x509.load_pem_x509_certificate(cp.root_pem)
        old = await certificate(cp, bearer(cp.create_token("shop", "orders")))
    with pytest.raises(ConfigurationError, match="lacks roots that the mesh lives on"):
        await start(tmp_path, ca_dir=path)
    write(path, files_of(MIDDLE, ROOT.certificate, own))
    async with control_plane(tmp_path, ca_dir=path) as cp:
        fresh = await certificate(cp, identity=old)
        assert len(fresh.bundles["cluster.local"].roots) == 2
        await run("revoke", "--state", cp.config.state_dir, "--serial", f"{old.svid.serial:032x}")
        with trio.fail_after(10):
            while cp.authority.view.crl is None or cp.authority.view.crl.generation != cp.store.generation:
                await trio.sleep(0.02)
        assert cp.authority.view.crl.pem.count("BEGIN X509 CRL") == 2  # each signer answers for what it signed


def test_who_may_sign_no_lists_publishes_none(tmp_path: Path, store: Store) -> None:
    from miniistiod import expiry, revocation

    quiet = make_ca("quiet", ROOT, crl_sign=False)
    store.plug(read_ca(files_of(quiet), "cluster.local", NOW).public)
    assert any("lacks cRLSign" in text for text in expiry.warnings(store, time.time()))
    crl = revocation.publish(store, [quiet, ROOT], time.time())
    assert crl is not None
    assert crl.pem.count("BEGIN X509 CRL") == 1
    assert attrs.asdict(crl)["number"] == 1


async def test_a_state_can_begin_with_a_ca_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write(tmp_path / "ca", files_of(MIDDLE))
    assert cli.main(["init", "--state", str(tmp_path / "state"), "--ca-dir", str(directory)]) == 0
    assert ca.fingerprint(MIDDLE.root) in capsys.readouterr().out
    assert (tmp_path / "state" / ROOT_FILE).read_bytes() == pem(MIDDLE.root)
    with pytest.raises(ConfigurationError, match="name their directory with --ca-dir"):
        async with control_plane(tmp_path):
            pass
    async with control_plane(tmp_path, ca_dir=directory) as cp:
        identity = await certificate(cp, bearer(cp.create_token("shop", "orders", name="orders-1")))
        assert len(identity.svid.chain) == 2


@pytest.mark.parametrize("command", ["init", "run"])
def test_a_ca_that_cannot_be_used_makes_no_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    directory = write(tmp_path / "ca", {**files_of(MIDDLE), "ca-key.pem": ROOT.key_pem()})
    (tmp_path / "mesh").mkdir()
    (tmp_path / "mesh" / "meshconfig.yaml").write_text("{}")
    arguments = ["--state", str(tmp_path / "state"), "--ca-dir", str(directory)]
    if command == "run":
        arguments += ["--init", "--config", str(tmp_path / "mesh"), "--log-level", "off"]
        arguments += ["--listen", "127.0.0.1:0", "--monitoring", "127.0.0.1:0"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, *arguments])
    assert "ca-key.pem does not belong to ca-cert.pem" in capsys.readouterr().err
    assert not (tmp_path / "state").exists()
