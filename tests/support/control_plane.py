"""A control plane in memory, each of whose moves a test makes."""

from __future__ import annotations

import contextlib
import datetime
from typing import TYPE_CHECKING

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztunnel.control.demand import Demand
from ztunnel.control.discovery import DiscoveryClient, make_node
from ztunnel.control.revocation import REVOCATION_TYPE
from ztunnel.control.transport import TokenSource
from ztunnel.mesh import Store
from ztunnel.metrics import Metrics
from ztunnel.wire import ca_pb2, discovery_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from hbone.identity import Identity
    from ztunnel.control.transport import Channel, MessageStream, Metadata

START = 1_800_000_000.0
"""Wall clock at the begin of a test's mock clock."""


def wall() -> float:
    """A wall clock that goes with Trio's, so that MockClock moves both."""
    return START + trio.current_time()


def utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


class Authority:
    """A CA for any lifetime by the mock clock, down to seconds and backdated as asked."""

    def __init__(self, *, name: str = "root", backdate: float = 0.0, at: float = START) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.backdate = backdate
        subject = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, name)])
        usage = _usage(key_cert_sign=True, crl_sign=True)
        self.root = (
            _builder(subject, subject, self.key.public_key(), at - 3600, at + 10 * 365 * 86400)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def root_pem(self) -> str:
        return self.root.public_bytes(serialization.Encoding.PEM).decode()

    def crl(self, *serials: int, at: float) -> x509.CertificateRevocationList:
        """A list that names certificates by their serial numbers."""
        now = datetime.datetime.fromtimestamp(at, datetime.UTC)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.root.subject)
        builder = builder.last_update(now).next_update(now + datetime.timedelta(days=1))
        for serial in serials:
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(revoked)
        return builder.sign(self.key, hashes.SHA256())

    def leaf(self, public_key: ec.EllipticCurvePublicKey, uris: Iterable[str], *, lifetime: float, at: float) -> str:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        return (
            _builder(x509.Name([]), self.root.subject, public_key, at - self.backdate, at + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True, key_encipherment=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(names, critical=True)
            .sign(self.key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
            .decode()
        )


def _usage(**on: bool) -> x509.KeyUsage:
    names = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: on.get(name, False) for name in names})


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: float, end: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(start))
        .not_valid_after(utc(end))
    )


class ScriptedStream:
    """One discovery stream; the test is the server."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = dict(metadata)
        self.revocations_wanted: list[list[str]] = []
        self._to_server, self._requests = trio.open_memory_channel[bytes](100)
        self._to_client, self._responses = trio.open_memory_channel[bytes | None | Exception](100)

    async def send(self, message: bytes) -> None:
        await self._to_server.send(message)

    async def receive(self) -> bytes | None:
        response = await self._responses.receive()
        if isinstance(response, Exception):
            raise response
        return response

    async def request(self) -> discovery_pb2.DeltaDiscoveryRequest:
        """What the client sends next; that it wants revocation lists is only noted."""
        while True:
            request = discovery_pb2.DeltaDiscoveryRequest.FromString(await self._requests.receive())
            if request.type_url != REVOCATION_TYPE or request.response_nonce:
                return request
            self.revocations_wanted.append(list(request.resource_names_subscribe))

    async def opening(self) -> dict[str, discovery_pb2.DeltaDiscoveryRequest]:
        """The first request of each of the two types."""
        return {request.type_url: request for request in [await self.request(), await self.request()]}

    def respond(
        self,
        type_url: str,
        resources: Iterable[tuple[str, str, bytes]] = (),
        removed: Iterable[str] = (),
        nonce: str = "n",
    ) -> None:
        response = discovery_pb2.DeltaDiscoveryResponse(type_url=type_url, nonce=nonce, removed_resources=list(removed))
        for name, version, payload in resources:
            resource = response.resources.add(name=name, version=version)
            resource.resource.type_url = type_url
            resource.resource.value = payload
        self._to_client.send_nowait(response.SerializeToString())

    def send_raw(self, data: bytes) -> None:
        self._to_client.send_nowait(data)

    def fail(self, error: Exception) -> None:
        self._to_client.send_nowait(error)

    def end(self) -> None:
        self._to_client.send_nowait(None)


class ScriptedControlPlane:
    """Dials end here. Set `dial_error` or `hangs`, `on_unary` for the CA, and take streams with `next_stream`."""

    def __init__(self, clock: Callable[[], float] = wall) -> None:
        self._clock = clock
        self.dial_error: Exception | None = None
        self.hangs = False
        self.dials = 0
        self.presented: list[Identity | None] = []
        self.requests: list[tuple[str, bytes, Metadata]] = []
        self.on_unary: Callable[[bytes], bytes] | None = None
        self._streams_in, self._streams = trio.open_memory_channel[ScriptedStream](100)

    @contextlib.asynccontextmanager
    async def dial(self, identity: Identity | None) -> AsyncIterator[Channel]:
        self.dials += 1
        self.presented.append(identity)
        await trio.lowlevel.checkpoint()
        if self.dial_error is not None:
            raise self.dial_error
        yield self

    async def unary(self, path: str, request: bytes, metadata: Metadata) -> bytes:
        self.requests.append((path, request, metadata))
        if self.hangs:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        assert self.on_unary is not None
        return self.on_unary(request)

    @contextlib.asynccontextmanager
    async def stream(self, path: str, metadata: Metadata) -> AsyncIterator[MessageStream]:
        stream = ScriptedStream(metadata)
        self._streams_in.send_nowait(stream)
        yield stream

    async def next_stream(self) -> ScriptedStream:
        """The next stream that the client opens."""
        return await self._streams.receive()

    def sign_with(self, authority: Authority, *, lifetime: float | None = None) -> None:
        """Answer CSRs as a CA does."""

        def sign(raw: bytes) -> bytes:
            request = ca_pb2.IstioCertificateRequest.FromString(raw)
            csr = x509.load_pem_x509_csr(request.csr.encode())
            names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uris = names.get_values_for_type(x509.UniformResourceIdentifier)
            key = csr.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            seconds = request.validity_duration if lifetime is None else lifetime
            leaf = authority.leaf(key, uris, lifetime=seconds, at=self._clock())
            return ca_pb2.IstioCertificateResponse(cert_chain=[leaf, authority.root_pem]).SerializeToString()

        self.on_unary = sign


class OnDemand:
    """A discovery client that asks a scripted control plane for addresses when it needs them.

    Args:
        node_name: Where it says that it runs.
    """

    def __init__(self, node_name: str = "") -> None:
        self.control = ScriptedControlPlane()
        self.store = Store()
        self.demand = Demand(self.store, "")
        node = make_node(name="w", namespace="n", ip="10.0.0.1", node_name=node_name, metadata={}, json_metadata={})
        self.client = DiscoveryClient(
            self.control.dial,
            self.store,
            node=node,
            metrics=Metrics(),
            token=TokenSource(value="secret"),
            demand=self.demand,
        )
