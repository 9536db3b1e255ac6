"""grpcio, the C implementation, as client of the control plane."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from tests.support.miniistiod import (
    ADDRESS,
    AUTHORIZATION,
    CREATE_CERTIFICATE,
    DELTA,
    MESH,
    Applicant,
    acknowledge,
    bearer,
    control_plane,
    subscribe,
    uid,
)

from ztunnel.wire import ca_pb2, discovery_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import miniistiod

pytestmark = pytest.mark.interop
SECONDS = 20.0


@contextlib.contextmanager
def channel(cp: miniistiod.MiniIstiod, **certificate: bytes) -> Iterator[Any]:
    credentials = grpc.ssl_channel_credentials(root_certificates=cp.root_pem, **certificate)
    with grpc.secure_channel(f"localhost:{cp.port}", credentials) as opened:
        yield opened


def create(cp: miniistiod.MiniIstiod, request: bytes, metadata: Any = (), **certificate: bytes) -> bytes:
    with channel(cp, **certificate) as opened:
        answer: bytes = opened.unary_unary(CREATE_CERTIFICATE)(request, metadata=metadata, timeout=SECONDS)
        return answer


def refused(cp: miniistiod.MiniIstiod, request: bytes, metadata: Any = ()) -> tuple[Any, str]:
    with pytest.raises(grpc.RpcError) as caught:
        create(cp, request, metadata)
    return caught.value.code(), caught.value.details()


async def test_certificates_and_errors(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = cp.create_token("shop", "orders", name="orders-1")

        def work() -> None:
            assert refused(cp, Applicant().request()) == (
                grpc.StatusCode.UNAUTHENTICATED,
                "request authenticate failure",
            )
            assert refused(cp, b"", bearer(token))[0] is grpc.StatusCode.INVALID_ARGUMENT
            assert refused(cp, Applicant().request(seconds=10**9), bearer(token))[0] is grpc.StatusCode.INVALID_ARGUMENT
            applicant = Applicant()
            answer = create(cp, applicant.request(seconds=600), bearer(token))
            chain = ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain
            leaf = x509.load_pem_x509_certificate(chain[0].encode())
            assert chain[-1].encode() == cp.root_pem
            assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds() in (660, 661)
            key = applicant.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            renewal = Applicant()
            answer = create(cp, renewal.request(), private_key=key, certificate_chain=chain[0].encode())
            assert renewal.identity(answer).id == applicant.identity(create_again(cp, applicant, key, chain)).id
            assert refused(cp, Applicant().request(), bearer(token))[0] is grpc.StatusCode.UNAUTHENTICATED

        await trio.to_thread.run_sync(work)


def create_again(cp: miniistiod.MiniIstiod, applicant: Applicant, key: bytes, chain: Any) -> bytes:
    return create(cp, applicant.request(), private_key=key, certificate_chain=chain[0].encode())


class Stream:
    """A delta stream of grpcio's; requests go through a queue."""

    def __init__(self, opened: Any, metadata: Any) -> None:
        self.requests: queue.Queue[bytes | None] = queue.Queue()
        self.call = opened.stream_stream(DELTA)(iter(self.requests.get, None), metadata=metadata, timeout=SECONDS)

    def next(self, error: str | None = None) -> discovery_pb2.DeltaDiscoveryResponse:
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(next(self.call))
        self.requests.put(acknowledge(response, error))
        return response


async def test_a_delta_stream(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        metadata = bearer(cp.create_token("shop", "orders", reusable=True))
        path = cp.config.config_dir / "mesh.yaml"
        changed = threading.Event()

        def work() -> None:
            with channel(cp) as opened:
                stream = Stream(opened, metadata)
                stream.requests.put(subscribe(ADDRESS))
                stream.requests.put(subscribe(AUTHORIZATION))
                policies, addresses = stream.next(), stream.next()
                assert (policies.type_url, addresses.type_url) == (AUTHORIZATION, ADDRESS)
                versions = {item.name: item.version for item in addresses.resources}
                assert versions.keys() == {uid("orders-1"), uid("web-1"), "shop/orders.mesh"}
                path.write_text(MESH.replace("10.1.0.2", "10.1.0.3"))
                update = stream.next(error="web-1: no")
                assert [item.name for item in update.resources] == [uid("web-1")]
                path.write_text(MESH.replace("kind: ServiceEntry", "kind: Nonsense"))
                path.write_text(MESH)
                assert [item.name for item in stream.next().resources] == [uid("web-1")]
                stream.requests.put(None)
                assert list(stream.call) == []
                assert stream.call.code() is grpc.StatusCode.OK
            with channel(cp) as opened:
                stream = Stream(opened, metadata)
                stream.requests.put(subscribe(ADDRESS, initial_resource_versions={**versions, "shop/gone.mesh": "1"}))
                stream.requests.put(subscribe(AUTHORIZATION))
                assert stream.next().type_url == AUTHORIZATION
                again = stream.next()
                assert (list(again.resources), list(again.removed_resources)) == ([], ["shop/gone.mesh"])
                stream.requests.put(None)
                assert list(stream.call) == []
            for wrong, code in (
                (subscribe(namespace="web"), grpc.StatusCode.PERMISSION_DENIED),
                (b"", grpc.StatusCode.INVALID_ARGUMENT),
            ):
                with channel(cp) as opened:
                    stream = Stream(opened, metadata)
                    stream.requests.put(wrong)
                    with pytest.raises(grpc.RpcError) as caught:
                        stream.next()
                    assert caught.value.code() is code
                    stream.requests.put(None)
            changed.set()

        await trio.to_thread.run_sync(work)
        assert changed.is_set()
