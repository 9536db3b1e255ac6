"""What every test may count on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from hbone.daemon import logs
from hbone.testing.hosts import namespace_obstacle

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that make network namespaces are skipped where that can't be done; asked only when there are any."""
    for item in items:
        if item.get_closest_marker("netns") and (obstacle := namespace_obstacle()):
            item.add_marker(pytest.mark.skip(reason=f"no network namespaces here: {obstacle}"))


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
