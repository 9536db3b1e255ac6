"""Reads a directory of documents, and notices when it changes.

Looks at names, sizes and times instead of asking the kernel for events: those are missing on network file systems and
for what a symbolic link leads to. Editors and copies write in steps, so a change counts once nothing has moved for a
moment.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TypeAlias

import attrs
import trio

from hbone.errors import ConfigurationError
from miniistiod.resources.tree import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from pathlib import Path

__all__ = ["Debounce", "DirectoryError", "Fingerprint", "Looking", "read", "scan", "watch"]

SUFFIXES = (".yaml", ".yml")
MAX_FILES = 10_000
MAX_DEPTH = 16
"""Directories within each other."""
MAX_TOTAL = 64 << 20
"""Bytes of all documents together."""

Fingerprint: TypeAlias = dict[str, tuple[int, int, int]]
"""Path to inode, size and time of change."""


class DirectoryError(ConfigurationError):
    """The directory of documents is not there, is empty, or cannot be read. That is never taken for a deletion."""


@attrs.frozen(kw_only=True)
class Debounce:
    """When a change counts."""

    poll: float = 0.1
    """Seconds between two looks; more where looking takes more than a twentieth of this."""
    quiet: float = 0.1
    """Seconds without a further change."""
    limit: float = 10.0
    """Seconds after the first change, even if there is no end of them."""


def _walk(folder: str, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, os.stat_result]]:
    """Documents below a folder, with their path from where the walk began; hidden ones are left out."""
    if depth > MAX_DEPTH:
        raise DirectoryError(f"{folder!r} is more than {MAX_DEPTH} directories deep; move it up")
    with os.scandir(folder) as found:
        for item in sorted(found, key=lambda item: item.name):
            if item.name.startswith("."):
                continue
            if item.is_dir(follow_symlinks=False):
                yield from _walk(item.path, f"{prefix}{item.name}/", depth + 1)
            elif item.name.endswith(SUFFIXES) and not item.is_dir():
                yield prefix + item.name, item.stat()


def scan(directory: Path) -> Fingerprint:
    """What is in the directory now.

    Raises:
        DirectoryError: it is missing, or has no document.
    """
    found: Fingerprint = {}
    try:
        for path, status in _walk(str(directory)):
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
            if len(found) > MAX_FILES:
                raise DirectoryError(f"{str(directory)!r} has more than {MAX_FILES} documents; split the mesh")
    except OSError as error:
        raise _unreadable(directory, error) from None
    total = sum(size for _, size, _ in found.values())
    if total > MAX_TOTAL:
        raise DirectoryError(f"{str(directory)!r} has {total} bytes of documents, over {MAX_TOTAL}; split the mesh")
    if not found:
        raise DirectoryError(
            f"{str(directory)!r} has no document; put .yaml files in it (meshconfig.yaml alone means an empty mesh)"
        )
    return found


def read(directory: Path, paths: Iterable[str] | None = None) -> dict[str, str]:
    """The documents, path to text; all of them, or those of `paths`.

    Raises:
        DirectoryError: as `scan`, or a file is too large or no UTF-8.
    """
    files: dict[str, str] = {}
    total = 0
    for path in scan(directory) if paths is None else paths:
        try:
            with open(directory / path, "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise _unreadable(directory / path, error) from None
        total += len(data)
        if len(data) > MAX_BYTES or total > MAX_TOTAL:
            raise DirectoryError(f"{path!r} is over {MAX_BYTES} bytes, or all over {MAX_TOTAL}; split it")
        try:
            files[path] = data.decode()
        except UnicodeDecodeError as error:
            raise DirectoryError(f"{path!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return files


def _unreadable(path: Path, error: OSError) -> DirectoryError:
    return DirectoryError(f"{str(path)!r} cannot be read: {(error.strerror or str(error)).lower()}; check the path")


async def watch(
    look: Callable[[], Awaitable[Fingerprint | None]],
    known: Fingerprint | None,
    changed: Callable[[], Awaitable[None]],
    timing: Debounce,
    cost: Callable[[], float] = lambda: 0.0,
) -> None:
    """Call `changed` after each change, until cancelled.

    Args:
        look: what there is now, or None; a `Looking`.
        known: what there was when it was last read.
        changed: reads it; also called when the directory is gone or empty, and when it is back.
        timing: when a change counts.
        cost: CPU seconds of the last look.
    """
    while True:
        await trio.sleep(max(timing.poll, 20 * cost()))
        seen = await look()
        if seen == known:
            continue
        end = trio.current_time() + timing.limit
        while trio.current_time() < end:
            await trio.sleep(timing.quiet)
            later = await look()
            if later == seen:
                break
            seen = later
        known = seen
        await changed()


class Looking:
    """A look at a directory, in a thread: a slow disk stalls nobody. None stands for one that cannot be used."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.cost = 0.0
        """CPU seconds of the last look; by the wall's clock a busy machine would be looked at less and less."""

    async def __call__(self) -> Fingerprint | None:
        """What there is now."""
        return await trio.to_thread.run_sync(self._look)

    def _look(self) -> Fingerprint | None:
        began = time.thread_time()
        try:
            return scan(self._directory)
        except DirectoryError:
            return None
        finally:
            self.cost = time.thread_time() - began
