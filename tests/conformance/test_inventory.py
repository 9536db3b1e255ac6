"""The inventory is complete, and every test that it names exists, is collected and runs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.inventory import Inventory, never_runs

if TYPE_CHECKING:
    import pytest

INVENTORY = Inventory(Path(__file__).with_name("inventory.toml"))
AREAS_EXPECTED = 18
ITEMS_EXPECTED = 309
GAPS = 0


def test_every_item_has_its_row() -> None:
    INVENTORY.check_counts(areas=AREAS_EXPECTED, items=ITEMS_EXPECTED)


def test_rows_name_tests_or_a_reason_or_own_up_to_a_gap() -> None:
    INVENTORY.check_rows()


def test_gaps_are_counted() -> None:
    gaps = [f"{row.area}: {row.text}: {row.gap}" for row in INVENTORY.gaps]
    assert len(gaps) == GAPS, gaps


def test_every_named_test_exists_and_runs(request: pytest.FixtureRequest) -> None:
    INVENTORY.check_tests(request.session)


def test_skips_are_seen_through() -> None:
    for text, never in (
        ("pytest.mark.skip", True),
        ("pytest.mark.skip(reason='x')", True),
        ("pytest.mark.xfail(strict=True)", True),
        ("pytest.mark.skipif(True, reason='x')", True),
        ("pytest.mark.skipif(bool(namespace_obstacle()), reason='x')", False),
        ("pytest.mark.parametrize('a', [1])", False),
        ("kinds", False),
    ):
        assert never_runs(ast.parse(text, mode="eval").body) is never, text
