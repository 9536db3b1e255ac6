from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniistiod import catalog as catalog_module
from miniistiod import discovery
from miniistiod.catalog import Catalog, Entry, Plan, encode
from miniistiod.discovery import (
    ADDRESS,
    AUTHORIZATION,
    HOLD_SECONDS,
    FellBehindError,
    Response,
    Subscriber,
    TooManyNamesError,
    World,
)
from ztunnel.wire import discovery_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Mapping

UID = "Kubernetes/networking.istio.io/WorkloadEntry/shop/"


def entry(name: str, version: str = "1", **fields: Any) -> Entry:
    body = f"{name}@{version}".encode()
    return Entry(name, body.decode(), encode(ADDRESS, name, body.decode(), body), len(body), **fields)


@attrs.frozen
class Mesh:
    addresses: dict[str, Entry]
    policies: dict[str, Entry]


def mesh(addresses: list[Entry], policies: list[Entry] | None = None) -> Mesh:
    made = [
        attrs.evolve(item, wire=encode(AUTHORIZATION, item.name, item.version, item.body)) for item in policies or []
    ]
    return Mesh({item.name: item for item in addresses}, {item.name: item for item in made})


def plan(catalog: Catalog, wanted: Mesh) -> Plan:
    def differing(old: Mapping[str, Entry], new: Mapping[str, Entry]) -> dict[str, Entry | None]:
        gone: dict[str, Entry | None] = {name: None for name in old if name not in new}
        known = {name: item.version for name, item in old.items()}
        return gone | {name: item for name, item in new.items() if known.get(name) != item.version}

    return Plan(
        addresses=differing(catalog.addresses, wanted.addresses), policies=differing(catalog.policies, wanted.policies)
    )


def ask(
    url: str = ADDRESS,
    sub: list[str] | None = None,
    unsub: list[str] | None = None,
    has: dict[str, str] | None = None,
    nonce: str = "",
    error: str | None = None,
) -> pb.DeltaDiscoveryRequest:
    request = pb.DeltaDiscoveryRequest(
        type_url=url,
        resource_names_subscribe=sub or [],
        resource_names_unsubscribe=unsub or [],
        initial_resource_versions=has or {},
        response_nonce=nonce,
    )
    if error is not None:
        request.error_detail.message = error
    return request


class Client:
    """A stream's client: what it was sent, in short."""

    def __init__(self, wanted: Mesh, *requests: pb.DeltaDiscoveryRequest, node: str = "") -> None:
        self.catalog = Catalog()
        self.become(wanted)
        self.subscriber = Subscriber("s", self.catalog, node=node)
        self.nonces: dict[str, str] = {}
        for request in requests:
            self.subscriber.request(request, 0.0)
        self.seen = self.take()

    def become(self, wanted: Mesh) -> None:
        self.catalog.apply(plan(self.catalog, wanted))

    def push(self, wanted: Mesh, now: float = 0.0) -> list[str]:
        self.become(wanted)
        return self.take(now)

    def ask(self, *requests: pb.DeltaDiscoveryRequest, now: float = 0.0) -> list[str]:
        for request in requests:
            self.subscriber.request(request, now)
        return self.take(now)

    def responses(self, now: float = 0.0) -> list[pb.DeltaDiscoveryResponse]:
        return [pb.DeltaDiscoveryResponse.FromString(item.data) for item in self.subscriber.take(now)]

    def take(self, now: float = 0.0) -> list[str]:
        responses = self.responses(now)
        for response in responses:
            assert response.nonce not in self.nonces.values()
            self.nonces[response.type_url] = response.nonce
            for resource in response.resources:
                assert resource.resource.type_url == response.type_url
                assert resource.version.encode() == resource.resource.value
        return [
            f"{response.type_url.rpartition('.')[2]}:"
            f" {' '.join(f'{r.name}' for r in response.resources)}"
            f"{''.join(f' -{name}' for name in response.removed_resources)}"
            for response in responses
        ]


BOTH = (ask(ADDRESS), ask(AUTHORIZATION))


def test_policies_are_sent_before_addresses_whatever_was_asked_first() -> None:
    snapshot = mesh([entry("a"), entry("b")], [entry("p")])
    for order in (BOTH, BOTH[::-1]):
        assert Client(snapshot, *order).seen == ["Authorization: p", "Address: a b"]


def test_the_first_answer_comes_even_if_it_is_empty() -> None:
    assert Client(mesh([]), *BOTH).seen == ["Authorization: ", "Address: "]


def test_addresses_wait_for_the_policies_to_be_asked_for_but_not_long() -> None:
    client = Client(mesh([entry("a")], [entry("p")]), ask(ADDRESS))
    assert client.seen == []
    assert client.subscriber.deadline == HOLD_SECONDS
    assert client.take(HOLD_SECONDS - 0.01) == []
    assert client.take(HOLD_SECONDS) == ["Address: a"]
    assert client.subscriber.deadline != HOLD_SECONDS
    assert client.ask(ask(AUTHORIZATION), now=2.0) == ["Authorization: p"]


def test_an_acknowledgement_is_not_answered() -> None:
    client = Client(mesh([entry("a")], [entry("p")]), *BOTH)
    assert client.ask(ask(ADDRESS, nonce=client.nonces[ADDRESS])) == []
    assert client.ask(ask(AUTHORIZATION, nonce=client.nonces[AUTHORIZATION])) == []


def test_a_push_has_what_changed_and_nothing_else() -> None:
    same, policy = entry("a"), entry("p")
    client = Client(mesh([same, entry("b"), entry("c")], [policy]), *BOTH)
    assert client.push(mesh([same, entry("b", "2"), entry("d")], [policy])) == ["Address: b d -c"]
    assert client.push(mesh([same, entry("b", "2"), entry("d")], [policy])) == []


def test_policies_come_before_workloads_and_go_after_them() -> None:
    client = Client(mesh([entry("a")], [entry("old"), entry("kept")]), *BOTH)
    pushed = client.push(mesh([entry("a", "2")], [entry("kept", "2"), entry("new")]))
    assert pushed == ["Authorization: kept new", "Address: a", "Authorization:  -old"]


def test_pushes_that_were_not_taken_are_merged() -> None:
    client = Client(mesh([entry("a"), entry("b")]), *BOTH)
    client.become(mesh([entry("a", "2"), entry("b"), entry("x")]))
    # x came and went; that it is gone may be said to somebody who never had it.
    assert client.push(mesh([entry("a", "2"), entry("b", "2")])) == ["Address: a b -x"]


def test_a_resource_is_encoded_once_for_all_who_get_it() -> None:
    catalog = Catalog()
    catalog.apply(plan(catalog, mesh([entry("a"), entry("b", "2")], [entry("p")])))
    one, other = ([part for item in full(catalog) for part in item.parts[1:]] for _ in range(2))
    assert len(one) == 3
    assert all(part is again for part, again in zip(one, other, strict=True))


def full(catalog: Catalog) -> list[Response]:
    """What a new subscriber to everything is sent."""
    subscriber = Subscriber("s", catalog)
    for request in BOTH:
        subscriber.request(request, 0.0)
    return subscriber.take(0.0)


def test_a_reconnect_gets_what_it_lacks() -> None:
    snapshot = mesh([entry("a"), entry("b", "2"), entry("c")], [entry("p"), entry("q", "2")])
    client = Client(
        snapshot,
        ask(ADDRESS, has={"a": "a@1", "b": "b@1", "gone": "gone@1", "c": ""}),
        ask(AUTHORIZATION, has={"p": "p@1", "q": "", "old": ""}),
    )
    assert client.seen == ["Authorization: q", "Address: b c -gone", "Authorization:  -old"]


def test_a_reconnect_that_lacks_nothing_is_answered() -> None:
    client = Client(
        mesh([entry("a")], [entry("p")]), ask(ADDRESS, has={"a": "a@1"}), ask(AUTHORIZATION, has={"p": "p@1"})
    )
    assert client.seen == ["Authorization: ", "Address: "]


def test_a_rejection_is_kept_and_not_answered() -> None:
    client = Client(mesh([entry("a")]), *BOTH)
    rejection = client.subscriber.request(ask(ADDRESS, nonce=client.nonces[ADDRESS], error="a: bad"), 0.0)
    assert rejection is not None
    assert rejection.message == "a: bad"
    assert client.take() == []
    assert client.subscriber.rejections[ADDRESS] == rejection
    assert client.push(mesh([entry("a", "2")], [])) == ["Address: a"]
    client.ask(ask(ADDRESS, nonce=client.nonces[ADDRESS]))
    assert client.subscriber.rejections == {}


def test_a_stale_acknowledgement_says_nothing() -> None:
    client = Client(mesh([entry("a")]), *BOTH)
    old = client.nonces[ADDRESS]
    client.push(mesh([entry("a", "2")], []))
    assert client.ask(ask(ADDRESS, nonce=old)) == []
    described: Any = client.subscriber.describe()
    assert described[ADDRESS]["acknowledged"] is False


def test_a_name_asked_on_a_wildcard_stream_brings_everything_again() -> None:
    client = Client(mesh([entry("a"), entry("b")]), *BOTH)
    assert client.ask(ask(ADDRESS, sub=["a"])) == ["Address: a b"]


def test_a_wildcard_stream_keeps_no_names() -> None:
    known = [entry(str(number)) for number in range(50)]
    client = Client(mesh(known), ask(ADDRESS, has={item.name: item.version for item in known}), ask(AUTHORIZATION))
    assert client.seen == ["Authorization: ", "Address: "]
    state = client.subscriber._types[ADDRESS]
    assert (state.demand, state.held) == (None, None)
    described: Any = client.subscriber.describe()
    assert (described[ADDRESS]["wildcard"], described[ADDRESS]["names"]) == (True, [])


def test_other_types_are_left_unanswered() -> None:
    client = Client(mesh([entry("a")]), *BOTH)
    assert client.ask(ask(discovery.HEALTH), ask("type.googleapis.com/envoy.config.cluster.v3.Cluster")) == []


# -- on demand

SERVICE = entry("shop/cart.mesh", aliases=("/10.9.0.1",), is_service=True)
A = entry(UID + "a", aliases=("/10.0.0.1",), members=("shop/cart.mesh",))
B = entry(UID + "b", aliases=("/10.0.0.2",), members=("shop/cart.mesh",))
C = entry(UID + "c", aliases=("/10.0.0.3",), node="n1")
MESH = mesh([SERVICE, A, B, C])
NOTHING = ask(ADDRESS, sub=["*"], unsub=["*"])


def on_demand(wanted: Mesh = MESH, node: str = "") -> Client:
    return Client(wanted, NOTHING, ask(AUTHORIZATION), node=node)


def test_on_demand_begins_with_an_empty_answer() -> None:
    assert on_demand().seen == ["Authorization: ", "Address: "]


def test_an_address_is_answered_under_both_its_names() -> None:
    client = on_demand()
    assert client.ask(ask(ADDRESS, sub=["/10.0.0.3"])) == [f"Address: {UID}c /10.0.0.3"]
    client = on_demand()
    client.subscriber.request(ask(ADDRESS, sub=["/10.0.0.3"]), 0.0)
    (response,) = client.responses()
    assert [list(resource.aliases) for resource in response.resources] == [["/10.0.0.3"]] * 2


@pytest.mark.parametrize("name", ["/10.9.0.1", "shop/cart.mesh"])
def test_a_service_brings_its_workloads(name: str) -> None:
    alias = " /10.9.0.1" if name.startswith("/") else ""
    assert on_demand().ask(ask(ADDRESS, sub=[name])) == [f"Address: shop/cart.mesh {UID}a {UID}b{alias}"]


def test_an_unknown_name_is_removed_at_once_and_pushed_when_it_appears() -> None:
    client = on_demand()
    assert client.ask(ask(ADDRESS, sub=["/10.0.0.9"])) == ["Address:  -/10.0.0.9"]
    assert client.push(mesh([A], [])) == []
    new = entry(UID + "new", aliases=("/10.0.0.9",))
    assert client.push(mesh([A, new], [])) == [f"Address: {UID}new /10.0.0.9"]
    assert client.push(mesh([A], [])) == [f"Address:  -/10.0.0.9 -{UID}new"]


def test_only_what_was_asked_for_is_pushed() -> None:
    client = on_demand()
    client.ask(ask(ADDRESS, sub=[UID + "c"]))
    changed = entry(UID + "c", "2", aliases=("/10.0.0.3",))
    assert client.push(mesh([SERVICE, entry(UID + "a", "2"), B, changed], [])) == [f"Address: {UID}c"]


def test_a_name_asked_again_is_answered_again() -> None:
    client = on_demand()
    first = client.ask(ask(ADDRESS, sub=["/10.0.0.3"]))
    assert first
    assert client.ask(ask(ADDRESS, sub=["/10.0.0.3"])) == ["Address: /10.0.0.3"]


def test_giving_a_name_up_brings_no_data() -> None:
    client = on_demand()
    client.ask(ask(ADDRESS, sub=[UID + "c", UID + "a"]))
    assert client.ask(ask(ADDRESS, unsub=[UID + "c"])) == []
    changed = entry(UID + "c", "2")
    assert client.push(mesh([SERVICE, A, B, changed], [])) == []


def test_the_nodes_own_workloads_come_unasked() -> None:
    assert on_demand(node="n1").seen == ["Authorization: ", f"Address: {UID}c"]


def test_a_reconnect_on_demand_gets_what_changed_and_learns_what_is_gone() -> None:
    client = Client(
        MESH,
        ask(ADDRESS, sub=["*"], unsub=["*"], has={UID + "c": C.version, UID + "a": "old", UID + "x": "1"}),
        ask(AUTHORIZATION),
    )
    assert client.seen == ["Authorization: ", f"Address: {UID}a -{UID}x"]


def test_on_demand_can_become_wildcard() -> None:
    client = on_demand()
    client.ask(ask(ADDRESS, sub=["/10.0.0.3"]))
    (pushed,) = client.ask(ask(ADDRESS, sub=["*"]))
    assert pushed.split() == ["Address:", *MESH.addresses]


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    client = on_demand()
    with pytest.raises(TooManyNamesError):
        client.subscriber.request(ask(ADDRESS, sub=["x" * 3000]), 0.0)
    monkeypatch.setattr(discovery, "MAX_NAMES", 10)
    with pytest.raises(TooManyNamesError):
        client.subscriber.request(ask(ADDRESS, sub=[str(number) for number in range(11)]), 0.0)


def test_what_nobody_asked_for_costs_an_on_demand_client_nothing() -> None:
    client = on_demand()
    client.ask(ask(ADDRESS, sub=["/10.0.0.3"]))
    many = [entry(f"{UID}{number}") for number in range(100)]
    assert client.push(mesh([SERVICE, A, B, C, *many])) == []
    joined = entry(UID + "d", aliases=("/10.0.0.4",), members=("shop/cart.mesh",))
    assert client.push(mesh([SERVICE, A, B, C, joined])) == []


def test_a_workload_that_joins_a_service_is_pushed_to_who_asked_for_the_service() -> None:
    client = on_demand()
    client.ask(ask(ADDRESS, sub=["/10.9.0.1"]))
    joined = entry(UID + "d", aliases=("/10.0.0.4",), members=("shop/cart.mesh",))
    assert client.push(mesh([SERVICE, A, B, C, joined])) == [f"Address: {UID}d"]
    assert client.push(mesh([SERVICE, A, B, C])) == [f"Address:  -{UID}d"]


def test_a_workload_that_comes_to_the_node_is_pushed() -> None:
    client = on_demand(node="n1")
    came = entry(UID + "a", "2", node="n1")
    assert client.push(mesh([SERVICE, came, B, C])) == [f"Address: {UID}a"]


NAMES = st.sampled_from([f"{UID}{letter}" for letter in "abc"])
ENTRIES = st.dictionaries(
    NAMES,
    st.tuples(
        st.sampled_from(["1", "2"]),
        st.sampled_from([(), ("/10.0.0.1",), ("/10.0.0.2",), ("/10.0.0.1", "/10.0.0.2")]),
        st.sampled_from([(), ("shop/s.mesh",)]),
        st.sampled_from(["", "n1"]),
    ),
)
ASKED = st.sampled_from([f"{UID}a", f"{UID}b", "/10.0.0.1", "/10.0.0.2", "/10.9.0.1", "shop/s.mesh", "/gone"])
STEPS = st.lists(st.tuples(st.sampled_from(["sub", "unsub", "take"]), ASKED, ENTRIES, st.booleans()), max_size=12)


@given(STEPS)
def test_an_on_demand_client_has_what_it_asked_for_at_its_newest(steps: list[Any]) -> None:
    """Whatever is asked and changed in between: afterwards each name that was asked is there under that name."""
    client = on_demand(mesh([]), node="n1")
    asked: set[str] = set()
    has: dict[str, bytes] = {}
    for verb, name, entries, service in [*steps, ("take", "", {}, True)]:
        if verb == "sub":
            asked.add(name)
            client.subscriber.request(ask(ADDRESS, sub=[name]), 0.0)
        elif verb == "unsub":
            asked.discard(name)
            client.subscriber.request(ask(ADDRESS, unsub=[name]), 0.0)
        made = [
            entry(uid, f"{version}{aliases}{members}{node}", aliases=aliases, members=members, node=node)
            for uid, (version, aliases, members, node) in entries.items()
        ]
        client.become(
            mesh([*made, *([entry("shop/s.mesh", aliases=("/10.9.0.1",), is_service=True)] if service else [])])
        )
        if verb != "take":
            continue
        for response in client.responses():
            for resource in response.resources:
                has[resource.name] = resource.resource.value
            for gone in response.removed_resources:
                has.pop(gone, None)
    for name in asked:
        names = client.catalog.resolve(name)
        if not names:
            assert name not in has
            continue
        assert has[name] == client.catalog.addresses[names[0]].body
        assert all(has[found] == client.catalog.addresses[found].body for found in names)
    assert all(has[name] == client.catalog.addresses[name].body for name in client.catalog.by_node.get("n1", ()))


def test_who_falls_behind_further_than_is_remembered_must_connect_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "MAX_REMOVED", 10)
    client = Client(mesh([entry("a")]), *BOTH)
    late = Subscriber("late", client.catalog)
    for request in BOTH:
        late.request(request, 0.0)
    assert late.take(0.0)
    for number in range(30):
        assert client.push(mesh([entry("a"), entry(f"{number}")]))
    with pytest.raises(FellBehindError):
        late.take(0.0)


# -- state of the world


def whole(url: str = ADDRESS, names: list[str] | None = None, nonce: str = "", error: str = "") -> pb.DiscoveryRequest:
    request = pb.DiscoveryRequest(type_url=url, resource_names=names or [], response_nonce=nonce)
    if error:
        request.error_detail.message = error
    return request


def test_the_older_form_sends_everything_after_each_change() -> None:
    catalog = Catalog()
    catalog.apply(plan(catalog, mesh([entry("a"), entry("b")], [entry("p")])))
    world = World("w", catalog)
    world.request(whole(), 0.0)
    world.request(whole(AUTHORIZATION), 0.0)

    def take() -> list[tuple[str, list[bytes]]]:
        found = [pb.DiscoveryResponse.FromString(item.data) for item in world.take(0.0)]
        return [(item.type_url.rpartition(".")[2], [resource.value for resource in item.resources]) for item in found]

    assert take() == [("Authorization", [b"p@1"]), ("Address", [b"a@1", b"b@1"])]
    assert take() == []
    catalog.apply(plan(catalog, mesh([entry("a", "2"), entry("b")], [entry("p")])))
    assert take() == [("Address", [b"a@2", b"b@1"])]
    rejection = world.request(whole(nonce="w-3", error="no"), 0.0)
    assert rejection is not None
    assert rejection.message == "no"
    assert take() == []
    assert world.request(whole(names=["b"], nonce="w-2"), 0.0) is None  # of an older response: not heard
    assert take() == []
    world.request(whole(names=["b"], nonce="w-3"), 0.0)
    assert take() == [("Address", [b"b@1"])]
    assert world.rejections == {}
