from __future__ import annotations

from typing import Any

import pytest

from miniistiod import discovery
from miniistiod.discovery import ADDRESS, AUTHORIZATION, HOLD_SECONDS, Subscriber, TooManyNamesError
from miniistiod.snapshot import Entry, Snapshot
from ztunnel.wire import discovery_pb2 as pb

UID = "Kubernetes/networking.istio.io/WorkloadEntry/shop/"


def entry(name: str, version: str = "1", **fields: Any) -> Entry:
    return Entry(name, f"{name}@{version}", f"{name}@{version}".encode(), **fields)


def mesh(addresses: list[Entry], policies: list[Entry] | None = None, number: int = 1) -> Snapshot:
    return Snapshot({item.name: item for item in addresses}, {item.name: item for item in policies or []}, number)


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

    def __init__(self, snapshot: Snapshot | None, *requests: pb.DeltaDiscoveryRequest, node: str = "") -> None:
        self.subscriber = Subscriber("s", node=node)
        self.nonces: dict[str, str] = {}
        for request in requests:
            self.subscriber.request(request, 0.0)
        self.seen: list[str] = [] if snapshot is None else self.push(snapshot)

    def push(self, snapshot: Snapshot, now: float = 0.0) -> list[str]:
        self.subscriber.offer(snapshot)
        return self.take(now)

    def ask(self, *requests: pb.DeltaDiscoveryRequest, now: float = 0.0) -> list[str]:
        for request in requests:
            self.subscriber.request(request, now)
        return self.take(now)

    def take(self, now: float = 0.0) -> list[str]:
        responses = self.subscriber.take(now)
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
    assert client.push(mesh([same, entry("b", "2"), entry("d")], [policy], 2)) == ["Address: b d -c"]
    assert client.push(mesh([same, entry("b", "2"), entry("d")], [policy], 3)) == []


def test_versions_decide_not_objects() -> None:
    client = Client(mesh([entry("a")]), *BOTH)
    assert client.push(mesh([entry("a")], [], 2)) == []


def test_policies_come_before_workloads_and_go_after_them() -> None:
    client = Client(mesh([entry("a")], [entry("old"), entry("kept")]), *BOTH)
    pushed = client.push(mesh([entry("a", "2")], [entry("kept", "2"), entry("new")], 2))
    assert pushed == ["Authorization: kept new", "Address: a", "Authorization:  -old"]


def test_pushes_that_were_not_taken_are_merged() -> None:
    client = Client(mesh([entry("a"), entry("b")]), *BOTH)
    client.subscriber.offer(mesh([entry("a", "2"), entry("b"), entry("x")], [], 2))
    assert client.push(mesh([entry("a", "2"), entry("b", "2")], [], 3)) == ["Address: a b"]


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
    assert client.push(mesh([entry("a", "2")], [], 2)) == ["Address: a"]
    client.ask(ask(ADDRESS, nonce=client.nonces[ADDRESS]))
    assert client.subscriber.rejections == {}


def test_a_stale_acknowledgement_says_nothing() -> None:
    client = Client(mesh([entry("a")]), *BOTH)
    old = client.nonces[ADDRESS]
    client.push(mesh([entry("a", "2")], [], 2))
    assert client.ask(ask(ADDRESS, nonce=old)) == []
    described: Any = client.subscriber.describe()
    assert described[ADDRESS]["acknowledged"] is False


def test_a_name_asked_on_a_wildcard_stream_brings_everything_again() -> None:
    client = Client(mesh([entry("a"), entry("b")]), *BOTH)
    assert client.ask(ask(ADDRESS, sub=["a"])) == ["Address: a b"]


def test_other_types_are_left_unanswered() -> None:
    client = Client(mesh([entry("a")]), *BOTH)
    assert client.ask(ask(discovery.HEALTH), ask("type.googleapis.com/envoy.config.cluster.v3.Cluster")) == []


# -- on demand

SERVICE = entry("shop/cart.mesh", aliases=("/10.9.0.1",))
A = entry(UID + "a", aliases=("/10.0.0.1",), members=("shop/cart.mesh",))
B = entry(UID + "b", aliases=("/10.0.0.2",), members=("shop/cart.mesh",))
C = entry(UID + "c", aliases=("/10.0.0.3",), node="n1")
MESH = mesh([SERVICE, A, B, C])
NOTHING = ask(ADDRESS, sub=["*"], unsub=["*"])


def on_demand(snapshot: Snapshot = MESH, node: str = "") -> Client:
    return Client(snapshot, NOTHING, ask(AUTHORIZATION), node=node)


def test_on_demand_begins_with_an_empty_answer() -> None:
    assert on_demand().seen == ["Authorization: ", "Address: "]


def test_an_address_is_answered_under_both_its_names() -> None:
    client = on_demand()
    assert client.ask(ask(ADDRESS, sub=["/10.0.0.3"])) == [f"Address: {UID}c /10.0.0.3"]
    client = on_demand()
    client.subscriber.request(ask(ADDRESS, sub=["/10.0.0.3"]), 0.0)
    (response,) = client.subscriber.take(0.0)
    assert [list(resource.aliases) for resource in response.resources] == [["/10.0.0.3"]] * 2


@pytest.mark.parametrize("name", ["/10.9.0.1", "shop/cart.mesh"])
def test_a_service_brings_its_workloads(name: str) -> None:
    alias = " /10.9.0.1" if name.startswith("/") else ""
    assert on_demand().ask(ask(ADDRESS, sub=[name])) == [f"Address: shop/cart.mesh {UID}a {UID}b{alias}"]


def test_an_unknown_name_is_removed_at_once_and_pushed_when_it_appears() -> None:
    client = on_demand()
    assert client.ask(ask(ADDRESS, sub=["/10.0.0.9"])) == ["Address:  -/10.0.0.9"]
    assert client.push(mesh([A], [], 2)) == []
    new = entry(UID + "new", aliases=("/10.0.0.9",))
    assert client.push(mesh([A, new], [], 3)) == [f"Address: {UID}new /10.0.0.9"]
    assert client.push(mesh([A], [], 4)) == [f"Address:  -/10.0.0.9 -{UID}new"]


def test_only_what_was_asked_for_is_pushed() -> None:
    client = on_demand()
    client.ask(ask(ADDRESS, sub=[UID + "c"]))
    changed = entry(UID + "c", "2", aliases=("/10.0.0.3",))
    assert client.push(mesh([SERVICE, entry(UID + "a", "2"), B, changed], [], 2)) == [f"Address: {UID}c"]


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
    assert client.push(mesh([SERVICE, A, B, changed], [], 2)) == []


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
