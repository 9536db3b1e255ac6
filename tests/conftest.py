"""What every test may count on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from hbone.daemon import logs

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A test that configures the logs of its process leaves them to the next as it found them."""
    handlers = list(logging.getLogger().handlers)
    level = logs.current_level()
    yield
    logs.shutdown()
    logs.set_level(level)
    for handler in [handler for handler in logging.getLogger().handlers if handler not in handlers]:
        logging.getLogger().removeHandler(handler)
