"""The part of the state that the mesh lives on, besides its documents: what was seen and decided for them."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING, Any

from miniistiod.registry import HboneMark
from miniistiod.store.records import Registration, StaleAuthorityError, fields_of
from miniistiod.store.tokens import TokenState

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MeshState"]

_REGISTRATION = (
    "namespace, name, grp, service_account, address, network, locality, labels, node, serial, stream, connected,"
    " disconnected, gone"
)


class MeshState(TokenState):
    """Marks, automatic addresses, the last good documents, and machines that registered themselves."""

    def marks(self) -> dict[tuple[str, str], HboneMark]:
        """WorkloadEntries that are known to run a ztunnel."""
        rows = self._rows("SELECT namespace, name, service_account, node FROM marks")
        return {(row[0], row[1]): HboneMark(service_account=row[2], node=row[3]) for row in rows}

    def mark(self, namespace: str, name: str, service_account: str, node: str, now: float) -> None:
        """Remember that a WorkloadEntry runs a ztunnel."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO marks VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " service_account = excluded.service_account, node = excluded.node",
                (namespace, name, service_account, node, now),
            )

    def vips(self) -> dict[tuple[str, str], int]:
        """Automatic addresses."""
        return {(row[0], row[1]): row[2] for row in self._rows("SELECT namespace, host, number FROM vips")}

    def first_seen(self) -> dict[tuple[str, str, str], datetime.datetime]:
        """When documents were first seen."""
        return {
            (row[0], row[1], row[2]): datetime.datetime.fromtimestamp(row[3], datetime.UTC)
            for row in self._rows("SELECT kind, namespace, name, seen FROM first_seen")
        }

    def documents(self) -> dict[str, str]:
        """The last good set of documents, path to text."""
        return {row[0]: row[1] for row in self._rows("SELECT path, text FROM documents")}

    def change_documents(
        self,
        files: Mapping[str, str | None],
        vips: Mapping[tuple[str, str], int] | None,
        seen: Mapping[tuple[str, str, str], datetime.datetime | None],
    ) -> None:
        """Remember how a good set of documents differs from the one before, and what was decided for it.

        Args:
            files: path to text; None for a file that is gone.
            vips: all automatic addresses; None when they are those of before.
            seen: documents to when they were first seen; None for those that are gone.
        """
        with self._transaction() as connection:
            gone = [(path,) for path, text in files.items() if text is None]
            kept = [(path, text) for path, text in files.items() if text is not None]
            connection.executemany("DELETE FROM documents WHERE path = ?", gone)
            connection.executemany("INSERT OR REPLACE INTO documents VALUES (?, ?)", kept)
            if vips is not None:
                connection.execute("DELETE FROM vips")
                rows = [(*key, number) for key, number in vips.items()]
                connection.executemany("INSERT INTO vips VALUES (?, ?, ?)", rows)
            for key, moment in seen.items():
                if moment is None:
                    connection.execute("DELETE FROM first_seen WHERE kind = ? AND namespace = ? AND name = ?", key)
                else:
                    row = (*key, moment.timestamp())
                    connection.execute("INSERT OR REPLACE INTO first_seen VALUES (?, ?, ?, ?)", row)

    # -- machines that register themselves

    def registrations(self) -> dict[tuple[str, str], Registration]:
        """Every machine that registered itself, by namespace and name."""
        found = (_registration(row) for row in self._rows(f"SELECT {_REGISTRATION} FROM registrations"))
        return {item.key: item for item in found}

    def register(self, registration: Registration, generation: int | None = None) -> None:
        """Remember a machine, or what is new about it.

        Raises:
            StaleAuthorityError: `generation` is not the present one: it may have been revoked meanwhile.
        """
        with self._transaction() as connection:
            if generation not in (None, self.generation):
                raise StaleAuthorityError
            connection.execute(
                f"INSERT OR REPLACE INTO registrations ({_REGISTRATION}) VALUES ({', '.join('?' * 14)})",
                (
                    registration.namespace,
                    registration.name,
                    registration.group,
                    registration.service_account,
                    registration.address,
                    registration.network,
                    registration.locality,
                    json.dumps(registration.labels, sort_keys=True),
                    registration.node,
                    registration.serial,
                    registration.stream,
                    registration.connected,
                    registration.disconnected,
                    int(registration.gone),
                ),
            )

    def unregister(self, namespace: str, name: str) -> None:
        """Forget a machine."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM registrations WHERE namespace = ? AND name = ?", (namespace, name))

    def describe(self) -> str:
        """The state in one line of JSON, without secrets; for debug pages."""
        counts = {
            table: self._rows(f"SELECT count(*) FROM {table}")[0][0]
            for table in ("certificates", "tokens", "marks", "registrations")
        }
        return json.dumps({"trust_domain": self.trust_domain, **counts})


def _registration(row: Any) -> Registration:
    fields = fields_of(_REGISTRATION, row)
    return Registration(**{**fields, "labels": json.loads(fields["labels"]), "gone": bool(fields["gone"])})
