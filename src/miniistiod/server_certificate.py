"""The certificate of port 15012: for names and addresses, renewed before it ends and when its root changes."""

from __future__ import annotations

import datetime
import socket
from typing import TYPE_CHECKING

import attrs
from cryptography.hazmat.primitives.asymmetric import ec

from hbone.identity import ServerCertificate, TrustBundle
from hbone.tls import TlsContext
from miniistiod import ca

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miniistiod.authority import Authority, View

__all__ = ["ServerTls", "names_of_host"]

ALWAYS = ("localhost", "127.0.0.1", "::1", "istiod.istio-system.svc")


def names_of_host(configured: Iterable[str], bound: Iterable[str]) -> tuple[str, ...]:
    """Names and addresses under which hosts may dial: configured, bound, this host's own, and the customary ones."""
    names = list(configured)
    names += [address for address in bound if address not in ("0.0.0.0", "::", "")]
    host = socket.gethostname()
    if host and host.replace("-", "a").replace(".", "a").isalnum():
        names.append(host)
        try:
            names += sorted({str(item[4][0]).partition("%")[0] for item in socket.getaddrinfo(host, None)})
        except OSError:
            pass  # the host does not know its own name; --name says it
    names += _own_addresses()
    return tuple(dict.fromkeys((*names, *ALWAYS)))


def _own_addresses() -> list[str]:
    """The addresses that packets to elsewhere would leave from; connecting a datagram socket sends nothing."""
    found = []
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((probe, 9))
                found.append(str(sock.getsockname()[0]))
        except OSError:
            continue  # no route of this family
    return found


@attrs.define(eq=False)
class ServerTls:
    """Gives the server its TlsContext; makes a new certificate at half of the old one's life."""

    _authority: Authority
    _trust_domain: str
    names: tuple[str, ...]
    _view: View | None = None
    _context: TlsContext | None = None
    _renew_at: datetime.datetime | None = None

    def context(self) -> TlsContext:
        """The context for a new connection."""
        now = datetime.datetime.now(datetime.UTC)
        view = self._authority.view
        if self._context is None or self._renew_at is None or now >= self._renew_at or view is not self._view:
            self._context = self._make(view, now)
            self._view = view
        return self._context

    def _make(self, view: View, now: datetime.datetime) -> TlsContext:
        signer = view.server
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = ca.issue_server(signer, key.public_key(), self.names, now, ca.SERVER_LIFETIME)
        self._renew_at = now + (leaf.not_valid_after_utc - now) / 2
        # The root goes along: a host that enrols has only its hash, and looks for it in the chain.
        certificate = ServerCertificate((leaf, signer.certificate, *signer.issuers), key)
        bundle = TrustBundle(self._trust_domain, view.roots)
        return TlsContext.server(certificate, "optional", bundles=bundle)
