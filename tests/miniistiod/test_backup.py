from __future__ import annotations

import contextlib
import datetime
import sqlite3
import stat
from typing import TYPE_CHECKING

import pytest

from hbone.errors import ConfigurationError
from hbone.identity import SpiffeId
from miniistiod import ca, issue_tokens, revocation
from miniistiod.store import DATABASE, ROOT_FILE, Store, locked, schema
from miniistiod.store.backup import restore

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
T = NOW.timestamp()
ORDERS = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/orders")


def new(directory: Path) -> Store:
    return Store.create(directory, "cluster.local", NOW)


def issue(store: Store) -> str:
    signer = store.signer()
    key = ca.make_root("x", NOW).key.public_key()
    leaf = ca.issue(signer, key, ORDERS, datetime.timedelta(hours=24), NOW)
    store.record_certificate(
        leaf,
        spiffe_id=str(ORDERS),
        name="",
        key_sha256="k",
        caller="test",
        now=T,
        signer=ca.fingerprint(signer.certificate),
    )
    return f"{leaf.serial_number:032x}"


def make_token(store: Store, *, reusable: bool) -> issue_tokens.NewToken:
    return issue_tokens.create(
        store, namespace="shop", service_account="orders", name=None, lifetime=None, reusable=reusable, now=T
    )


def test_a_copy_is_private_whole_and_made_while_the_state_is_in_use(tmp_path: Path) -> None:
    file = tmp_path / "copy.db"
    with new(tmp_path / "state") as store:
        serial = issue(store)
        file.write_text("an older one")
        store.back_up(file)
        issue(store)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [item.name for item in tmp_path.iterdir() if item.name != "state"] == ["copy.db"]
    done = restore(tmp_path / "other", file, T, "now")
    assert (done.trust_domain, done.saved, done.merged) == ("cluster.local", None, False)
    with Store.open(tmp_path / "other") as again, Store.open(tmp_path / "state") as store:
        assert again.signer().certificate == store.signer().certificate
        assert [item.serial for item in again.certificates(0.0)] == [serial]
        assert (tmp_path / "other" / ROOT_FILE).read_bytes() == (tmp_path / "state" / ROOT_FILE).read_bytes()


def test_a_copy_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store, pytest.raises(ConfigurationError, match="cannot be written"):
        store.back_up(tmp_path / "no" / "copy.db")


def test_a_restore_voids_every_token_of_before(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store:
        made = [make_token(store, reusable=reusable) for reusable in (True, False)]
        key = store.token_key
        store.back_up(tmp_path / "copy.db")
    assert restore(tmp_path / "state", tmp_path / "copy.db", T + 1, "now").tokens == 2
    with Store.open(tmp_path / "state") as store:
        assert store.token_key != key
        assert {item.id: item.state(T + 2) for item in store.list_tokens()} == {item.id: "revoked" for item in made}
        assert not store.redeem("once." + "x" * 12 + "." + "y" * 43, "k", T + 2).token


def test_what_the_state_of_before_knew_of_certificates_is_not_lost(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store:
        old = issue(store)
        store.back_up(tmp_path / "copy.db")
        fresh = issue(store)
        store.revoke(T + 1, serial=old)
        crl = revocation.publish(store, store.signers(), T + 1)
        assert crl is not None
        generation = store.generation
    done = restore(tmp_path / "state", tmp_path / "copy.db", T + 2, "20260301T000002Z")
    assert done.merged
    assert done.saved == tmp_path / "state" / "before-restore-20260301T000002Z.db"
    assert stat.S_IMODE(done.saved.stat().st_mode) == 0o600
    with Store.open(tmp_path / "state") as store:
        assert {item.serial: item.state(T) for item in store.certificates(0.0)} == {old: "revoked", fresh: "valid"}
        assert store.generation > generation
        again = revocation.publish(store, store.signers(), T + 2)
        assert again is not None
        assert again.number > crl.number


def test_after_a_restore_a_rotation_waits_for_what_is_not_listed(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store:
        store.back_up(tmp_path / "copy.db")
    restore(tmp_path / "other", tmp_path / "copy.db", T, "now")
    with Store.open(tmp_path / "other") as store:
        rotation = store.begin_rotation(ca.make_root("cluster.local", NOW), T + 1, 0.0)
        facts = store.facts(rotation, T + 1)
        assert facts.unaware == facts.old == T + 86_400


def test_a_damaged_state_can_be_restored(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store:
        store.back_up(tmp_path / "copy.db")
    (tmp_path / "state" / DATABASE).write_bytes(b"nonsense" * 1000)
    done = restore(tmp_path / "state", tmp_path / "copy.db", T, "now")
    assert not done.merged
    assert done.saved is not None
    assert done.saved.read_bytes() == b"nonsense" * 1000
    Store.open(tmp_path / "state").close()


def test_a_state_in_use_is_not_replaced(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store:
        store.back_up(tmp_path / "copy.db")
    with locked(tmp_path / "state"), pytest.raises(ConfigurationError, match="another miniistiod runs"):
        restore(tmp_path / "state", tmp_path / "copy.db", T, "now")


def set_version(path: Path, version: int) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_text("x" * 5000), "cannot be read"),
        (lambda path: path.write_bytes(b""), "is no state"),
        (lambda path: sqlite3.connect(path).close(), "is no state"),
    ],
)
def test_what_is_no_copy_of_a_state_is_refused(tmp_path: Path, make: object, why: str) -> None:
    make(tmp_path / "copy.db")  # type: ignore[operator]  # one of the functions above
    with pytest.raises(ConfigurationError, match=why):
        restore(tmp_path / "state", tmp_path / "copy.db", T, "now")
    assert not (tmp_path / "state").exists()


def test_a_copy_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    with new(tmp_path / "state") as store:
        store.back_up(tmp_path / "copy.db")
    set_version(tmp_path / "copy.db", 99)
    with pytest.raises(ConfigurationError, match="has the format 99 and this version reads 2"):
        restore(tmp_path / "other", tmp_path / "copy.db", T, "now")


def first_format(directory: Path) -> tuple[str, str]:
    """A state as the first version wrote it; the serials in it."""
    directory.mkdir(mode=0o700)
    root = ca.make_root("cluster.local", NOW)
    path = directory / DATABASE
    schema.create_private(path)
    with contextlib.closing(schema.connect(path)) as connection:
        connection.executescript(schema._FORMAT_1)
        connection.execute("INSERT INTO meta VALUES ('trust_domain', ?)", (b"cluster.local",))
        connection.execute("INSERT INTO meta VALUES ('token_key', ?)", (bytes(32),))
        connection.execute(
            "INSERT INTO roots (certificate, key, signing, created) VALUES (?, ?, 1, ?)",
            (ca.certificate_pem(root.certificate).encode(), root.key_pem(), T),
        )
        connection.execute(
            "INSERT INTO certificates VALUES ('aa', ?, '', 'k', ?, ?, ?)", (str(ORDERS), T, T + 9, "certificate")
        )
        connection.execute(
            "INSERT INTO certificates VALUES ('bb', ?, 'n', 'k', ?, ?, ?)",
            (str(ORDERS), T, T + 9, "one-time token abc"),
        )
        connection.execute(
            "INSERT INTO tokens (id, kind, secret_sha256, namespace, service_account, created, expires)"
            " VALUES ('abc', 'one-time', 'x', 'shop', 'orders', ?, ?)",
            (T, T + 9),
        )
        connection.execute("PRAGMA user_version = 1")
    return ca.fingerprint(root.certificate), "aa"


def test_the_first_format_is_saved_and_brought_up_to_date(tmp_path: Path) -> None:
    signer, _ = first_format(tmp_path / "state")
    with Store.open(tmp_path / "state") as store:
        found = {item.serial: item for item in store.certificates(0.0)}
        assert {item.signer for item in found.values()} == {signer}
        assert (found["aa"].token, found["bb"].token) == ("", "abc")
        assert store.list_tokens()[0].root_sha256 == signer
        assert store.generation == 1
    saved = tmp_path / "state" / "state-format-1.db"
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(saved)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM certificates").fetchone() == (2,)


def test_a_copy_of_the_first_format_is_brought_up_to_date(tmp_path: Path) -> None:
    first_format(tmp_path / "old")
    copy = tmp_path / "old" / DATABASE
    before = copy.read_bytes()
    restore(tmp_path / "state", copy, T, "now")
    with Store.open(tmp_path / "state") as store:
        assert len(store.certificates(0.0)) == 2
    assert copy.read_bytes() == before


def test_a_state_of_an_older_format_in_use_is_left_alone(tmp_path: Path) -> None:
    first_format(tmp_path / "state")
    with locked(tmp_path / "state"), pytest.raises(ConfigurationError, match="another miniistiod runs"):
        Store.open(tmp_path / "state")
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / DATABASE)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    first_format(tmp_path / "state")
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / DATABASE)) as connection:
        connection.execute("CREATE TABLE registrations (a)")
        connection.commit()
    with pytest.raises(ConfigurationError, match="is damaged"):
        Store.open(tmp_path / "state")
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / DATABASE)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(certificates)")]
        assert "revoked" not in columns
