"""Keeps the workload's certificate fresh: asks early, renews at half life, backs off, and fails closed at expiry."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import IdentityError
from ztunnel.control.transport import ControlPlaneError

if TYPE_CHECKING:
    import datetime
    from collections.abc import Callable

    from hbone.identity import Identity, SpiffeId
    from ztunnel.control.ca import CertificateAuthority

__all__ = ["Backoff", "NoCertificate", "SvidManager", "SvidStatus"]

FETCH_TIMEOUT = 10.0
"""Seconds that a connection waits for the first certificate."""
RENEWAL_FLOOR = 1.0
"""Least seconds between two renewals, however short the lifetime: nothing may ask without pause."""
LONGEST_SLEEP = 60.0
"""Seconds after which a sleeping renewal looks at the wall clock again: a suspended host's timers stand still."""

log = get_logger("ztunnel.control.svids")


class NoCertificate(IdentityError):
    """There is no valid certificate now; the message says why. Connections that need one are refused."""


@attrs.define
class Backoff:
    """Growing waits with jitter.

    Source: Istio's ztunnel, certificate retry: 1 s, doubled, ±20 %, at most 150 s.
    """

    first: float = 1.0
    limit: float = 150.0
    jitter: float = 0.2
    rng: random.Random = attrs.Factory(random.Random)
    _next: float = 0.0

    def wait(self) -> float:
        """Seconds to wait after one more failure."""
        self._next = min(self.limit, self._next * 2 if self._next else self.first)
        return min(self.limit, self._next * self.rng.uniform(1 - self.jitter, 1 + self.jitter))

    def reset(self) -> None:
        """Begin anew, after a success."""
        self._next = 0.0


@attrs.frozen(kw_only=True)
class SvidStatus:
    """What `status` and the dump show of the certificate."""

    identity: SpiffeId | None
    state: str
    """`Initializing`, `Available` or `Unavailable: <why>`."""
    not_before: datetime.datetime | None
    expires_at: datetime.datetime | None
    renew_in: float | None
    """Seconds until the next request to the CA."""
    last_error: str | None


class SvidManager:
    """The certificate of one workload.

    `current()` is what the data path reads; `run()` is the task that keeps it fresh. The half life counts from
    receipt by our own clocks, so a CA that backdates, or whose clock is off, does not make us ask without pause.
    """

    def __init__(
        self,
        authority: CertificateAuthority,
        *,
        save: Callable[[Identity], None] = lambda _: None,
        wall: Callable[[], float] = time.time,
        rng: random.Random | None = None,
        fetch_timeout: float = FETCH_TIMEOUT,
    ) -> None:
        """Start without an identity; `want` names it.

        Args:
            authority: Who makes certificates.
            save: Called with each new identity, to keep it on disk; must not wait.
            wall: Wall clock, seconds since 1970.
            rng: For jitter.
            fetch_timeout: Seconds that `fetch` waits at most.
        """
        self._authority = authority
        self._save = save
        self._wall = wall
        self._rng = rng or random.Random()  # jitter, no secret
        self._fetch_timeout = fetch_timeout
        self._backoff = Backoff(rng=self._rng)
        self._wanted: SpiffeId | None = None
        self._identity: Identity | None = None
        self._expires = 0.0
        self._error: str | None = None
        self._failed = False  # the last request failed, so callers get its error instead of waiting
        self._due_monotonic = 0.0
        self._due_wall = 0.0
        self._asking = trio.CancelScope()
        """Around the request that is under way: it ends when another identity is wanted."""
        self._changed = trio.Event()
        self._callbacks: list[Callable[[Identity], object]] = []

    @property
    def wanted(self) -> SpiffeId | None:
        """The identity that is kept fresh."""
        return self._wanted

    def want(self, spiffe_id: SpiffeId) -> None:
        """Keep a certificate for `spiffe_id`; one for another identity is dropped at once."""
        if spiffe_id == self._wanted:
            return
        self._wanted = spiffe_id
        if self._identity is not None and self._identity.svid.id != spiffe_id:
            self._identity = None
        if self._identity is None:
            self._due_monotonic = self._due_wall = 0.0
        self._failed, self._error = False, None
        self._backoff.reset()
        self._asking.cancel()
        self._wake()

    def adopt(self, identity: Identity) -> None:
        """Start from a certificate that was kept on disk; it is renewed when half of what is left is over."""
        self._wanted = identity.svid.id
        self._install(identity, save=False)

    def current(self) -> Identity | None:
        """The certificate in use; None when there is none or it has expired (fail closed)."""
        identity = self._identity
        if identity is None or self._wall() >= self._expires:
            return None
        return identity

    async def fetch(self) -> Identity:
        """The certificate in use, after waiting for the first one if need be.

        Raises:
            NoCertificate: the CA refused or cannot be reached, or said nothing within 10 s.
        """
        identity = self.current()
        if identity is not None:
            await trio.lowlevel.checkpoint()
            return identity
        with trio.move_on_after(self._fetch_timeout):
            while not self._failed:
                await self._changed.wait()
                identity = self.current()
                if identity is not None:
                    return identity
        raise NoCertificate(self._why())

    def subscribe(self, callback: Callable[[Identity], object]) -> Callable[[], None]:
        """Call `callback` with each new identity; the function returned ends that."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def status(self) -> SvidStatus:
        """A view for people; the key is not in it."""
        identity = self._identity
        if self.current() is not None:
            state = "Available"
        elif identity is None and not self._failed:
            state = "Initializing"
        else:
            state = f"Unavailable: {self._why()}"
        return SvidStatus(
            identity=self._wanted,
            state=state,
            not_before=identity.svid.not_before if identity is not None else None,
            expires_at=identity.svid.expires_at if identity is not None else None,
            renew_in=max(0.0, self._wait()) if self._wanted is not None else None,
            last_error=self._error,
        )

    def held(self) -> Identity | None:
        """The identity even when it has expired, for dumps."""
        return self._identity

    async def run(self) -> None:
        """Fetch and renew until cancelled."""
        while True:
            spiffe_id = self._wanted
            if spiffe_id is None:
                await self._changed.wait()
                continue
            wait = self._wait()
            if wait > 0:
                changed = self._changed
                with trio.move_on_after(min(wait, LONGEST_SLEEP)):
                    await changed.wait()
                continue
            identity = None
            with trio.CancelScope() as self._asking:
                identity = await self._ask(spiffe_id)
            if identity is None or spiffe_id != self._wanted:
                continue
            self._install(identity, save=True)
            log.info(
                "svid_rotated",
                identity=str(spiffe_id),
                serial=f"{identity.svid.serial:x}",
                expires=identity.svid.expires_at.isoformat(),
                renew_in=f"{self._wait():.1f}s",
            )

    async def _ask(self, spiffe_id: SpiffeId) -> Identity | None:
        """Ask the CA once. A failure is noted, unless another identity is wanted by now, and gives None."""
        try:
            return await self._authority.create(spiffe_id, self.current())
        except ControlPlaneError as error:
            reason = str(error)
        except Exception as error:  # a fault of ours costs this attempt; the certificate in use stays
            log.exception("asking for a certificate failed")
            reason = f"internal error: {type(error).__name__}"
        if spiffe_id == self._wanted:
            self._note_failure(reason)
        return None

    def _install(self, identity: Identity, *, save: bool) -> None:
        self._identity = identity
        self._expires = identity.svid.expires_at.timestamp()
        self._error, self._failed = None, False
        self._backoff.reset()
        half = (self._expires - self._wall()) / 2 * self._rng.uniform(0.9, 1.1)
        self._plan(max(RENEWAL_FLOOR, half))
        if save:
            self._save(identity)
        self._wake()
        for callback in tuple(self._callbacks):
            callback(identity)

    def _note_failure(self, reason: str) -> None:
        wait = self._backoff.wait()
        self._error, self._failed = reason, True
        left = self._expires - self._wall() if self._identity is not None else 0.0
        if left > 0:  # be told at expiry, not a back-off later
            wait = min(wait, max(RENEWAL_FLOOR, left))
        self._plan(wait)
        log.warning(
            "svid_failed",
            identity=str(self._wanted),
            error=reason,
            retry_in=f"{wait:.1f}s",
            valid_for=f"{max(0.0, left):.0f}s",
        )
        self._wake()

    def _plan(self, wait: float) -> None:
        self._due_monotonic = trio.current_time() + wait
        self._due_wall = self._wall() + wait

    def _wait(self) -> float:
        return min(self._due_monotonic - trio.current_time(), self._due_wall - self._wall())

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _why(self) -> str:
        if self._wanted is None:
            return "the workload's identity is not known yet: discovery has not described this workload"
        why = self._error or f"the CA did not answer within {self._fetch_timeout:g} s"
        identity = self._identity
        if identity is not None and self._wall() >= self._expires:
            return f"the certificate for {self._wanted} expired at {identity.svid.expires_at:%Y-%m-%d %H:%M:%S}Z: {why}"
        return f"no certificate for {self._wanted}: {why}"
