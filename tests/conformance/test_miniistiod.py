"""The inventory of a control plane is complete, and every test that it names exists, is collected and runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.inventory import Inventory

if TYPE_CHECKING:
    import pytest

INVENTORY = Inventory(Path(__file__).with_name("miniistiod.toml"))


def test_every_item_has_its_row() -> None:
    INVENTORY.check_counts(areas=6, items=233)


def test_rows_name_tests_or_a_reason() -> None:
    INVENTORY.check_rows()
    assert INVENTORY.gaps == []


def test_every_named_test_exists_and_runs(request: pytest.FixtureRequest) -> None:
    INVENTORY.check_tests(request.session)
