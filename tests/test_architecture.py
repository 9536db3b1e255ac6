"""docs/architecture.md names what is there, and nothing that is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/architecture.md").read_text()
CELLS = [re.findall(r"`([a-z_0-9]+)/?`", row.split("|")[1]) for row in TEXT.splitlines() if row.startswith("| `")]
TABLED = {name for cell in CELLS for name in cell}


def parts(package: str) -> set[str]:
    """The modules and packages right below one of ours."""
    below = (ROOT / "src" / package).iterdir()
    return {path.stem for path in below if path.suffix == ".py" or (path / "__init__.py").exists()}


@pytest.mark.parametrize("package", ["hbone", "ztunnel", "miniistiod"])
def test_every_part_of_a_package_has_its_line(package: str) -> None:
    assert parts(package) - TABLED - {"__init__", "__main__"} == set()


def test_every_line_names_a_part_that_exists() -> None:
    assert TABLED - parts("hbone") - parts("ztunnel") - parts("miniistiod") == set()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z_/]+\.(?:py|proto))`", TEXT))))
def test_every_file_that_is_named_exists(name: str) -> None:
    found = {
        f"/{path.relative_to(ROOT)}" for top in ("src", "tests", "bench", "tools") for path in (ROOT / top).rglob("*.*")
    }
    assert any(path.endswith(f"/{name}") for path in found)
