"""Documents and requests of any kind: an error each, never a traceback, never more work than the input is long."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.miniistiod import DELTA, bearer, control_plane, subscribe
from tests.support.sizes import FULL

from hbone.grpc import GrpcError, StatusCode
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from miniistiod import conditions, lint, services, vips
from miniistiod.catalog import Catalog
from miniistiod.discovery import ADDRESS, AUTHORIZATION, Subscriber, TooManyNamesError, World
from miniistiod.explain import ExplainError, MeshView, Question, reachability
from miniistiod.registry import Inputs, Registry
from miniistiod.resources import load
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from hbone.trio.grpc import GrpcStream

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = 3000 if FULL else 100
ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec: {parentRefs: [{name: wp}], rules: [{}]}
"""
GROUP = """
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: g, namespace: shop}
spec: {metadata: {labels: {a: b}}, template: {serviceAccount: x, ports: {http: 80}, locality: a/b}}
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: e, namespace: shop, labels: {kubernetes.io/service-name: headless}}
addressType: IPv4
endpoints: [{addresses: [10.2.0.9], conditions: {ready: false}}]
ports: [{name: tcp, port: 7001}]
"""


def documents() -> list[Any]:
    texts = [path.read_text() for path in sorted(GOLDEN.glob("*/input.yaml")) if "pa-ports" not in str(path)]
    found = [item for text in [*texts, ROUTE, GROUP, SLICE] for item in yaml.safe_load_all(text)]
    return json.loads(json.dumps(found, default=str))  # type: ignore[no-any-return]


DOCUMENTS = documents()
CONFIG = {
    "trustDomain": "mesh.example",
    "rootNamespace": "root",
    "network": "n",
    "serviceEntryVisibility": {
        "defaultVisibility": "PUBLIC",
        "policies": [
            {
                "namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]},
                "visibility": "NAMESPACE",
            }
        ],
    },
}
WORDS = st.sampled_from(
    [
        *("", "*", "*x*", "shop", "a.b", "10.0.0.1", "10.0.0.0/8", "::1", "::ffff:10.0.0.1", "fe80::1%eth0", "http"),
        *("STRICT", "DENY", "none", "istio-remote", "PROXY/99999", "0", "-1", "99999999999999999999", "spiffe://a/b"),
        *("\u0660", "\x00", "a/b/c/d", "é", "x" * 300, "__proto__", "10.0.0.1:80", "0001-01-01T00:00:00+23:59"),
    ]
)
SCALARS = st.one_of(WORDS, st.text(max_size=8), st.integers(-(2**70), 2**70), st.booleans(), st.none(), st.floats())
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=3)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [path, *(found for key, item in inner for found in places(item, (*path, key)))]
        if path
        else [found for key, item in inner for found in places(item, (key,))]
    )


def mutate(data: st.DataObject, document: Any) -> Any:
    """A document with some values taken out, exchanged, or added to."""
    changed = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 4))):
        paths = places(changed)
        if not paths:
            break
        *path, last = data.draw(st.sampled_from(paths))
        inner = changed
        for key in path:
            inner = inner[key]
        verb = data.draw(st.sampled_from(["set", "drop", "add", "twice"]))
        if verb == "drop":
            del inner[last]
        elif verb == "add" and isinstance(inner[last], dict):
            inner[last][data.draw(WORDS)] = data.draw(VALUES)
        elif verb == "twice" and isinstance(inner[last], list):
            inner[last] *= 2
        else:
            inner[last] = data.draw(VALUES)
    return changed


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_document_is_taken_or_refused_with_a_line_and_a_remedy(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(DOCUMENTS), min_size=1, max_size=4))
    texts = [yaml.safe_dump(mutate(data, document), allow_unicode=True) for document in chosen]
    config = yaml.safe_dump(mutate(data, CONFIG) if data.draw(st.booleans()) else CONFIG)
    resources = load({"a.yaml": "---\n".join(texts), "meshconfig.yaml": config})
    for finding in resources.findings:
        assert finding.what
        assert finding.fix
        assert str(finding).isprintable()
        assert len(str(finding)) < 3000
    # The gate stands before the conversion; but also what it refuses can be converted.
    wanted, given_addresses = services.vip_needs(resources.resources)
    registry = Registry.of(resources, Inputs(vips=vips.allot({}, wanted, given_addresses)))
    conditions.every_condition(registry)
    lint.findings(registry, "cluster.local")
    if not resources.errors:
        # What is accepted, a ztunnel can read.
        view = MeshView()
        store = view.take(view.news(registry.catalog))
        assert len(store.workloads) + len(store.services) == len(registry.catalog.addresses)
        assert not any(policy.unusable for policy in store.policies.values())
        reachability(store)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(max_size=300) | st.text("kind: [ServiceEntry]\n-#&*!|>'\"%@`{},?", max_size=200))
def test_any_text_is_taken_or_refused(text: str) -> None:
    load({"a.yaml": text, "meshconfig.yaml": text})


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_question_is_answered_or_refused(source: str, destination: str) -> None:
    view = MeshView()
    store = view.take(view.news(Registry.of(load({})).catalog))
    with contextlib.suppress(ExplainError):
        Question(source, destination).answer(store, "cluster.local")


NAMES = st.lists(WORDS | st.sampled_from(["shop/cart.mesh", "/10.9.0.10", "*"]), max_size=4)
REQUESTS = st.builds(
    lambda url, sub, unsub, held, nonce, error: (url, sub, unsub, held, nonce, error),
    st.sampled_from([ADDRESS, AUTHORIZATION, "", "type.googleapis.com/x"]),
    NAMES,
    NAMES,
    st.dictionaries(WORDS, WORDS, max_size=3),
    st.sampled_from(["", "s-1", "s-2", "stale"]),
    st.none() | st.text(max_size=5),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(REQUESTS, max_size=8))
def test_any_sequence_of_requests_is_answered(requests: list[Any]) -> None:
    catalog = Registry.of(load({"a.yaml": (GOLDEN / "se-workload-selector" / "input.yaml").read_text()})).catalog
    assert isinstance(catalog, Catalog)
    delta, world = Subscriber("s", catalog, node="n"), World("s", catalog)
    for now, (url, sub, unsub, held, nonce, error) in enumerate(requests):
        first = discovery_pb2.DeltaDiscoveryRequest(
            type_url=url,
            resource_names_subscribe=sub,
            resource_names_unsubscribe=unsub,
            initial_resource_versions=held,
            response_nonce=nonce,
        )
        second = discovery_pb2.DiscoveryRequest(type_url=url, resource_names=sub, response_nonce=nonce)
        if error is not None:
            first.error_detail.message = second.error_detail.message = error
        delta.request(first, float(now))
        world.request(second, float(now))
        for response in delta.take(float(now)):
            message = discovery_pb2.DeltaDiscoveryResponse.FromString(response.data)
            assert len(message.resources) == response.resources <= len(catalog.addresses) + len(catalog.policies) + 12
        for response in world.take(float(now)):
            assert len(discovery_pb2.DiscoveryResponse.FromString(response.data).resources) == response.resources
        delta.describe()
        world.describe()


def test_names_that_are_too_many_or_too_long_are_refused_on_both_forms() -> None:
    catalog = Catalog()
    for long in (["x" * 3000], [str(number) for number in range(60_000)]):
        with pytest.raises(TooManyNamesError, match="more than"):
            World("s", catalog).request(discovery_pb2.DiscoveryRequest(type_url=ADDRESS, resource_names=long), 0.0)
        with pytest.raises(TooManyNamesError, match="more than"):
            Subscriber("s", catalog).request(
                discovery_pb2.DeltaDiscoveryRequest(type_url=ADDRESS, resource_names_subscribe=long), 0.0
            )


async def to_the_end(stream: GrpcStream) -> None:
    while await stream.receive() is not None:
        pass


async def test_garbage_on_a_stream_ends_that_stream_alone(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        token = bearer(cp.create_token("shop", "orders", reusable=True))
        tls = TlsContext.client(None, roots=cp.root_pem, server_name="localhost")
        with trio.fail_after(60):
            async with GrpcClient.connect("127.0.0.1", cp.port, tls) as client:
                for path in (DELTA, DELTA.replace("Delta", "Stream")):
                    for first in (b"\xff" * 9, b"\x0a\xff\xff\xff\xff\x0f", subscribe()):
                        async with client.stream(path, token) as stream:
                            await stream.send(first)
                            await stream.send(b"\xff" * 9)
                            with pytest.raises(GrpcError) as caught:
                                await to_the_end(stream)
                            assert caught.value.code is StatusCode.INVALID_ARGUMENT
                async with client.stream(DELTA, token) as stream:
                    await stream.send(subscribe(ADDRESS))
                    await stream.send(subscribe(AUTHORIZATION))
                    assert await stream.receive() is not None
