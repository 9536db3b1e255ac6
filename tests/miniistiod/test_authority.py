"""The authority of a running control plane: what is taken back, and roots that come and go."""

from __future__ import annotations

import datetime
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import trio
from cryptography import x509
from tests.support.callers import certificate, dial, discovery, refusal
from tests.support.miniistiod import ADDRESS, CREATE_CERTIFICATE, Applicant, bearer, control_plane, subscribe

from hbone.errors import ConfigurationError, HboneError
from hbone.grpc import GrpcError, StatusCode
from hbone.identity import SpiffeId
from miniistiod import admin_client, auth, ca, cli
from miniistiod.authority import Authority
from miniistiod.revocation import REVOCATIONS
from miniistiod.rotation import Step, plan
from miniistiod.store import CRL_FILE, ROOT_FILE, Store, serial_text
from ztunnel.wire import revocation_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import miniistiod
    from hbone.identity import Identity

UNAUTHENTICATED = (StatusCode.UNAUTHENTICATED, "request authenticate failure")
NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)


async def run(*arguments: object) -> int:
    """A command, in a thread, as from another process."""

    def call() -> int:
        try:
            return cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            return int(ended.code or 0)

    return await trio.to_thread.run_sync(call)


def state(cp: miniistiod.MiniIstiod) -> Path:
    return cp.config.state_dir


def serial(identity: Identity) -> str:
    return serial_text(identity.svid.serial)


async def enrolled(cp: miniistiod.MiniIstiod, name: str | None = "orders-1") -> Identity:
    return await certificate(cp, bearer(cp.create_token("shop", "orders", name=name)))


async def test_a_revoked_certificate_renews_nothing_and_its_stream_is_cut(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        gone, stays = await enrolled(cp), await enrolled(cp, None)
        async with discovery(cp, gone) as cut, discovery(cp, stays, name="web-2") as kept:
            await cut.response()
            await kept.response()
            assert await run("revoke", "--state", state(cp), "--serial", serial(gone)) == 0
            assert await cut.ends_with() is StatusCode.UNAUTHENTICATED
        assert await refusal(cp, identity=gone) == UNAUTHENTICATED
        async with discovery(cp, gone) as stream:
            assert await stream.ends_with() is StatusCode.UNAUTHENTICATED
        assert (await certificate(cp, identity=stays)).id == stays.id


class Hesitant:
    """A call whose caller is believed, and says nothing until it is told to."""

    metadata = ()
    remote_address = ("192.0.2.1", 1)

    def __init__(self, identity: Identity) -> None:
        self.peer = identity.id
        self.tls = self
        self.peer_chain = identity.svid.chain
        self.believed, self.speak = trio.Event(), trio.Event()

    async def receive(self, max_bytes: int | None = None) -> bytes:
        self.believed.set()
        await self.speak.wait()
        return subscribe(ADDRESS)

    async def send(self, message: bytes | Sequence[bytes], /) -> None:
        raise AssertionError("it was sent something")


async def test_who_is_revoked_before_it_asks_for_anything_is_refused(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        gone = await enrolled(cp)
        call = Hesitant(gone)
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                with pytest.raises(GrpcError) as caught:
                    await cp.api.discovery.delta(call)
                assert caught.value.code is StatusCode.UNAUTHENTICATED

            nursery.start_soon(serve)
            await call.believed.wait()
            cp.store.revoke(0.0, serial=serial(gone))
            call.speak.set()


async def test_a_renewal_is_known_as_one(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        first = await enrolled(cp)
        second = await certificate(cp, identity=first)
        found = {item.serial: item for item in cp.store.certificates(0.0)}
        assert found[serial(second)].parent == serial(first)
        assert {item.name for item in found.values()} == {"orders-1"}
        assert await run("revoke", "--state", state(cp), "--name", "shop/orders-1") == 0
        assert await refusal(cp, identity=second) == UNAUTHENTICATED


async def test_a_revoked_token_cuts_its_stream(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = cp.create_token("shop", "orders", reusable=True)
        async with discovery(cp, None, bearer(token)) as stream:
            await stream.response()
            (listed,) = cp.store.list_tokens()
            assert await run("token", "revoke", "--state", state(cp), listed.id) == 0
            assert await stream.ends_with() is StatusCode.UNAUTHENTICATED


async def test_an_identity_is_revoked_with_its_tokens_and_can_be_given_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with control_plane(tmp_path) as cp:
        old, token = await enrolled(cp), cp.create_token("shop", "orders", reusable=True)
        assert await run("revoke", "--state", state(cp), "--identity", "shop/sa/orders", "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["certificates"] == [serial(old)]
        assert len(shown["tokens"]) == 2
        assert await refusal(cp, identity=old) == UNAUTHENTICATED
        assert await refusal(cp, bearer(token)) == UNAUTHENTICATED
        fresh = await enrolled(cp)
        assert (await certificate(cp, identity=fresh)).id == old.id
        async with discovery(cp, fresh) as stream:
            await stream.response()


async def test_what_is_revoked_is_listed_in_files_pages_and_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with control_plane(tmp_path) as cp:
        gone, stays = await enrolled(cp), await enrolled(cp)
        assert list(x509.load_pem_x509_crl((state(cp) / CRL_FILE).read_bytes())) == []
        async with discovery(cp, stays, types=[REVOCATIONS]) as stream:
            assert len((await stream.response()).resources) == 1
            assert await run("revoke", "--state", state(cp), "--serial", serial(gone)) == 0
            (resource,) = (await stream.response()).resources
        (der,) = revocation_pb2.RevocationLists.FromString(resource.resource.value).lists
        for found in (x509.load_der_x509_crl(der), x509.load_pem_x509_crl((state(cp) / CRL_FILE).read_bytes())):
            assert [item.serial_number for item in found] == [gone.svid.serial]
        assert await run("get", "certificates", "--state", state(cp)) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert {line[0]: line[4] for line in lines[1:]} == {serial(gone): "revoked", serial(stays): "valid"}


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--serial", "0f"], 1, "nothing left to revoke of the certificate"),
        (["--serial", "xyz"], 2, "write it in hex"),
        (["--name", "shop/nobody"], 1, "nothing left to revoke of the machine 'shop/nobody'"),
        (["--name", "nobody"], 2, "write namespace and name"),
        (["--identity", "spiffe://other/ns/a/sa/b"], 2, "is not a workload of the trust domain 'cluster.local'"),
        (["--identity", "nobody"], 2, "write NS/sa/ACCOUNT or a SPIFFE ID"),
        ([], 2, "one of the arguments --serial --identity --name is required"),
    ],
)
async def test_misuse_of_revoke_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, why: str
) -> None:
    Store.create(tmp_path / "state", "cluster.local", NOW).close()
    assert await run("revoke", "--state", tmp_path / "state", *arguments) == code
    assert why in capsys.readouterr().err


async def test_nothing_is_issued_by_what_a_command_has_just_changed(tmp_path: Path) -> None:
    """The command's change is not noticed yet, and the certificate is signed by what holds all the same."""
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        authority = Authority(store, wall=NOW.timestamp)
        identity = SpiffeId.istio("cluster.local", "shop", "orders")
        key = ca.make_root("x", NOW).certificate.public_key()
        assert isinstance(key, ca.PublicKey)
        caller = auth.Caller(identity=identity, how="certificate", serial="ab", since=NOW.timestamp() - 9)
        with Store.open(tmp_path / "state") as command:
            command.begin_rotation(ca.make_root("cluster.local", NOW), NOW.timestamp(), 0.0)
        _, chain = authority.issue(caller, identity, key, datetime.timedelta(hours=1))
        assert len(x509.load_pem_x509_certificates(chain[-1].encode())) == 2
        with Store.open(tmp_path / "state") as command:
            command.revoke(NOW.timestamp(), spiffe_id=str(identity))
        with pytest.raises(auth.Refused):
            authority.issue(caller, identity, key, datetime.timedelta(hours=1))


# -- rotation


async def roots_of(cp: miniistiod.MiniIstiod, identity: Identity) -> int:
    """How many roots the holder of a certificate knows after renewing it."""
    applicant = Applicant()
    async with dial(cp, identity) as client:
        fresh = applicant.identity(await client.unary(CREATE_CERTIFICATE, applicant.request()))
    return len(fresh.bundles["cluster.local"].roots)


async def shown(cp: miniistiod.MiniIstiod, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert await run("root", "show", "--state", state(cp), "--json") == 0
    return json.loads(capsys.readouterr().out)


async def until(cp: miniistiod.MiniIstiod, step: Step | None) -> None:
    with trio.fail_after(20):
        while True:
            rotation = cp.store.rotation()
            if (None if rotation is None else rotation.step) is step and (
                cp.authority.view.generation == cp.store.generation
            ):
                return
            await trio.sleep(0.02)


async def test_a_rotation_from_begin_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path) as cp:
        old_pem = cp.root_pem
        short = await certificate(cp, bearer(cp.create_token("shop", "orders")), seconds=2)
        assert await run("root", "rotate", "--state", state(cp), "--skew", "0.1s") == 0
        await until(cp, Step.PUBLISHED)
        both = cp.root_pem
        assert both.startswith(old_pem)
        assert (state(cp) / ROOT_FILE).read_bytes() == both
        report = await shown(cp, capsys)
        assert report["rotation"]["step"] == "published"
        assert not report["rotation"]["open"]
        assert [item["signs"] for item in report["roots"]] == [["workloads", "15012"], []]
        assert await run("root", "rotate", "--state", state(cp), "--finish", "signing") == 1
        assert "opens at" in capsys.readouterr().err
        assert await roots_of(cp, short) == 2

        await until(
            cp, Step.SIGNING
        )  # by itself, when the certificate from before has ended... and its renewal has not
        fresh = await certificate(cp, bearer(cp.create_token("shop", "orders")), seconds=60)
        assert x509.load_pem_x509_certificates(cp.root_pem)[1].subject == fresh.svid.leaf.issuer
        fresh.svid.leaf.verify_directly_issued_by(x509.load_pem_x509_certificates(cp.root_pem)[1])
        async with dial(cp, fresh, roots=old_pem):
            pass  # port 15012 still shows the old root, for files that are not updated
        report = await shown(cp, capsys)
        assert [item["signs"] for item in report["roots"]] == [["15012"], ["workloads"]]
        assert not report["rotation"]["byItself"]

        assert await run("root", "rotate", "--state", state(cp), "--finish", "serving", "--now") == 0
        await until(cp, Step.SERVING)
        with pytest.raises(HboneError):
            async with dial(cp, fresh, roots=old_pem):
                pass
        async with dial(cp, fresh):
            pass
        assert await run("root", "rotate", "--state", state(cp), "--finish", "done", "--now") == 0
        await until(cp, None)
        assert cp.root_pem == both.removeprefix(old_pem)
        assert (state(cp) / ROOT_FILE).read_bytes() == cp.root_pem
        assert (await certificate(cp, identity=fresh)).id == fresh.id
        assert len(cp.store.root_records()) == 1
        report = await shown(cp, capsys)
        assert report["rotation"] is None


async def test_steps_are_taken_by_themselves_when_nothing_is_in_the_way(tmp_path: Path) -> None:
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        now = NOW.timestamp()
        authority = Authority(store, wall=lambda: now)
        store.begin_rotation(ca.make_root("cluster.local", NOW), now, 60.0)
        assert authority.refresh()
        rotation = store.rotation()
        assert rotation is not None
        assert rotation.step is Step.SIGNING
        assert authority.view.signer.certificate != authority.view.server.certificate
        assert not authority.refresh()
        now += 1
        store.advance_rotation(Step.SERVING, now)
        assert authority.refresh()
        assert store.rotation() is None
        assert authority.view.roots == (authority.view.signer.certificate,)


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_rotation_goes_on_after_a_restart_at_any_step(tmp_path: Path, steps: int) -> None:
    now = NOW.timestamp()
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        store.begin_rotation(ca.make_root("cluster.local", NOW), now, 0.0)
        for step in [Step.SIGNING, Step.SERVING][:steps]:
            store.advance_rotation(step, now)
        before = (store.rotation(), store.roots(), store.signer().sha256, store.server_signer().sha256)
    with Store.open(tmp_path / "state") as store:
        assert (store.rotation(), store.roots(), store.signer().sha256, store.server_signer().sha256) == before
        with pytest.raises(ConfigurationError, match="a rotation is under way"):
            store.begin_rotation(ca.make_root("cluster.local", NOW), now, 0.0)
        for step in [Step.SIGNING, Step.SERVING, Step.DONE][steps:]:
            store.advance_rotation(step, now)
        assert store.rotation() is None
        assert [item.sha256 for item in store.signers()] == [store.server_signer().sha256]


def test_a_step_out_of_turn_is_refused(tmp_path: Path) -> None:
    with Store.create(tmp_path / "state", "cluster.local", NOW) as store:
        with pytest.raises(ConfigurationError, match="is not the next one"):
            store.advance_rotation(Step.SIGNING, 0.0)
        store.begin_rotation(ca.make_root("cluster.local", NOW), NOW.timestamp(), 0.0)
        for step in (Step.SERVING, Step.DONE, Step.PUBLISHED):
            with pytest.raises(ConfigurationError, match="is not the next one"):
                store.advance_rotation(step, 0.0)


async def test_a_token_made_during_a_rotation_names_the_root_that_is_shown(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        await run("root", "rotate", "--state", state(cp))
        await until(cp, Step.SIGNING)
        cp.create_token("shop", "orders")
        (record,) = cp.store.list_tokens()
        assert record.root_sha256 == ca.fingerprint(cp.authority.view.server.certificate)
        rotation = cp.store.rotation()
        assert rotation is not None
        following = plan(rotation, cp.store.facts(rotation, time.time()))
        step = (following.next, following.opens)
        assert step == (Step.SERVING, record.expires)  # who still holds it could not find the root in the chain


async def test_pages_and_commands_need_no_rotation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path) as cp:
        assert cp.store.rotation() is None
        assert await run("root", "show", "--state", state(cp)) == 0
        assert "workloads, 15012" in capsys.readouterr().out
        assert await run("root", "rotate", "--state", state(cp), "--finish", "done") == 2
        assert "no rotation is under way" in capsys.readouterr().err
        found = await trio.to_thread.run_sync(admin_client.fetch, state(cp) / "admin.sock", "/state")
        assert found["trust_domain"] == "cluster.local"


async def test_backup_and_restore_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "copy.db"
    async with control_plane(tmp_path) as cp:
        identity = await enrolled(cp)
        lasting = cp.create_token("shop", "orders", reusable=True)
        assert await run("backup", "--state", state(cp), file) == 0
        assert await run("restore", "--state", state(cp), file) == 2
        assert "stop it first" in capsys.readouterr().err
    assert await run("restore", "--state", tmp_path / "state", file) == 0
    assert "1 tokens became void" in capsys.readouterr().err
    async with control_plane(tmp_path) as cp:
        assert await refusal(cp, bearer(lasting)) == UNAUTHENTICATED
        assert (await certificate(cp, identity=identity)).id == identity.id


async def test_a_token_is_taken_back_with_what_it_got(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path) as cp:
        text = cp.create_token("shop", "orders", reusable=True)
        (token,) = cp.store.list_tokens()
        first = await certificate(cp, bearer(text))
        renewed = await certificate(cp, identity=first)
        other = await enrolled(cp)
        async with discovery(cp, renewed) as stream:
            await stream.response()
            assert await run("token", "revoke", "--state", state(cp), token.id) == 0
            told = capsys.readouterr().err
            assert "2 certificates that it got stay good" in told
            assert f"'miniistiod token revoke {token.id} --certificates' takes them back" in told
            assert (await certificate(cp, identity=renewed)).id == first.id
            assert await run("token", "revoke", "--state", state(cp), token.id, "--certificates") == 0
            assert "and 3 certificates that it got" in capsys.readouterr().err
            assert await stream.ends_with() is StatusCode.UNAUTHENTICATED
        for identity in (first, renewed):
            assert await refusal(cp, identity=identity) == UNAUTHENTICATED
        listed = x509.load_pem_x509_crl((cp.config.state_dir / CRL_FILE).read_bytes())
        assert len(listed) == 3
        assert (await certificate(cp, identity=other)).id == other.id
        assert await run("token", "revoke", "--state", state(cp), "none", "--certificates") == 1


async def test_renewing_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "istio-token"
    async with control_plane(tmp_path) as cp:
        old = cp.create_token("shop", "orders", reusable=True, lifetime=86_400.0)
        once = cp.create_token("shop", "web", name="web-1")
        first, second = cp.store.list_tokens()
        assert await run("token", "renew", "--state", state(cp), first.id, "--ttl", "30d", "--out", out) == 0
        assert "stays good until" in capsys.readouterr().err
        for text in (old, out.read_text()):
            assert str((await certificate(cp, bearer(text))).id).endswith("/sa/orders")
        assert await run("token", "renew", "--state", state(cp), second.id) == 0
        assert "ztunnel enroll" in capsys.readouterr().out
        assert await refusal(cp, bearer(once)) == UNAUTHENTICATED
        assert [item.name for item in cp.store.list_tokens() if item.kind == "one-time"] == ["web-1", "web-1"]
        assert await run("token", "renew", "--state", state(cp), second.id) == 2
        assert "is revoked" in capsys.readouterr().err
        assert await run("token", "renew", "--state", state(cp), "none") == 2
