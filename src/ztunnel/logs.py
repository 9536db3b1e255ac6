"""One structured line per connection, with the names and the order of ztunnel's access log."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from hbone.connect import Baggage
from hbone.daemon.logs import ADDRESS, COUNT, MILLISECONDS, Bare, Lines, get_logger
from ztunnel.errors import address_text

if TYPE_CHECKING:
    from typing import Any

    from hbone.daemon.logs import Logger
    from hbone.identity import SpiffeId
    from ztunnel.errors import DataplaneError
    from ztunnel.mesh.address import Address
    from ztunnel.mesh.rbac import Decision
    from ztunnel.mesh.service import Service
    from ztunnel.mesh.workload import Workload

__all__ = ["INBOUND", "OUTBOUND", "AccessLog", "AccessRecord", "Parties"]

INBOUND = "inbound"
OUTBOUND = "outbound"
_COMPLETE = "connection complete"


class Parties:
    """Who talks to whom: what the lines of several connections have in common. Nothing is formatted before a line is.

    Args:
        direction: `inbound` or `outbound`.
        destination: Outbound: the next hop. 15008: the local address and port. 15006: the original destination.
        hbone_authority: `:authority` of the CONNECT, if there is one.
        source_workload: Of the source, if it is known.
        source_identity: What the source proved, or our own in an outbound tunnel; None for plaintext.
        destination_workload: Of the destination, if it is known.
        destination_identity: What the destination proved, or our own in an inbound tunnel; None for plaintext.
        service: The service meant.
        source_baggage: What the source's proxy says about it; used when its workload is not known.
        destination_baggage: The same of the destination.
    """

    __slots__ = (
        "destination",
        "destination_baggage",
        "destination_identity",
        "destination_workload",
        "direction",
        "hbone_authority",
        "lines",
        "service",
        "source_baggage",
        "source_identity",
        "source_workload",
    )

    def __init__(
        self,
        direction: str,
        destination: Address,
        *,
        hbone_authority: str | None = None,
        source_workload: Workload | None = None,
        source_identity: SpiffeId | None = None,
        destination_workload: Workload | None = None,
        destination_identity: SpiffeId | None = None,
        service: Service | None = None,
        source_baggage: Baggage | None = None,
        destination_baggage: Baggage | None = None,
    ) -> None:
        self.direction = direction
        self.destination = destination
        self.hbone_authority = hbone_authority
        self.source_workload = source_workload
        self.source_identity = source_identity
        self.destination_workload = destination_workload
        self.destination_identity = destination_identity
        self.service = service
        self.source_baggage = source_baggage
        self.destination_baggage = destination_baggage
        self.lines: Lines | None = None
        """Their lines of connections that went well, once there was one."""

    def fields(self) -> dict[str, Any]:
        """The fields that are known when it opens, in order; absent ones are left out, the source's address is open."""
        fields: dict[str, Any] = {"src.addr": ADDRESS}
        fields.update(_party("src", self.source_workload, self.source_identity, self.source_baggage))
        fields["dst.addr"] = Bare(address_text(self.destination))
        if self.hbone_authority is not None:
            # A host name from the wire may hold anything; only an address goes without quotes.
            fields["dst.hbone_addr"] = self.hbone_authority
        if self.service is not None:
            fields["dst.service"] = self.service.hostname
        fields.update(_party("dst", self.destination_workload, self.destination_identity, self.destination_baggage))
        fields["direction"] = self.direction
        return fields


class AccessRecord:
    """What is told about one connection. Made when its route is known.

    Args:
        parties: Who talks to whom.
        source: Address of the downstream peer, as text.
        opened_at: Monotonic time, in seconds.
    """

    __slots__ = ("opened_at", "parties", "source")

    def __init__(self, parties: Parties, source: str, opened_at: float = 0.0) -> None:
        self.parties = parties
        self.source = source
        self.opened_at = opened_at

    def fields(self) -> dict[str, Any]:
        """The fields that are known when it opens."""
        return {**self.parties.fields(), "src.addr": Bare(self.source)}


def _party(side: str, workload: Workload | None, identity: SpiffeId | None, baggage: Baggage | None) -> dict[str, str]:
    if workload is not None:
        return _workload(side, workload, identity)
    said = baggage or Baggage()
    values = {
        ".workload": said.service_name or said.workload_name,
        ".namespace": said.namespace,
        ".identity": str(identity) if identity is not None else None,
        ".cluster": said.cluster,
    }
    return {side + name: value for name, value in values.items() if value}


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

    def opened(self, record: AccessRecord) -> None:
        """A connection's record was made; a line at debug level only."""
        if self._log.debugs:
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
        parties = record.parties
        if (
            parties.direction == INBOUND
        ):  # "sent" is seen from the workload we serve: the client's bytes or the server's
            received, sent = sent, received
        duration = max(0, int((now - record.opened_at) * 1000))
        if error is None:
            lines = parties.lines
            if lines is None:
                fields = parties.fields() | {"bytes_sent": COUNT, "bytes_recv": COUNT, "duration": MILLISECONDS}
                lines = parties.lines = Lines(self._log, "info", _COMPLETE, fields)
            lines.write(record.source, received, sent, duration)
        else:
            why = str(error) or type(error).__name__
            fields = record.fields() | {"bytes_sent": received, "bytes_recv": sent, "duration": f"{duration}ms"}
            self._log.error(_COMPLETE, **fields, error=why)

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
        if self._policy_level == "debug" and not self._policy.debugs:
            return
        for message, policy in decision.dry_run:
            self._policy.log(self._policy_level, message, **({"policy": policy} if policy else {}))
        fields = {"policy": decision.policy} if decision.policy else {}
        self._policy.log(self._policy_level, decision.message, **fields)
