"""Private files: complete or untouched, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hbone.daemon.files import require_private_directory, write_private
from hbone.errors import ConfigurationError


def test_a_private_file_has_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o777)
    try:
        write_private(tmp_path / "key", b"secret")
        write_private(tmp_path / "root", "public", mode=0o644)
    finally:
        os.umask(old)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert (tmp_path / "root").read_text() == "public"


def test_a_private_file_is_replaced_not_written_into(tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.write_text("untouched")
    (tmp_path / "key").symlink_to(other)
    write_private(tmp_path / "key", b"new")
    assert other.read_text() == "untouched"
    assert not (tmp_path / "key").is_symlink()
    with (tmp_path / "key").open("rb") as reader:
        write_private(tmp_path / "key", b"newer")
        assert reader.read() == b"new"  # who reads has the old file, whole


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_private(tmp_path / "key", b"old")

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    if failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_private(tmp_path / "key", b"new")
    monkeypatch.undo()
    assert (tmp_path / "key").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["key"]


def test_a_missing_directory_is_made_private(tmp_path: Path) -> None:
    made = require_private_directory(tmp_path / "a" / "state")
    assert made.stat().st_mode & 0o777 == 0o700
    assert require_private_directory(made) == made


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_a_directory_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"mode 0{mode:o}.*chmod 0700"):
        require_private_directory(tmp_path / "state")


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is not a directory"):
        require_private_directory(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="cannot be made"):
        require_private_directory(tmp_path / "file" / "below")
    with pytest.raises(ConfigurationError, match="no such file"):
        require_private_directory(tmp_path / "missing", create=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory away needs root")
def test_someone_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    os.chown(tmp_path / "state", 12345, 12345)
    with pytest.raises(ConfigurationError, match="belongs to user 12345"):
        require_private_directory(tmp_path / "state")
