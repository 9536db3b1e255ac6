"""The README's recipe for a stock ztunnel, run as it stands: what such a ztunnel then has in its environment is enough.

There is no stock ztunnel here: a stand-in says what it was started with. What it would send is a recording of one
(its request for a certificate) and what its rules make of that environment (its node). Ours starts with it, too.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from cryptography import x509
from tests.support.miniistiod import (
    ADDRESS,
    AUTHORIZATION,
    CREATE_CERTIFICATE,
    DELTA,
    MESH,
    acknowledge,
    control_plane,
    uid,
)

from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from ztunnel.config import Config
from ztunnel.control.cache import StateDir
from ztunnel.membership import Membership
from ztunnel.metrics import Metrics
from ztunnel.wire import ca_pb2, discovery_pb2

if TYPE_CHECKING:
    import miniistiod

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "golden" / "ztunnel-requests.jsonl"
LINES = RECORDED.read_text().splitlines()
CSR = next(data for line in LINES if b"REQUEST" in (data := base64.b64decode(json.loads(line)["bytes"])))


def recipe() -> tuple[str, str]:
    """The commands for the control plane, and those for the host."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "AUTH_TOKEN" in block)
    above, _, below = block.partition("# on the host\n")
    return above, below


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """`miniistiod`, and a `ztunnel` that writes down its environment."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name, line in (
        ("miniistiod", f'exec {sys.executable} -m miniistiod "$@"'),
        ("ztunnel", f"exec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"),
    ):
        (directory / name).write_text(f"#!/bin/sh\n{line}\n")
        (directory / name).chmod(0o755)
    return directory


async def started(cp: miniistiod.MiniIstiod, commands: Path, tmp_path: Path) -> dict[str, str]:
    """What the stand-in finds in its environment once the recipe was followed."""
    host = tmp_path / "host"
    host.mkdir()
    above, below = (
        text.replace("/var/lib/miniistiod", str(cp.config.state_dir))
        .replace("/etc/ztunnel", str(host))
        .replace("10.77.0.3:15012", f"localhost:{cp.port}")
        for text in recipe()
    )
    kept = ("PYTHONPATH", "LANG", "HOME")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment["PATH"] = f"{commands}:/usr/bin:/bin"

    async def shell(text: str) -> str:
        done = await trio.run_process(
            ["/bin/sh", "-eu", "-c", text],
            env=environment,
            cwd=tmp_path,
            capture_stdout=True,
            stderr=subprocess.DEVNULL,
        )
        return done.stdout.decode()

    await shell(above)
    for path in (tmp_path / "istio-token", cp.config.state_dir / "root-cert.pem"):
        (host / path.name).write_bytes(path.read_bytes())
    found: dict[str, str] = json.loads(await shell(below))
    return {name: value for name, value in found.items() if name not in (*kept, "PATH", "PWD", "SHLVL", "_", "OLDPWD")}


def as_stock_ztunnel(environment: dict[str, str]) -> tuple[list[tuple[str, str]], Any]:
    """Metadata of its calls, and its first request of discovery. Source: Rust ztunnel's rules for its environment."""
    token = Path(environment["AUTH_TOKEN"]).read_text()  # not trimmed: a newline would make every call fail
    namespace, name = environment.get("POD_NAMESPACE", ""), environment.get("POD_NAME", "")
    request = discovery_pb2.DeltaDiscoveryRequest()
    request.node.id = (
        f"ztunnel~{environment.get('INSTANCE_IP', '1.1.1.1')}~{name}.{namespace}~{namespace}.svc.cluster.local"
    )
    request.node.metadata.update({"NAME": name, "NAMESPACE": namespace, "INSTANCE_IPS": "1.1.1.1", "NODE_NAME": ""})
    return [("authorization", f"Bearer {token}"), ("clusterid", environment.get("CLUSTER_ID", "Kubernetes"))], request


def trusting(roots: str, host: str) -> TlsContext:
    return TlsContext.client(None, roots=Path(roots).read_bytes(), server_name=host)


async def test_the_recipe_is_all_that_a_stock_ztunnel_needs(tmp_path: Path, commands: Path) -> None:
    async with control_plane(tmp_path) as cp:
        environment = await started(cp, commands, tmp_path)
        assert set(environment) == {
            *("PROXY_MODE", "PROXY_WORKLOAD_INFO", "XDS_ADDRESS", "CA_ADDRESS"),
            *("XDS_ROOT_CA", "CA_ROOT_CA", "AUTH_TOKEN"),
        }
        metadata, first = as_stock_ztunnel(environment)
        for which in ("CA", "XDS"):
            host, _, port = environment[f"{which}_ADDRESS"].removeprefix("https://").partition(":")
            tls = trusting(environment[f"{which}_ROOT_CA"], host)
            with trio.fail_after(30):
                async with GrpcClient.connect("127.0.0.1", int(port), tls) as client:
                    if which == "CA":
                        answer = ca_pb2.IstioCertificateResponse.FromString(
                            await client.unary(CREATE_CERTIFICATE, CSR, metadata)
                        )
                        leaf = x509.load_pem_x509_certificate(answer.cert_chain[0].encode())
                        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
                        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [
                            "spiffe://cluster.local/ns/shop/sa/orders"
                        ]
                        continue
                    async with client.stream(DELTA, metadata) as stream:
                        for url in (ADDRESS, AUTHORIZATION):
                            first.type_url = url
                            await stream.send(first.SerializeToString())
                        found = {}
                        for _ in range(2):
                            data = await stream.receive()
                            assert data is not None
                            response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
                            found[response.type_url] = {item.name for item in response.resources}
                            await stream.send(acknowledge(response))
        assert found == {
            ADDRESS: {uid("orders-1"), uid("web-1"), "shop/orders.mesh"},
            AUTHORIZATION: {"shop/orders"},
        }


async def test_ours_starts_in_the_same_environment(tmp_path: Path, commands: Path) -> None:
    async with control_plane(tmp_path, MESH) as cp:
        environment = await started(cp, commands, tmp_path)
        config = Config.from_env({**environment, "ZTUNNEL_STATE_DIR": str(tmp_path / "ours")})
        directory = StateDir.open(tmp_path / "ours")
        try:
            mesh = Membership(config, Metrics("test"), directory)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mesh.run)
                with trio.fail_after(30):
                    while mesh.svids.current() is None or mesh.own_workload() is None:
                        await trio.sleep(0.01)
                nursery.cancel_scope.cancel()
            identity = mesh.svids.current()
            assert identity is not None
            assert str(identity.id) == "spiffe://cluster.local/ns/shop/sa/orders"
        finally:
            directory.release()
