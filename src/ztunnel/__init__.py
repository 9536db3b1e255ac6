"""The node proxy of an ambient mesh, as a daemon or inside a program.

`Ztunnel` is the mesh inside a program, `Config` its settings, and `DataplaneError` why a connection is refused.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ztunnel.config import Config
    from ztunnel.embed import Ztunnel
    from ztunnel.errors import DataplaneError

__all__ = ["Config", "DataplaneError", "Ztunnel"]

_HOME = {"Config": "ztunnel.config", "DataplaneError": "ztunnel.errors", "Ztunnel": "ztunnel.embed"}


def __getattr__(name: str) -> Any:
    """Import what `name` needs when it is first used: `ztunnel.mesh` and `ztunnel.wire` are used without a loop."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'ztunnel' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
