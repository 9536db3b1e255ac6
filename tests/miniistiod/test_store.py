from __future__ import annotations

import datetime
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from hbone.errors import ConfigurationError, HboneError
from miniistiod import ca, issue_tokens
from miniistiod.registry import HboneMark
from miniistiod.store import DATABASE, ROOT_FILE, Store
from ztunnel.wire.token import parse_enrolment_token

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
T = NOW.timestamp()


def new(path: Path) -> Store:
    return Store.create(path / "state", "cluster.local", NOW)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_state_is_private_and_its_root_is_not(tmp_path: Path) -> None:
    with new(tmp_path) as store:
        store.mark("shop", "a", "orders", "", T)
        state = tmp_path / "state"
        assert mode(state) == 0o700
        assert mode(state / ROOT_FILE) == 0o644
        for path in state.glob(f"{DATABASE}*"):
            assert mode(path) == 0o600
        assert (state / ROOT_FILE).read_bytes() == store.roots_pem()
        assert b"PRIVATE" not in store.roots_pem()


def test_it_is_the_same_when_opened_again(tmp_path: Path) -> None:
    with new(tmp_path) as store:
        root, key = store.signer().certificate, store.token_key
    with Store.open(tmp_path / "state") as store:
        assert store.signer().certificate == root
        assert store.roots() == [root]
        assert (store.trust_domain, store.token_key) == ("cluster.local", key)


def test_there_is_never_a_second_root(tmp_path: Path) -> None:
    new(tmp_path).close()
    with pytest.raises(ConfigurationError, match="a second root would split the mesh"):
        new(tmp_path)


def test_a_state_without_its_database_is_not_started_anew(tmp_path: Path) -> None:
    new(tmp_path).close()
    (tmp_path / "state" / DATABASE).unlink()
    with pytest.raises(ConfigurationError, match="is not empty"):
        new(tmp_path)
    with pytest.raises(ConfigurationError, match="there is no state"):
        Store.open(tmp_path / "state")


def test_a_missing_state_is_not_made_by_opening_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist; name the one of before, or start"):
        Store.open(tmp_path / "state")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(("path", "bits"), [(".", 0o750), (DATABASE, 0o640)])
def test_a_state_that_others_can_read_is_refused(tmp_path: Path, path: str, bits: int) -> None:
    new(tmp_path).close()
    (tmp_path / "state" / path).chmod(bits)
    with pytest.raises(ConfigurationError, match="chmod"):
        Store.open(tmp_path / "state")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    new(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "state" / DATABASE)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigurationError, match="has the format 99 and this version reads 2"):
        Store.open(tmp_path / "state")


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    new(tmp_path).close()
    (tmp_path / "state" / DATABASE).write_bytes(b"nonsense" * 1000)
    with pytest.raises(ConfigurationError, match="restore it from a backup"):
        Store.open(tmp_path / "state")


def test_a_trust_domain_that_is_none_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(HboneError, match="trust domain"):
        Store.create(tmp_path / "state", "No/Domain", NOW)
    assert not (tmp_path / "state").exists()


def test_the_root_file_is_made_again_when_it_is_gone_or_wrong(tmp_path: Path) -> None:
    new(tmp_path).close()
    path = tmp_path / "state" / ROOT_FILE
    for damage in (path.unlink, lambda: path.write_text("x")):
        damage()
        with Store.open(tmp_path / "state") as store:
            assert path.read_bytes() == store.roots_pem()


def test_secrets_are_not_in_the_file(tmp_path: Path) -> None:
    with new(tmp_path) as store:
        made = [
            issue_tokens.create(
                store,
                namespace="shop",
                service_account="orders",
                name=None,
                lifetime=None,
                reusable=reusable,
                now=T,
            )
            for reusable in (True, False)
        ]
        names = [item.id for item in store.list_tokens()]
    assert sorted(names) == sorted(item.id for item in made)
    content = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir() if path.is_file())
    for token in made:
        assert token.id.encode() in content
        secret = token.text if token.text.startswith("eyJ") else parse_enrolment_token(token.text).secret
        assert secret.rpartition(".")[2].encode() not in content


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"namespace": "A"}, "namespace 'A'"),
        ({"service_account": "a/b"}, "service account 'a/b'"),
        ({"name": "x y"}, "name 'x y'"),
        ({"lifetime": 0.0}, "out of range"),
        ({"lifetime": 8 * 86_400.0}, "give 1s to 7d"),
        ({"reusable": True, "lifetime": 367 * 86_400.0}, "give 1s to 366d"),
        ({"reusable": True, "name": "a"}, "not bound to a name"),
    ],
)
def test_a_token_beyond_the_limits_is_not_made(tmp_path: Path, fields: dict[str, object], why: str) -> None:
    arguments: dict[str, object] = {
        "namespace": "shop",
        "service_account": "orders",
        "name": None,
        "lifetime": None,
        "reusable": False,
        "now": T,
    }
    with new(tmp_path) as store:
        with pytest.raises(ConfigurationError, match=why):
            issue_tokens.create(store, **{**arguments, **fields})  # type: ignore[arg-type]  # wrong on purpose
        assert store.list_tokens() == []


def test_marks_and_documents_are_remembered(tmp_path: Path) -> None:
    seen = [("WorkloadEntry", "shop", "a"), ("WorkloadEntry", "shop", "b")]
    with new(tmp_path) as store:
        store.mark("shop", "a", "orders", "node-1", T)
        store.mark("shop", "a", "orders", "node-2", T)
        store.change_documents({"a.yaml": "1", "b.yaml": "2"}, {("shop", "h"): 7}, dict.fromkeys(seen, NOW))
        store.change_documents({"a.yaml": "3", "b.yaml": None}, {("shop", "g"): 7}, {seen[0]: None})
        store.change_documents({}, None, {seen[0]: NOW + datetime.timedelta(seconds=10)})
    with Store.open(tmp_path / "state") as store:
        assert store.marks() == {("shop", "a"): HboneMark(service_account="orders", node="node-2")}
        assert store.documents() == {"a.yaml": "3"}
        assert store.vips() == {("shop", "g"): 7}
        assert {key[2]: when.timestamp() for key, when in store.first_seen().items()} == {"a": T + 10, "b": T}


def test_a_set_of_documents_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with new(tmp_path) as store:
        store.change_documents({"a.yaml": "1"}, {("shop", "h"): 7}, {})
        with pytest.raises(sqlite3.IntegrityError):
            store.change_documents({"a.yaml": "2"}, {("shop", "h"): 7, ("shop", "i"): 7}, {})
        assert store.documents() == {"a.yaml": "1"}
        assert store.vips() == {("shop", "h"): 7}


def test_two_processes_can_use_the_state(tmp_path: Path) -> None:
    with new(tmp_path) as daemon, Store.open(tmp_path / "state") as command:
        issue_tokens.create(
            command, namespace="shop", service_account="a", name=None, lifetime=None, reusable=False, now=T
        )
        daemon.mark("shop", "a", "a", "", T)
        assert len(daemon.list_tokens()) == 1
        assert command.marks()


def test_what_has_ended_is_forgotten_after_a_week(tmp_path: Path) -> None:
    with new(tmp_path) as store:
        token = issue_tokens.create(
            store, namespace="shop", service_account="a", name=None, lifetime=None, reusable=False, now=T
        )
        key = ca.make_root("x", NOW).key.public_key()
        from hbone.identity import SpiffeId

        spiffe_id = SpiffeId.istio("cluster.local", "shop", "a")
        leaf = ca.issue(store.signer(), key, spiffe_id, datetime.timedelta(hours=1), NOW)
        store.record_certificate(leaf, spiffe_id=str(spiffe_id), name="", key_sha256="k", caller="test", now=T)
        assert [item.serial for item in store.certificates(T)] == [f"{leaf.serial_number:032x}"]
        assert store.certificates(T + 3600) == []
        assert store.forget_expired(T + 7 * 86_400) == 0
        assert store.forget_expired(T + 3601 + 7 * 86_400) == 2
        assert not store.revoke_token(token.id, T)


CHILD = """
import sys, time
from pathlib import Path
from miniistiod.store import Store
store = Store.open(Path(sys.argv[1]))
for number, secret in enumerate(sys.stdin.read().split()):
    assert store.redeem(secret, "key", time.time()).token is not None
    sys.stdout.write(f"{number}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize("after", [1, 7, 20])
def test_a_token_whose_use_was_acknowledged_stays_used_after_kill_9(tmp_path: Path, after: int) -> None:
    now = datetime.datetime.now(datetime.UTC)
    with Store.create(tmp_path / "state", "cluster.local", now) as store:
        secrets = [
            parse_enrolment_token(
                issue_tokens.create(
                    store,
                    namespace="shop",
                    service_account="orders",
                    name=None,
                    lifetime=None,
                    reusable=False,
                    now=now.timestamp(),
                ).text
            ).secret
            for _ in range(40)
        ]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "state")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        child.stdin.write("\n".join(secrets).encode())
        child.stdin.close()
        acknowledged = [child.stdout.readline() for _ in range(after)]
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += child.stdout.readlines()
    assert child.returncode == -signal.SIGKILL
    used = [int(line) for line in acknowledged if line.endswith(b"\n")]
    with Store.open(tmp_path / "state") as store:
        for number in used:
            assert store.redeem(secrets[number], "another key", now.timestamp() + 5).token is None
        assert store.redeem(secrets[-1], "another key", now.timestamp() + 5).token is not None or len(used) == 40
