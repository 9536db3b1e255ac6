"""The inventory is complete, and every test that it names exists, is collected and runs."""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parents[1]
AREAS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("inventory.toml").read_text())
AREAS_EXPECTED = 18
ITEMS_EXPECTED = 309
GAPS = 31


@attrs.frozen
class Row:
    """One row of the table."""

    area: str
    text: str
    tests: tuple[str, ...] = ()
    items: int = 1
    reason: str = ""
    gap: str = ""


def read(area: str, text: str, value: Any) -> Row:
    if isinstance(value, str):
        value = {"tests": [value]}
    elif isinstance(value, list):
        value = {"tests": value}
    return Row(area, text, **{**value, "tests": tuple(value.get("tests", ()))})


ROWS = [read(area, text, value) for area, table in AREAS.items() for text, value in table["rows"].items()]


def test_every_item_has_its_row() -> None:
    for area, table in AREAS.items():
        assert sum(row.items for row in ROWS if row.area == area) == table["items"], area
    assert (len(AREAS), sum(table["items"] for table in AREAS.values())) == (AREAS_EXPECTED, ITEMS_EXPECTED)


def test_rows_name_tests_or_a_reason_or_own_up_to_a_gap() -> None:
    for row in ROWS:
        assert row.items >= 1, row
        assert len(set(row.tests)) == len(row.tests), row
        assert [bool(row.reason), bool(row.gap), bool(row.tests and not row.gap)].count(True) == 1, row


def test_gaps_are_counted() -> None:
    assert sum(row.items for row in ROWS if row.gap) == GAPS


@pytest.mark.parametrize("row", [row for row in ROWS if row.gap], ids=lambda row: f"{row.area}: {row.text}")
def test_gaps_are_told(row: Row) -> None:
    pytest.skip(f"gap in {row.area}: {row.text}: {row.gap}")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def functions(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Test functions of a file; `Class::test` where they are methods."""
    return dict(_functions(parsed(path).body, ""))


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _functions(node.body, f"{prefix}{node.name}::")


def marks(path: Path, name: str) -> list[ast.expr]:
    """The marks of a test, and those of its whole file."""
    found = list(functions(path)[name].decorator_list)
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
            found += node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
    return found


def never_runs(mark: ast.expr) -> bool:
    """Whether a mark skips its test, or expects it to fail, whatever the host is."""
    text = ast.unparse(mark)
    if text.startswith(("pytest.mark.skip(", "pytest.mark.xfail")) or text == "pytest.mark.skip":
        return True
    if text.startswith("pytest.mark.skipif(") and isinstance(mark, ast.Call):
        return isinstance(mark.args[0], ast.Constant) and bool(mark.args[0].value)
    return False


def fault_of(name: str, collected: dict[Path, set[str]]) -> str:
    """Why a named test does not show anything; empty when it does."""
    file, _, test = name.partition("::")
    path = TESTS / file
    function, _, parameter = test.partition("[")
    if not path.name.startswith("test_") or not path.is_file():
        return "there is no such file of tests"
    if function not in functions(path):
        return "there is no such test"
    if any(never_runs(mark) for mark in marks(path, function)):
        return "it never runs"
    if any(ast.unparse(statement).startswith("pytest.skip(") for statement in functions(path)[function].body):
        return "it skips itself"
    nodes = collected.get(path)
    if nodes is not None and not any(node == test or (not parameter and node.startswith(test + "[")) for node in nodes):
        return "it was not collected"
    return ""


def test_every_named_test_exists_and_runs(request: pytest.FixtureRequest) -> None:
    collected = collected_nodes(request.session)
    named = sorted({test for row in ROWS for test in row.tests})
    assert {name: fault for name in named if (fault := fault_of(name, collected))} == {}


def collected_nodes(session: pytest.Session) -> dict[Path, set[str]]:
    """What this run collected, by file; only of files that it collected whole."""
    options = session.config.option
    if options.keyword or options.markexpr or options.deselect or any("::" in name for name in session.config.args):
        return {}
    found: dict[Path, set[str]] = {}
    for item in session.items:
        found.setdefault(item.path, set()).add(item.nodeid.partition("::")[2])
    return found


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
