"""`python -m ztunnel` and the console script: says what is missing where the extra was not installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

EXTRA = {
    "google": "protobuf",
    "hypercorn": "hypercorn",
    "prometheus_client": "prometheus-client",
    "structlog": "structlog",
    "yaml": "pyyaml",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # Some are imported when they are first used, when it is too late to say so.
    package = next((package for module, package in EXTRA.items() if find_spec(module) is None), None)
    if package is None:
        try:
            from ztunnel.cli import main as run
        except ModuleNotFoundError as error:
            package = EXTRA.get((error.name or "").partition(".")[0])
            if package is None:
                raise
        else:
            return run(argv)
    sys.stderr.write(f"ztunnel: {package} is not installed; pip install 'hbone[ztunnel]'\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
