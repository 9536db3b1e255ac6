"""The certificate authority of a running control plane: what signs, what is believed, what was taken back.

The state is shared with commands in other processes, so what holds is read again whenever its `generation` has
changed, and a certificate is recorded, and handed out, only under the generation that it was signed by.
"""

from __future__ import annotations

import datetime
import threading
import time
from typing import TYPE_CHECKING, Protocol

import attrs
import trio

from hbone.daemon.logs import get_logger
from hbone.errors import ConfigurationError
from miniistiod import auth, ca, revocation
from miniistiod.rotation import plan
from miniistiod.store import StaleAuthorityError, serial_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cryptography import x509

    from hbone.identity import SpiffeId
    from miniistiod.store import Crl, Store

__all__ = ["Authority", "PluggedCa", "View"]

_log = get_logger("miniistiod.ca")
LOOK_SECONDS = 0.25
"""How soon a change made by a command takes effect."""
_ATTEMPTS = 5


class PluggedCa(Protocol):
    """A CA in files."""

    problem: str
    """Why its newest files are not in force; empty when they are."""

    @property
    def more_lists(self) -> str:
        """Revocation lists that lie beside it, PEM."""
        ...

    def current(self) -> ca.Signer:
        """What signs now; looks at the files, and keeps to what was good while they are not."""
        ...

    def adopt(self, store: Store) -> None:
        """Tell the state which CA is in force."""
        ...


@attrs.frozen(kw_only=True)
class View:
    """What holds under one generation."""

    generation: int
    signer: ca.Signer
    server: ca.Signer
    """What signs the certificate of port 15012."""
    roots: tuple[x509.Certificate, ...]
    crl: Crl | None


class Authority:
    """Signs, and keeps up with the state.

    Args:
        store: the state.
        plugged: a CA from files; else the state's own root signs.
        wall: seconds since 1970.

    Raises:
        ConfigurationError: what signs cannot be used.
    """

    def __init__(
        self, store: Store, plugged: PluggedCa | None = None, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._plugged = plugged
        self._wall = wall
        self._lock = threading.Lock()
        self._changed: list[Callable[[], Awaitable[None]]] = []
        if plugged is None and store.plugged() is not None:
            raise ConfigurationError(
                f"the CA of {str(store.directory)!r} is plugged in from files; name their directory with --ca-dir"
            )
        self.view = self._read()

    def on_change(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Have `callback` awaited after each change."""
        self._changed.append(callback)

    async def keep_up(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            if await trio.to_thread.run_sync(self.refresh):
                for callback in self._changed:
                    await callback()

    def refresh(self) -> bool:
        """Look at the state, take the steps of a rotation that are due, and publish; whether anything changed."""
        with self._lock:
            before = self.view
            if self._plugged is not None:
                self._plugged.current()
                self._plugged.adopt(self._store)
            else:
                self._rotate()
            crl = before.crl
            stale = crl is None or self._wall() - crl.made >= revocation.REFRESH
            if self._store.generation != before.generation or stale:
                self.view = self._read()
            return self.view is not before

    def _rotate(self) -> None:
        while (rotation := self._store.rotation()) is not None:
            now = self._wall()
            following = plan(rotation, self._store.facts(rotation, now))
            if not following.due(now):
                return
            try:
                self._store.advance_rotation(following.next, now)
            except ConfigurationError:
                return  # a command was quicker
            _log.info("root rotation", step=following.next.value)

    def _read(self) -> View:
        store = self._store
        if self._plugged is not None:
            self._plugged.current()
            self._plugged.adopt(store)
        while True:
            generation = store.generation
            if self._plugged is not None:
                signer = server = self._plugged.current()
                # Roots from before the CA was plugged in still answer for what they signed.
                signers, more = [signer, *store.signers()], self._plugged.more_lists
            else:
                signer, server, more = store.signer(), store.server_signer(), ""
                signers = store.signers()
            roots = tuple(store.roots())
            crl = revocation.publish(store, signers, self._wall(), more)
            if store.generation == generation:
                store.publish_roots()
                return View(generation=generation, signer=signer, server=server, roots=roots, crl=crl)

    def issue(
        self,
        caller: auth.Caller,
        identity: SpiffeId,
        key: ca.PublicKey,
        lifetime: datetime.timedelta,
    ) -> tuple[x509.Certificate, list[str]]:
        """Sign and record a certificate; the certificate and what to answer.

        Args:
            caller: who asks.
            identity: for whom: the caller, or a workload of the node whose proxy it is.
            key: the holder's.
            lifetime: how long from now.

        Raises:
            SigningError: what signs has expired, or changes without pause.
            Refused: the caller was revoked meanwhile.
        """
        key_sha256 = ca.key_hash(key)
        for _ in range(_ATTEMPTS):
            view = self.view
            now = datetime.datetime.fromtimestamp(self._wall(), datetime.UTC)
            if why := auth.problem(self._store, caller):
                raise auth.Refused(why)
            certificate = ca.issue(view.signer, key, identity, lifetime, now)
            try:
                self._store.record_certificate(
                    certificate,
                    spiffe_id=str(identity),
                    name=(caller.name or "") if identity == caller.identity else "",
                    key_sha256=key_sha256,
                    caller=caller.how,
                    now=now.timestamp(),
                    generation=view.generation,
                    signer=ca.fingerprint(view.signer.certificate),
                    token=caller.token,
                    parent=caller.serial,
                    node=caller.node if identity == caller.identity else "",
                    group=caller.group if identity == caller.identity else "",
                )
            except StaleAuthorityError:
                self.refresh()
                continue
            _log.info(
                "certificate issued",
                identity=str(identity),
                serial=serial_text(certificate.serial_number),
                key=key_sha256,
                caller=caller.how,
                by=None if identity == caller.identity else str(caller.identity),
                expires=certificate.not_valid_after_utc.isoformat(),
            )
            return certificate, ca.response_chain(certificate, view.signer, view.roots)
        raise ca.SigningError("roots and revocations change without pause")

    @property
    def problem(self) -> str:
        """Why the newest files of a CA are not in force; empty when all is well."""
        return "" if self._plugged is None else self._plugged.problem
