"""Write completions/COMMAND.SHELL for the three commands, from their parsers: `make completions`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import shtab

import hbone.cli
import miniistiod.cli
import ztunnel.cli

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIRECTORY = Path(__file__).parents[1] / "completions"
SHELLS = ("bash", "zsh")
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "hbone": hbone.cli.build_parser,
    "miniistiod": miniistiod.cli.parser,
    "ztunnel": ztunnel.cli._parser,
}
_PLACES = {"FILE": shtab.FILE, "PATH": shtab.FILE, "DIR": shtab.DIRECTORY}


def scripts() -> Iterator[tuple[str, str]]:
    """Name and text of each file."""
    for command, build in PARSERS.items():
        parser = build()
        _complete_paths(parser)
        for shell in SHELLS:
            yield f"{command}.{shell}", shtab.complete(parser, shell=shell).rstrip() + "\n"


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """What a parser calls FILE or DIR is completed with names of files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_paths(inner)
        elif action.metavar in _PLACES:
            action.complete = _PLACES[action.metavar]  # type: ignore[attr-defined]  # what shtab looks for


def main() -> None:
    """Write them all."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, text in scripts():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
