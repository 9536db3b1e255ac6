"""What libraries log the standard way, among our own lines.

A module of its own, because mypyc cannot compile a class whose base is an ordinary class.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.daemon.logs import Logger

__all__ = ["FromStandardLibrary"]


class FromStandardLibrary(logging.Handler):
    """Lets warnings of libraries that log the standard way appear in the same form.

    Args:
        get_logger: gives a logger of ours by its name.
    """

    def __init__(self, get_logger: Callable[[str], Logger]) -> None:
        super().__init__(logging.WARNING)
        self._get_logger = get_logger

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        logger = self._get_logger(record.name)
        fields: dict[str, Any] = {}
        if record.exc_info and record.exc_info[0] is not None:
            fields["exc_info"] = record.exc_info
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        if record.levelno >= logging.ERROR:
            logger.error(message, **fields)
        else:
            logger.warning(message, **fields)
