"""`python -m ztunnel` and the console script: says what is missing where the extra was not installed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hbone.commandline import run_with_extra
from hbone.daemon.late import UNUSED, import_late

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["main"]

EXTRA = {
    "google": "protobuf",
    "h11": "h11",
    "prometheus_client": "prometheus-client",
    "structlog": "structlog",
    "yaml": "pyyaml",
}


def _load() -> Callable[[Sequence[str] | None], int]:
    import_late(*UNUSED)
    from ztunnel.cli import main as command

    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_with_extra("ztunnel", EXTRA, _load, argv)


if __name__ == "__main__":
    sys.exit(main())
