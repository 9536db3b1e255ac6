from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.mesh import at, hbone, service

from hbone.daemon import logs
from ztunnel.errors import Drained, PolicyRejected, SelfCall
from ztunnel.logs import INBOUND, OUTBOUND, AccessLog, AccessRecord, Parties
from ztunnel.mesh.rbac import Decision

if TYPE_CHECKING:
    from collections.abc import Iterator

CLIENT, WEB = hbone("client", "10.1.0.1"), hbone("web", "10.2.0.1")


class Output:
    def __init__(self) -> None:
        self.stream = io.StringIO()

    def lines(self) -> list[dict[str, Any]]:
        assert logs.flush()
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def output() -> Iterator[Output]:
    found = Output()
    logs.configure("json", "info", stream=found.stream)
    yield found
    logs.set_level("info")
    logs.shutdown()


def record(direction: str = OUTBOUND) -> AccessRecord:
    parties = Parties(
        direction,
        at("10.2.0.1:15008"),
        hbone_authority="10.2.0.1:8080",
        source_workload=CLIENT,
        source_identity=CLIENT.identity,
        destination_workload=WEB,
        destination_identity=WEB.identity,
        service=service("web"),
    )
    return AccessRecord(parties, "10.1.0.1:40000", 100.0)


COMPLETE = {
    "src.addr": "10.1.0.1:40000",
    "src.workload": "client",
    "src.namespace": "default",
    "src.identity": "spiffe://cluster.local/ns/default/sa/client",
    "src.cluster": "Kubernetes",
    "dst.addr": "10.2.0.1:15008",
    "dst.hbone_addr": "10.2.0.1:8080",
    "dst.service": "web.default.svc.cluster.local",
    "dst.workload": "web",
    "dst.namespace": "default",
    "dst.identity": "spiffe://cluster.local/ns/default/sa/web",
    "dst.cluster": "Kubernetes",
    "direction": "outbound",
    "bytes_sent": 11,
    "bytes_recv": 22,
    "duration": "12ms",
}


def test_complete_line_has_ztunnels_names_in_its_order(output: Output) -> None:
    AccessLog().complete(record(), received=11, sent=22, now=100.0125)
    (line,) = output.lines()
    assert line["level"] == "info"
    fields = {key: value for key, value in line.items() if "." in key or key in COMPLETE}
    assert list(fields.items()) == list(COMPLETE.items())


def test_inbound_sends_what_the_server_sends(output: Output) -> None:
    AccessLog().complete(record(INBOUND), received=11, sent=22, now=101.0)
    (line,) = output.lines()
    assert (line["bytes_sent"], line["bytes_recv"], line["duration"]) == (22, 11, "1000ms")


def test_failure_is_an_error_with_its_text(output: Output) -> None:
    AccessLog().complete(record(), received=0, sent=0, now=100.0, error=PolicyRejected("no"))
    AccessLog().complete(record(), received=0, sent=0, now=100.0, error=Drained())
    first, second = output.lines()
    assert first["level"] == second["level"] == "error"
    assert first["error"] == "connection closed due to policy rejection: no"
    assert second["error"] == "connection closed due to connection drain"


def test_absent_values_are_left_out(output: Output) -> None:
    bare = AccessRecord(Parties(INBOUND, at("[fd00::1]:2")), "10.1.0.1:1")
    AccessLog().complete(bare, received=0, sent=0, now=0.0)
    (line,) = output.lines()
    assert [key for key in line if "." in key] == ["src.addr", "dst.addr"]
    assert line["dst.addr"] == "[fd00::1]:2"


def test_opening_is_told_at_debug_only(output: Output) -> None:
    AccessLog().opened(record())
    assert output.lines() == []
    logs.set_level("debug")
    AccessLog().opened(record())
    (line,) = output.lines()
    assert line["level"] == "debug"
    assert "bytes_sent" not in line


def test_early_deny_is_a_warning(output: Output) -> None:
    AccessLog().early_deny(OUTBOUND, at("10.1.0.1:1"), at("127.0.0.1:15001"), SelfCall())
    (line,) = output.lines()
    assert line["level"] in {"warn", "warning"}
    found = [(key, line[key]) for key in line if key in {"src.addr", "dst.addr", "direction", "error"}]
    assert found == [
        ("src.addr", "10.1.0.1:1"),
        ("dst.addr", "127.0.0.1:15001"),
        ("direction", "outbound"),
        ("error", "attempted recursive call to ourselves"),
    ]


def test_policy_decisions_are_told_at_debug_or_at_info_when_asked(output: Output) -> None:
    decision = Decision(True, "a/b", "", "allow policy match", (("dry-run: deny policy match", "a/c"),))
    AccessLog().decision(decision)
    assert output.lines() == []
    AccessLog(policy_at_info=True).decision(decision)
    assert [line["policy"] for line in output.lines()] == ["a/c", "a/b"]


def test_hostile_authority_stays_on_one_line(output: Output) -> None:
    logs.configure("plain", "info", stream=output.stream)
    parties = Parties(INBOUND, at("10.2.0.1:15008"), hbone_authority='a b"\n\x1b[31m 100%s c=d:80')
    hostile = AccessRecord(parties, "10.1.0.1:1")
    AccessLog().complete(hostile, received=0, sent=0, now=0.0)
    assert logs.flush()
    (line,) = output.stream.getvalue().splitlines()
    assert "\x1b" not in line
