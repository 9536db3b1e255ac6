"""grpcio with stubs that protoc makes of the same .proto files, in a process of its own: a client that shares no code.

Every code that a ztunnel can see is shown once, certificates are asked for, and all forms of discovery are spoken.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.miniistiod import ADDRESS, AUTHORIZATION, CREATE_CERTIFICATE, MESH, bearer, control_plane, uid

from hbone.grpc import GrpcConfig
from hbone.trio.grpc import GrpcServer
from miniistiod import app, auth, ca, streams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import miniistiod

pytestmark = pytest.mark.interop
SECONDS = 60.0
WIRE = Path(__file__).parents[2] / "src" / "ztunnel" / "wire"
PROGRAM = Path(__file__).parents[1] / "support" / "grpcio_client.py"
NODE = {
    "id": "ztunnel~10.1.0.1~orders-1.shop~shop.svc.cluster.local",
    "metadata": {"NAME": "orders-1", "NAMESPACE": "shop", "INSTANCE_IPS": "10.1.0.1"},
}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What protoc makes of the .proto files alone."""
    source, made = tmp_path_factory.mktemp("proto"), tmp_path_factory.mktemp("stubs")
    (source / "ztunnel" / "wire").mkdir(parents=True)
    files = [shutil.copy(path, source / "ztunnel" / "wire") for path in sorted(WIRE.glob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(source), f"--python_out={made}"]
    subprocess.run([*command, f"--grpc_python_out={made}", *map(str, files)], check=True, timeout=SECONDS)
    for directory in (made / "ztunnel", made / "ztunnel" / "wire"):
        (directory / "__init__.py").touch()
    return made


class Client:
    """The program, and what it answers."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""

    async def do(self, verb: str, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        await self._process.stdin.send_all(json.dumps([verb, arguments, keywords]).encode() + b"\n")
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some()
            assert data, "the client has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    async def connect(self, cp: miniistiod.MiniIstiod, **certificate: str) -> None:
        await self.do("connect", cp.port, cp.root_pem.decode(), **certificate)

    async def refused(self, verb: str, *arguments: Any, **keywords: Any) -> tuple[str, str]:
        found = await self.do(verb, *arguments, **keywords)
        return found["code"], found.get("details", "")

    async def stream_ends(self, *requests: dict[str, Any], metadata: Any = (), **keywords: Any) -> tuple[str, str]:
        """How the server ends a stream that begins so."""
        await self.do("open", "x", metadata, **keywords)
        await self.do("send", "x", *requests)
        return await self.refused("next", "x")


@contextlib.asynccontextmanager
async def client(stubs: Path) -> AsyncGenerator[Client]:
    environment = {**os.environ, "PYTHONPATH": str(stubs), "GRPC_VERBOSITY": "NONE"}
    with trio.fail_after(SECONDS):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            yield Client(process)
        finally:
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()


def applicant() -> tuple[str, str]:
    """A key, and a request for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    return pem, request.public_bytes(serialization.Encoding.PEM).decode()


def uri_of(pem: str) -> str:
    names = x509.load_pem_x509_certificate(pem.encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    (uri,) = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    return uri


async def test_certificates_by_token_and_by_certificate(tmp_path: Path, stubs: Path) -> None:
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        await ours.connect(cp)
        key, csr = applicant()
        token = bearer(cp.create_token("shop", "orders", name="orders-1"))
        found = await ours.do("create", {"csr": csr, "validityDuration": 600}, token)
        chain = found["certChain"]
        assert chain[-1].encode() == cp.root_pem
        assert uri_of(chain[0]) == "spiffe://cluster.local/ns/shop/sa/orders"
        await ours.connect(cp, key=key, chain="".join(chain[:-1]))
        renewed = await ours.do("create", {"csr": applicant()[1]})
        assert uri_of(renewed["certChain"][0]) == uri_of(chain[0])


async def test_every_code_of_the_authority(tmp_path: Path, stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        await ours.connect(cp)
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        csr = applicant()[1]

        async def code(request: Any, metadata: Any = token, **more: Any) -> tuple[str, str]:
            return await ours.refused("create", request, metadata, **more)

        assert await code({"csr": csr}) == ("OK", "")
        assert await code({"csr": csr}, []) == ("UNAUTHENTICATED", "request authenticate failure")
        assert (await code({"csr": csr}, bearer("nonsense")))[0] == "UNAUTHENTICATED"
        other = {"ImpersonatedIdentity": "spiffe://cluster.local/ns/shop/sa/web"}
        assert await code({"csr": csr, "metadata": other}) == (
            "UNAUTHENTICATED",
            "request impersonation authentication failure",
        )
        assert await code({"csr": "nonsense"}) == (
            "INVALID_ARGUMENT",
            "CSR signing error (certificate signing request is not properly encoded)",
        )
        assert await code({"csr": csr, "validityDuration": 10**9}) == (
            "INVALID_ARGUMENT",
            "CSR signing error (requested TTL 1000000000s is greater than the max allowed TTL 7776000s)",
        )
        assert (await ours.refused("raw", CREATE_CERTIFICATE, "/////w==", token))[0] == "INVALID_ARGUMENT"
        assert (await ours.refused("raw", CREATE_CERTIFICATE.replace("Create", "Destroy"), "", token))[0] == (
            "UNIMPLEMENTED"
        )
        assert (await code({"csr": csr}, compression=True))[0] == "UNIMPLEMENTED"
        assert (await code({"csr": csr}, padding=5 << 20))[0] == "RESOURCE_EXHAUSTED"

        def broken(*_: object) -> None:
            raise ca.SigningError("the root has expired")

        with monkeypatch.context() as patch:
            patch.setattr(cp.authority, "issue", broken)
            assert await code({"csr": csr}) == ("INTERNAL", "CSR signing error (the authority cannot sign)")
        with monkeypatch.context() as patch:
            patch.setattr(auth.RateLimiter, "allow", lambda *_: False)
            found, details = await code({"csr": csr})
            assert (found, details.partition(":")[0]) == ("RESOURCE_EXHAUSTED", "request rate limit exceeded")


async def test_every_code_of_discovery(tmp_path: Path, stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        await ours.connect(cp)
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        first = {"typeUrl": ADDRESS, "node": NODE}
        for delta in (True, False):

            async def code(request: Any, metadata: Any = token, form: bool = delta) -> tuple[str, str]:
                return await ours.stream_ends(request, metadata=metadata, delta=form)

            def node(**fields: Any) -> Any:
                return {**first, "node": {**NODE, **fields}}

            assert await code(first, []) == ("UNAUTHENTICATED", "authentication failure")
            assert await code({"typeUrl": ADDRESS}) == ("INVALID_ARGUMENT", "missing node information")
            assert await code(node(id="")) == ("INVALID_ARGUMENT", "missing node information")
            for wrong in ("nonsense", "ztunnel~10.1.0.1~a", "nobody~10.1.0.1~a.shop~shop.svc.cluster.local"):
                assert (await code(node(id=wrong)))[0] == "INVALID_ARGUMENT", wrong
            for metadata in ({"NAMESPACE": "web"}, {"NAMESPACE": "shop", "SERVICE_ACCOUNT": "web"}):
                found, details = await code(node(metadata=metadata))
                assert (found, details.partition(":")[0]) == ("PERMISSION_DENIED", "authorization failed")
            with monkeypatch.context() as patch:
                patch.setattr(auth.RateLimiter, "allow", lambda *_: False)
                found, details = await code(first)
                assert (found, details.partition(":")[0]) == ("RESOURCE_EXHAUSTED", "request rate limit exceeded")
            with monkeypatch.context() as patch:
                patch.setattr(streams, "FIRST_REQUEST_SECONDS", 0.05)
                assert (await ours.stream_ends(metadata=token, delta=delta))[0] == "DEADLINE_EXCEEDED"


async def test_discovery_without_documents_is_unavailable(tmp_path: Path, stubs: Path) -> None:
    """istiod says UNKNOWN, on which a ztunnel asks again without waiting longer and longer."""
    async with control_plane(tmp_path, "kind: Nonsense") as cp, client(stubs) as ours:
        await ours.connect(cp)
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        assert await ours.stream_ends({"typeUrl": ADDRESS, "node": NODE}, metadata=token) == (
            "UNAVAILABLE",
            "server is not ready to serve discovery information",
        )


async def test_an_old_connection_is_drained_and_its_streams_end(
    tmp_path: Path, stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GrpcConfig(max_connection_age=0.2, drain_grace=0.1)
    monkeypatch.setattr(app, "GrpcServer", lambda handlers: GrpcServer(handlers, config=config))
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        await ours.connect(cp)
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        await ours.do("open", "x", token)
        await ours.do("send", "x", {"typeUrl": AUTHORIZATION, "node": NODE}, {"typeUrl": ADDRESS})
        found = [await ours.do("next", "x")]
        while found[-1]["code"] == "OK":
            found.append(await ours.do("next", "x"))
        assert found[-1]["code"] == "UNAVAILABLE"


async def subscribed(ours: Client, cp: miniistiod.MiniIstiod, *requests: Any, **keywords: Any) -> None:
    token = bearer(cp.create_token("shop", "orders", reusable=True))
    await ours.connect(cp)
    await ours.do("open", "s", token, **keywords)
    await ours.do("send", "s", *({**request, "node": NODE} for request in requests))


async def answered(ours: Client, error: str | None = None) -> dict[str, Any]:
    """The next response, acknowledged, or with `error` rejected."""
    found = await ours.do("next", "s")
    assert found["code"] == "OK", found
    request = {"typeUrl": found["typeUrl"], "responseNonce": found["nonce"]}
    await ours.do("send", "s", request if error is None else {**request, "errorDetail": {"message": error}})
    return found


def names(response: dict[str, Any]) -> list[str]:
    return sorted(
        [item["name"] for item in response.get("resources", ())]
        + [f"-{name}" for name in response.get("removedResources", ())]
    )


async def test_delta_discovery(tmp_path: Path, stubs: Path) -> None:
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        path = cp.config.config_dir / "mesh.yaml"
        await subscribed(ours, cp, {"typeUrl": ADDRESS}, {"typeUrl": AUTHORIZATION})
        policies, addresses = await answered(ours), await answered(ours)
        assert names(policies) == ["shop/orders"]
        (policy,) = policies["resources"]
        assert policy["resource"]["@type"] == AUTHORIZATION
        match = {"serviceAccounts": [{"namespace": "shop", "serviceAccount": "web"}]}
        assert policy["resource"]["rules"] == [{"clauses": [{"matches": [match]}]}]
        assert names(addresses) == [uid("orders-1"), uid("web-1"), "shop/orders.mesh"]
        versions = {item["name"]: item["version"] for item in addresses["resources"]}
        service = next(item for item in addresses["resources"] if item["name"] == "shop/orders.mesh")
        assert service["resource"]["service"]["ports"] == [
            {"servicePort": 80, "targetPort": 8080, "appProtocol": "HTTP11"}
        ]
        path.write_text(MESH.replace("10.1.0.2", "10.1.0.3"))
        assert names(await answered(ours, error="web-1: no")) == [uid("web-1")]
        path.write_text(MESH.replace("name: web-1", "name: web-2"))
        assert names(await answered(ours)) == ["-" + uid("web-1"), uid("web-2")]
        assert await ours.do("end", "s") == {"code": "OK"}
        held = {**versions, "shop/gone.mesh": "1"}
        again = {"typeUrl": ADDRESS, "initialResourceVersions": held}
        await subscribed(ours, cp, again, {"typeUrl": AUTHORIZATION})
        assert names(await answered(ours)) == ["shop/orders"]
        assert names(await answered(ours)) == sorted(["-" + uid("web-1"), "-shop/gone.mesh", uid("web-2")])


async def test_discovery_on_demand(tmp_path: Path, stubs: Path) -> None:
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        path = cp.config.config_dir / "mesh.yaml"
        nothing = {"resourceNamesSubscribe": ["*"], "resourceNamesUnsubscribe": ["*"]}
        await subscribed(ours, cp, {"typeUrl": ADDRESS, **nothing}, {"typeUrl": AUTHORIZATION})
        assert [names(await answered(ours)) for _ in range(2)] == [["shop/orders"], []]

        async def ask(name: str) -> dict[str, Any]:
            await ours.do("send", "s", {"typeUrl": ADDRESS, "resourceNamesSubscribe": [name]})
            return await answered(ours)

        found = await ask("/10.9.0.1")
        # Under the name that was asked for too: a ztunnel waits for that.
        assert names(found) == ["/10.9.0.1", uid("orders-1"), "shop/orders.mesh"]
        aliases = {item["name"]: item.get("aliases") for item in found["resources"]}
        assert aliases["shop/orders.mesh"] == ["/10.9.0.1"]
        assert aliases[uid("orders-1")] == ["/10.1.0.1"]
        assert names(await ask("/10.1.0.9")) == ["-/10.1.0.9"]
        path.write_text(MESH.replace("10.1.0.2", "10.1.0.9"))
        assert "/10.1.0.9" in names(await answered(ours))
        path.write_text(MESH)
        assert "-/10.1.0.9" in names(await answered(ours))


async def test_the_older_form_of_discovery(tmp_path: Path, stubs: Path) -> None:
    async with control_plane(tmp_path) as cp, client(stubs) as ours:
        await subscribed(ours, cp, {"typeUrl": ADDRESS}, {"typeUrl": AUTHORIZATION}, delta=False)
        found = {}
        for _ in range(2):
            response = await answered(ours)
            found[response["typeUrl"]] = [item["@type"] for item in response["resources"]]
        assert found == {ADDRESS: [ADDRESS] * 3, AUTHORIZATION: [AUTHORIZATION]}
