"""Live connections: their record, their counters, and the policies that they are asked about again.

A connection is registered before its policies are asked, so a change that comes in between finds it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from ztunnel.errors import DataplaneError, PolicyChanged, ResponseFlag, address_text
from ztunnel.jsonstream import Rows
from ztunnel.logs import INBOUND, OUTBOUND
from ztunnel.mesh.rbac import decide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ztunnel.dataplane.plane import Plane
    from ztunnel.dataplane.relay import Relay
    from ztunnel.logs import AccessRecord
    from ztunnel.mesh.rbac import Connection as PolicyFacts
    from ztunnel.mesh.rbac import Decision, PolicySet
    from ztunnel.mesh.store import Change, Store
    from ztunnel.mesh.workload import Workload
    from ztunnel.metrics import Traffic

__all__ = ["AppConnection", "Connections", "InboundConnection"]

_SLICE_SECONDS: Final = 0.001
_SLICE_STEP: Final = 16
_ACCOUNT_STEP: Final = 256


class AppConnection:
    """One connection of an application, from its record to its line in the log.

    Args:
        plane: what the data path shares.
        reporter: `source` or `destination`.
    """

    __slots__ = ("_counted_received", "_counted_sent", "closed", "plane", "record", "relay", "reporter", "traffic")

    def __init__(self, plane: Plane, reporter: str) -> None:
        self.plane = plane
        self.reporter = reporter
        self.closed = False
        self.record: AccessRecord | None = None
        self.traffic: Traffic | None = None
        self.relay: Relay | None = None
        """The relay of the socket that was accepted (outbound, passthrough) or dialled (a tunnel's stream)."""
        self._counted_received = 0
        self._counted_sent = 0

    def open_record(self, record: AccessRecord, traffic: Traffic) -> None:
        """From here on it counts, and will have its line in the log."""
        self.record = record
        self.traffic = traffic
        traffic.opened()
        self.plane.log.opened(record)

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes towards the upstream and towards the downstream peer, so far."""
        raise NotImplementedError

    def account(self) -> None:
        """Bring the counters up to date."""
        if self.traffic is not None:
            received, sent = self.bytes_moved()
            self.traffic.received_bytes += received - self._counted_received
            self.traffic.sent_bytes += sent - self._counted_sent
            self._counted_received = received
            self._counted_sent = sent

    def close_record(self, error: DataplaneError | None) -> None:
        """Write the line, count the end. Does nothing the second time."""
        if self.closed:
            return
        self.closed = True
        self.plane.connections.forget(self)
        record, traffic = self.record, self.traffic
        if record is None or traffic is None:
            return
        self.account()
        traffic.closed(ResponseFlag.NONE if error is None else error.flag)
        self.plane.log.complete(
            record,
            received=self._counted_received,
            sent=self._counted_sent,
            now=self.plane.reactor.now,
            error=error,
        )

    def abort(self, error: DataplaneError) -> None:
        """Cut it, for `error`."""
        raise NotImplementedError

    def dump(self) -> dict[str, Any] | None:
        """For `config_dump`; None before there is something to say. Source: ztunnel's dump of connections."""
        record = self.record
        if record is None:
            return None
        return {
            "src": record.source,
            "originalDst": record.parties.hbone_authority,
            "actualDst": address_text(record.parties.destination),
            "protocol": "TCP" if record.parties.hbone_authority is None else "HBONE",
        }


class InboundConnection(AppConnection):
    """One that policies decide about: a tunnel's stream, or plaintext."""

    __slots__ = ("facts", "workload")

    def __init__(self, plane: Plane, workload: Workload, facts: PolicyFacts) -> None:
        super().__init__(plane, "destination")
        self.workload = workload
        self.facts = facts

    def check(self) -> DataplaneError | None:
        """Ask the policies, at the start. Register first."""
        decision = self.decide()
        self.plane.log.decision(decision)
        return None if decision.allowed else decision.error()

    def decide(self) -> Decision:
        """What the policies say."""
        return decide(self.plane.store, self.workload, self.facts)

    def recheck(self) -> None:
        """Ask them again; closed at once if they say no now."""
        workload = self.plane.store.workload_by_uid(self.workload.uid) or self.workload
        self.workload = workload
        if not decide(self.plane.store, workload, self.facts).allowed:
            self.plane.metrics.policy_closed()
            self.abort(PolicyChanged())


class _Group:
    """The inbound connections of one workload, and the policies that all of them were asked about by, or will be."""

    __slots__ = ("members", "policies", "workload")

    def __init__(self, workload: Workload, policies: PolicySet) -> None:
        self.workload = workload
        self.policies = policies
        self.members: dict[InboundConnection, None] = {}


class Connections:
    """The live connections of one data path.

    Args:
        store: the policies.
        later: calls a function in the reactor's next turn.
        clock: seconds, monotonic.
    """

    def __init__(self, store: Store, later: Callable[[Callable[[], object]], None], clock: Callable[[], float]) -> None:
        self.inbound: dict[InboundConnection, None] = {}
        self.outbound: dict[AppConnection, None] = {}
        self._store = store
        self._later = later
        self._clock = clock
        self._groups: dict[str, _Group] = {}
        self._checking: dict[_Group, Iterator[InboundConnection]] = {}
        self._when_checked: list[Callable[[], object]] = []
        self._current: InboundConnection | None = None

    def __len__(self) -> int:
        return len(self.inbound) + len(self.outbound)

    def __iter__(self) -> Iterator[AppConnection]:
        return itertools.chain(list(self.inbound), list(self.outbound))

    def register(self, connection: InboundConnection) -> None:
        """From here on it is asked about again whenever the policies of its workload change."""
        self.inbound[connection] = None
        uid = connection.workload.uid
        group = self._groups.get(uid)
        if group is None:
            workload = self._store.workload_by_uid(uid) or connection.workload
            group = self._groups[uid] = _Group(workload, self._store.policies_for(workload))
        group.members[connection] = None

    def forget(self, connection: AppConnection) -> None:
        """It ended."""
        if isinstance(connection, InboundConnection):
            self.inbound.pop(connection, None)
            uid = connection.workload.uid
            group = self._groups.get(uid)
            if group is not None:
                group.members.pop(connection, None)
                if not group.members:
                    del self._groups[uid]
        else:
            self.outbound.pop(connection, None)

    def account(self) -> None:
        """Bring every connection's counters up to date."""
        for _ in self.accounting():
            pass

    def accounting(self) -> Iterator[None]:
        """The same, with pauses for who has other things to do."""
        for count, connection in enumerate(self, 1):
            if not connection.closed:
                connection.account()
            if count % _ACCOUNT_STEP == 0:
                yield

    def recheck(self, change: Change) -> None:
        """Ask the policies again about the connections of each workload whose policies changed.

        That costs a look at each workload that has connections; they themselves are looked at only when there is a
        reason to, a millisecond's worth a turn.
        """
        store = self._store
        running = bool(self._checking)
        for uid, group in self._groups.items():
            if not change.policies and uid not in change.workloads:
                continue
            group.workload = store.workload_by_uid(uid) or group.workload
            before, now = group.policies, store.policies_for(group.workload)
            if now is not before:
                group.policies = now
                if (now.policies, now.missing) != (before.policies, before.missing):
                    # From the start: those already asked saw older policies.
                    self._checking[group] = iter(list(group.members))
        if self._checking and not running:
            self._later(self._check_some)

    def _check_some(self) -> None:
        end = self._clock() + _SLICE_SECONDS
        count = 0
        while self._checking:
            group, members = next(iter(self._checking.items()))
            for connection in members:
                self._current = connection
                if not connection.closed:
                    connection.recheck()
                count += 1
                if count % _SLICE_STEP == 0 and self._clock() >= end:
                    self._later(self._check_some)
                    return
            if self._checking.get(group) is members:
                del self._checking[group]
        self._current = None
        calls, self._when_checked = self._when_checked, []
        for call in calls:
            call()

    def when_checked(self, call: Callable[[], object]) -> None:
        """Call once every connection was asked about by the policies as they are now; at once where all were."""
        if self._checking:
            self._when_checked.append(call)
        else:
            call()

    def on_fault(self) -> None:
        """A policy could not be asked: that connection is cut, and the others are asked."""
        connection = self._current
        self._later(self._check_some)
        if connection is not None and not connection.closed:
            connection.abort(PolicyChanged())

    def dump(self) -> dict[str, Rows]:
        """For `config_dump`; each is made when it is written."""
        return {
            INBOUND: Rows(list(self.inbound), lambda connection: connection.dump()),
            OUTBOUND: Rows(list(self.outbound), lambda connection: connection.dump()),
        }
