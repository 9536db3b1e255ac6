"""The daemon's own pages: admin (15000 and a Unix socket), metrics (15020), readiness (15021).

Nothing changes by GET, and no page shows a secret. What the pages show comes from `view.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import attrs
import trio

from hbone.daemon import logs
from hbone.daemon.loglevels import Levels
from hbone.errors import ConfigurationError
from ztunnel import debugpages, exposition, jsonstream
from ztunnel.logscopes import SCOPES
from ztunnel.pages import Page, router

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hbone.daemon.http import App
    from ztunnel.metrics import Metrics
    from ztunnel.pages import Request

__all__ = ["AdminView", "Readiness", "admin_app", "readiness_app", "stats_app"]

PAGES = (
    ("/config_dump", "everything that is known: workloads, services, policies, certificates, settings"),
    ("/status", "the short view that `ztunnel status` prints"),
    ("/explain?destination=HOST:PORT&from=WORKLOAD", "what the mesh does with a connection, step by step"),
    ("/logging", "POST ?level=info,dns=debug changes log levels, GET shows them"),
    ("/quitquitquit", "POST drains and ends the process"),
    *debugpages.PAGES,
)
LOGGING_USAGE = """\
usage: POST /logging\t\t\t\t(To show the current log level)
       POST /logging?level=<level>\t\t(To change it: off, error, warn, info, debug or trace)
       POST /logging?level=<scope>=<level>\t(The same for one scope; several with commas between)
       POST /logging?reset\t\t\t(To go back to the level at the start; together with level: before it)
"""


class AdminView(debugpages.DebugView, Protocol):
    """What the admin pages show, and the one thing that they start."""

    async def config_dump(self) -> dict[str, Any]:
        """Everything that is known, without secrets; long lists as `jsonstream.Rows`."""
        ...

    async def refresh(self) -> None:
        """Bring `status` up to date."""
        ...

    def status(self) -> dict[str, Any]:
        """The short view."""
        ...

    def level_changed(self) -> None:
        """The log level is another now."""
        ...

    async def explain(self, destination: str, source: str | None) -> dict[str, Any]:
        """What the mesh does with a connection; raises ConfigurationError for a question that cannot be read."""
        ...

    def shut_down(self) -> None:
        """Begin the drain."""
        ...


class Readiness:
    """The tasks that must be done before the workload may use the mesh."""

    def __init__(self, *tasks: str) -> None:
        self._pending = set(tasks)

    def done(self, task: str) -> None:
        """`task` is done."""
        self._pending.discard(task)

    @property
    def pending(self) -> list[str]:
        """What is not done, sorted."""
        return sorted(self._pending)

    @property
    def ready(self) -> bool:
        """Whether all are done."""
        return not self._pending


def admin_app(view: AdminView) -> App:
    """The admin pages. Source: Istio's ztunnel, admin server."""
    start_levels = logs.current_levels()

    async def index(_: Request) -> Page:
        import html  # half a megabyte of names for characters

        rows = "".join(
            f'<tr><td><a href="{html.escape(path)}">{html.escape(path)}</a><td>{html.escape(what)}'
            for path, what in PAGES
        )
        style = "<style>body{font:15px system-ui;margin:2em}td{padding:.2em 1em .2em 0}</style>"
        text = f"<!doctype html><title>ztunnel</title>{style}<h1>ztunnel</h1><table>{rows}</table>\n"
        return Page(content_type="text/html; charset=utf-8", body=text.encode())

    async def config_dump(_: Request) -> Page:
        found = await view.config_dump()
        return Page(content_type="application/json", write=lambda send: jsonstream.write(found, send))

    async def status(_: Request) -> Page:
        await view.refresh()
        found = jsonstream.with_rows(view.status())  # a hundred tunnels take longer than the data path should wait
        return Page(content_type="application/json", write=lambda send: jsonstream.write(found, send))

    async def explain(request: Request) -> Page:
        destination = request.query.get("destination")
        if not destination:
            return Page.text("destination is missing; ask for /explain?destination=HOST:PORT\n", 400)
        try:
            return Page.json(await view.explain(destination, request.query.get("from") or None))
        except ConfigurationError as error:
            return Page.text(f"{error}\n", 400)

    async def logging(request: Request) -> Page:
        if request.method == "GET":
            return Page.text(f"current log level is {logs.current_level()}\n")
        if request.method != "POST":
            return Page.text(f"Invalid HTTP method\n{LOGGING_USAGE}", 405)
        levels = start_levels if "reset" in request.query else logs.current_levels()
        try:
            levels = levels.plus(Levels.parse(request.query.get("level", ""), SCOPES))
        except ConfigurationError as error:
            level = request.query["level"][:100]
            return Page.text(f"Invalid level provided: {level}\n{error}\n{LOGGING_USAGE}", 400)
        if levels != logs.current_levels():
            logs.set_level(levels)
            view.level_changed()
        return Page.text(f"current log level is {levels}\n")

    async def quit_(request: Request) -> Page:
        if request.method != "POST":
            return Page(status=405)
        return attrs.evolve(Page.text("shutdown now\n"), then=view.shut_down)

    return router(
        {
            "/": index,
            "/config_dump": config_dump,
            "/status": status,
            "/explain": explain,
            "/logging": logging,
            "/quitquitquit": quit_,
            **debugpages.debug_routes(view),
        }
    )


def stats_app(metrics: Metrics, refresh: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint) -> App:
    """The metrics pages; `refresh` brings the counters up to date first. Source: Istio's ztunnel, stats server."""

    async def page(request: Request) -> Page:
        await refresh()
        body = await jsonstream.collect_pieces(exposition.lines(metrics.families()))
        return Page(content_type=exposition.content_type(request.accept), body=body)

    return router({"/metrics": page, "/stats/prometheus": page})


def readiness_app(readiness: Readiness) -> App:
    """The readiness page. Source: Istio's ztunnel, readiness server."""

    async def page(request: Request) -> Page:
        if request.method not in ("GET", "HEAD"):
            return Page(status=405)
        if readiness.ready:
            return Page.text("ready\n")
        return Page.text(f"not ready, pending: {', '.join(readiness.pending)}\n", 500)

    return router({"/healthz/ready": page})
