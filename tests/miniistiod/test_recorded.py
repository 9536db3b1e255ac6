"""What the Rust ztunnel sent and istiod issued, recorded: ours takes the one and makes the other."""

from __future__ import annotations

import base64
import datetime
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.support.callers import dial
from tests.support.documents import entry
from tests.support.miniistiod import CREATE_CERTIFICATE, bearer, control_plane

from hbone.grpc import GrpcError
from hbone.identity import SpiffeId
from miniistiod import auth, ca, issue_tokens
from miniistiod.catalog import Catalog, Entry, Plan, encode
from miniistiod.discovery import ADDRESS, AUTHORIZATION, Subscriber
from ztunnel.wire import ca_pb2, discovery_pb2

GOLDEN = Path(__file__).parent / "golden"
NOW = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text().splitlines()]


REQUESTS = [base64.b64decode(item["bytes"]) for item in lines("ztunnel-requests.jsonl")]
SIGNING = [data for data in REQUESTS if b"CERTIFICATE REQUEST" in data]
RECORDED_CSR = ca_pb2.IstioCertificateRequest.FromString(SIGNING[0]).csr
DISCOVERY = [discovery_pb2.DeltaDiscoveryRequest.FromString(data) for data in REQUESTS if data not in SIGNING]


@pytest.mark.parametrize("case", ["own-identity", "ttl-zero", "ttl-maximum"])
def test_a_leaf_has_the_profile_that_istiod_gives(case: str) -> None:
    recorded = next(item for item in lines("ca.jsonl") if item["case"] == case)["chain"][0]
    key = ca.parse_request(ca_pb2.IstioCertificateRequest.FromString(SIGNING[0]).csr)
    seconds = {"own-identity": 86_400, "ttl-zero": 0, "ttl-maximum": 7_776_000}[case]
    identity = SpiffeId.parse(recorded["uris"][0])
    leaf = ca.issue(ca.make_root("cluster.local", NOW), key, identity, ca.lifetime_for(seconds), NOW)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    purposes = {ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth", ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth"}
    found = {
        "backdateSeconds": (NOW - leaf.not_valid_before_utc).total_seconds(),
        "lifetimeSeconds": (leaf.not_valid_after_utc - leaf.not_valid_before_utc).total_seconds(),
        "extensions": [
            f"{item.oid.dotted_string} critical={'true' if item.critical else 'false'}" for item in leaf.extensions
        ],
        "uris": names.get_values_for_type(x509.UniformResourceIdentifier),
        "subject": leaf.subject.rfc4514_string(),
        "issuer": leaf.issuer.rfc4514_string(),
        "isCA": leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca,
        "extKeyUsage": "[{}]".format(
            " ".join(purposes[oid] for oid in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        ),
    }
    assert found == {name: recorded[name] for name in found}


DIFFERENT = {
    "unknown-cluster": ("OK", "the clusterid header decides nothing: there is one cluster"),
    "impersonate-failed-pod": ("UNAUTHENTICATED", "granted only because the recording's API had no field selectors"),
    "impersonate-workloadentry": ("OK", "a machine that is registered on the proxy's node is what it is asked for"),
}
NODES = {"one": "node-1", "vm1": "node-1", "failed": ""}
MACHINES = "\n---\n".join(
    entry(name, f"10.0.0.{n}", spec={"serviceAccount": name}, namespace="app", annotations={"miniistiod/node": node})
    for n, (name, node) in enumerate(NODES.items(), 1)
)


@pytest.mark.parametrize("recorded", lines("ca.jsonl"), ids=lambda recorded: recorded["case"])
async def test_every_recorded_call_gets_its_code(tmp_path: Path, recorded: dict[str, Any]) -> None:
    """The same calls to ours, by callers that stand for the same."""
    options = dict(re.findall(r"--(\S+) (\S+)", recorded["args"]))
    code = recorded["code"].upper().replace("INVALIDARGUMENT", "INVALID_ARGUMENT")
    wanted, _ = DIFFERENT.get(recorded["case"], (code, ""))
    async with control_plane(tmp_path, MACHINES) as cp:
        token = options.get("token", "lab:app:vm1")
        if token.startswith("lab:"):
            _, namespace, account, *pod = token.split(":")
            token = issue_tokens.create(
                cp.store,
                namespace=namespace,
                service_account=account,
                name=None,
                lifetime=None,
                reusable=True,
                now=time.time(),
                node="node-1" if pod else "",
            ).text
        metadata = [*bearer(token)[:1], ("clusterid", options.get("cluster", "Kubernetes"))]
        request = ca_pb2.IstioCertificateRequest(
            csr=options.get("raw-csr", RECORDED_CSR), validity_duration=int(options.get("ttl", 86_400))
        )
        if "impersonate" in options:
            request.metadata.update({"ImpersonatedIdentity": options["impersonate"]})
        async with dial(cp) as client:
            if wanted != "OK":
                with pytest.raises(GrpcError) as caught:
                    await client.unary(CREATE_CERTIFICATE, request.SerializeToString(), metadata)
                assert caught.value.code.name == wanted
                assert caught.value.message == recorded.get("message", "request impersonation authentication failure")
                return
            answer = await client.unary(CREATE_CERTIFICATE, request.SerializeToString(), metadata)
    leaf, *_ = ca_pb2.IstioCertificateResponse.FromString(answer).cert_chain
    found = x509.load_pem_x509_certificate(leaf.encode())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if "chain" not in recorded:
        assert uris == [options.get("impersonate", "spiffe://cluster.local/ns/app/sa/vm1")]
        return
    assert uris == recorded["chain"][0]["uris"]
    span = (found.not_valid_after_utc - found.not_valid_before_utc).total_seconds()
    assert 0 <= span - recorded["chain"][0]["lifetimeSeconds"] <= 1  # times in certificates are whole seconds


def test_requests_for_certificates_are_taken() -> None:
    for data in SIGNING:
        request = ca_pb2.IstioCertificateRequest.FromString(data)
        assert ca.parse_request(request.csr)
        assert ca.lifetime_for(request.validity_duration) == datetime.timedelta(days=1)
        assert not request.metadata.fields


def test_nodes_are_understood() -> None:
    firsts = [request for request in DISCOVERY if request.HasField("node")]
    assert firsts
    for request in firsts:
        fields = {key: value.string_value for key, value in request.node.metadata.fields.items()}
        node = auth.parse_node_id(request.node.id, fields)
        assert (node.kind, node.namespace) == ("ztunnel", "app")
        assert node.name in ("vm1", "vm2")
        auth.check_node(
            node, auth.Caller(identity=SpiffeId.istio("cluster.local", "app", node.name), how="certificate")
        )


def test_conversations_are_answered() -> None:
    def resource(url: str, name: str) -> Entry:
        return Entry(name, "v", encode(url, name, "v", name.encode()), len(name))

    catalog = Catalog()
    catalog.apply(
        Plan(addresses={"a": resource(ADDRESS, "a")}, policies={"app/echo": resource(AUTHORIZATION, "app/echo")})
    )
    first = [request for request in DISCOVERY if request.HasField("node")]
    for opening in (first[:2], first[-2:]):
        subscriber = Subscriber("s", catalog)
        for request in opening:
            assert subscriber.request(request, 0.0) is None
        responses = [discovery_pb2.DeltaDiscoveryResponse.FromString(item.data) for item in subscriber.take(0.0)]
        assert [response.type_url for response in responses][:2] == [AUTHORIZATION, ADDRESS]
        held = dict(opening[0].initial_resource_versions)
        assert sorted(responses[1].removed_resources) == sorted(held)
        for response in responses:
            acknowledgement = discovery_pb2.DeltaDiscoveryRequest(
                type_url=response.type_url, response_nonce=response.nonce
            )
            assert subscriber.request(acknowledgement, 0.0) is None
        assert subscriber.take(0.0) == []
