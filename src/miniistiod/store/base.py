"""Opening the state, its transactions, and the lock that goes with it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, Self

import attrs

from hbone.daemon.files import require_private_directory, write_private
from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError, IdentityError
from hbone.identity import TrustDomain
from miniistiod import ca
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
    import datetime
    from collections.abc import Iterator
    from pathlib import Path

    from miniistiod.store.authority import Plugged

__all__ = ["ADMIN_SOCKET", "CRL_FILE", "ROOT_FILE", "Database", "locked"]

_log = get_logger("miniistiod.store")
ROOT_FILE = "root-cert.pem"
CRL_FILE = "crl.pem"
ADMIN_SOCKET = "admin.sock"
_LOCK = "lock"


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the one control plane of a state; the lock goes with the process, however it ends.

    Raises:
        ConfigurationError: another one runs.
    """
    descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another miniistiod runs on the state in {str(directory)!r}; stop it first"
            ) from None
        yield
    finally:
        os.close(descriptor)


class Database:
    """The file, open. Methods are safe to call from threads."""

    def __init__(self, directory: Path, connection: sqlite3.Connection) -> None:
        self.directory = directory
        self._connection = connection
        self._lock = threading.RLock()
        self._depth = 0
        self.trust_domain = self._meta("trust_domain").decode()
        self.token_key = self._meta("token_key")

    @classmethod
    def create(
        cls, directory: Path, trust_domain: str, now: datetime.datetime, *, plugged: Plugged | None = None
    ) -> Self:
        """Make the state of a new mesh.

        Args:
            directory: where; made if it is missing, and empty.
            trust_domain: the mesh's name.
            now: begin of the root's life.
            plugged: a CA from files; else a root is made too.

        Raises:
            ConfigurationError: there is one already, or the directory or the trust domain cannot be used.
        """
        try:
            TrustDomain(trust_domain)
        except IdentityError as error:
            raise ConfigurationError(str(error)) from None
        directory = require_private_directory(directory)
        path = directory / DATABASE
        if path.exists():
            raise ConfigurationError(f"{str(path)!r} exists; a second root would split the mesh, so leave out --init")
        if leftovers := [item.name for item in directory.iterdir() if not item.name.startswith(".")]:
            raise ConfigurationError(
                f"{str(directory)!r} is not empty ({leftovers[0]!r} is in it) and has no {DATABASE}; name another"
                " directory, or restore the database"
            )
        # Made under another name: a crash half way leaves no state that looks whole.
        unfinished = directory / f".{DATABASE}.{secrets.token_hex(8)}"
        create_private(unfinished)
        with contextlib.closing(connect(unfinished)) as connection:
            migrate(connection)
            connection.execute("BEGIN")
            connection.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [("trust_domain", trust_domain.encode()), ("token_key", secrets.token_bytes(32))],
            )
            if plugged is not None:
                connection.execute(
                    "INSERT INTO meta VALUES (?, ?)", ("plugged", json.dumps(attrs.asdict(plugged)).encode())
                )
            else:
                signer = ca.make_root(trust_domain, now)
                connection.execute(
                    "INSERT INTO roots (certificate, key, signing, created) VALUES (?, ?, 1, ?)",
                    (ca.certificate_pem(signer.certificate).encode(), signer.key_pem(), now.timestamp()),
                )
            connection.execute("COMMIT")
        unfinished.rename(path)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open the state of before; one of an older format is saved beside it and brought up to date.

        Raises:
            ConfigurationError: there is none, it is of a newer version, damaged, or open to others.
        """
        if not directory.exists():
            raise ConfigurationError(
                f"the state directory {str(directory)!r} does not exist; name the one of before, or start a new mesh"
                " with --init"
            )
        directory = require_private_directory(directory, create=False)
        path = directory / DATABASE
        if not path.exists():
            raise ConfigurationError(
                f"there is no {DATABASE} in {str(directory)!r}; name the directory of before, or start a new mesh with"
                " --init"
            )
        if path.stat().st_mode & 0o077:
            raise ConfigurationError(
                f"{str(path)!r} holds the root's key and others can read it; run 'chmod 0600 {path}'"
            )
        try:
            connection = connect(path)
            version = version_of(connection)
        except sqlite3.Error as error:
            raise ConfigurationError(f"{str(path)!r} cannot be read ({error}); restore it from a backup") from None
        try:
            check_version(path, version)
            if version < SCHEMA_VERSION:
                _upgrade(directory, connection, version)
            connection.execute("PRAGMA journal_mode = WAL")
            store = cls(directory, connection)
            store.publish_roots()
        except (LookupError, sqlite3.Error, ValueError) as error:
            connection.close()
            raise ConfigurationError(f"{str(path)!r} is damaged ({error}); restore it from a backup") from None
        except BaseException:
            connection.close()
            raise
        return store

    def publish_roots(self) -> None:
        """Bring the file of roots up to date."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def back_up(self, path: Path) -> None:
        """Copy the state to a file, also while it is in use.

        Raises:
            ConfigurationError: the file cannot be written.
        """
        with contextlib.closing(connect(self.directory / DATABASE)) as source:  # its own view, however long it takes
            copy_database(source, path)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer; what is done inside is durable when the outermost one ends, or undone."""
        with self._lock:
            if self._depth:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def _find(self, key: str) -> bytes | None:
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return bytes(rows[0][0]) if rows else None

    def _meta(self, key: str) -> bytes:
        value = self._find(key)
        if value is None:
            raise LookupError(f"no {key}")
        return value

    def _set(self, key: str, value: bytes | None) -> None:
        with self._transaction() as connection:
            if value is None:
                connection.execute("DELETE FROM meta WHERE key = ?", (key,))
            else:
                connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def _publish(self, name: str, content: bytes) -> None:
        path = self.directory / name
        with contextlib.suppress(OSError):
            if path.read_bytes() == content:
                return
        try:
            write_private(path, content, 0o644)
        except OSError as error:
            raise ConfigurationError(f"{str(path)!r} cannot be written: {(error.strerror or '').lower()}") from None


def check_version(path: Path, version: int) -> None:
    """Refuse what this version cannot read.

    Raises:
        ConfigurationError: a newer format, or none.
    """
    if not 1 <= version <= SCHEMA_VERSION:
        raise ConfigurationError(
            f"{str(path)!r} has the format {version} and this version reads {SCHEMA_VERSION}; use the version of"
            " miniistiod that wrote it, or a newer one"
        )


def _upgrade(directory: Path, connection: sqlite3.Connection, version: int) -> None:
    """Under the lock: a control plane of the older version must not go on with what it no longer understands."""
    with locked(directory):
        version = version_of(connection)  # another process may have been quicker
        if version < SCHEMA_VERSION:
            saved = directory / f"state-format-{version}.db"
            copy_database(connection, saved)
            migrate(connection)
            _log.info("state brought up to date", format=SCHEMA_VERSION, before=version, saved=str(saved))
