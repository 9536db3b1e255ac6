"""Restoring the state from a copy of it."""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from typing import TYPE_CHECKING

import attrs

from hbone.daemon.files import require_private_directory
from hbone.errors import ConfigurationError
from miniistiod.store.base import check_version, locked
from miniistiod.store.database import Store
from miniistiod.store.schema import (
    DATABASE,
    SCHEMA_VERSION,
    connect,
    copy_database,
    create_private,
    migrate,
    version_of,
)

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Restored", "restore"]

_DAY = 86_400.0
_ISSUED = (
    "serial, spiffe_id, name, key_sha256, issued, expires, caller, token, parent, signer, generation, node, grp,"
    " revoked"
)


@attrs.frozen(kw_only=True)
class Restored:
    """What a restore did."""

    trust_domain: str
    tokens: int
    """Tokens that are worthless from now on."""
    saved: Path | None
    """Where the state of before is; None when there was none."""
    merged: bool
    """What was issued and revoked since the copy is known, because the state of before could be read."""


def restore(directory: Path, file: Path, now: float, stamp: str) -> Restored:
    """Put a copy made by `Store.back_up` in the place of the state.

    All tokens become worthless: the copy can't know which were used or revoked after it was made.

    Args:
        directory: the state; made if it is missing.
        file: the copy.
        now: seconds since 1970.
        stamp: `now` as it is written into the name under which the state of before is kept.

    Raises:
        ConfigurationError: the copy cannot be used, a control plane runs on the state, or the disk is full.
    """
    with contextlib.closing(_open_copy(file)) as source:
        directory = require_private_directory(directory)
        with locked(directory):
            return _replace(directory, source, now, stamp)


def _open_copy(file: Path) -> sqlite3.Connection:
    if not file.is_file():
        raise ConfigurationError(f"there is no file {str(file)!r}; name one that 'miniistiod backup' wrote")
    try:
        source = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        try:
            version = version_of(source)
            sound = source.execute("PRAGMA quick_check").fetchone()[0] == "ok"
            tables = {row[0] for row in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        except BaseException:
            source.close()
            raise
    except sqlite3.Error as error:
        raise ConfigurationError(
            f"{str(file)!r} cannot be read ({error}); name one that 'miniistiod backup' wrote"
        ) from None
    try:
        if not {"meta", "roots", "certificates", "tokens"} <= tables:
            raise ConfigurationError(f"{str(file)!r} is no state; name one that 'miniistiod backup' wrote")
        check_version(file, version)
        if not sound:
            raise ConfigurationError(f"{str(file)!r} is damaged; name another backup")
    except BaseException:
        source.close()
        raise
    return source


def _replace(directory: Path, source: sqlite3.Connection, now: float, stamp: str) -> Restored:
    path = directory / DATABASE
    unfinished = directory / f".{DATABASE}.{secrets.token_hex(8)}"
    saved: Path | None = None
    try:
        create_private(unfinished)
        with contextlib.closing(connect(unfinished)) as copy:
            source.backup(copy)
            if version_of(copy) < SCHEMA_VERSION:
                migrate(copy)  # the copy that was given is the backup of it
            present = None
            if path.exists():
                saved = directory / f"before-restore-{stamp}.db"
                present = _save(path, saved)
            tokens = _make_current(copy, present, now)
            (trust_domain,) = copy.execute("SELECT value FROM meta WHERE key = 'trust_domain'").fetchone()
            copy.execute("PRAGMA journal_mode = DELETE")
        for suffix in ("-wal", "-shm"):  # of the file that goes; all of it is in what was saved
            (directory / f"{DATABASE}{suffix}").unlink(missing_ok=True)
        unfinished.replace(path)
    except (sqlite3.Error, OSError) as error:
        raise ConfigurationError(f"the state in {str(directory)!r} cannot be written ({error})") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    Store.open(directory).close()  # publishes its roots
    return Restored(trust_domain=bytes(trust_domain).decode(), tokens=tokens, saved=saved, merged=present is not None)


def _save(path: Path, saved: Path) -> Path | None:
    """Keep the state of before; its copy when it can be read as one, in the present format."""
    try:
        with contextlib.closing(connect(path)) as old:
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            version = version_of(old)
            copy_database(old, saved)
    except (sqlite3.Error, ConfigurationError):
        saved.write_bytes(path.read_bytes())  # damaged, perhaps; kept as it is
        saved.chmod(0o600)
        return None
    return saved if version == SCHEMA_VERSION else None


def _make_current(copy: sqlite3.Connection, present: Path | None, now: float) -> int:
    """Take back what the copy cannot be trusted about; the number of tokens that this voids."""
    if present is not None:
        copy.execute("ATTACH ? AS present", (str(present),))
        if not _same_mesh(copy):
            copy.execute("DETACH present")
            present = None
    copy.execute("BEGIN IMMEDIATE")
    generations = [int(row[0]) for row in copy.execute("SELECT value FROM meta WHERE key = 'generation'")]
    numbers = [json.loads(row[0])["number"] for row in copy.execute("SELECT value FROM meta WHERE key = 'crl'")]
    if present is not None:
        copy.execute(f"INSERT OR IGNORE INTO certificates ({_ISSUED}) SELECT {_ISSUED} FROM present.certificates")
        copy.execute(
            "UPDATE certificates SET revoked = (SELECT revoked FROM present.certificates AS other"
            " WHERE other.serial = certificates.serial) WHERE revoked IS NULL AND serial IN"
            " (SELECT serial FROM present.certificates WHERE revoked IS NOT NULL)"
        )
        copy.execute("INSERT OR REPLACE INTO revoked_identities SELECT spiffe_id, at FROM present.revoked_identities")
        generations += [int(row[0]) for row in copy.execute("SELECT value FROM present.meta WHERE key = 'generation'")]
        numbers += [
            json.loads(row[0])["number"] for row in copy.execute("SELECT value FROM present.meta WHERE key = 'crl'")
        ]
    else:
        # What was issued since is not in the register: a rotation waits as long as it may live.
        (longest,) = copy.execute("SELECT max(expires - issued) FROM certificates").fetchone()
        _put(copy, "unlisted_until", str(now + max(_DAY, longest or 0.0)).encode())
    tokens = copy.execute("UPDATE tokens SET revoked = ? WHERE revoked IS NULL AND spent IS NULL", (now,)).rowcount
    copy.execute("UPDATE tokens SET revoked = ? WHERE revoked IS NULL", (now,))
    _put(copy, "token_key", secrets.token_bytes(32))
    _put(copy, "generation", str(max(generations) + 1).encode())
    if numbers:
        crl = {"number": max(numbers), "generation": 0, "made": 0.0, "pem": ""}
        _put(copy, "crl", json.dumps(crl).encode())
    copy.execute("COMMIT")
    if present is not None:
        copy.execute("DETACH present")
    return tokens


def _same_mesh(copy: sqlite3.Connection) -> bool:
    names = [
        bytes(copy.execute(f"SELECT value FROM {name}.meta WHERE key = 'trust_domain'").fetchone()[0])
        for name in ("main", "present")
    ]
    roots = [
        {bytes(row[0]) for row in copy.execute(f"SELECT certificate FROM {name}.roots")} for name in ("main", "present")
    ]
    return names[0] == names[1] and bool(roots[0] & roots[1] or not roots[0])


def _put(copy: sqlite3.Connection, key: str, value: bytes) -> None:
    copy.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
