"""What operators are warned by: expiry, connection, age, refusals; on the status page, in gauges, in alert rules."""

from __future__ import annotations

import base64
import datetime
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from tests.support.daemon import CA, running, settings
from tests.support.standing import line, printed

from hbone.testing.ca import TestCa
from ztunnel.control.transport import TokenSource
from ztunnel.errors import ResponseFlag

if TYPE_CHECKING:
    from tests.support.daemon import Running

FAILED = ResponseFlag.CONNECT
RULES = Path(__file__).parents[2] / "examples" / "alerts" / "ztunnel.rules.yaml"
ENDS = 1_900_000_000


def token(**claims: Any) -> str:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"eyJhbGciOiJub25lIn0.{body}.sig"


async def values(ztunnel: Running) -> dict[str, float]:
    body = (await ztunnel.http("stats", "/metrics"))[1]
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in body.splitlines() if not line.startswith("#")}


async def test_expiry_of_certificate_roots_and_token_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token(exp=ENDS))
    async with running(settings(AUTH_TOKEN=str(file))) as ztunnel:
        before = await values(ztunnel)
        assert before["ztunnel_certificate_expiration_timestamp_seconds"] == 0
        assert before["ztunnel_root_expiration_timestamp_seconds"] == 0
        await ztunnel.sync()
        identity = await ztunnel.daemon.mesh.svids.fetch()
        found = await values(ztunnel)
        assert found["ztunnel_certificate_expiration_timestamp_seconds"] == identity.svid.expires_at.timestamp()
        root = CA.root.not_valid_after_utc.timestamp()
        assert found["ztunnel_root_expiration_timestamp_seconds"] == root
        assert found["ztunnel_token_expiration_timestamp_seconds"] == ENDS
        assert found["ztunnel_control_plane_connected"] == 1
        assert found["ztunnel_mesh_stale_seconds"] == 0
        assert found["ztunnel_rejected_resources_total"] == 0
        status = await ztunnel.status()
        assert status["tokenExpires"] == "2030-03-17T17:46:40Z"
        text = "\n".join(printed(status, ENDS - 2 * 86_400 - 3600))
        assert f"roots until {status['rootsExpire']} (in " in text
        assert "token until 2030-03-17T17:46:40Z (in 2 d 1 h)" in text
        file.write_text(token(exp=ENDS + 60))
        assert (await values(ztunnel))["ztunnel_token_expiration_timestamp_seconds"] == ENDS + 60
        file.unlink()
        assert (await values(ztunnel))["ztunnel_token_expiration_timestamp_seconds"] == 0


@pytest.mark.parametrize("text", ["", "plain", "a.b.c", token(), token(exp="soon"), token(exp=None), "e.30.x", "a..b"])
def test_a_token_that_does_not_say_when_it_ends_has_no_end(text: str) -> None:
    assert TokenSource(value=text).expires() is None


async def test_revocation_lists_are_told_with_number_age_and_whether_they_are_overdue(tmp_path: Path) -> None:
    authority = TestCa()
    leaf = authority.svid("shop", "web").leaf
    path = tmp_path / "crl.pem"
    path.write_bytes(authority.crl(leaf).public_bytes(serialization.Encoding.PEM))
    async with running(settings(CRL_PATH=str(path))) as ztunnel:
        status = await ztunnel.status()
        found = status["revocation"]
        assert (found["lists"], found["certificates"], found["overdue"], found["error"]) == (1, 1, False, None)
        as_of = datetime.datetime.fromisoformat(found["asOf"]).timestamp()
        text = line(printed(status, as_of + 90), "revocation")
        assert text.startswith(
            f"1 certificate taken back, by 1 list, as of {found['asOf']} (1 min 30 s ago),"
            f" next due {found['nextUpdate']} (in "
        )
        assert (await values(ztunnel))["ztunnel_revocation_lists"] == 1
        mesh = ztunnel.daemon.mesh
        due = mesh.revocations.next_update()
        assert due is not None
        assert (await values(ztunnel))["ztunnel_revocation_next_update_timestamp_seconds"] == due
        mesh.wall = lambda: due + 1
        mesh.revocations.error = "it is cut"
        status = await ztunnel.status()
        text = line(printed(status, due + 3600), "revocation")
        assert f", due for replacement since {found['nextUpdate']} (1 h ago) and still in force; {path} is not" in text
        assert text.endswith("is not read: it is cut")


def metric_names(expression: str) -> set[str]:
    without = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|without) *\([^)]*\)", "", expression)
    return set(re.findall(r"\b(?:istio|ztunnel|process|up)_?\w*\b", without))


async def test_every_metric_of_the_alert_rules_is_exposed() -> None:
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    named = set().union(*(metric_names(rule["expr"]) for rule in rules))
    async with running(settings(ZTUNNEL_WORKER_THREADS="2")) as ztunnel:
        await ztunnel.sync()
        ztunnel.daemon.metrics.connection("source", None, None, None, None).closed(FAILED)
        exposed = {name.partition("{")[0] for name in await values(ztunnel)}
    assert named - {"up"} <= exposed
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


async def test_every_gauge_that_warns_has_a_rule() -> None:
    async with running() as ztunnel:
        exposed = {name.partition("{")[0] for name in await values(ztunnel)}
    text = RULES.read_text()
    for name in exposed:
        if re.search("_timestamp_seconds$|_stale_|_connected$|_rejected_", name):
            assert name in text
