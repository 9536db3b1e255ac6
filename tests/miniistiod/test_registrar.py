"""Machines that register themselves in a WorkloadGroup."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.callers import Stream, certificate, dial, refusal
from tests.support.miniistiod import ADDRESS, AUTHORIZATION, DELTA, MESH, bearer, control_plane, uid
from tests.support.sizes import size

from hbone.grpc import StatusCode
from hbone.identity import SpiffeId
from miniistiod import admin_client, cli, issue_tokens, registrar
from miniistiod.auth import BadNode, Caller, Node, read_node
from miniistiod.registrar import RegistrationError, entry_of, make_registration
from miniistiod.resources import WorkloadGroup
from miniistiod.resources.model import Endpoint, Metadata
from ztunnel.wire import discovery_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    import miniistiod
    from hbone.identity import Identity

GROUPS = (
    MESH
    + """
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: carts, namespace: shop}
spec:
  metadata: {labels: {app: carts, version: v1}, annotations: {a: b}}
  template: {serviceAccount: carts, weight: 7, ports: {http: 8080}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: anyone, namespace: shop}
spec: {template: {network: north, locality: eu/a/1}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: carts, namespace: shop}
spec:
  hosts: [carts.mesh]
  addresses: [10.9.0.2]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP}]
  workloadSelector: {labels: {app: carts}}
"""
)
CARTS = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/carts")
CALLER = Caller(identity=CARTS, how="certificate", serial="ab")
GROUP = WorkloadGroup(
    meta=Metadata(kind="WorkloadGroup", namespace="shop", name="carts"),
    labels={"app": "carts"},
    annotations={"a": "b"},
    template=Endpoint(address="", service_account="carts", weight=7, ports={"http": 8080}),
)
NODE = Node(id="ztunnel~10.2.0.1~vm-1.shop~x", kind="ztunnel", name="vm-1", namespace="shop", ip="10.2.0.1")


def registered(
    node: Node = NODE, caller: Caller = CALLER, group: WorkloadGroup = GROUP, remote: str = "10.2.0.9"
) -> Any:
    return make_registration(node, caller, group, remote=remote, stream="s", now=5.0)


# -- what is made of what a machine says


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({}, "10.2.0.1"),
        ({"addresses": ("10.2.0.5", "10.2.0.6")}, "10.2.0.5"),
        ({"addresses": ("1.1.1.1",), "ip": "1.1.1.1"}, "10.2.0.9"),
        ({"addresses": ("fd00::7",)}, "fd00::7"),
        ({"addresses": ("::ffff:10.2.0.7",)}, "10.2.0.7"),
        ({"ip": ""}, "10.2.0.9"),
    ],
)
def test_the_address_is_what_it_says_or_where_it_comes_from(fields: dict[str, Any], address: str) -> None:
    assert registered(attrs.evolve(NODE, **fields)).address == address


@pytest.mark.parametrize("text", ["nonsense", "0.0.0.0", "::", "224.0.0.1", "255.255.255.255", "10.0.0.1/8"])
def test_an_address_of_no_host_is_refused(text: str) -> None:
    with pytest.raises(RegistrationError, match="set INSTANCE_IP"):
        registered(attrs.evolve(NODE, addresses=(text,)))


@pytest.mark.parametrize(
    ("node", "caller", "group", "name"),
    [
        ({}, {}, {}, "vm-1"),
        ({}, {"name": "vm-1"}, {}, "vm-1"),
        ({"name": ""}, {"name": "vm-2"}, {}, "vm-2"),
        ({"name": ""}, {}, {}, "carts-10.2.0.1"),
        ({"kind": "sidecar"}, {}, {}, "carts-10.2.0.1"),
        ({"name": "", "network": "north"}, {}, {}, "carts-10.2.0.1-north"),
        ({"name": "", "addresses": ("fd00::7",)}, {}, {}, "carts-fd00--7"),
    ],
)
def test_names(node: dict[str, Any], caller: dict[str, Any], group: dict[str, Any], name: str) -> None:
    found = registered(attrs.evolve(NODE, **node), attrs.evolve(CALLER, **caller), attrs.evolve(GROUP, **group))
    assert found.name == name


def identity(text: str) -> dict[str, Any]:
    return {"identity": SpiffeId.parse(f"spiffe://cluster.local/ns/{text}")}


@pytest.mark.parametrize(
    ("node", "caller", "why"),
    [
        ({}, identity("web/sa/carts"), "of another namespace"),
        ({}, identity("shop/sa/orders"), "for another service account"),
        ({}, {"name": "vm-2"}, "was made for the name 'vm-2'"),
        ({"name": "VM 1"}, {}, "is malformed"),
        ({"network": "a b"}, {}, "the network 'a b' is malformed"),
    ],
)
def test_what_a_group_is_not_for(node: dict[str, Any], caller: dict[str, Any], why: str) -> None:
    with pytest.raises(RegistrationError, match=why):
        registered(attrs.evolve(NODE, **node), attrs.evolve(CALLER, **caller))


def test_a_group_without_service_account_is_for_everyone_of_its_namespace() -> None:
    group = attrs.evolve(GROUP, template=Endpoint(address=""))
    found = registered(caller=attrs.evolve(CALLER, **identity("shop/sa/orders")), group=group)
    assert entry_of(found, group).endpoint.service_account == "orders"


def test_labels_of_the_group_win_and_none_steers_the_mesh() -> None:
    labels = {
        "app": "orders",
        "version": "v2",
        "app.example.com/tier": "x",
        "service.istio.io/canonical-name": "c",
        "istio.io/use-waypoint": "none",
        "networking.istio.io/tunnel": "http",
        "topology.istio.io/network": "n",
        "gateway.networking.k8s.io/gateway-name": "g",
        "bad key": "x",
        "long": "x" * 64,
    }
    found = entry_of(registered(attrs.evolve(NODE, labels=labels)), GROUP)
    assert found.labels == {
        "app": "carts",
        "version": "v2",
        "app.example.com/tier": "x",
        "service.istio.io/canonical-name": "c",
    }
    many = {f"l{number}": "" for number in range(100)}
    assert len(registered(attrs.evolve(NODE, labels=many)).labels) == 32


def test_the_entry_of_a_machine() -> None:
    node = attrs.evolve(NODE, network="south", locality="eu/b", node_name="rack-1")
    found = entry_of(registered(node), GROUP)
    assert found.meta.key == ("WorkloadEntry", "shop", "vm-1")
    assert found.meta.annotations == {
        "a": "b",
        "istio.io/autoRegistrationGroup": "carts",
        "miniistiod/node": "rack-1",
        "ambient.istio.io/redirection": "enabled",
    }
    assert str(found.endpoint.address) == "10.2.0.1"
    assert (found.endpoint.weight, dict(found.endpoint.ports)) == (7, {"http": 8080})
    assert (found.endpoint.network, found.endpoint.locality) == ("south", "eu/b")
    own = attrs.evolve(GROUP, template=attrs.evolve(GROUP.template, network="north", locality="eu/a"))
    assert (registered(node, group=own).network, registered(node, group=own).locality) == ("north", "eu/a")


def test_a_group_says_itself_how_its_machines_are_reached() -> None:
    group = attrs.evolve(GROUP, labels={"networking.istio.io/tunnel": ""})
    assert "ambient.istio.io/redirection" not in entry_of(registered(), group).meta.annotations
    group = attrs.evolve(GROUP, annotations={"ambient.istio.io/redirection": "disabled"})
    assert entry_of(registered(), group).meta.annotations["ambient.istio.io/redirection"] == "disabled"


TEXT = st.text(max_size=30)


@settings(max_examples=size(5000, 300), deadline=None)
@given(
    st.builds(
        Node,
        id=TEXT,
        kind=st.sampled_from(["ztunnel", "sidecar"]),
        name=TEXT,
        ip=TEXT | st.ip_addresses().map(str),
        addresses=st.lists(TEXT | st.ip_addresses().map(str), max_size=3).map(tuple),
        network=TEXT,
        locality=TEXT,
        node_name=TEXT,
        labels=st.dictionaries(TEXT, TEXT, max_size=5),
    ),
    TEXT | st.ip_addresses().map(str),
)
def test_whatever_a_machine_says_is_an_entry_or_an_error(node: Node, remote: str) -> None:
    try:
        found = registered(node, remote=remote)
    except RegistrationError:
        return
    entry = entry_of(found, GROUP)
    assert entry.endpoint.service_account == "carts"
    assert entry.labels["app"] == "carts"


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["LABELS", "NAME", "INSTANCE_IPS", "NETWORK", "a"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=size(3000, 200), deadline=None)
@given(VALUES, TEXT)
def test_any_node_is_read_or_refused(metadata: Any, node_id: str) -> None:
    message = discovery_pb2.Node(id=f"ztunnel~{node_id}~a~b")
    if isinstance(metadata, dict):
        json_format.ParseDict(metadata, message.metadata)
    with contextlib.suppress(BadNode):
        read_node(message)


# -- in a mesh


def request(url: str, name: str, ip: str, **more: Any) -> bytes:
    message = discovery_pb2.DeltaDiscoveryRequest(type_url=url)
    message.node.id = f"ztunnel~{ip}~{name}.shop~shop.svc.cluster.local"
    message.node.metadata.update({"NAME": name, "NAMESPACE": "shop", "INSTANCE_IPS": ip, "NODE_NAME": "", **more})
    return message.SerializeToString()


@contextlib.asynccontextmanager
async def machine(
    cp: miniistiod.MiniIstiod,
    who: Identity | list[tuple[str, str]],
    name: str = "vm-1",
    ip: str = "10.2.0.1",
    **more: Any,
) -> AsyncGenerator[Stream]:
    token = who if isinstance(who, list) else []
    async with dial(cp, None if isinstance(who, list) else who) as client, client.stream(DELTA, token) as stream:
        for url in (AUTHORIZATION, ADDRESS):
            await stream.send(request(url, name, ip, **more))
        yield Stream(stream)


def group_token(
    cp: miniistiod.MiniIstiod, account: str = "carts", group: str = "carts", name: str | None = None
) -> Any:
    token = issue_tokens.create(
        cp.store,
        namespace="shop",
        service_account=account,
        name=name,
        lifetime=None,
        reusable=False,
        now=time.time(),
        group=group,
    )
    return bearer(token.text)


async def joined(cp: miniistiod.MiniIstiod, **fields: Any) -> Identity:
    return await certificate(cp, group_token(cp, **fields))


def workload(cp: miniistiod.MiniIstiod, name: str = "vm-1") -> workload_pb2.Workload | None:
    found = cp.mesh.catalog.addresses.get(uid(name))
    return None if found is None else workload_pb2.Address.FromString(found.body).workload


async def until(condition: Any) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


def state_of(cp: miniistiod.MiniIstiod, name: str = "vm-1") -> str | None:
    return next((str(item["state"]) for item in cp.api.registrar.describe() if item["name"] == name), None)


SHORT = datetime.timedelta(seconds=0.05)


async def test_a_machine_joins_leaves_and_comes_back(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS, registration_grace=SHORT) as cp:
        who = await joined(cp)
        assert workload(cp) is None
        async with machine(cp, who) as stream:
            names: set[str] = set()
            while not {uid("vm-1"), "shop/carts.mesh"} <= names:
                names |= {item.name for item in (await stream.response()).resources}
            found = workload(cp)
            assert found is not None
            assert found.addresses == [bytes([10, 2, 0, 1])]
            assert (found.service_account, found.tunnel_protocol) == ("carts", workload_pb2.HBONE)
            assert not found.native_tunnel
            assert list(found.services) == ["shop/carts.mesh"]
            assert found.capacity.value == 7
            assert state_of(cp) == "connected"
        await until(lambda: workload(cp) is None)
        assert state_of(cp) == "gone"
        async with machine(cp, await certificate(cp, identity=who), ip="10.2.0.77") as stream:
            await stream.response()
            found = workload(cp)
            assert found is not None
            assert found.addresses == [bytes([10, 2, 0, 77])]
            assert state_of(cp) == "connected"


async def test_a_machine_that_joins_costs_no_look_at_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        who = await joined(cp)
        for number in range(200):
            item = attrs.evolve(registered(), name=f"old-{number}", address=f"10.4.0.{number}", disconnected=5.0)
            cp.store.register(item)
    made: list[str] = []
    costs: list[list[str]] = []
    register = registrar.Registrar._register

    def counted(item: Any, group: WorkloadGroup) -> Any:
        made.append(item.name)
        return entry_of(item, group)

    async def measured(self: registrar.Registrar, *arguments: Any) -> None:
        before = len(made)
        await register(self, *arguments)  # alone, under the registrar's lock
        costs.append(made[before:])

    async with control_plane(tmp_path, None) as cp:
        assert len(cp.api.registrar.describe()) == 200
        monkeypatch.setattr(registrar, "entry_of", counted)
        monkeypatch.setattr(registrar.Registrar, "_register", measured)
        async with machine(cp, who) as stream:
            await stream.response()
            assert workload(cp) is not None
            assert costs == [["vm-1"]]


async def test_the_group_may_be_named_by_the_node_instead(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        token = bearer(cp.create_token("shop", "carts", reusable=True))
        async with machine(cp, token, AUTO_REGISTER_GROUP="carts", LABELS={"version": "v9", "tier": "x"}) as stream:
            await stream.response()
            found = workload(cp)
            assert found is not None
            assert found.canonical_revision == "v1"
        async with machine(cp, token, "vm-2") as stream:
            await stream.response()
            assert workload(cp, "vm-2") is None  # nobody asked for it


async def test_a_short_absence_is_not_noticed(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS, registration_grace=datetime.timedelta(hours=1)) as cp:
        who = await joined(cp)
        async with machine(cp, who) as stream:
            await stream.response()
        await until(lambda: state_of(cp) == "away")
        number, before = cp.mesh.catalog.number, cp.mesh.catalog.addresses[uid("vm-1")]
        async with machine(cp, who) as stream:
            await stream.response()
            assert state_of(cp) == "connected"
        assert cp.mesh.catalog.addresses[uid("vm-1")] is before
        assert cp.mesh.catalog.number == number


async def test_the_newest_stream_counts(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS, registration_grace=SHORT) as cp:
        who, leave = await joined(cp), trio.Event()

        async def first(task_status: trio.TaskStatus[None]) -> None:
            async with machine(cp, who) as stream:
                await stream.response()
                task_status.started()
                await leave.wait()

        async with trio.open_nursery() as nursery:
            await nursery.start(first)
            async with machine(cp, who) as stream:
                await stream.response()
                leave.set()
                await until(lambda: len(cp.api.discovery.streams) == 1)
                assert state_of(cp) == "connected"
                assert cp.api.registrar._away == {}  # nobody is to be taken out
                assert workload(cp) is not None


async def test_an_older_stream_keeps_the_machine_when_the_newer_one_ends(tmp_path: Path) -> None:
    """As when another ztunnel wants to take over on a host, and does not get ready."""
    async with control_plane(tmp_path, GROUPS, registration_grace=SHORT) as cp:
        who = await joined(cp)
        async with machine(cp, who) as stream:
            await stream.response()
            async with machine(cp, who) as newer:
                await newer.response()
            await until(lambda: len(cp.api.discovery.streams) == 1)
            assert state_of(cp) == "connected"
            assert cp.api.registrar._away == {}
            assert workload(cp) is not None
        await until(lambda: state_of(cp) == "gone")
        assert cp.api.registrar._open == {}


async def test_a_machine_is_there_again_after_a_restart(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        who = await joined(cp)
        async with machine(cp, who) as stream:
            await stream.response()
            before = workload(cp)
    async with control_plane(tmp_path, GROUPS) as cp:
        assert workload(cp) == before
        assert state_of(cp) == "away"
        async with machine(cp, who) as stream:
            await stream.response()
            assert state_of(cp) == "connected"


async def test_who_is_gone_stays_so_over_a_restart(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS, registration_grace=SHORT) as cp:
        async with machine(cp, await joined(cp)) as stream:
            await stream.response()
        await until(lambda: state_of(cp) == "gone")
    async with control_plane(tmp_path, GROUPS) as cp:
        assert workload(cp) is None
        assert state_of(cp) == "gone"


@pytest.mark.parametrize(
    ("account", "group", "code", "more"),
    [
        ("orders", "carts", StatusCode.PERMISSION_DENIED, {}),
        ("carts", "nothing", StatusCode.FAILED_PRECONDITION, {}),
        ("carts", "carts", StatusCode.PERMISSION_DENIED, {"AUTO_REGISTER_GROUP": "anyone"}),
        ("carts", "carts", StatusCode.FAILED_PRECONDITION, {"ip": "10.1.0.2"}),
        ("carts", "carts", StatusCode.FAILED_PRECONDITION, {"ip": "10.9.0.1"}),
        ("carts", "carts", StatusCode.FAILED_PRECONDITION, {"ip": "nonsense"}),
    ],
    ids=["account", "group", "two groups", "a workload's address", "a service's address", "no address"],
)
async def test_who_may_not_register(
    tmp_path: Path, account: str, group: str, code: StatusCode, more: dict[str, Any]
) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        async with machine(cp, await joined(cp, account=account, group=group), **more) as stream:
            assert await stream.ends_with() is code
        assert cp.store.registrations() == {}
        assert workload(cp) is None


async def test_two_machines_cannot_have_one_address(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS, registration_grace=datetime.timedelta(hours=1)) as cp:
        first, second = await joined(cp), await joined(cp)
        async with machine(cp, first) as stream:
            await stream.response()
            async with machine(cp, second, "vm-2") as other:
                assert await other.ends_with() is StatusCode.FAILED_PRECONDITION
        await until(lambda: state_of(cp) == "away")
        async with machine(cp, second, "vm-2") as other:  # the first has left, and its address went to the next
            await other.response()
            assert workload(cp) is None
            assert workload(cp, "vm-2") is not None


async def test_a_name_in_use_by_another_account_is_refused(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        async with machine(cp, await joined(cp)) as stream:
            await stream.response()
            other = await joined(cp, account="orders", group="anyone")
            async with machine(cp, other, ip="10.2.0.2") as second:
                assert await second.ends_with() is StatusCode.PERMISSION_DENIED
            found = workload(cp)
            assert found is not None
            assert found.service_account == "carts"


async def test_a_document_of_the_same_name_has_precedence(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        before = workload(cp, "web-1")
        async with machine(cp, await joined(cp, account="web", group="anyone"), "web-1", "10.2.0.1") as stream:
            await stream.response()
            assert cp.store.registrations() == {}
            found = workload(cp, "web-1")
            assert found is not None
            assert before is not None
            assert found.addresses == before.addresses


async def test_machines_follow_their_group(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        path = cp.config.config_dir / "mesh.yaml"
        async with machine(cp, await joined(cp)) as stream:
            await stream.response()
            path.write_text(GROUPS.replace("weight: 7", "weight: 9"))
            await until(lambda: (found := workload(cp)) is not None and found.capacity.value == 9)
            path.write_text(
                GROUPS.replace(
                    "name: carts, namespace: shop}\nspec:\n  metadata",
                    "name: other, namespace: shop}\nspec:\n  metadata",
                )
            )
            await until(lambda: workload(cp) is None)
            path.write_text(GROUPS)
            await until(lambda: workload(cp) is not None)


async def run(*arguments: object) -> int:
    return await trio.to_thread.run_sync(lambda: cli.main([str(item) for item in arguments]))


async def test_a_revoked_machine_is_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        who = await joined(cp, name="vm-1")
        async with machine(cp, who) as stream:
            await stream.response()
            state = cp.config.state_dir
            assert await run("get", "registrations", "--state", state) == 0
            assert "shop/vm-1  carts  10.2.0.1  carts    connected" in capsys.readouterr().out
            assert await run("revoke", "--state", state, "--name", "shop/vm-1", "--json") == 0
            assert json.loads(capsys.readouterr().out)["registrations"] == [["shop", "vm-1"]]
            assert await stream.ends_with() is StatusCode.UNAUTHENTICATED
        await until(lambda: workload(cp) is None)
        assert state_of(cp) is None
        assert (await refusal(cp, identity=who))[0] is StatusCode.UNAUTHENTICATED
        async with machine(cp, await joined(cp, name="vm-1")) as stream:
            await stream.response()
            assert workload(cp) is not None


async def test_a_command_that_allows_plaintext_is_followed(tmp_path: Path) -> None:
    async with control_plane(tmp_path) as cp:
        await certificate(cp, bearer(cp.create_token("shop", "orders", name="orders-1")))
        assert workload(cp, "orders-1").tunnel_protocol == workload_pb2.HBONE  # type: ignore[union-attr]  # a document
        state = cp.config.state_dir
        assert await run("revoke", "--state", state, "--name", "shop/orders-1") == 0
        await until(lambda: cp.authority.view.generation == cp.store.generation)
        assert workload(cp, "orders-1").tunnel_protocol == workload_pb2.HBONE  # type: ignore[union-attr]
        await certificate(cp, bearer(cp.create_token("shop", "orders", name="orders-1")))
        assert await run("revoke", "--state", state, "--name", "shop/orders-1", "--plaintext") == 0
        await until(lambda: workload(cp, "orders-1").tunnel_protocol == workload_pb2.NONE)  # type: ignore[union-attr]


async def test_the_page_of_machines_tells_their_state(tmp_path: Path) -> None:
    async with control_plane(tmp_path, GROUPS) as cp:
        async with machine(cp, await joined(cp)) as stream:
            await stream.response()
            path = cp.config.state_dir / "admin.sock"
            (found,) = await trio.to_thread.run_sync(admin_client.fetch, path, "/registrations")
            assert (found["name"], found["state"], found["labels"]) == ("vm-1", "connected", {})
