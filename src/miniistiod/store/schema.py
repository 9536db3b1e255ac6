"""The tables, and how an older format becomes the present one."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["DATABASE", "SCHEMA_VERSION", "connect", "copy_database", "create_private", "migrate", "version_of"]

DATABASE = "state.db"
SCHEMA_VERSION = 2
_BUSY_SECONDS = 10.0

_FORMAT_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE roots (
  id INTEGER PRIMARY KEY, certificate BLOB NOT NULL, key BLOB, signing INTEGER NOT NULL, created REAL NOT NULL
) STRICT;
CREATE TABLE certificates (
  serial TEXT PRIMARY KEY, spiffe_id TEXT NOT NULL, name TEXT NOT NULL, key_sha256 TEXT NOT NULL,
  issued REAL NOT NULL, expires REAL NOT NULL, caller TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX certificates_expires ON certificates (expires);
CREATE TABLE tokens (
  id TEXT PRIMARY KEY, kind TEXT NOT NULL, secret_sha256 TEXT NOT NULL, namespace TEXT NOT NULL,
  service_account TEXT NOT NULL, name TEXT, created REAL NOT NULL, expires REAL NOT NULL,
  spent REAL, spent_key_sha256 TEXT, revoked REAL
) STRICT, WITHOUT ROWID;
CREATE TABLE marks (
  namespace TEXT NOT NULL, name TEXT NOT NULL, service_account TEXT NOT NULL, node TEXT NOT NULL,
  since REAL NOT NULL, PRIMARY KEY (namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE vips (
  namespace TEXT NOT NULL, host TEXT NOT NULL, number INTEGER NOT NULL UNIQUE, PRIMARY KEY (namespace, host)
) STRICT, WITHOUT ROWID;
CREATE TABLE first_seen (
  kind TEXT NOT NULL, namespace TEXT NOT NULL, name TEXT NOT NULL, seen REAL NOT NULL,
  PRIMARY KEY (kind, namespace, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE documents (path TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""

_FORMAT_2 = """
ALTER TABLE certificates ADD COLUMN token TEXT NOT NULL DEFAULT '';
ALTER TABLE certificates ADD COLUMN parent TEXT NOT NULL DEFAULT '';
ALTER TABLE certificates ADD COLUMN signer TEXT NOT NULL DEFAULT '';
ALTER TABLE certificates ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
ALTER TABLE certificates ADD COLUMN node TEXT NOT NULL DEFAULT '';
ALTER TABLE certificates ADD COLUMN grp TEXT NOT NULL DEFAULT '';
ALTER TABLE certificates ADD COLUMN revoked REAL;
CREATE INDEX certificates_spiffe_id ON certificates (spiffe_id);
CREATE INDEX certificates_parent ON certificates (parent) WHERE parent != '';
CREATE INDEX certificates_revoked ON certificates (revoked) WHERE revoked IS NOT NULL;
ALTER TABLE tokens ADD COLUMN node TEXT NOT NULL DEFAULT '';
ALTER TABLE tokens ADD COLUMN grp TEXT NOT NULL DEFAULT '';
ALTER TABLE tokens ADD COLUMN root_sha256 TEXT NOT NULL DEFAULT '';
CREATE TABLE revoked_identities (spiffe_id TEXT PRIMARY KEY, at REAL NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE registrations (
  namespace TEXT NOT NULL, name TEXT NOT NULL, grp TEXT NOT NULL, service_account TEXT NOT NULL,
  address TEXT NOT NULL, network TEXT NOT NULL, locality TEXT NOT NULL, labels TEXT NOT NULL, node TEXT NOT NULL,
  serial TEXT NOT NULL, stream TEXT NOT NULL, connected REAL NOT NULL, disconnected REAL, gone INTEGER NOT NULL,
  PRIMARY KEY (namespace, name)
) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES ('generation', CAST('1' AS BLOB));
"""


def _to_2(connection: sqlite3.Connection) -> None:
    _execute(connection, _FORMAT_2)
    # Who signed what was issued so far is known: there was one root.
    for (certificate,) in connection.execute("SELECT certificate FROM roots").fetchall():
        signer = x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
        connection.execute("UPDATE certificates SET signer = ?", (signer,))
        connection.execute("UPDATE tokens SET root_sha256 = ? WHERE kind = 'one-time'", (signer,))
    for serial, caller in connection.execute("SELECT serial, caller FROM certificates").fetchall():
        kind, _, token = caller.rpartition(" ")
        if kind:
            connection.execute("UPDATE certificates SET token = ? WHERE serial = ?", (token, serial))


def _execute(connection: sqlite3.Connection, text: str) -> None:
    """Statement by statement: `executescript` would end the transaction that this is a part of."""
    for statement in text.split(";"):
        if statement.strip():
            connection.execute(statement)


_MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {
    1: lambda connection: _execute(connection, _FORMAT_1),
    2: _to_2,
}
"""What makes each format out of the one before."""


def connect(path: Path) -> sqlite3.Connection:
    """Open the file. Whatever is committed is on the disk when the commit returns."""
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")
    return connection


def version_of(connection: sqlite3.Connection) -> int:
    """The format of a file; 0 when there is nothing in it."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    return int(version)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a file to the present format, in one transaction."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for version in range(version_of(connection) + 1, SCHEMA_VERSION + 1):
            _MIGRATIONS[version](connection)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def create_private(path: Path) -> None:
    """Make an empty file that only its owner may read; SQLite gives its side files the same mode."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))


def copy_database(source: sqlite3.Connection, path: Path) -> None:
    """Copy a file that may be in use to `path`, 0600, replaced by rename: whole or not at all.

    Raises:
        ConfigurationError: it cannot be written.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        try:
            create_private(temporary)
            with contextlib.closing(sqlite3.connect(temporary)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without side files
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except (OSError, sqlite3.Error) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigurationError(f"{str(path)!r} cannot be written ({reason}); name another place") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
