"""What the README claims about settings and commands is what the programs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ztunnel.config import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def table() -> str:
    """The table of settings, as `Config` has it."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{v.name}` | {v.default} | {v.meaning} |" for v in Config.variables()]
    return "\n".join(rows)


def test_every_setting_is_in_the_readme() -> None:
    begin, end = README.index("<!-- variables -->"), README.index("<!-- end of variables -->")
    found = README[begin + len("<!-- variables -->") : end].strip()
    assert found == table(), "the table of settings differs; python -m tests.test_readme mends it"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.M))))
def test_every_make_target_exists(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


if __name__ == "__main__":
    begin, end = README.index("<!-- variables -->"), README.index("<!-- end of variables -->")
    head, tail = README[: begin + len("<!-- variables -->")], README[end:]
    (ROOT / "README.md").write_text(f"{head}\n\n{table()}\n\n{tail}")
