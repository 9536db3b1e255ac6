"""The data path's modules, plain and compiled: which they are, and what the compiler would get wrong."""

from __future__ import annotations

import ast
import importlib
import os
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"][
    "custom"
]["modules"]
EXPECTED = bool(os.environ.get("HBONE_EXPECT_COMPILED"))
"""`make test-compiled` says so."""


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("path", COMPILED)
def test_all_of_them_are_compiled_or_none(path: str) -> None:
    found = importlib.import_module(module_name(path)).__file__
    assert found is not None
    assert found.endswith(".so") is EXPECTED


@pytest.mark.parametrize("path", COMPILED)
def test_no_call_stands_in_a_slice(path: str) -> None:
    """mypyc calls it twice where what is sliced is no list, tuple or string; `len` has no effects, so it may."""
    for node in ast.walk(ast.parse((ROOT / "src" / path).read_text())):
        if isinstance(node, ast.Slice):
            calls = [
                call
                for part in (node.lower, node.upper, node.step)
                if part is not None
                for call in ast.walk(part)
                if isinstance(call, ast.Call) and not (isinstance(call.func, ast.Name) and call.func.id == "len")
            ]
            assert not calls, f"{path}:{calls[0].lineno}: take the call out of the slice"


@pytest.mark.parametrize("path", COMPILED)
def test_no_default_is_left_open(path: str) -> None:
    """A Protocol's `= ...` is a value of the wrong type once it is compiled."""
    for node in ast.walk(ast.parse((ROOT / "src" / path).read_text())):
        if isinstance(node, ast.FunctionDef):
            defaults = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
            assert not [one for one in defaults if isinstance(one, ast.Constant) and one.value is ...], node.name


@pytest.mark.parametrize("path", COMPILED)
def test_no_class_has_one_of_a_library_as_its_base(path: str) -> None:
    """mypyc lays out its own data where that of the base is; enumerations are not compiled as classes."""
    for node in ast.walk(ast.parse((ROOT / "src" / path).read_text())):
        if isinstance(node, ast.ClassDef):
            named = [base for base in map(ast.unparse, node.bases) if "." in base and not base.startswith("enum.")]
            assert not named, f"{path}:{node.lineno}: {node.name} needs a module that is not compiled"
