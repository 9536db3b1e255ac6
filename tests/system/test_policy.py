"""Who may call whom, decided at the destination and again whenever a policy changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from tests.support.shop import DENY_ALL, echo, ended, kinds, open_stream, shop, until

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh

ALLOW = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: clients, namespace: shop}}
spec:
  {selector}
  action: ALLOW
  rules:
  - from: [{{source: {{principals: ["cluster.local/ns/shop/sa/{account}"]}}}}]
"""
SELECTOR = "selector: {matchLabels: {app: orders}}"


def allow(account: str, selector: str = SELECTOR) -> str:
    return ALLOW.format(account=account, selector=selector)


@kinds
async def test_only_the_named_identity_may_call(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces, documents={"policy": allow("client")}) as running:
        assert await echo(running) == b"hello"
        running.apply("policy", allow("somebody-else"))
        assert await until(lambda: _refused(running))
        denied = await running.ztunnels["beta"].until_logged(error="allow policies exist, but none allowed")
        assert denied["src.identity"] == "spiffe://cluster.local/ns/shop/sa/client"


async def _refused(running: Mesh) -> bool:
    return await echo(running) == b""


@kinds
async def test_a_changed_policy_ends_a_live_connection_within_a_second(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces, documents={"policy": allow("client")}) as running:
        stream = await open_stream(running)
        running.apply("policy", allow("somebody-else"))
        started = trio.current_time()
        assert await ended(stream, 10)
        record = await running.ztunnels["beta"].until_logged(error="connection closed due to policy change")
        assert record["src.identity"].endswith("/sa/client")
        assert trio.current_time() - started < 10


@kinds
async def test_a_new_selector_policy_ends_a_live_connection(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces) as running:
        stream = await open_stream(running)
        running.apply("closed", DENY_ALL)
        assert await ended(stream, 10)
        await running.ztunnels["beta"].until_logged(error="connection closed due to policy change")
        running.withdraw("closed")
        assert await until(lambda: _answered(running))


async def _answered(running: Mesh) -> bool:
    return await echo(running) == b"hello"


@kinds
async def test_a_document_that_cannot_be_enforced_changes_nothing(tmp_path: Path, namespaces: bool) -> None:
    async with shop(tmp_path, namespaces=namespaces, documents={"policy": allow("client")}) as running:
        stream = await open_stream(running)
        broken = allow("client").replace("rules:", "rules:\n  - to: [{operation: {methods: [GET]}}]")
        running.apply("policy", broken)

        async def named() -> bool:
            return "policy.yaml" in (await running.control.http(15014, "/ready", address=running.server))[1]

        assert await until(named)
        await trio.sleep(1)  # what it had pushed would be here
        await stream.send_all(b"again")
        assert await stream.receive_some() == b"again"
        await stream.aclose()
        assert await echo(running) == b"hello"
