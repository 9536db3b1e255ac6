"""Imports point one way: reads every import of `src`, those inside functions too; not those for type checkers."""

from __future__ import annotations

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

import hbone

SRC = pathlib.Path(hbone.__file__).parents[1]
PACKAGES = ("hbone", "ztunnel", "miniistiod")

LAYERS: tuple[tuple[str, ...], ...] = (
    ("enums", "lazy", "version"),
    ("errors",),
    ("events", "fields", "config", "admission", "commandline"),
    ("connect", "engine", "identity", "openssl", "daemon"),
    ("tlspeer", "pool", "devca", "inspect"),
    ("tlscontext",),
    ("tls",),
    ("endpoint", "grpc"),
    ("sessionstream",),
    ("session",),
    ("recall",),
    ("tunnelpool",),
    ("trio", "asyncio"),
    ("asgi", "httpx", "cli"),
)
"""Each part of hbone imports only from the layers before its own, and from itself."""

PURE = (
    "hbone.admission",
    "hbone.config",
    "hbone.connect",
    "hbone.endpoint",
    "hbone.engine",
    "hbone.enums",
    "hbone.errors",
    "hbone.events",
    "hbone.fields",
    "hbone.identity.spiffe",
    "hbone.identity.verify",
    "hbone.openssl",
    "hbone.pool",
    "hbone.recall",
    "hbone.session",
    "hbone.sessionstream",
    "hbone.tls",
    "hbone.tlscontext",
    "hbone.tlspeer",
    "hbone.tunnelpool",
    "ztunnel.dns.answer",
    "ztunnel.dns.names",
    "ztunnel.dns.wire",
    "ztunnel.errors",
    "ztunnel.mesh",
    "ztunnel.wire",
)
IMPURE = {"asyncio", "logging", "select", "selectors", "signal", "socket", "subprocess", "threading", "time", "trio"}

IN_C = {"hbone._native"}
"""Imports nothing of ours, and may not be there."""

EXPLAINING = ("miniistiod.explain", "miniistiod.overview", "miniistiod.pages", "miniistiod.wording")
FROM_ZTUNNEL = {"ztunnel.wire"}
"""What miniistiod may import of ztunnel; its explain also asks the same decisions."""


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((SRC / package).rglob("*.py"))
    if not path.stem.endswith("_pb2")
}


class _Imports(ast.NodeVisitor):
    def __init__(self, module: str, path: pathlib.Path) -> None:
        self._package = module if path.stem == "__init__" else module.rpartition(".")[0]
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        for child in node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else [*node.body, *node.orelse]:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self._package.split(".")
            base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            self.found.add(whole if whole in MODULES or whole in IN_C else base)


@functools.cache
def imports(module: str) -> frozenset[str]:
    path = MODULES[module]
    visitor = _Imports(module, path)
    visitor.visit(ast.parse(path.read_text(), path))
    return frozenset(visitor.found)


def unit(module: str) -> str:
    return ".".join(module.split(".")[:2])


def within(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def test_the_packages_point_one_way() -> None:
    wrong = []
    for module in MODULES:
        for name in imports(module):
            if within(module, "hbone") and within(name, "ztunnel", "miniistiod"):
                wrong.append((module, name))
            if within(module, "ztunnel") and within(name, "miniistiod"):
                wrong.append((module, name))
            if within(module, "miniistiod") and within(name, "ztunnel"):
                more = {"ztunnel.mesh", "ztunnel.errors"} if within(module, *EXPLAINING) else set()
                if not within(name, *FROM_ZTUNNEL, *more):
                    wrong.append((module, name))
    # The test bench starts whole meshes, and is no part of the library that it lies in.
    assert [each for each in wrong if not within(each[0], "hbone.testing")] == []


def test_hbone_is_layered() -> None:
    layer = {f"hbone.{name}": number for number, names in enumerate(LAYERS) for name in names}
    known = {*layer, "hbone", "hbone.testing"}
    assert {unit(module) for module in MODULES if within(module, "hbone")} == known
    wrong = [
        (module, name)
        for module in MODULES
        for name in imports(module)
        if unit(module) in layer
        and within(name, "hbone")
        and name not in IN_C
        and unit(name) != unit(module)
        and layer.get(unit(name), len(LAYERS)) >= layer[unit(module)]
    ]
    assert wrong == []


def test_nothing_but_tests_needs_the_test_bench() -> None:
    wrong = [
        (module, name)
        for module in MODULES
        for name in imports(module)
        if within(name, "hbone.testing") and not within(module, "hbone.testing")
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_parts_of_a_package_form_no_circle(package: str) -> None:
    graph: dict[str, set[str]] = {}
    for module in MODULES:
        if within(module, f"{package}") and module != package:
            graph.setdefault(unit(module), set()).update(
                unit(name) for name in imports(module) if within(name, package) and unit(name) != unit(module)
            )
    done: set[str] = set()
    circles: list[list[str]] = []

    def walk(node: str, way: list[str]) -> None:
        if node in way:
            circles.append([*way[way.index(node) :], node])
            return
        if node not in done:
            for neighbour in sorted(graph.get(node, ())):
                walk(neighbour, [*way, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    assert circles == []


def test_what_is_pure_imports_neither_loops_nor_clocks_nor_sockets() -> None:
    wrong = [
        (module, name)
        for module in MODULES
        if within(module, *PURE)
        for name in imports(module)
        if name.split(".")[0] in IMPURE
    ]
    assert wrong == []


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_hbone_and_using_its_names_brings_no_event_loop() -> None:
    code = (
        "import hbone, sys\n"
        "for name in hbone.__all__: getattr(hbone, name)\n"
        "print([name for name in ('trio', 'asyncio', 'anyio', 'h11', 'structlog') if name in sys.modules])"
    )
    assert in_a_fresh_process(code) == "[]"


def test_help_waits_for_nothing_large() -> None:
    code = (
        "import sys, hbone.cli\n"
        "hbone.cli.build_parser()\n"
        "print([name for name in ('trio', 'OpenSSL', 'cryptography') if name in sys.modules])"
    )
    assert in_a_fresh_process(code) == "[]"


def test_public_names_are_the_same_for_people_and_type_checkers() -> None:
    tree = ast.parse(pathlib.Path(hbone.__file__).read_text())
    typed: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                if isinstance(child, ast.ImportFrom) and child.module:
                    typed.update({alias.name: child.module for alias in child.names})
    assert typed == hbone._HOME
    assert sorted(typed) == sorted(hbone.__all__)
    assert set(hbone.__all__) <= set(dir(hbone))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="frobnicate"):
        _ = hbone.frobnicate
