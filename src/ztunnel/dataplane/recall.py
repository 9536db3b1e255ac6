"""Certificates that were taken back: no handshake with them, and an end to the tunnels that have one.

A tunnel is asked about by the path that its handshake verified, and by no clock: an expiry can't look like a
revocation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from hbone.daemon.logs import get_logger
from hbone.identity import RevocationLists
from hbone.identity.svid import UNPARSABLE
from ztunnel.errors import CertificateRevoked, TlsFailed, address_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from hbone.identity import RevocationSource
    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.tunnel import Tunnel
    from ztunnel.errors import DataplaneError
    from ztunnel.metrics import Metrics

__all__ = ["Recall"]

_SLICE_SECONDS: Final = 0.001

log: Final = get_logger("ztunnel.dataplane")


class Recall:
    """Asks the revocation lists about tunnels.

    Args:
        source: of the lists; None: there are none.
        reactor: gives the time for it.
        metrics: counters.
    """

    def __init__(self, source: RevocationSource | None, reactor: Reactor, metrics: Metrics) -> None:
        self.members: list[tuple[str, Callable[[], Iterable[Tunnel]]]] = []
        """Where tunnels are found, with the `reporter` of metrics."""
        self._source = source
        self._reactor = reactor
        self._metrics = metrics
        self._nothing = RevocationLists()
        self._left: Iterator[tuple[str, Tunnel]] | None = None
        self._when_done: list[Callable[[], object]] = []
        self._unsubscribe = source.subscribe(self._changed) if source is not None else None

    @property
    def lists(self) -> RevocationLists:
        """For a handshake that begins now."""
        return self._source.current if self._source is not None else self._nothing

    def refused(self, reporter: str) -> None:
        """A handshake was refused for a revocation."""
        self._metrics.crl_rejected(reporter)

    def allows(self, tunnel: Tunnel, reporter: str) -> bool:
        """Whether a tunnel that was just established may live; else it is closed now.

        The lists may have changed since its handshake began.
        """
        lists = self.lists
        if not lists or tunnel.endpoint.tls.context.expectation.revoked is lists:
            return True
        return self._check(tunnel, reporter)

    def when_done(self, call: Callable[[], object]) -> None:
        """Call once every tunnel was asked about; at once where all were."""
        if self._left is None:
            call()
        else:
            self._when_done.append(call)

    def close(self) -> None:
        """Ask no more."""
        self._end()
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def _changed(self) -> None:
        """Ask about every tunnel, a millisecond's worth a turn."""
        running = self._left is not None
        found = [(reporter, tunnel) for reporter, members in self.members for tunnel in members()]
        self._left = iter(found)  # from the start: those already asked about were compared with older lists
        if not running:
            self._reactor.later(self._check_some)

    def _check_some(self) -> None:
        left = self._left
        if left is None:
            return
        clock = self._reactor.clock
        end = clock() + _SLICE_SECONDS
        for reporter, tunnel in left:
            if tunnel.established and not tunnel.closed:
                self._check(tunnel, reporter)
            if clock() >= end:
                self._reactor.later(self._check_some)
                return
        self._end()

    def _end(self) -> None:
        self._left = None
        calls, self._when_done = self._when_done, []
        for call in calls:
            call()

    def on_fault(self) -> None:
        """A fault of ours at one tunnel; the others are asked about all the same."""
        self._reactor.later(self._check_some)

    def _check(self, tunnel: Tunnel, reporter: str) -> bool:
        error: DataplaneError
        try:
            found = self.lists.find(tunnel.endpoint.tls.verified_path)
        except UNPARSABLE:
            self._metrics.crl_untracked(reporter)
            why = "the peer's certificate cannot be looked up in the revocation lists"
            error = TlsFailed(why)
        else:
            if found is None:
                return True
            self._metrics.crl_rejected(reporter)
            why, error = str(found), CertificateRevoked()
        log.warning(
            "tunnel closed by the revocation lists",
            peer=str(tunnel.peer),
            address=address_text(tunnel.address),
            connections=len(tunnel.streams),
            reason=why,
        )
        tunnel.close(error)
        return False
