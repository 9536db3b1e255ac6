"""One structured line per connection, with the names and the order of ztunnel's access log."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from hbone.daemon.logs import Bare, Shared, debugging, get_logger
from ztunnel.errors import address_text

if TYPE_CHECKING:
    from typing import Any

    from hbone.connect import Baggage
    from hbone.daemon.logs import Logger
    from hbone.identity import SpiffeId
    from ztunnel.errors import DataplaneError
    from ztunnel.mesh.address import Address
    from ztunnel.mesh.rbac import Decision
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.workload import Workload

__all__ = ["INBOUND", "OUTBOUND", "AccessLog", "AccessRecord"]

INBOUND = "inbound"
OUTBOUND = "outbound"
_KEPT = 1024
"""Pairs of source and destination whose fields are kept written out."""


class AccessRecord:
    """What is told about one connection. Made when its route is known; nothing is formatted before it ends.

    Args:
        direction: `inbound` or `outbound`.
        source: Address of the downstream peer.
        destination: Outbound: the next hop. 15008: the local address and port. 15006: the original destination.
        hbone_authority: `:authority` of the CONNECT, if there is one.
        source_workload: Of the source, if it is known.
        source_identity: What the source proved, or our own in an outbound tunnel; None for plaintext.
        destination_workload: Of the destination, if it is known.
        destination_identity: What the destination proved, or our own in an inbound tunnel; None for plaintext.
        service: The service meant.
        opened_at: Monotonic time, in seconds.
        source_baggage: What the source's proxy says about it; used when its workload is not known.
    """

    __slots__ = (
        "destination",
        "destination_identity",
        "destination_workload",
        "direction",
        "hbone_authority",
        "opened_at",
        "service",
        "source",
        "source_baggage",
        "source_identity",
        "source_workload",
    )

    def __init__(
        self,
        direction: str,
        source: Address,
        destination: Address,
        *,
        hbone_authority: str | None = None,
        source_workload: Workload | None = None,
        source_identity: SpiffeId | None = None,
        destination_workload: Workload | None = None,
        destination_identity: SpiffeId | None = None,
        service: Service | None = None,
        opened_at: float = 0.0,
        source_baggage: Baggage | None = None,
    ) -> None:
        self.direction = direction
        self.source = source
        self.destination = destination
        self.hbone_authority = hbone_authority
        self.source_workload = source_workload
        self.source_identity = source_identity
        self.destination_workload = destination_workload
        self.destination_identity = destination_identity
        self.service = service
        self.opened_at = opened_at
        self.source_baggage = source_baggage

    def fields(self) -> dict[str, Any]:
        """The fields that are known when it opens, in order; absent ones are left out."""
        fields: dict[str, Any] = {"src.addr": Bare(address_text(self.source))}
        workload, baggage = self.source_workload, self.source_baggage
        if workload is not None:
            fields.update(_workload("src", workload, self.source_identity))
        elif baggage is not None:
            _add(fields, "src.workload", baggage.service_name or baggage.workload_name)
            _add(fields, "src.namespace", baggage.namespace)
            if self.source_identity is not None:
                fields["src.identity"] = str(self.source_identity)
            _add(fields, "src.cluster", baggage.cluster)
        elif self.source_identity is not None:
            fields["src.identity"] = str(self.source_identity)
        fields["dst.addr"] = Bare(address_text(self.destination))
        if self.hbone_authority is not None:
            # A host name from the wire may hold anything; only an address goes without quotes.
            fields["dst.hbone_addr"] = self.hbone_authority
        if self.service is not None:
            fields["dst.service"] = self.service.hostname
        if self.destination_workload is not None:
            fields.update(_workload("dst", self.destination_workload, self.destination_identity))
        elif self.destination_identity is not None:
            fields["dst.identity"] = str(self.destination_identity)
        fields["direction"] = self.direction
        return fields


def _add(fields: dict[str, Any], name: str, value: str | None) -> None:
    if value:
        fields[name] = value


@functools.lru_cache(maxsize=1024)
def _workload(side: str, workload: Workload, identity: SpiffeId | None) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = workload.name or workload.canonical_name
    if name:
        fields[side + ".workload"] = name
    if workload.namespace:
        fields[side + ".namespace"] = workload.namespace
    if identity is not None:
        fields[side + ".identity"] = str(identity)
    if workload.cluster_id:
        fields[side + ".cluster"] = workload.cluster_id
    return fields


class AccessLog:
    """Writes the lines.

    Args:
        policy_at_info: Log each policy decision at info instead of debug.
    """

    def __init__(self, *, policy_at_info: bool = False) -> None:
        self._log: Logger = get_logger("access")
        self._policy: Logger = get_logger("ztunnel.mesh.rbac")
        self._policy_level = "info" if policy_at_info else "debug"
        self._kept: dict[tuple[Any, ...], tuple[Shared, tuple[Any, ...]]] = {}

    def opened(self, record: AccessRecord) -> None:
        """A connection's record was made; a line at debug level only."""
        if debugging():
            self._log.debug("connection opened", **record.fields())

    def complete(
        self, record: AccessRecord, *, received: int, sent: int, now: float, error: BaseException | str | None = None
    ) -> None:
        """The connection ended: exactly one line per record.

        Args:
            record: The connection.
            received: Bytes from the downstream peer to the upstream.
            sent: Bytes from the upstream to the downstream peer.
            now: Monotonic time, in seconds.
            error: Why it failed, if it did.
        """
        # "Sent" is seen from the workload we serve: the client's bytes outbound, the server's inbound.
        outbound = record.direction == OUTBOUND
        last: dict[str, Any] = {
            "bytes_sent": received if outbound else sent,
            "bytes_recv": sent if outbound else received,
            "duration": f"{max(0, int((now - record.opened_at) * 1000))}ms",
        }
        method = "info"
        if error is not None:
            last["error"] = str(error) or type(error).__name__
            method = "error"
        first = {"src.addr": Bare(address_text(record.source))}
        self._log.line(method, "connection complete", first, self._shared(record), last)

    def _shared(self, record: AccessRecord) -> Shared:
        """The fields that connections between the same two have in common: all but the source's port."""
        parts = (
            record.source_workload,
            record.source_identity,
            record.source_baggage,
            record.destination_workload,
            record.destination_identity,
            record.service,
        )
        # By identity, since comparing workloads costs more than writing them out; `parts` is kept, so no id is reused.
        key = (*map(id, parts), address_text(record.destination), record.hbone_authority, record.direction)
        found = self._kept.get(key)
        if found is None:
            fields = record.fields()
            del fields["src.addr"]
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            found = self._kept[key] = (Shared(fields), parts)
        return found[0]

    def early_deny(
        self, direction: str, source: Address | None, destination: Address | None, error: DataplaneError | str
    ) -> None:
        """A connection was refused before there was a record."""
        fields: dict[str, Any] = {}
        if source is not None:
            fields["src.addr"] = Bare(address_text(source))
        if destination is not None:
            fields["dst.addr"] = Bare(address_text(destination))
        self._log.warning("connection failed", **fields, direction=direction, error=str(error))

    def decision(self, decision: Decision) -> None:
        """How the policies decided, dry runs included."""
        if self._policy_level == "debug" and not debugging():
            return
        for message, policy in decision.dry_run:
            self._policy.log(self._policy_level, message, **({"policy": policy} if policy else {}))
        fields = {"policy": decision.policy} if decision.policy else {}
        self._policy.log(self._policy_level, decision.message, **fields)
