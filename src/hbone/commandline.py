"""What the three commands share: a parser that says what is wrong in one sentence, and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import enum
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

from hbone.errors import ConfigurationError, HboneError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["CommandError", "ExitCode", "Parser", "fail", "printable", "run", "run_with_extra"]


class ExitCode(enum.IntEnum):
    """How a command ended, for scripts."""

    DONE = 0
    NO = 1
    """The answer is no: denied, or lint found something."""
    MISUSE = 2
    """Wrong arguments or a bad configuration."""
    UNREACHABLE = 3
    """A peer could not be reached."""


class CommandError(HboneError):
    """Ends a command with one sentence on standard error and an exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.MISUSE) -> None:
        super().__init__(message)
        self.code = code


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal. argparse would have shutil ask it, which imports compressors, also for a daemon."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **{"width": _columns() - 2, **options})


def _columns() -> int:
    with contextlib.suppress(KeyError, ValueError):
        if (chosen := int(os.environ["COLUMNS"])) > 0:
            return chosen
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    return 80


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one sentence without the usage text."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(**options)  # type: ignore[arg-type]  # passed through to argparse untouched

    def error(self, message: str) -> NoReturn:
        """Exit with 2, naming the program that was called and where help is."""
        self.exit(ExitCode.MISUSE, f"{self.prog}: {_sentence(message)}; see '{self.prog} --help'\n")


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey: some of it is from peers and from files."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _sentence(text: str) -> str:
    return printable(" ".join(text.split()))


def fail(program: str, message: str, code: int = ExitCode.MISUSE) -> NoReturn:
    """Write one sentence to standard error and exit."""
    sys.stderr.write(f"{program}: {_sentence(message)}\n")
    raise SystemExit(int(code))


def run(program: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Call `command`; turn the errors that are the user's to mend into one sentence.

    Returns:
        The exit code.
    """
    try:
        return int(command(argv))
    except CommandError as error:
        fail(program, str(error), error.code)
    except ConfigurationError as error:
        fail(program, str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, as `head` does
        return int(ExitCode.DONE)
    except KeyboardInterrupt:
        return 130


def run_with_extra(
    program: str,
    extra: Mapping[str, str],
    load: Callable[[], Callable[[Sequence[str] | None], int]],
    argv: Sequence[str] | None,
) -> int:
    """Run a command whose packages may be missing, and say in one sentence which of them is.

    Args:
        program: Name of the command and of its extra.
        extra: The top-level modules of the extra, and the package that has each.
        load: Imports the command and returns it.
        argv: Its arguments.

    Returns:
        The exit code.
    """
    # Some are imported when they are first used, when it is too late to say so.
    package = next((package for module, package in extra.items() if find_spec(module) is None), None)
    if package is None:
        try:
            command = load()
        except ModuleNotFoundError as error:
            package = extra.get((error.name or "").partition(".")[0])
            if package is None:
                raise
        else:
            return command(argv)
    sys.stderr.write(f"{program}: {package} is not installed; pip install 'hbone[{program}]'\n")
    return int(ExitCode.MISUSE)
