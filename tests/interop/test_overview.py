"""The page of the mesh in headless Chromium: it is shown without a script and without asking anybody for anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import trio
from tests.support.miniistiod import control_plane

from hbone.daemon.http import serve_asgi
from miniistiod.pages import admin_app

pytestmark = pytest.mark.interop
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 100.0
MESH = (Path(__file__).parents[1] / "data" / "overview.yaml").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
async def test_a_browser_shows_the_mesh_and_asks_nobody_else(tmp_path: Path) -> None:
    asked: list[str] = []
    async with control_plane(tmp_path, MESH) as cp, trio.open_nursery() as nursery:
        app = admin_app(cp.mesh, cp.store, cp.api)

        async def noting(scope: object, receive: object, send: object) -> None:
            asked.append(scope["path"])  # type: ignore[index]
            await app(scope, receive, send)  # type: ignore[arg-type]

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(serve_asgi, noting, listeners)
        port = listeners[0].socket.getsockname()[1]
        command = [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            f"http://127.0.0.1:{port}/",
        ]
        with trio.fail_after(SECONDS):
            found = await trio.run_process(command, capture_stdout=True, stderr=subprocess.DEVNULL)
        nursery.cancel_scope.cancel()
    shown = found.stdout.decode()
    assert '<table id="reachability">' in shown
    assert "2001:db8::12" in shown
    for colour in ("yes", "no", "some", "plain", "waypoint"):
        assert f'class="{colour}"' in shown
    assert set(asked) <= {"/", "/favicon.ico"}
