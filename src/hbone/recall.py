"""Certificates that were taken back: no handshake with them, and an end to the tunnels that have one. No I/O.

A tunnel is asked about by the path that its handshake verified, and by no clock.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from hbone.errors import PeerIdentityError, PeerRevokedError
from hbone.identity.svid import UNPARSABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.errors import HboneError
    from hbone.identity import Identity
    from hbone.identity.revocation import RevocationLists, RevocationSource
    from hbone.session import Session
    from hbone.tls import TlsContext

__all__ = ["Recall"]


class Recall:
    """TLS contexts of one side, and the sessions made with them, held against revocation lists.

    Args:
        make: the context of an identity: `TlsContext.client` or `.server`.
        source: who knows the lists; None: there are none.
        refused: called with the error when a tunnel that was established is closed for them.
    """

    def __init__(
        self,
        make: Callable[..., TlsContext],
        source: RevocationSource | None = None,
        refused: Callable[[HboneError], object] = lambda _: None,
    ) -> None:
        self._make = make
        self._source = source
        self._refused = refused
        self._for: tuple[Identity, RevocationLists | None] | None = None
        self._context: TlsContext | None = None
        self._sessions: weakref.WeakSet[Session[Any]] = weakref.WeakSet()
        self._unsubscribe = source.subscribe(self._changed) if source is not None else None

    def of(self, identity: Identity) -> TlsContext:
        """The context of `identity` for a handshake that begins now.

        Raises:
            HboneError: its certificate or key cannot be used.
        """
        lists = self._source.current if self._source is not None else None
        context = self._context
        if context is None or self._for is None or self._for[0] is not identity or self._for[1] is not lists:
            context = self._make(identity) if not lists else self._make(identity, crls=lists)
            self._context, self._for = context, (identity, lists)
        return context

    def admit(self, session: Session[Any]) -> bool:
        """Whether a session that was just established may live; if so, it is asked about at each change from now on.

        The lists may have changed since its handshake began.
        """
        source = self._source
        if source is None or session.failure is not None:
            return session.failure is None
        lists = source.current
        if lists and session.endpoint.tls.context.expectation.revoked is not lists and not self._check(session):
            return False
        self._sessions.add(session)
        return True

    def close(self) -> None:
        """Ask no more."""
        self._sessions.clear()
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def _changed(self) -> None:
        for session in list(self._sessions):
            if session.failure is None:
                self._check(session)

    def _check(self, session: Session[Any]) -> bool:
        assert self._source is not None
        error: HboneError
        try:
            found = self._source.current.find(session.endpoint.tls.verified_path)
        except UNPARSABLE:
            error = PeerIdentityError("the peer's certificate cannot be looked up in the revocation lists")
        else:
            if found is None:
                return True
            error = PeerRevokedError(str(found))
        session.lose(error)
        self._refused(error)
        return False
