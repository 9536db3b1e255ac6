"""What a ztunnel in a program tells of its connections: a line and counters each, as the daemon's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

from hbone.daemon.logs import get_logger
from hbone.errors import ErrorCode, PeerRevokedError, StreamResetError
from ztunnel.dataplane.plan import inbound_accounts
from ztunnel.errors import CertificateRevoked, DataplaneError, ReceiveFailed, SendFailed, address_text
from ztunnel.logs import INBOUND, OUTBOUND, AccessLog, AccessRecord, Parties
from ztunnel.mesh.route import Tunnel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hbone.connect import Baggage, ConnectRequest
    from hbone.identity import SpiffeId
    from hbone.trio import HboneStream
    from ztunnel.config import Config
    from ztunnel.mesh import Address, Store, Workload
    from ztunnel.mesh.inbound import InboundTarget
    from ztunnel.mesh.route import Plain
    from ztunnel.metrics import Metrics, Traffic

    Told = Callable[[Mapping[str, Any]], object]

__all__ = ["Books", "Entry", "PlainStream"]

ENDS = frozenset({ErrorCode.NO_ERROR, ErrorCode.CANCEL})
"""RST_STREAM codes of an orderly end."""

log = get_logger("ztunnel.embed")


class Entry:
    """One connection, from its route to its end."""

    def __init__(self, books: Books, parties: Parties, source: str, traffic: Traffic) -> None:
        self.error: DataplaneError | None = None
        """Why it is about to be cut."""
        self._books = books
        self._record = AccessRecord(parties, source, books.clock())
        self._traffic = traffic
        self._stream: HboneStream | PlainStream | None = None
        self._counted = (0, 0)
        self._closed = False
        traffic.opened()
        books.log.opened(self._record)
        books.entries[self] = None

    def follow(self, stream: HboneStream | PlainStream) -> None:
        """Count what it carries, and close with it."""
        self._stream = stream
        stream.on_over = self._over
        if stream.over:
            self._over()

    def account(self) -> None:
        """Bring the counters up to date."""
        received, sent = self._moved()
        self._traffic.received(received - self._counted[0])
        self._traffic.sent(sent - self._counted[1])
        self._counted = received, sent

    def _moved(self) -> tuple[int, int]:
        """Bytes towards the upstream and towards the downstream peer, which outbound is the program."""
        stream = self._stream
        if stream is None:
            return 0, 0
        if self._record.parties.direction == OUTBOUND:
            return stream.sent_bytes, stream.received_bytes
        return stream.received_bytes, stream.sent_bytes

    def _over(self) -> None:
        self.close(self.error or self._reason())

    def _reason(self) -> DataplaneError | None:
        failure = self._stream.failure if self._stream is not None else None
        if failure is None or (isinstance(failure, StreamResetError) and failure.code in ENDS):
            return None
        if isinstance(failure, PeerRevokedError) or isinstance(failure.__cause__, PeerRevokedError):
            return CertificateRevoked()
        kind = ReceiveFailed if self._record.parties.direction == OUTBOUND else SendFailed
        return kind(str(failure))

    def close(self, error: DataplaneError | None) -> None:
        """It is over. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        books = self._books
        books.entries.pop(self, None)
        self.account()
        self._traffic.closed(*(() if error is None else (error.flag,)))
        received, sent = self._counted
        now = books.clock()
        books.log.complete(self._record, received=received, sent=sent, now=now, error=error)
        books.tell(self._record, received, sent, now, error)


class Books:
    """All connections of one embedded ztunnel.

    Args:
        config: settings.
        metrics: counters.
        told: called with the fields of each line when a connection ended.
        clock: seconds, monotonic.
    """

    def __init__(
        self, config: Config, metrics: Metrics, told: Told | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.metrics = metrics
        self.log = AccessLog(policy_at_info=config.policy_info_logging)
        self.clock = clock
        self.entries: dict[Entry, None] = {}
        """Of connections that live."""
        self._config = config
        self._told = told
        metrics.before_reading.append(self._account)

    def _account(self) -> None:
        for entry in self.entries:
            entry.account()

    def outbound(
        self,
        source: Workload,
        found: Tunnel | Plain,
        *,
        answered: SpiffeId | None = None,
        baggage: Baggage | None = None,
    ) -> Entry:
        """A connection of the program to where its route leads.

        Args:
            source: our workload.
            found: the route.
            answered: who did, where only that shows who it is: behind a gateway.
            baggage: what they say of themselves.
        """
        tunnel = found if isinstance(found, Tunnel) else None
        far = found.workload if tunnel is None or tunnel.inner is None else None
        identity = source.identity if tunnel is not None else None
        peer = answered or (far.identity if tunnel is not None and far is not None else None)
        parties = Parties(
            OUTBOUND,
            tunnel.next_hop if tunnel is not None else found.address,  # type: ignore[union-attr]  # Plain, then
            hbone_authority=tunnel.authority if tunnel is not None else None,
            source_workload=source,
            source_identity=identity,
            destination_workload=far,
            destination_identity=peer,
            service=found.service,
            destination_baggage=baggage,
        )
        security = "mutual_tls" if tunnel is not None else "unknown"
        traffic = self.metrics.connection(
            "source", source, identity, far, found.service, answered, security, baggage if answered else None
        )
        ours = address_text((source.addresses[0], 0)) if source.addresses else ""
        return Entry(self, parties, ours, traffic)

    def inbound(
        self,
        store: Store,
        workload: Workload,
        client: Address,
        local: Address,
        peer: SpiffeId,
        request: ConnectRequest,
        target: InboundTarget,
    ) -> Entry:
        """A stream of a peer to one of the program's ports."""
        parties, traffic = inbound_accounts(
            self._config, store, self.metrics, workload, client, local, peer, request, target
        )
        return Entry(self, parties, address_text(client), traffic)

    def tell(self, record: AccessRecord, received: int, sent: int, now: float, error: DataplaneError | None) -> None:
        """Tell the program of a connection that ended; a fault of its own is logged, and goes no further."""
        if self._told is None:
            return
        if record.parties.direction == INBOUND:  # as in the log: seen from the workload we serve
            received, sent = sent, received
        fields = {name: str(value) for name, value in record.fields().items()}
        ended: dict[str, Any] = {**fields, "bytes_sent": received, "bytes_recv": sent}
        ended["duration"] = f"{max(0, int((now - record.opened_at) * 1000))}ms"
        if error is not None:
            ended["error"] = str(error)
        try:
            self._told(ended)
        except Exception:
            log.exception("the program's on_connection failed")


class PlainStream(trio.abc.HalfCloseableStream):
    """A TCP connection to outside the mesh, with what the books need. `socket` is Trio's."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.socket = stream.socket
        self.received_bytes = 0
        self.sent_bytes = 0
        self.failure: Exception | None = None
        """Why it broke."""
        self.over = False
        self.on_over: Callable[[], object] | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive at least one byte; b"" at the end."""
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as error:
            self.failure = error
            raise
        self.received_bytes += len(data)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`."""
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            self.failure = error
            raise
        self.sent_bytes += memoryview(data).nbytes

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """End our direction."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close both directions."""
        try:
            await self._stream.aclose()
        finally:
            if not self.over:
                self.over = True
                if self.on_over is not None:
                    self.on_over()
