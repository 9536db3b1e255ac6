"""Inventories: tables of what a program of ours has to do, and which test shows that it does.

One row an item: its key says what is expected. Its value is one of
`"file::test"` or a list of them, relative to tests/;
`{ tests = [...], items = 2 }` where one row stands for several items;
`{ reason = "..." }` where it does not apply here, and why;
`{ gap = "...", tests = [...] }` where something is still missing.
`items` of an area is how many items it has, so that none is lost by a slip of the hand.
"""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

__all__ = ["Inventory", "Row", "never_runs"]

TESTS = Path(__file__).parents[1]


@attrs.frozen
class Row:
    """One row of a table."""

    area: str
    text: str
    tests: tuple[str, ...] = ()
    items: int = 1
    reason: str = ""
    gap: str = ""


class Inventory:
    """A table, and the checks that hold it to the tests that exist."""

    def __init__(self, path: Path) -> None:
        self.areas: dict[str, Any] = tomllib.loads(path.read_text())
        self.rows = [
            _read(area, text, value) for area, table in self.areas.items() for text, value in table["rows"].items()
        ]

    def check_counts(self, *, areas: int, items: int) -> None:
        """Every item has its row."""
        for area, table in self.areas.items():
            assert sum(row.items for row in self.rows if row.area == area) == table["items"], area
        assert (len(self.areas), sum(table["items"] for table in self.areas.values())) == (areas, items)

    def check_rows(self) -> None:
        """Each row names tests, or a reason, or owns up to a gap."""
        for row in self.rows:
            assert row.items >= 1, row
            assert len(set(row.tests)) == len(row.tests), row
            assert [bool(row.reason), bool(row.gap), bool(row.tests and not row.gap)].count(True) == 1, row

    @property
    def gaps(self) -> list[Row]:
        """Rows of which something is missing."""
        return [row for row in self.rows if row.gap]

    def check_tests(self, session: pytest.Session) -> None:
        """Every test that is named exists, was collected, and runs."""
        collected = _collected_nodes(session)
        named = sorted({test for row in self.rows for test in row.tests})
        assert {name: fault for name in named if (fault := _fault_of(name, collected))} == {}


def _read(area: str, text: str, value: Any) -> Row:
    if isinstance(value, str):
        value = {"tests": [value]}
    elif isinstance(value, list):
        value = {"tests": value}
    return Row(area, text, **{**value, "tests": tuple(value.get("tests", ()))})


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def _tests(path: Path) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Test functions of a file; `Class::test` where they are methods."""
    return dict(_functions(_parsed(path).body, ""))


def _functions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield from _functions(node.body, f"{prefix}{node.name}::")


def _marks(path: Path, name: str) -> list[ast.expr]:
    """The marks of a test, and those of its whole file."""
    found = list(_tests(path)[name].decorator_list)
    for node in _parsed(path).body:
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


def _fault_of(name: str, collected: dict[Path, set[str]]) -> str:
    """Why a named test does not show anything; empty when it does."""
    file, _, test = name.partition("::")
    path = TESTS / file
    function, _, parameter = test.partition("[")
    if not path.name.startswith("test_") or not path.is_file():
        return "there is no such file of tests"
    if function not in _tests(path):
        return "there is no such test"
    if any(never_runs(mark) for mark in _marks(path, function)):
        return "it never runs"
    if any(ast.unparse(statement).startswith("pytest.skip(") for statement in _tests(path)[function].body):
        return "it skips itself"
    nodes = collected.get(path)
    if nodes is not None and not any(node == test or (not parameter and node.startswith(test + "[")) for node in nodes):
        return "it was not collected"
    return ""


def _collected_nodes(session: pytest.Session) -> dict[Path, set[str]]:
    """What this run collected, by file; only of files that it collected whole."""
    options = session.config.option
    if options.keyword or options.markexpr or options.deselect or any("::" in name for name in session.config.args):
        return {}
    found: dict[Path, set[str]] = {}
    for item in session.items:
        found.setdefault(item.path, set()).add(item.nodeid.partition("::")[2])
    return found
