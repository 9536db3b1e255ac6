"""A small identity authority and control plane for ambient meshes without Kubernetes.

```python
async with miniistiod.MiniIstiod(miniistiod.Config(config_dir="mesh", state_dir="state", init=True)) as cp:
    print(cp.port, cp.create_token("shop", "orders"))
    await trio.sleep_forever()
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miniistiod.app import MiniIstiod
    from miniistiod.config import Address, Config

__all__ = ["Address", "Config", "MiniIstiod"]


def __getattr__(name: str) -> object:
    """The public names, imported at first use, so that the command can say which package is missing."""
    if name == "MiniIstiod":
        from miniistiod.app import MiniIstiod

        return MiniIstiod
    if name in ("Address", "Config"):
        from miniistiod import config

        return getattr(config, name)
    raise AttributeError(f"module 'miniistiod' has no attribute {name!r}")
