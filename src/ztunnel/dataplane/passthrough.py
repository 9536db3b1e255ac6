"""Plaintext connections to the workload: 15006. The peer has no identity, and the policies are told so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ztunnel.dataplane.connections import InboundConnection
from ztunnel.dataplane.dial import Dial
from ztunnel.dataplane.relay import Relay, join
from ztunnel.errors import ConnectFailed, DataplaneError, SelfCall, address_text
from ztunnel.logs import INBOUND, AccessRecord, Parties
from ztunnel.mesh.inbound import guess_service
from ztunnel.mesh.rbac import Connection as PolicyFacts

if TYPE_CHECKING:
    import socket

    from ztunnel.dataplane.plane import Plane
    from ztunnel.mesh.address import Address
    from ztunnel.mesh.workload import Workload

__all__ = ["Passthrough", "PlainConnection"]


class Passthrough:
    """Takes captured incoming plaintext to the application.

    Args:
        plane: what the data path shares.
        transparent: applications see the client's own address.
    """

    def __init__(self, plane: Plane, *, transparent: bool = False) -> None:
        self.plane = plane
        self.transparent = transparent

    def accepted(self, sock: socket.SocketType, peer: Address) -> None:
        """A connection to 15006."""
        plane = self.plane
        plane.metrics.socket_opened("destination")
        destination = plane.calls.original_destination(sock, peer[0])
        if destination[1] in plane.own_ports:
            self.refuse(sock, peer, destination, SelfCall())
            return
        workload = plane.local.current
        if workload is not None:
            self._serve(sock, peer, destination, workload)
        else:
            plane.reactor.start_task(self._wait_and_serve, sock, peer, destination)

    async def _wait_and_serve(self, sock: socket.SocketType, peer: Address, destination: Address) -> None:
        error: DataplaneError = self.plane.local.unknown()
        workload: Workload | None = None
        try:
            workload = await self.plane.local.wait()
        except DataplaneError as exc:
            error = exc
        finally:
            if workload is None:
                self.refuse(sock, peer, destination, error)
        if workload is not None:
            self._serve(sock, peer, destination, workload)

    def refuse(self, sock: socket.SocketType, peer: Address, destination: Address, error: DataplaneError) -> None:
        """Close it, before it has a record."""
        self.plane.metrics.socket_closed("destination")
        self.plane.log.early_deny(INBOUND, peer, destination, error)
        self.plane.reactor.close(sock)

    def _serve(self, sock: socket.SocketType, peer: Address, destination: Address, workload: Workload) -> None:
        PlainConnection(self, workload, PolicyFacts(peer[0], None, destination), sock).begin(peer, destination)


class PlainConnection(InboundConnection):
    """One plaintext connection, and the one to the application."""

    __slots__ = ("_dial", "_far", "_passthrough", "_sock")

    def __init__(
        self, passthrough: Passthrough, workload: Workload, facts: PolicyFacts, sock: socket.SocketType
    ) -> None:
        super().__init__(passthrough.plane, workload, facts)
        self._passthrough = passthrough
        self._sock = sock
        self._dial: Dial | None = None
        self._far: Relay | None = None

    def begin(self, peer: Address, destination: Address) -> None:
        """Record, register, ask, dial: in this order."""
        plane = self.plane
        source = plane.store.workload_by_address(plane.config.network, peer[0])
        service = guess_service(plane.store, self.workload, destination[1])
        parties = Parties(
            INBOUND, destination, source_workload=source, destination_workload=self.workload, service=service
        )
        record = AccessRecord(parties, address_text(peer), plane.reactor.now)
        traffic = plane.metrics.connection("destination", source, None, self.workload, service)
        plane.connections.register(self)
        self.open_record(record, traffic)
        error = self.check()
        if error is not None:
            self._fail(error)
            return
        self._dial = Dial(plane.reactor, plane.calls, self)
        self._dial.start(destination, peer[0] if self._passthrough.transparent else None, local=True)

    def dialed(self, sock: socket.SocketType, mask: int, *, watched: bool) -> None:
        """The application is there: relay."""
        self._dial = None
        plane = self.plane
        near = self.relay = Relay(plane.reactor, plane.calls, self._sock, self)
        far = self._far = Relay(plane.reactor, plane.calls, sock, self)
        join(near, far, watched=watched)

    def dial_failed(self, error: DataplaneError) -> None:
        """It is not."""
        self._dial = None
        self._fail(error)

    def on_fault(self) -> None:
        """A fault of ours."""
        self.abort(ConnectFailed("internal error"))

    def abort(self, error: DataplaneError) -> None:
        """Cut it."""
        if self.relay is not None and not self.relay.closed:
            self.relay.abort(error)
        else:
            self._fail(error)

    def _fail(self, error: DataplaneError) -> None:
        if self.closed:
            return
        if self._dial is not None:
            self._dial.cancel()
            self._dial = None
        self.plane.reactor.close(self._sock)
        self._over(error)

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        """One of the two sockets is closed."""
        near, far = self.relay, self._far
        if near is not None and far is not None and near.closed and far.closed:
            self._over(error)

    def _over(self, error: DataplaneError | None) -> None:
        if not self.closed:
            self.plane.metrics.socket_closed("destination")
            self.close_record(error)

    def bytes_moved(self) -> tuple[int, int]:
        """Written to the application, written to the peer."""
        near, far = self.relay, self._far
        return (far.written, near.written) if near is not None and far is not None else (0, 0)
