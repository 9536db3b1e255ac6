"""A recorded conversation of the Rust ztunnel in dedicated mode, replayed against ours over TLS and gRPC.

The bytes are the client's own. Only two things in them are of the other server, and are exchanged for ours: the nonce
that an answer gives back, and the versions that a reconnect brings along. Where no such ztunnel is at hand, this shows
that ours gives it what it got: the same resources, after the same changes, on both of its streams.
"""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from cryptography import x509
from google.protobuf import json_format
from tests.support.miniistiod import ADDRESS, AUTHORIZATION, CREATE_CERTIFICATE, DELTA, bearer, control_plane

from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from ztunnel.wire import authorization_pb2, ca_pb2, discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import miniistiod
    from hbone.trio.grpc import GrpcStream

EVENTS = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden" / "ztunnel-conversation.jsonl").read_text().splitlines()
]
MACHINE = """apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {{name: {name}, namespace: app, labels: {{{labels}}}}}
spec: {{address: {address}, serviceAccount: {name}}}
"""
TUNNEL = "networking.istio.io/tunnel: http"
SERVICE = """apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: {name}, namespace: app}}
spec:
  hosts: [{name}.app.mesh]
  resolution: STATIC
  ports: [{{number: 80, name: tcp, protocol: TCP, targetPort: 8080}}]
  workloadSelector: {{labels: {{app: echo}}}}
"""
POLICY = """apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: echo, namespace: app}}
spec:
  selector: {{matchLabels: {{app: echo}}}}
  rules:
  - from: [{{source: {{principals: [cluster.local/ns/app/sa/{caller}]}}}}]
    to: [{{operation: {{ports: ["8080"]}}}}]
"""
STRICT = """apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: istio-system}
spec: {mtls: {mode: STRICT}}
"""
DOCUMENTS = {
    "vm1.yaml": MACHINE.format(name="vm1", address="10.78.0.1", labels=f"app: client, {TUNNEL}"),
    "vm2.yaml": MACHINE.format(name="vm2", address="10.78.0.2", labels=f"app: echo, {TUNNEL}"),
    "echo.yaml": SERVICE.format(name="echo") + "  addresses: [10.99.0.1]\n",
    "auto.yaml": SERVICE.format(name="auto"),
    "policy.yaml": POLICY.format(caller="vm1"),
    "strict.yaml": STRICT,
}
CHANGES: dict[int, dict[str, str | None]] = {
    2: {"vm3.yaml": MACHINE.format(name="vm3", address="10.78.0.3", labels="app: echo")},
    3: {"policy.yaml": POLICY.format(caller="other")},
    4: {"vm3.yaml": None},
}
"""By the number of the recorded push."""


@attrs.define
class Recorded:
    """One stream of the recording: what the client sent first, and what it was sent, by push and type."""

    machine: str
    opening: list[bytes] = attrs.Factory(list)
    acknowledgements: list[bytes] = attrs.Factory(list)
    pushes: dict[tuple[int, str], Any] = attrs.Factory(dict)


def recorded() -> list[Recorded]:
    """The discovery streams in the order in which they began: two, and the same two after a restart of istiod."""
    found: list[Recorded] = []
    now: dict[int, Recorded] = {}
    for event in EVENTS:
        body = event.get("body", {})
        if event["event"] == "client_header" and event["method"] == DELTA:
            (token,) = (item for item in event["metadata"] if item.startswith("authorization:"))
            now[event["call"]] = Recorded(token.rpartition(":")[2])
            found.append(now[event["call"]])
        elif event["call"] not in now or "typeUrl" not in body:
            continue
        elif event["event"] == "client_message":
            stream = now[event["call"]]
            (stream.opening if "node" in body else stream.acknowledgements).append(base64.b64decode(event["bytes"]))
        elif event["event"] == "server_message":
            now[event["call"]].pushes[int(body["systemVersionInfo"].rpartition("/")[2]), body["typeUrl"]] = body
    return found


def plain(resource: discovery_pb2.Resource, url: str) -> dict[str, Any]:
    """A resource as the recording writes it."""
    kind: Any = workload_pb2.Address if url == ADDRESS else authorization_pb2.Authorization
    found = json_format.MessageToDict(kind.FromString(resource.resource.value))
    if "rules" in found:
        found["groups"] = [{"rules": rule["clauses"]} for rule in found.pop("rules")]
    return {"@type": url, **found}


class Client:
    """The recorded ztunnel on one of our streams."""

    def __init__(self, stream: GrpcStream, wanted: Recorded) -> None:
        self.stream = stream
        self.wanted = wanted
        self.versions: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self._answers = list(wanted.acknowledgements)

    async def open(self, versions: dict[str, str] | None = None) -> None:
        for data in self.wanted.opening:
            request = discovery_pb2.DeltaDiscoveryRequest.FromString(data)
            if versions is None:
                await self.stream.send(data)  # every byte as it was
                continue
            for name, version in list(request.initial_resource_versions.items()):
                if version:
                    request.initial_resource_versions[name] = versions[name]
            await self.stream.send(request.SerializeToString())

    async def expect(self, push: int) -> None:
        """Ours sends what was recorded for this push, and takes the recorded acknowledgement of it."""
        wanted = {url: body for (number, url), body in self.wanted.pushes.items() if number == push}
        for _ in range(len(wanted)):
            data = await self.stream.receive()
            assert data is not None
            response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
            body = wanted.pop(response.type_url)
            found = {item.name: self._renamed(plain(item, response.type_url)) for item in response.resources}
            assert found == {item["name"]: self._renamed(item["resource"]) for item in body.get("resources", ())}
            assert sorted(response.removed_resources) == body.get("removedResources", [])
            assert response.nonce
            self.versions.update({item.name: item.version for item in response.resources})
            await self._acknowledge(response)
        assert not wanted

    def _renamed(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Automatic addresses are handed out in another order here."""
        service = resource.get("service", {})
        if service.get("name") == "auto":
            assert [len(base64.b64decode(item["address"])) for item in service["addresses"]] == [4, 16]
            service = {**service, "addresses": "automatic"}
            return {**resource, "service": service}
        return resource

    async def _acknowledge(self, response: discovery_pb2.DeltaDiscoveryResponse) -> None:
        for data in self._answers:
            request = discovery_pb2.DeltaDiscoveryRequest.FromString(data)
            if request.type_url == response.type_url:
                self._answers.remove(data)
                request.response_nonce = response.nonce
                await self.stream.send(request.SerializeToString())
                return
        raise AssertionError(f"the recorded ztunnel did not answer {response.type_url} once more")


@contextlib.asynccontextmanager
async def connected(cp: miniistiod.MiniIstiod, wanted: Recorded) -> AsyncGenerator[Client]:
    token = bearer(cp.create_token("app", wanted.machine, reusable=True))
    tls = TlsContext.client(None, roots=cp.root_pem, server_name="localhost")
    with trio.fail_after(60):
        client = GrpcClient.connect("127.0.0.1", cp.port, tls)
        async with client as opened, opened.stream(DELTA, token) as stream:
            yield Client(stream, wanted)


def change(directory: Path, files: dict[str, str | None]) -> None:
    for name, text in files.items():
        if text is None:
            (directory / name).unlink()
        else:
            (directory / name).write_text(text)


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    directory = tmp_path / "mesh"
    directory.mkdir()
    change(directory, dict(DOCUMENTS))
    return directory


async def test_both_streams_get_what_they_were_recorded_to_get(tmp_path: Path, mesh: Path) -> None:
    first, second, *later = recorded()
    assert [first.machine, second.machine] == ["vm2", "vm1"]
    async with control_plane(tmp_path, None) as cp:
        async with connected(cp, first) as one, connected(cp, second) as two:
            for client in (one, two):
                await client.open()
                await client.expect(1)
            for push, files in CHANGES.items():
                change(mesh, files)
                for client in (one, two):
                    await client.expect(push)
            described = [stream.subscriber.describe() for stream in cp.api.discovery.streams.values()]
            versions = {**one.versions}
        assert len(described) == 2
        for wanted in later:  # the same machines, after the server was away
            async with connected(cp, wanted) as again:
                await again.open(versions)
                await again.expect(1)


async def test_a_ztunnel_that_comes_from_istiod_gets_everything_once_more(tmp_path: Path, mesh: Path) -> None:
    """Its versions are another server's, so nothing that it has is taken for ours."""
    change(mesh, {"policy.yaml": POLICY.format(caller="other")})
    wanted = recorded()[2]
    async with control_plane(tmp_path, None) as cp, connected(cp, wanted) as client:
        await client.open()
        found: dict[str, set[str]] = {}
        for _ in range(2):
            data = await client.stream.receive()
            assert data is not None
            response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
            found[response.type_url] = {item.name for item in response.resources}
            assert not response.removed_resources
        held = discovery_pb2.DeltaDiscoveryRequest.FromString(wanted.opening[0]).initial_resource_versions
        assert found[ADDRESS] == set(held)
        assert found[AUTHORIZATION] == {"app/echo", "istio-system/istio_converted_static_strict"}


@pytest.mark.usefixtures("mesh")
async def test_recorded_requests_for_certificates_are_signed(tmp_path: Path) -> None:
    calls = [event["call"] for event in EVENTS if event.get("method") == CREATE_CERTIFICATE]
    assert calls
    async with control_plane(tmp_path, None) as cp:
        for call in calls:
            (sent,) = (item for item in EVENTS if item["call"] == call and item["event"] == "client_message")
            (header,) = (item for item in EVENTS if item["call"] == call and item["event"] == "client_header")
            (token,) = (item for item in header["metadata"] if item.startswith("authorization:"))
            machine = token.rpartition(":")[2]
            tls = TlsContext.client(None, roots=cp.root_pem, server_name="localhost")
            async with GrpcClient.connect("127.0.0.1", cp.port, tls) as client:
                metadata = bearer(cp.create_token("app", machine, reusable=True))
                answer = await client.unary(CREATE_CERTIFICATE, base64.b64decode(sent["bytes"]), metadata)
            chain = ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain
            leaf = x509.load_pem_x509_certificate(chain[0].encode())
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
                f"spiffe://cluster.local/ns/app/sa/{machine}"
            ]
            assert chain[-1].encode() == cp.root_pem
