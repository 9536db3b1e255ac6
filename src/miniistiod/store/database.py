"""The state: one SQLite file in a private directory. Whatever was answered to a caller was committed before.

Several processes may open it (the daemon and `miniistiod token create`); each change is one short transaction, and
SQLite lets one writer in at a time. Methods are safe to call from threads.
"""

from __future__ import annotations

from miniistiod.store.mesh import MeshState

__all__ = ["Store"]


class Store(MeshState):
    """The state of one mesh. Use `Store.create` once, `Store.open` afterwards; close it."""
