from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio

from miniistiod import watch
from miniistiod.watch import Debounce, DirectoryError, read, scan

if TYPE_CHECKING:
    from pathlib import Path


def test_documents_are_those_with_the_suffix(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.yaml", "sub/a.yml", ".hidden.yaml", "notes.txt", ".git/x.yaml", "a.yaml~"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == {"b.yaml": "b.yaml", "sub/a.yml": "sub/a.yml"}
    assert list(scan(tmp_path)) == ["b.yaml", "sub/a.yml"]


def test_a_missing_or_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match="no such file or directory; check the path"):
        scan(tmp_path / "gone")
    with pytest.raises(DirectoryError, match="has no document"):
        scan(tmp_path)
    (tmp_path / "a.yaml").symlink_to("nowhere")
    with pytest.raises(DirectoryError, match="cannot be read"):
        scan(tmp_path)


def test_what_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"abc\xff")
    with pytest.raises(DirectoryError, match="not UTF-8 at byte 3"):
        read(tmp_path)


def test_a_huge_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_BYTES", 10)
    (tmp_path / "a.yaml").write_bytes(b"x" * 11)
    with pytest.raises(DirectoryError, match="over 10 bytes"):
        read(tmp_path)


class Watched:
    """A watched directory whose clock jumps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.changes: list[float] = []

    async def look(self) -> watch.Fingerprint | None:
        await trio.lowlevel.checkpoint()
        try:
            return scan(self.directory)
        except DirectoryError:
            return None

    async def changed(self) -> None:
        self.changes.append(trio.current_time())
        await trio.lowlevel.checkpoint()


async def test_a_change_counts_once_nothing_moves(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("1")
    watched = Watched(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.watch, watched.look, scan(tmp_path), watched.changed, Debounce())
        await trio.sleep(5)
        assert watched.changes == []
        for step in range(20):  # every 50 ms: never quiet
            path.write_text("x" * (step + 2))
            await trio.sleep(0.05)
        assert watched.changes == []
        await trio.sleep(1)
        assert len(watched.changes) == 1
        nursery.cancel_scope.cancel()


async def test_endless_changes_count_after_ten_seconds(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("1")
    watched = Watched(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.watch, watched.look, scan(tmp_path), watched.changed, Debounce())
        for step in range(250):
            path.write_text("x" * (step + 2))
            await trio.sleep(0.05)
        assert len(watched.changes) == 1
        assert 10 <= watched.changes[0] <= 10.5
        nursery.cancel_scope.cancel()


async def test_going_away_and_coming_back_are_changes(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("1")
    watched = Watched(tmp_path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.watch, watched.look, scan(tmp_path), watched.changed, Debounce())
        os.rename(path, tmp_path / "a.txt")
        await trio.sleep(1)
        assert len(watched.changes) == 1
        os.rename(tmp_path / "a.txt", path)
        await trio.sleep(1)
        assert len(watched.changes) == 2
        nursery.cancel_scope.cancel()


async def test_a_directory_that_is_dear_to_look_at_is_looked_at_less(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    looks: list[float] = []

    async def look() -> None:
        looks.append(trio.current_time())
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.watch, look, None, Watched(tmp_path).changed, Debounce(), lambda: 0.05)
        await trio.sleep(10.5)
        nursery.cancel_scope.cancel()
    assert len(looks) == 10  # a twentieth of a processor


async def test_a_look_at_what_cannot_be_used_is_none(tmp_path: Path) -> None:
    look = watch.Looking(tmp_path)
    assert await look() is None
    (tmp_path / "a.yaml").write_text("1")
    assert await look() == scan(tmp_path)
