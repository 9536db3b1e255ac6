from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ztunnel.mesh

MODULES = sorted(Path(ztunnel.mesh.__file__).parent.glob("*.py"))
ALLOWED = {"ztunnel.mesh", "ztunnel.errors", "ztunnel.wire", "hbone.errors", "hbone.identity", "hbone.connect"}
FORBIDDEN = {
    "trio",
    "asyncio",
    "socket",
    "selectors",
    "select",
    "time",
    "datetime",
    "threading",
    "logging",
    "structlog",
    "os",
}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_decisions_import_no_loop_socket_clock_or_log(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] not in FORBIDDEN
            if name.startswith(("ztunnel", "hbone", "miniistiod")):
                assert any(name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED), name
