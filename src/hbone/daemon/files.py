"""Files that only their owner may read, replaced in one step or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["require_private_directory", "write_private"]


def write_private(path: str | os.PathLike[str], data: bytes | str | Sequence[bytes], mode: int = 0o600) -> None:
    """Replace the file at `path`: readers see the old content or the new, also after a crash.

    The content is written beside it under a random name, synced, renamed over it, and the directory synced.

    Args:
        path: where; a symbolic link is replaced, not followed.
        data: the content, or the pieces of it; text is encoded as UTF-8.
        mode: permission bits, whatever the umask says.

    Raises:
        OSError: the directory is missing, full or not ours; nothing is left behind.
    """
    target = Path(path)
    content = data.encode() if isinstance(data, str) else data
    pieces = [content] if isinstance(content, bytes | bytearray | memoryview) else content
    temporary = target.parent / f".{target.name}.{os.urandom(8).hex()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o600)
    try:
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(target.parent)


def require_private_directory(path: str | os.PathLike[str], *, create: bool = True) -> Path:
    """Make sure that `path` is a directory of this user's with no access for others.

    Args:
        path: the directory.
        create: make it, and the missing ones above it, with mode 0700.

    Returns:
        The directory.

    Raises:
        ConfigurationError: it is something else, someone else's, or open to others; says what to do.
    """
    directory = Path(path)
    if create:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError:
            pass  # a file stands there: told below
        except OSError as error:
            raise ConfigurationError(
                f"directory {str(directory)!r} cannot be made ({_reason(error)}); make it yourself with mode 0700"
                " or name another"
            ) from error
    try:
        found = directory.stat()
    except OSError as error:
        raise ConfigurationError(
            f"directory {str(directory)!r} cannot be used ({_reason(error)}); make it with mode 0700 or name another"
        ) from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"{str(directory)!r} is not a directory; name a directory with mode 0700")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"directory {str(directory)!r} belongs to user {found.st_uid}, but this process is user {os.geteuid()};"
            f" run it as that user, or 'chown {os.geteuid()}' the directory"
        )
    if found.st_mode & 0o077:
        raise ConfigurationError(
            f"directory {str(directory)!r} has mode {stat.S_IMODE(found.st_mode):04o}, so others can reach the keys in"
            f" it; run 'chmod 0700 {directory}'"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(f"directory {str(directory)!r} cannot be written; run 'chmod 0700 {directory}'")
    return directory


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
