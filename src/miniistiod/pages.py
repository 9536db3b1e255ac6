"""Pages of the control plane: metrics and readiness for anyone, the mesh itself on the state's private socket."""

from __future__ import annotations

import collections
import json
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

import attrs
from google.protobuf import json_format

from miniistiod import overview
from miniistiod.explain import ExplainError, Question, effective, reachability
from miniistiod.wording import says
from ztunnel.mesh.decode import decode_policy
from ztunnel.wire import authorization_pb2, workload_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from hbone.daemon.http import App, Receive, Scope, Send
    from miniistiod.api import Api
    from miniistiod.mesh import Mesh
    from miniistiod.metrics import Metrics
    from miniistiod.store import Store

__all__ = ["admin_app", "monitoring_app"]

MAX_QUERY = 4096
"""Characters of a query; the rest is not looked at."""


def monitoring_app(mesh: Mesh, metrics: Metrics, refresh: Callable[[], None]) -> App:
    """`/metrics` and `/ready`. Nothing here is secret: addresses of the mesh are not on these pages."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        if scope["method"] not in ("GET", "HEAD"):
            await _respond(send, 405, "only GET is answered here\n", "text/plain")
        elif scope["path"] == "/metrics":
            refresh()
            accept = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"accept"), "")
            text, content_type = metrics.expose(accept)
            await _respond(send, 200, text, content_type)
        elif scope["path"] == "/ready":
            status = mesh.status.to_json()
            await _json(send, status, 200 if mesh.status.loaded else 503)
        else:
            await _respond(send, 404, "there is /metrics and /ready\n", "text/plain")

    return app


def admin_app(mesh: Mesh, store: Store, api: Api) -> App:
    """Debug pages as JSON, for `miniistiod get` and for people."""

    async def ready() -> Any:
        return {**mesh.status.to_json(), "warnings": list(await mesh.warnings())}

    async def explained(query: Mapping[str, str]) -> Any:
        question = Question(query.get("from", ""), query.get("to", ""))
        return await mesh.ask(lambda view: question.answer(view, store.trust_domain))

    async def in_force(query: Mapping[str, str]) -> Any:
        return await mesh.ask(lambda view: effective(view, query.get("workload", "")))

    asked: dict[str, Callable[[Mapping[str, str]], Awaitable[Any]]] = {"/explain": explained, "/effective": in_force}
    slow: dict[str, Callable[[], Awaitable[Any]]] = {
        "/ready": ready,
        "/conditions": mesh.conditions,
        "/reachability": lambda: mesh.ask(reachability),
    }
    pages: dict[str, Callable[[], Any]] = {
        "/workloads": lambda: _addresses(mesh, "workload"),
        "/services": lambda: _addresses(mesh, "service"),
        "/policies": lambda: _policies(mesh),
        "/certificates": lambda: [attrs.asdict(item) for item in store.certificates(time.time())],
        "/subscribers": lambda: _subscribers(api),
        "/registrations": api.registrar.describe,
        "/state": lambda: json.loads(store.describe()),
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del receive
        path = scope["path"]
        if scope["method"] != "GET":
            await _respond(send, 405, "only GET is answered here\n", "text/plain")
        elif path == "/":
            subscribers = _subscribers(api)
            status = await ready()
            trust_domain, number = store.trust_domain, mesh.catalog.number
            page = await mesh.ask(
                lambda view: overview.render(view, status, subscribers, trust_domain=trust_domain, number=number)
            )
            await _respond(send, 200, page, "text/html; charset=utf-8", overview.HEADERS)
        elif path in asked:
            try:
                await _json(send, await asked[path](_query(scope)), 200)
            except ExplainError as error:
                await _json(send, {"error": str(error)}, 200)
        elif path in slow:
            await _json(send, await slow[path](), 200)
        elif path in pages:
            await _json(send, pages[path](), 200)
        else:
            await _respond(send, 404, f"there are / {' '.join(sorted((*pages, *slow, *asked)))}\n", "text/plain")

    return app


def _addresses(mesh: Mesh, kind: str) -> list[Any]:
    found = []
    for name, item in sorted(mesh.catalog.addresses.items()):
        message = workload_pb2.Address.FromString(item.body)
        if message.WhichOneof("type") == kind:
            body = json_format.MessageToDict(getattr(message, kind))
            found.append({"name": name, "version": item.version, "at": list(item.aliases), kind: body})
    return found


def _policies(mesh: Mesh) -> list[Any]:
    workloads = _Counts(mesh)
    return [
        {
            "name": name,
            "version": item.version,
            "policy": json_format.MessageToDict(policy := authorization_pb2.Authorization.FromString(item.body)),
            "workloads": _ruled(policy, workloads),
            "says": says(decode_policy(name, item.body)),
        }
        for name, item in sorted(mesh.catalog.policies.items())
    ]


def _ruled(policy: authorization_pb2.Authorization, workloads: _Counts) -> int:
    """How many workloads a policy is in force for."""
    if policy.scope == authorization_pb2.WORKLOAD_SELECTOR:
        return workloads.naming[f"{policy.namespace}/{policy.name}"]
    return workloads.of[policy.namespace] if policy.scope == authorization_pb2.NAMESPACE else workloads.of.total()


class _Counts:
    """Workloads by namespace, and by the policies that they refer to."""

    def __init__(self, mesh: Mesh) -> None:
        self.of: collections.Counter[str] = collections.Counter()
        self.naming: collections.Counter[str] = collections.Counter()
        for item in mesh.catalog.addresses.values():
            if not item.is_service:
                workload = workload_pb2.Address.FromString(item.body).workload
                self.of[workload.namespace] += 1
                self.naming.update(workload.authorization_policies)


def _subscribers(api: Api) -> list[Any]:
    return [
        {
            "stream": stream.id,
            "node": stream.node.id,
            "identity": str(stream.caller.identity),
            "by": stream.caller.how,
            "remote": stream.remote,
            "since": stream.since,
            "types": stream.subscriber.describe(),
        }
        for stream in api.discovery.streams.values()
    ]


async def _json(send: Send, value: Any, status: int) -> None:
    await _respond(send, status, json.dumps(value, indent=1) + "\n", "application/json")


def _query(scope: Scope) -> dict[str, str]:
    text = bytes(scope.get("query_string", b"")).decode("latin-1")
    return dict(urllib.parse.parse_qsl(text[:MAX_QUERY]))


async def _respond(
    send: Send, status: int, body: str | bytes, content_type: str, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    data = body.encode() if isinstance(body, str) else body
    headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(data)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
