"""A node's proxy may ask for the identities of the workloads on its node, and for no other."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from tests.support.callers import certificate, refusal
from tests.support.miniistiod import bearer, control_plane

from hbone.errors import ConfigurationError
from hbone.grpc import StatusCode
from miniistiod import issue_tokens
from miniistiod.certificates import accounts_on
from miniistiod.store import Store

if TYPE_CHECKING:
    from pathlib import Path

    import miniistiod

ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"
REFUSED = (StatusCode.UNAUTHENTICATED, "request impersonation authentication failure")


def proxy_token(cp: miniistiod.MiniIstiod, node: str = "node-1", *, reusable: bool = True) -> list[tuple[str, str]]:
    token = issue_tokens.create(
        cp.store,
        namespace="istio-system",
        service_account="ztunnel",
        name=None,
        lifetime=None,
        reusable=reusable,
        now=time.time(),
        node=node,
    )
    return bearer(token.text)


async def on_a_node(tmp_path: Path) -> None:
    """A state in which orders-1 is on node-1."""
    async with control_plane(tmp_path) as cp:
        cp.store.mark("shop", "orders-1", "orders", "node-1", time.time())


async def test_identities_of_its_own_node_are_granted(tmp_path: Path) -> None:
    await on_a_node(tmp_path)
    async with control_plane(tmp_path) as cp:
        assert accounts_on(cp.mesh.catalog, "node-1") == {("shop", "orders")}
        identity = await certificate(cp, proxy_token(cp), impersonate=ORDERS)
        assert str(identity.id) == ORDERS
        (listed,) = cp.store.certificates(0.0)
        assert (listed.spiffe_id, listed.node) == (ORDERS, "")  # what it got is a workload's, and no proxy's
        own = await certificate(cp, proxy_token(cp))
        assert own.id.service_account == "ztunnel"
        assert await refusal(cp, identity=identity, impersonate=str(own.id)) == REFUSED


async def test_a_proxy_asks_with_its_certificate_too(tmp_path: Path) -> None:
    await on_a_node(tmp_path)
    async with control_plane(tmp_path) as cp:
        proxy = await certificate(cp, proxy_token(cp, reusable=False))
        renewed = await certificate(cp, identity=proxy)
        assert str((await certificate(cp, identity=renewed, impersonate=ORDERS)).id) == ORDERS
        cp.store.revoke(time.time(), serial=f"{proxy.svid.serial:032x}")
        assert (await refusal(cp, identity=renewed, impersonate=ORDERS))[0] is StatusCode.UNAUTHENTICATED
        assert {item.state(time.time()) for item in cp.store.certificates(0.0)} == {"revoked"}  # what it got, too


async def test_what_a_proxy_got_by_its_token_goes_with_the_proxy(tmp_path: Path) -> None:
    await on_a_node(tmp_path)
    async with control_plane(tmp_path) as cp:
        token = proxy_token(cp)
        proxy = await certificate(cp, token)
        orders = await certificate(cp, token, impersonate=ORDERS)
        bystander = await certificate(cp, bearer(cp.create_token("shop", "orders")))
        cp.store.revoke(time.time(), spiffe_id=str(proxy.id))
        assert (await refusal(cp, identity=orders))[0] is StatusCode.UNAUTHENTICATED
        assert (await certificate(cp, identity=bystander)).id == orders.id


@pytest.mark.parametrize(
    "wanted",
    [
        "spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/sa/default",
        "spiffe://other/ns/shop/sa/orders",
        "spiffe://cluster.local/ns/shop",
        "spiffe://cluster.local/ns/shop/sa/orders,spiffe://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/sa/orders/",
        "SPIFFE://cluster.local/ns/shop/sa/orders",
        "orders",
        "",
    ],
)
async def test_no_other_identity_is_granted(tmp_path: Path, wanted: str) -> None:
    await on_a_node(tmp_path)
    async with control_plane(tmp_path) as cp:
        assert await refusal(cp, proxy_token(cp), impersonate=wanted) == REFUSED


async def test_nothing_is_granted_on_another_node_or_without_one(tmp_path: Path) -> None:
    await on_a_node(tmp_path)
    async with control_plane(tmp_path) as cp:
        assert await refusal(cp, proxy_token(cp, "node-2"), impersonate=ORDERS) == REFUSED
        workload = bearer(cp.create_token("shop", "web", reusable=True))
        assert await refusal(cp, workload, impersonate=ORDERS) == REFUSED
        enrolled = await certificate(cp, bearer(cp.create_token("shop", "web", name="node-1")))
        assert await refusal(cp, identity=enrolled, impersonate=ORDERS) == REFUSED


def test_a_proxys_token_is_of_no_group(tmp_path: Path) -> None:
    import datetime

    with Store.create(tmp_path / "state", "cluster.local", datetime.datetime.now(datetime.UTC)) as store:
        with pytest.raises(ConfigurationError, match="leave out --node, or leave out --group"):
            issue_tokens.create(
                store,
                namespace="a",
                service_account="b",
                name=None,
                lifetime=None,
                reusable=True,
                now=0.0,
                node="n",
                group="g",
            )
