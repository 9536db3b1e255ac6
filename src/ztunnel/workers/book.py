"""Counters in memory that a worker shares with its parent, so that none is lost with a worker that is killed.

```text
row 0          sockets open, connections closed by policy, label sets merged, refused and not found by revocation lists
row n          a label set: opened, received, sent, closed by each flag      or a host name: resolved
```

The worker says once what a row means, on its socket, before it counts there. After that counting is a store to memory.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from ztunnel.errors import ResponseFlag
from ztunnel.metrics import MAX_SERIES, Counts, Labels, Metrics, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.metrics import DnsKey

__all__ = ["Page", "WorkerMetrics", "make_memory"]

_FLAGS: Final = tuple(ResponseFlag)
_ROW: Final = struct.Struct(f"={3 + len(_FLAGS)}q")
_COUNT: Final = struct.Struct("=q")
_FIRST: Final = struct.Struct("=8q")
_REPORTERS: Final = ("source", "destination")
_ROWS: Final = 2 * MAX_SERIES + 4  # label sets with the two merged ones, host names, the first row
_SIZE: Final = _ROWS * _ROW.size


def make_memory() -> int:
    """The memory of one worker, as a descriptor. Pages that are not written cost nothing."""
    fd = os.memfd_create("ztunnel-counters", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _SIZE)
    except BaseException:
        os.close(fd)
        raise
    return fd


class _Series(Traffic):
    """Counters that stand in a row as well."""

    __slots__ = ("_at", "_memory")

    def __init__(self, labels: Labels, memory: mmap.mmap, row: int) -> None:
        super().__init__(labels)
        self._memory = memory
        self._at = row * _ROW.size

    def opened(self) -> None:
        super().opened()
        self.write()

    def closed(self, flag: ResponseFlag = ResponseFlag.NONE) -> None:
        super().closed(flag)
        self.write()

    def write(self) -> None:
        """Bring the row up to date."""
        closed = self.closed_by_flag
        _ROW.pack_into(
            self._memory,
            self._at,
            self.opened_count,
            self.received_bytes,
            self.sent_bytes,
            *[closed.get(flag, 0) for flag in _FLAGS],
        )


class WorkerMetrics(Metrics):
    """The counters of a worker.

    Args:
        fd: of `make_memory`; closed here.
        announce: sends what a new row means to the parent.
    """

    def __init__(self, fd: int, announce: Callable[[bytes], None]) -> None:
        super().__init__()
        self._memory = mmap.mmap(fd, _SIZE)
        os.close(fd)
        self._announce = announce
        self._next_row = 1
        self._names: dict[DnsKey, int] = {}

    def make_traffic(self, labels: Labels) -> Traffic:
        """Counters with a row of their own."""
        return _Series(labels, self._memory, self._new_row({"traffic": labels}))

    def _new_row(self, meaning: dict[str, Any]) -> int:
        row = self._next_row
        self._next_row += 1
        self._announce(json.dumps({"row": row, **meaning}).encode())
        return row

    def socket_opened(self, reporter: str) -> None:
        """A connection was accepted."""
        super().socket_opened(reporter)
        self._write_first()

    def socket_closed(self, reporter: str) -> None:
        """An accepted connection is done with."""
        super().socket_closed(reporter)
        self._write_first()

    def policy_closed(self) -> None:
        """A live connection was closed by a change of policy."""
        super().policy_closed()
        self._write_first()

    def crl_rejected(self, reporter: str) -> None:
        """A tunnel was refused or closed because its peer's certificate was revoked."""
        super().crl_rejected(reporter)
        self._write_first()

    def crl_untracked(self, reporter: str) -> None:
        """A live tunnel's certificates could not be looked up in the revocation lists."""
        super().crl_untracked(reporter)
        self._write_first()

    def name_resolved(self, key: DnsKey) -> None:
        """A host name was resolved for a connection."""
        super().name_resolved(key)
        count = self.counts.on_demand.get(key)
        if count is not None:
            row = self._names.get(key)
            if row is None:
                row = self._names[key] = self._new_row({"name": key})
            _COUNT.pack_into(self._memory, row * _ROW.size, count)

    def write(self) -> None:
        """Bring every row up to date, after the bytes of live connections were counted."""
        self._write_first()
        for traffic in self.counts.traffic.values():
            if isinstance(traffic, _Series):
                traffic.write()

    def _write_first(self) -> None:
        counts = self.counts
        sockets = counts.sockets
        _FIRST.pack_into(
            self._memory,
            0,
            sockets.get("source", 0),
            sockets.get("destination", 0),
            counts.policy_closed,
            counts.overflow,
            *(counts.crl_rejected.get(reporter, 0) for reporter in _REPORTERS),
            *(counts.crl_untracked.get(reporter, 0) for reporter in _REPORTERS),
        )


class Page:
    """The parent's view of a worker's counters.

    Args:
        fd: of `make_memory`; stays open.
    """

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _SIZE, prot=mmap.PROT_READ)
        self._series: dict[int, Labels] = {}
        self._names: dict[int, DnsKey] = {}

    def announced(self, body: bytes) -> None:
        """What a row means.

        Raises:
            ValueError: it cannot be understood.
        """
        meaning = json.loads(body)
        row = meaning["row"]
        if not isinstance(row, int) or not 0 < row < _ROWS:
            raise ValueError(f"row {row!r}; there are {_ROWS}")
        if "traffic" in meaning:
            reporter, source, destination, policy, locality = meaning["traffic"]
            self._series[row] = (reporter, tuple(source), tuple(destination), policy, tuple(locality))
        else:
            source, hostname = meaning["name"]
            self._names[row] = (tuple(source), hostname)

    def counts(self) -> Counts:
        """What was counted so far."""
        memory = self._memory
        source, destination, policy_closed, overflow, *crl = _FIRST.unpack_from(memory, 0)
        sockets = dict(zip(_REPORTERS, (source, destination), strict=True))
        rejected, untracked = (
            {reporter: count for reporter, count in zip(_REPORTERS, found, strict=True) if count}
            for found in (crl[:2], crl[2:])
        )
        counts = Counts(
            sockets=sockets,
            policy_closed=policy_closed,
            overflow=overflow,
            crl_rejected=rejected,
            crl_untracked=untracked,
        )
        for row, labels in self._series.items():
            traffic = counts.traffic[labels] = Traffic(labels)
            opened, received, sent, *closed = _ROW.unpack_from(memory, row * _ROW.size)
            traffic.opened_count, traffic.received_bytes, traffic.sent_bytes = opened, received, sent
            traffic.closed_by_flag = {flag: count for flag, count in zip(_FLAGS, closed, strict=True) if count}
            traffic.failed_by_flag = {
                flag: count for flag, count in traffic.closed_by_flag.items() if flag is not ResponseFlag.NONE
            }
        for row, key in self._names.items():
            counts.on_demand[key] = _COUNT.unpack_from(memory, row * _ROW.size)[0]
        return counts

    def last_counts(self) -> tuple[Counts, int]:
        """What a worker that ended had counted; the connections that ended with it count as failed.

        Returns:
            The counts, and the number of those connections.
        """
        counts = self.counts()
        counts.sockets.clear()
        lost = 0
        for traffic in counts.traffic.values():
            left = traffic.opened_count - sum(traffic.closed_by_flag.values())
            for _ in range(left):
                traffic.closed(ResponseFlag.CONNECT)
            lost += max(0, left)
        return counts, lost

    def close(self) -> None:
        """Let the memory go."""
        self._memory.close()
