"""What the commands of miniistiod share: how they are declared, and how they print."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbone.commandline import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PROGRAM", "add_command", "add_state", "counted", "example", "say", "show", "table", "when"]

PROGRAM = "miniistiod"


def example(*lines: str) -> str:
    """The end of a help text."""
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def add_command(commands: Any, name: str, text: str, function: Callable[..., int], *examples: str) -> Any:
    """Declare a command; its parser."""
    added = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=example(*examples)
    )
    added.set_defaults(command=function)
    return added


def add_state(command: Any) -> None:
    """Give a command the option that names the state."""
    command.add_argument(
        "--state",
        type=Path,
        required=True,
        metavar="DIR",
        help="private directory (0700) of the root, tokens, register",
    )


def when(seconds: float) -> str:
    """A moment, in UTC, to the second."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def counted(number: int, what: str) -> str:
    """A number of things; `what` is the word for one of them."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def show(text: str) -> None:
    """Print what was asked for."""
    sys.stdout.write(f"{_lines(text)}\n")


def say(text: str) -> None:
    """Print a remark."""
    sys.stderr.write(f"{_lines(text)}\n")


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows under a header."""
    rows = [tuple(printable(value) for value in row) for row in rows]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        show("  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip())
