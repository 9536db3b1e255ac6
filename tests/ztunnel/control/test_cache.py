from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.control_plane import Authority, ScriptedControlPlane
from tests.support.daemon import Warnings

from hbone.errors import ConfigurationError
from hbone.identity import SpiffeId
from ztunnel.control.ca import CaClient
from ztunnel.control.cache import CacheWriter, StateDir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hbone.identity import Identity


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the module warned of."""
    log = Warnings()
    monkeypatch.setattr("ztunnel.control.cache.log", log)
    return log.lines


ME = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
CA = Authority(at=time.time())


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    state = StateDir.open(tmp_path / "state")
    yield state
    state.release()


async def identity(lifetime: float = 3600) -> Identity:
    control = ScriptedControlPlane(time.time)
    control.sign_with(CA, lifetime=lifetime)
    return await CaClient(control.dial, lifetime=lifetime).create(ME, None)


def load(state: StateDir, *, account: str = "web", now: float | None = None) -> Identity | None:
    return state.load_identity(namespace="shop", service_account=account, now=now or time.time())


async def test_identity_is_read_back_with_key_and_roots(state: StateDir) -> None:
    saved = await identity()
    state.save_identity(saved)
    found = load(state)
    assert found is not None
    assert found.svid.id == ME
    assert found.svid.serial == saved.svid.serial
    assert found.svid.key.public_key() == saved.svid.key.public_key()
    assert found.bundles["cluster.local"].roots == (CA.root,)
    assert CA.root_pem.encode() in (state.roots_pem() or b"")


async def test_expired_foreign_or_damaged_identity_is_refused_with_one_warning(
    state: StateDir, warnings: list[str]
) -> None:
    state.save_identity(await identity())
    path = state.path / "svid.pem"
    whole = path.read_bytes()
    assert load(state, now=time.time() + 7200) is None
    assert load(state, account="cart") is None
    for damaged in (b"", b"garbage", whole[: len(whole) // 2], whole.replace(b"PRIVATE KEY", b"SECRET")):
        path.write_bytes(damaged)
        assert load(state) is None
    path.write_bytes(whole)
    (state.path / "roots.pem").write_text(Authority(name="other", at=time.time()).root_pem)
    assert load(state) is None
    assert len(warnings) == 7
    assert all("saved certificate not used" in text for text in warnings)
    assert not any("-----BEGIN" in text for text in warnings)


async def test_key_of_another_certificate_is_refused(state: StateDir) -> None:
    state.save_identity(await identity())
    path = state.path / "svid.pem"
    first = path.read_bytes()
    state.save_identity(await identity())
    second = path.read_bytes()
    cut = b"-----END PRIVATE KEY-----\n"
    path.write_bytes(first.partition(cut)[0] + cut + second.partition(cut)[2])
    assert load(state) is None


def test_nothing_saved_is_no_warning(state: StateDir, warnings: list[str]) -> None:
    assert load(state) is None
    assert state.load_snapshot("w") is None
    assert state.roots_pem() is None
    state.touch_snapshot()
    assert not warnings


def test_snapshot_is_read_back_with_the_time_it_was_current(state: StateDir) -> None:
    state.save_snapshot(b"\x00mesh\n" * 1000, "shop/web-1/web")
    os.utime(state.path / "mesh.snapshot", (1_700_000_000, 1_700_000_000))
    found = state.load_snapshot("shop/web-1/web")
    assert found is not None
    assert found.data == b"\x00mesh\n" * 1000
    assert found.saved_at == 1_700_000_000
    state.touch_snapshot()
    found = state.load_snapshot("shop/web-1/web")
    assert found is not None
    assert found.saved_at > 1_700_000_000


@pytest.mark.parametrize("cut", [0, 1, 50, 200, -1])
def test_torn_snapshot_is_refused(state: StateDir, cut: int) -> None:
    state.save_snapshot(b"mesh" * 1000, "w")
    path = state.path / "mesh.snapshot"
    path.write_bytes(path.read_bytes()[:cut])
    assert state.load_snapshot("w") is None


def test_flipped_bit_and_other_workload_are_refused(state: StateDir) -> None:
    state.save_snapshot(b"mesh" * 1000, "w")
    assert state.load_snapshot("other") is None
    path = state.path / "mesh.snapshot"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert state.load_snapshot("w") is None


def test_directory_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    with pytest.raises(ConfigurationError, match="chmod 0700"):
        StateDir.open(path)


def test_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path / "state")
    with pytest.raises(ConfigurationError, match="in use by another ztunnel"):
        StateDir.open(tmp_path / "state")
    first.release()
    StateDir.open(tmp_path / "state").release()


class Source:
    """What a writer is asked to write."""

    def __init__(self) -> None:
        self.made = 0
        self.content = b"0"
        self.in_sync = False

    async def snapshot(self) -> bytes:
        self.made += 1
        return self.content

    def writer(self, state: StateDir) -> CacheWriter:
        return CacheWriter(state, workload="w", snapshot=self.snapshot, in_sync=lambda: self.in_sync)


def saved(state: StateDir) -> bytes | None:
    found = state.load_snapshot("w")
    return found.data if found is not None else None


async def test_many_changes_are_few_writes_and_the_last_is_on_disk(state: StateDir) -> None:
    source = Source()
    writer = source.writer(state)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        for number in range(200):
            source.content = str(number).encode()
            writer.mesh_changed()
            await trio.lowlevel.checkpoint()
        while saved(state) != b"199":
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert source.made <= 3


async def test_what_is_left_is_written_when_it_is_stopped(state: StateDir) -> None:
    source = Source()
    writer = source.writer(state)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        await trio.testing.wait_all_tasks_blocked()
        source.content = b"last"
        writer.mesh_changed()
        writer.identity_changed(await identity())
        nursery.cancel_scope.cancel()
    assert saved(state) == b"last"
    assert load(state) is not None


async def test_failed_write_is_told_once_and_made_up_for(
    state: StateDir, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source()
    writer = source.writer(state)
    good = state.save_snapshot

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_snapshot", full)
    monkeypatch.setattr("ztunnel.control.cache.RETRY", 0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        writer.mesh_changed()
        while source.made < 3:
            await trio.sleep(0.01)
        monkeypatch.setattr(state, "save_snapshot", good)
        while saved(state) is None:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert len(warnings) == 1
    assert "state not saved" in warnings[0]
