"""What a log line looks like, what never appears in it, and that writing it never waits."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from hbone.daemon import logs, logwriter
from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handlers = list(logging.getLogger().handlers)
    yield
    logs.shutdown()
    logs.set_level("info")
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def written(format: Any = "plain", level: str = "info") -> io.StringIO:  # noqa: A002
    out = io.StringIO()
    logs.configure(format, level, stream=out)
    return out


def lines(out: io.StringIO) -> list[str]:
    assert logs.flush()
    return out.getvalue().splitlines()


FIELDS: dict[str, Any] = {
    "src.addr": logs.Bare("10.0.0.1:33000"),
    "src.workload": "client-0",
    "bytes_sent": 5,
    "duration": 1.5,
    "ok": True,
}


def test_a_plain_line_is_tab_separated_with_quoted_text() -> None:
    out = written()
    logs.get_logger("ztunnel.access").info("connection complete", **FIELDS)
    time, level, target, message, fields = lines(out)[0].split("\t")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    assert (level, target, message) == ("info", "access", "connection complete")
    assert fields == 'src.addr=10.0.0.1:33000 src.workload="client-0" bytes_sent=5 duration=1.5 ok=true'


def test_a_json_line_has_its_fields_in_order() -> None:
    out = written("json")
    logs.get_logger("ztunnel.access").warning("connection complete", **FIELDS)
    line = json.loads(lines(out)[0])
    assert list(line) == ["level", "time", "scope", "message", *FIELDS]
    assert (line["level"], line["scope"]) == ("warn", "ztunnel.access")
    assert line["bytes_sent"] == 5


def test_a_console_line_has_no_colour_codes_away_from_a_terminal() -> None:
    out = written("console")
    logs.get_logger("ztunnel.access").info("connection complete", **FIELDS)
    assert "connection complete" in lines(out)[0]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("format", ["plain", "json", "console", None])
def test_lines_that_differ_in_few_values_are_as_other_lines(
    format: str | None,  # noqa: A002
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    out = io.StringIO() if format is None else written(format)
    logger = logs.get_logger("ztunnel.%s")
    fields = {
        "src.addr": logs.ADDRESS,
        "100%s": 'a "%d" \n%%',
        "bytes_sent": logs.COUNT,
        "token": "s3cr3tvalue",
        "header": "Bearer s3cr3tvalue",
        "duration": logs.MILLISECONDS,
    }
    template = logs.Lines(logger, "warning", "100%s done", fields)
    for number in range(2):
        template.write("[fd00::1]:2", number, 40)
        values = {**fields, "src.addr": logs.Bare("[fd00::1]:2"), "bytes_sent": number, "duration": "40ms"}
        logger.warning("100%s done", **values)
    found = caplog.messages if format is None else lines(out)
    found = [re.sub(r"\d\d:\d\d:\d\d\.\d+", "", line) for line in found]
    assert found[0] == found[1] != found[2] == found[3]
    assert "s3cr3t" not in "".join(found)


def test_lines_follow_the_level_and_a_new_format() -> None:
    template = logs.Lines(logs.get_logger("x"), "info", "done", {"count": logs.COUNT})
    out = written("plain", "warn")
    template.write(1)
    logs.set_level("info")
    template.write(2)
    assert [line.split("\t")[-1] for line in lines(out)] == ["count=2"]
    out = written("json")
    template.write(3)
    assert [json.loads(line)["count"] for line in lines(out)] == [3]


@pytest.mark.parametrize("format", ["plain", "json", "console"])
def test_nothing_in_a_line_can_begin_another_or_steer_a_terminal(format: str) -> None:  # noqa: A002
    out = written(format)
    logs.get_logger("x").info("a\nb\x1b[2J", key='c\n"d"\u2028\t\x9b', addr=logs.Bare("e\nf"))
    (line,) = lines(out)
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028]", line)


@pytest.mark.parametrize("format", ["plain", "json", "console"])
@pytest.mark.parametrize(
    "fields",
    [
        {"authorization": "Bearer s3cr3tvalue"},
        {"token": "s3cr3tvalue"},
        {"header": "authorization: Bearer s3cr3tvalue"},
        {"error": "bad token eyJhbGciOiJSUzI1NiJ9.s3cr3tvalue.AAAA rejected"},
        {"text": "-----BEGIN EC PRIVATE KEY-----\ns3cr3tvalue\n-----END EC PRIVATE KEY-----\n"},
        {"text": "-----BEGIN PRIVATE KEY-----\ns3cr3tvalue"},
        {"raw": b"s3cr3tvalue"},
    ],
)
def test_secrets_appear_in_no_line(format: str, fields: dict[str, Any]) -> None:  # noqa: A002
    out = written(format)
    logs.get_logger("x").info("checked", **fields, after="kept")
    (line,) = lines(out)
    assert "s3cr3tvalue" not in line
    assert "kept" in line
    if format == "json":
        assert json.loads(line)["after"] == "kept"


def test_an_exception_is_on_the_same_line() -> None:
    out = written()
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logs.get_logger("x").exception("handler failed")
    (line,) = lines(out)
    assert "\terror\t" in line
    assert "RuntimeError: broken" in line


def test_levels_are_compared_before_anything_is_made() -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise AssertionError("rendered")

    out = written(level="warn")
    logger = logs.get_logger("x")
    logger.info("hidden", value=Unprintable())
    logger.debug("hidden", value=Unprintable())
    logger.error("seen")
    logs.set_level("debug")
    logger.debug("seen too")
    assert logs.current_level() == "debug"
    logs.set_level("off")
    logger.error("hidden", value=Unprintable())
    assert [line.split("\t")[3] for line in lines(out)] == ["seen", "seen too"]


def test_a_scope_has_a_level_of_its_own_and_the_longest_counts() -> None:
    before = logs.get_logger("a.b.c")
    out = written(level="warn,a=info,a.b=debug,a.b.c.d=off")
    for name, method in (
        ("a", "debug"),
        ("a", "info"),
        ("a.b", "debug"),
        ("a.bb", "debug"),
        ("a.b.c.d.e", "error"),
        ("b", "info"),
        ("b", "warning"),
    ):
        getattr(logs.get_logger(name), method)(f"{name} {method}")
    before.bind(x=1).debug("made before")
    structlog.get_logger("a.b.c").debug("by structlog")
    seen = [line.split("\t")[3] for line in lines(out)]
    assert seen == ["a info", "a.b debug", "b warning", "made before", "by structlog"]
    assert before.debugs
    logs.set_level("error")
    before.warning("hidden")
    logs.Lines(before, "info", "hidden", {}).write()
    assert len(lines(out)) == 5
    assert not before.debugs


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a=loud", "level is 'loud'"),
        ("a b=info", "scope is 'a b'"),
        ("=info", "scope is ''"),
        ("info," * 101, "101 log levels are told"),
    ],
)
def test_levels_that_cannot_be_read_are_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        logs.set_level(text)


@pytest.mark.parametrize("bad", [{"format": "xml"}, {"level": "loud"}])
def test_an_unknown_format_or_level_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        logs.configure(**bad)


def test_bound_fields_are_in_each_line() -> None:
    out = written()
    logger = logs.get_logger("x", id=7).bind(peer="a")
    logger.info("one")
    assert lines(out)[0].endswith('\tone\tid=7 peer="a"')


def test_warnings_of_other_libraries_have_the_same_form() -> None:
    out = written("json")
    logging.getLogger("some.library").warning("odd %s", "thing")
    logging.getLogger("some.library").info("detail")
    structlog.get_logger("other").info("by structlog")
    assert [(json.loads(line)["scope"], json.loads(line)["message"]) for line in lines(out)] == [
        ("some.library", "odd thing"),
        ("other", "by structlog"),
    ]


def test_without_configuration_lines_go_to_the_standard_library(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logs.get_logger("ztunnel.x").info("embedded", a=1)
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("ztunnel.x", "embedded\ta=1")]


class Stuck(io.StringIO):
    """A pipe whose reader stands still until `free` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait()
        return super().write(text)


def test_a_reader_that_stands_still_costs_lines_not_time() -> None:
    out = Stuck()
    logs.configure("plain", "info", stream=out)
    logger = logs.get_logger("x")
    sent = logwriter.MAX_QUEUED_LINES + 500
    for number in range(sent):
        logger.info("line", number=number)
    assert not logs.flush(timeout=0.01)
    out.free.set()
    assert logs.flush(timeout=30)
    got = out.getvalue().splitlines()
    dropped = [line for line in got if "log lines dropped" in line]
    assert 1 <= len(dropped) <= 2  # the batch that stood still may have been made while lines were dropped
    count = sum(int(line.rpartition("count=")[2]) for line in dropped)
    assert count >= 500 - 2 * logwriter.MAX_BATCH_LINES
    assert len(got) - len(dropped) + count == sent


def test_a_reader_that_went_away_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    logs.configure("plain", "info", stream=Gone())
    logs.get_logger("x").info("unheard")
    assert logs.flush()


def test_lines_are_written_before_the_process_ends() -> None:
    code = "from hbone.daemon import logs; logs.configure(); [logs.get_logger('x').info('n', i=i) for i in range(500)]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 500


def test_a_value_of_any_length_makes_a_bounded_line() -> None:
    out = written("json")
    logs.get_logger("x").info("long", value="a" * 1_000_000)
    assert len(json.loads(lines(out)[0])["value"]) < 20_000


def test_lines_of_processes_that_share_a_pipe_are_whole() -> None:
    writers, lines, padding = 4, 300, 5000  # longer than what a pipe takes in one piece
    script = f"""
import os
from hbone.daemon import logs
lock = os.memfd_create("lock")
children = []
for number in range({writers}):
    child = os.fork()
    if not child:
        logs.share_output(lock)
        logs.configure("json")
        log = logs.get_logger("test")
        for line in range({lines}):
            log.info("line", writer=number, line=line, padding="x" * (line * 37 % {padding}))
            if line % 50 == 0:
                logs.flush(10)
        logs.shutdown(10)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((entry["writer"], entry["line"]) for entry in found) == [
        (writer, line) for writer in range(writers) for line in range(lines)
    ]
