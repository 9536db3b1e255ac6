"""The data path in several processes under one parent.

```text
daemon: certificates, discovery, pages, state directory ── executes ──> starter ── forks twice ──> workers
   │  a socket each: the mesh as it came in, the certificate, accept, drain  ────────────────────────^
   └─ memory shared with each: its counters, which outlive it
```
"""

from __future__ import annotations

__all__: list[str] = []
