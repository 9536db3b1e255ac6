from __future__ import annotations

import json
import pathlib
import re
from typing import TYPE_CHECKING

import pytest
from tests.support.daemon import policy, running, workload

import ztunnel
from hbone.daemon import logs
from hbone.daemon.loglevels import LEVELS
from ztunnel.admin import Readiness
from ztunnel.logscopes import SCOPES, read_levels

if TYPE_CHECKING:
    from collections.abc import Iterator

SRC = pathlib.Path(ztunnel.__file__).parents[1]


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    before = logs.current_level()
    yield
    logs.set_level(before)


async def test_index_lists_the_pages() -> None:
    async with running() as ztunnel:
        code, body = await ztunnel.http("admin", "/")
        assert code == 200
        for path in ("/config_dump", "/logging", "/quitquitquit", "/status"):
            assert path in body


async def test_config_dump_has_ztunnels_keys_and_no_secret() -> None:
    async with running() as ztunnel:
        await ztunnel.sync(workload(), workload("cart", "cart", "10.0.0.2"), policies=(policy("p"),))
        await ztunnel.daemon.mesh.svids.fetch()
        code, body = await ztunnel.http("admin", "/config_dump")
        assert code == 200
        dump = json.loads(body)
        assert list(dump) == sorted(dump)
        assert [entry["uid"] for entry in dump["workloads"]] == ["c1//Pod/shop/cart", "c1//Pod/shop/web-1"]
        assert dump["workloads"][1]["workloadIps"] == ["10.0.0.1"]
        assert dump["workloads"][1]["protocol"] == "HBONE"
        assert dump["policies"] == [
            {"name": "p", "namespace": "shop", "scope": "Namespace", "action": "Allow", "rules": [], "dryRun": False}
        ]
        assert dump["services"] == []
        assert dump["stagedServices"] == {}
        (certificate,) = dump["certificates"]
        assert certificate["identity"] == "spiffe://cluster.local/ns/shop/sa/web"
        assert certificate["state"] == "Available"
        assert set(certificate["certChain"][0]) == {"pem", "serialNumber", "validFrom", "expirationTime"}
        assert len(certificate["rootCerts"]) == 1
        assert dump["config"]["proxyMode"] == "Dedicated"
        assert dump["version"]["version"]
        assert dump["connections"] == {"inbound": [], "outbound": []}
        for page in (body, (await ztunnel.http("admin", "/status"))[1]):
            assert "PRIVATE KEY" not in page
            assert "authToken" not in page


async def test_log_level_changes_by_post_only() -> None:
    async with running() as ztunnel:
        before = logs.current_level()
        assert await ztunnel.http("admin", "/logging?level=debug") == (200, f"current log level is {before}\n")
        assert await ztunnel.http("admin", "/logging?level=debug", "POST") == (200, "current log level is debug\n")
        assert await ztunnel.http("admin", "/logging", "POST") == (200, "current log level is debug\n")
        code, text = await ztunnel.http("admin", "/logging?level=loud", "POST")
        assert code == 400
        assert text.startswith("Invalid level provided: loud\n")
        assert logs.current_level() == "debug"
        assert await ztunnel.http("admin", "/logging?reset", "POST") == (200, f"current log level is {before}\n")
        assert (await ztunnel.http("admin", "/logging", "PUT"))[0] == 405


async def test_levels_of_scopes_are_added_and_a_later_one_replaces_its_like() -> None:
    logs.set_level("info")
    async with running() as ztunnel:
        for query, levels in (
            ("level=ztunnel::xds=debug", "info,ztunnel::xds=debug"),
            ("level=dns=warn,access=error", "info,ztunnel::xds=debug,dns=warn,access=error"),
            ("reset&level=access=debug,info", "access=debug,info"),
            ("level=access=trace", "info,access=trace"),
            ("reset&level=debug", "debug"),
            ("reset", "info"),
        ):
            answer = await ztunnel.http("admin", f"/logging?{query}", "POST")
            assert answer == (200, f"current log level is {levels}\n")
        for query, why in (
            ("level=nothing=debug", "no log scope is called 'nothing'; there are access, dns,"),
            ("level=access", "log level is 'access'; it must be one of"),
            ("level=access=loud", "log level is 'loud'; it must be one of"),
        ):
            code, text = await ztunnel.http("admin", f"/logging?{query}", "POST")
            assert code == 400
            assert why in text.splitlines()[1]
        assert logs.current_level() == "info"


def test_every_logger_has_a_scope() -> None:
    found = set()
    for path in [*SRC.glob("ztunnel/**/*.py"), *SRC.glob("hbone/**/*.py")]:
        found |= set(re.findall(r'get_logger\(\s*"([^"]+)"', path.read_text()))
    assert found == set(SCOPES.names)
    for targets in SCOPES.aliases.values():
        assert set(targets) <= found


def test_ztunnels_names_of_scopes_stand_for_ours() -> None:
    levels, complaints = read_levels("warn,ztunnel::xds=debug,ztunnel::proxy::inbound=trace,hickory_server::server=off")
    assert levels.of("ztunnel.control.discovery") == LEVELS["debug"]
    assert levels.of("ztunnel.dataplane") == LEVELS["trace"]
    assert levels.of("dns") == LEVELS["warn"]
    assert len(complaints) == 1
    assert read_levels("ztunnel=debug")[0].of("access") == LEVELS["info"]


async def test_quit_needs_a_post() -> None:
    async with running() as ztunnel:
        assert (await ztunnel.http("admin", "/quitquitquit"))[0] == 405
        assert (await ztunnel.status())["state"] == "starting"
        assert await ztunnel.http("admin", "/quitquitquit", "POST") == (200, "shutdown now\n")


async def test_page_of_another_origin_is_refused() -> None:
    async with running() as ztunnel:
        assert (await ztunnel.http("admin", "/config_dump", headers={"host": "evil.example"}))[0] == 403
        evil = {"origin": "https://evil.example"}
        assert (await ztunnel.http("admin", "/quitquitquit", "POST", headers=evil))[0] == 403
        assert (await ztunnel.status())["state"] == "starting"


async def test_unknown_page_is_404() -> None:
    async with running() as ztunnel:
        assert (await ztunnel.http("admin", "/nothing"))[0] == 404
        assert (await ztunnel.http("stats", "/nothing"))[0] == 404


async def test_metrics_are_on_both_paths_in_both_formats() -> None:
    async with running() as ztunnel:
        await ztunnel.sync()
        for path in ("/metrics", "/stats/prometheus"):
            code, body = await ztunnel.http("stats", path)
            assert code == 200
            assert 'istio_build{component="ztunnel"' in body
            assert 'istio_xds_message_total{url="type.googleapis.com/istio.workload.Address"} 1' in body
            assert "ztunnel_certificate_expiration_timestamp_seconds" in body
            assert "ztunnel_control_plane_connected 1.0" in body
        code, body = await ztunnel.http("stats", "/metrics", headers={"accept": "application/openmetrics-text"})
        assert code == 200
        assert body.endswith("# EOF\n")


async def test_explain_tells_the_steps() -> None:
    async with running() as ztunnel:
        await ztunnel.sync(workload(), workload("cart", "cart", "10.0.0.2"))
        code, body = await ztunnel.http("admin", "/explain?destination=10.0.0.2:8080&from=shop/web-1")
        assert code == 200
        found = json.loads(body)
        assert found["allowed"] is True
        assert found["route"]["kind"] == "tunnel"
        assert found["route"]["nextHop"] == "10.0.0.2:15008"
        assert found["route"]["expectedPeers"] == ["spiffe://cluster.local/ns/shop/sa/cart"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "destination is missing"),
        ("?destination=10.0.0.2", "destination '10.0.0.2'"),
        ("?destination=10.0.0.2:99999", "99999"),
        ("?destination=10.0.0.2:80&from=nobody", "no workload is called 'nobody'"),
        ("?destination=no-such-name.invalid:80", "no service of the mesh"),
    ],
)
async def test_question_that_cannot_be_answered_is_400_with_a_reason(query: str, words: str) -> None:
    async with running() as ztunnel:
        await ztunnel.sync()
        await ztunnel.until_ready()
        code, body = await ztunnel.http("admin", f"/explain{query}")
        assert code == 400
        assert words in body


def test_readiness_names_what_is_pending() -> None:
    readiness = Readiness("b", "a")
    assert readiness.pending == ["a", "b"]
    readiness.done("a")
    assert not readiness.ready
    readiness.done("b")
    assert readiness.ready
