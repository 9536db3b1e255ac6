"""What the README claims about settings and commands is what the programs say."""

from __future__ import annotations

import argparse
import re
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tools.completions import PARSERS

from hbone.connect import Authority, ConnectRequest
from hbone.endpoint import Endpoint
from hbone.events import ConnectReceived, StreamEnded
from hbone.testing.ca import TestCa
from hbone.tls import TlsContext
from ztunnel.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CA = TestCa()
README = (ROOT / "README.md").read_text()


def table() -> str:
    """The table of settings, as `Config` has it."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{v.name}` | {v.default} | {v.meaning} |" for v in Config.variables()]
    return "\n".join(rows)


def test_every_setting_is_in_the_readme() -> None:
    begin, end = README.index("<!-- variables -->"), README.index("<!-- end of variables -->")
    found = README[begin + len("<!-- variables -->") : end].strip()
    assert found == table(), "the table of settings differs; python -m tests.test_readme mends it"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))))
def test_every_make_target_exists(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def commands() -> list[list[str]]:
    """The words of each command in the table, brackets of what may be left out removed."""
    rows = README[README.index("<!-- commands -->") : README.index("<!-- end of commands -->")]
    return [found.translate({91: None, 93: None}).split() for found in re.findall(r"^\| `(.+?)` \|", rows, re.M)]


def test_the_loop_without_an_event_loop_runs_as_it_stands() -> None:
    program = README.split("### Without an event loop", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), names)
    web, orders = (CA.identity("shop", name) for name in ("web", "orders"))
    heard, answer, ours, theirs = bytearray(), bytearray(), *socket.socketpair()
    server = Endpoint(
        TlsContext.server(orders), client=False, authorize=lambda who: who == CA.id("shop", "web"), now=0.0
    )

    def echo(view: memoryview) -> int:
        heard.extend(view)
        return len(view)

    def keep(view: memoryview) -> int:
        answer.extend(view)
        return len(view)

    request = ConnectRequest(authority=Authority.parse("10.0.0.7:8080"))
    client = threading.Thread(target=names["ask"], args=(ours, web, CA.id("shop", "orders"), request, keep))
    with ours, theirs:
        ours.settimeout(30)
        theirs.settimeout(30)
        client.start()
        while not server.engine.closed:
            for event in server.receive_data(theirs.recv(65536), 0.0):
                if isinstance(event, ConnectReceived):
                    server.engine.accept(event.stream_id, (), echo)
                elif isinstance(event, StreamEnded):
                    server.engine.send_data(event.stream_id, heard)
                    server.close()
            while data := server.data_to_send():
                theirs.sendall(data)
        client.join(30)
    assert answer == b"hello"


def verbs(parser: argparse.ArgumentParser, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The commands of a parser that do something."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield before
    for action in inner:
        for name, sub in action.choices.items():
            yield from verbs(sub, (*before, name))


@pytest.mark.parametrize("program", PARSERS)
def test_every_command_is_in_the_readme(program: str) -> None:
    known = set(verbs(PARSERS[program]())) - {("proxy",)}  # ztunnel's word for run
    rows = [words[1:] for words in commands() if words[0] == program]
    assert {tuple(words[:2]) if tuple(words[:2]) in known else (words[0],) for words in rows} == known


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_option_in_the_readme_is_one(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = PARSERS[words[0]]()
    verb = next(found for found in verbs(parser) if found == tuple(words[1 : 1 + len(found)]))
    with pytest.raises(SystemExit):
        parser.parse_args([*verb, "--help"])
    shown = capsys.readouterr().out
    for word in words[1 + len(verb) :]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", shown), word


if __name__ == "__main__":
    begin, end = README.index("<!-- variables -->"), README.index("<!-- end of variables -->")
    head, tail = README[: begin + len("<!-- variables -->")], README[end:]
    (ROOT / "README.md").write_text(f"{head}\n\n{table()}\n\n{tail}")
