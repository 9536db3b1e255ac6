"""Publishes what was revoked: `crl.pem` in the state, and a resource of discovery for our ztunnels.

Type `type.googleapis.com/hbone.v1.RevocationLists`, one resource named `mesh`, sent to whoever asks for the type. A
stock ztunnel never does; it may be given the file (`CRL_PATH`).
"""

from __future__ import annotations

import datetime
import hashlib
from typing import TYPE_CHECKING

import attrs
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from miniistiod import ca
from miniistiod.store import Crl
from ztunnel.wire import discovery_pb2, revocation_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from miniistiod.store import Store

__all__ = ["NAME", "REVOCATIONS", "RevocationFeed", "publish", "publish_own", "signs_lists"]

REVOCATIONS = "type.googleapis.com/hbone.v1.RevocationLists"
NAME = "mesh"
REFRESH = 86_400.0
"""Seconds after which lists are made again though nothing was revoked."""
_ATTEMPTS = 10


def signs_lists(certificate: x509.Certificate) -> bool:
    """Whether verifiers would take a list that this certificate signed. RFC 5280 §6.3.3."""
    try:
        return certificate.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign
    except x509.ExtensionNotFound:
        return True


def publish(store: Store, signers: Iterable[ca.Signer], now: float, more: str = "") -> Crl | None:
    """Bring the published lists up to date with what is revoked.

    Args:
        store: the state.
        signers: those whose key is at hand.
        now: seconds since 1970.
        more: lists made elsewhere, PEM, published along.

    Returns:
        What is published now; None when other processes changed the state all the while, and will publish.
    """
    signers = [signer for signer in signers if signs_lists(signer.certificate)]
    for _ in range(_ATTEMPTS):
        generation, before = store.generation, store.crl()
        if before and before.generation == generation and 0 <= now - before.made < REFRESH:
            return before
        number = before.number + 1 if before else 1
        moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
        lists = [
            ca.make_crl(signer, store.revoked_by(ca.fingerprint(signer.certificate), now), number=number, now=moment)
            for signer in signers
        ]
        pem = "".join(item.public_bytes(serialization.Encoding.PEM).decode() for item in lists) + more
        crl = Crl(number=number, generation=generation, made=now, pem=pem)
        if store.keep_crl(crl):
            return crl
    return None


def publish_own(store: Store, now: float) -> Crl | None:
    """As `publish`, by the keys of the state. None, too, where a CA in files signs: the control plane has its key."""
    return publish(store, store.signers(), now) if store.plugged() is None else None


@attrs.define(kw_only=True)
class RevocationFeed:
    """What one stream is owed of the lists. Pure."""

    stream: str
    subscribed: bool = False
    sent: str = ""
    """Version that the client has."""
    _counter: int = 0
    _owed: bool = False

    def request(self, message: discovery_pb2.DeltaDiscoveryRequest) -> None:
        """Take in a request of the type; the first one subscribes."""
        if not self.subscribed:
            self.subscribed = self._owed = True
            self.sent = message.initial_resource_versions.get(NAME, "")

    def take(self, crl: Crl | None) -> discovery_pb2.DeltaDiscoveryResponse | None:
        """The response that is due, if any. The first one comes even if there is nothing new in it."""
        if not self.subscribed or (crl is None and not self._owed):
            return None
        body = b"" if crl is None else _body(crl.pem)
        version = hashlib.blake2b(body, digest_size=8).hexdigest()
        if version == self.sent and not self._owed:
            return None
        self._counter += 1
        response = discovery_pb2.DeltaDiscoveryResponse(
            type_url=REVOCATIONS, nonce=f"{self.stream}-r{self._counter}", system_version_info=version
        )
        if version != self.sent:
            resource = response.resources.add(name=NAME, version=version)
            resource.resource.type_url, resource.resource.value = REVOCATIONS, body
        self.sent, self._owed = version, False
        return response


def _body(pem: str) -> bytes:
    return revocation_pb2.RevocationLists(lists=_der(pem)).SerializeToString(deterministic=True)


def _der(pem: str) -> Sequence[bytes]:
    end = "-----END X509 CRL-----"
    return [
        x509.load_pem_x509_crl((part + end).encode()).public_bytes(serialization.Encoding.DER)
        for part in pem.split(end)[:-1]
    ]
