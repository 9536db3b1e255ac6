from __future__ import annotations

import importlib
import linecache
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import attrs
import pytest

from hbone.daemon.late import import_late, tidy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Write = Callable[[str], list[int]]

NAME = "put_off_for_a_test"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Makes the module; the list it fills has one item for each time it was run."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    runs: list[int] = []
    monkeypatch.setattr(sys, "runs_of_a_test", runs, raising=False)

    def write(text: str) -> list[int]:
        (tmp_path / f"{NAME}.py").write_text(f"import sys\nsys.runs_of_a_test.append(1)\n{text}\n")
        importlib.invalidate_caches()
        return runs

    yield write
    sys.modules.pop(NAME, None)


def test_a_module_is_run_when_it_is_first_used(write: Write) -> None:
    runs = write("value = 7")
    import_late(NAME)
    module = importlib.import_module(NAME)
    assert module is importlib.import_module(NAME)
    assert runs == []
    assert module.value == 7
    assert module.value == 7
    assert runs == [1]
    assert "__getattr__" not in vars(module)


def test_asking_it_for_a_name_is_a_use(write: Write) -> None:
    runs = write("value = 7")
    import_late(NAME)
    found: dict[str, int] = {}
    exec(f"import {NAME}", found)
    assert runs == []
    exec(f"from {NAME} import value", found)
    assert (found["value"], runs) == (7, [1])


def test_what_it_does_not_have_is_missed_as_usual(write: Write) -> None:
    write("value = 7")
    import_late(NAME)
    with pytest.raises(AttributeError, match="other"):
        importlib.import_module(NAME).other  # noqa: B018


def test_its_own_way_to_make_names_stays(write: Write) -> None:
    write("def __getattr__(name): return name * 2")
    import_late(NAME)
    module = importlib.import_module(NAME)
    assert (module.ab, module.cd) == ("abab", "cdcd")


def test_a_circle_is_told_so_as_usual(write: Write) -> None:
    write(f"import {NAME}\n{NAME}.value\nvalue = 7")
    import_late(NAME)
    with pytest.raises(AttributeError, match="yet"):
        importlib.import_module(NAME).value  # noqa: B018


def test_a_module_that_failed_is_run_again(write: Write) -> None:
    runs = write("if len(sys.runs_of_a_test) < 2: raise OSError('no')\nvalue = 7")
    import_late(NAME)
    module = importlib.import_module(NAME)
    with pytest.raises(OSError, match="no"):
        module.value  # noqa: B018
    assert (module.value, runs) == (7, [1, 1])


def test_threads_that_use_it_at_once_run_it_once(write: Write) -> None:
    runs = write("import time\ntime.sleep(0)\nvalue = 7")
    import_late(NAME)
    module = importlib.import_module(NAME)
    together = threading.Barrier(8)

    def use(_: int) -> int:
        together.wait(30)
        return int(module.value)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(8))) == [7] * 8
    assert runs == [1]


def test_what_is_there_or_missing_is_left_alone() -> None:
    before = sys.modules["threading"]
    import_late("threading", "no_such_module", "no_such_package.module")
    assert sys.modules["threading"] is before
    assert "no_such_module" not in sys.modules


def test_tidying_lets_go_of_generated_sources_and_cycles() -> None:
    @attrs.frozen
    class Generated:
        value: int = 0

    class Circle:
        def __init__(self) -> None:
            self.itself = self

    circle = weakref.ref(Circle())
    assert any("Generated" in name for name in linecache.cache)
    tidy()
    assert not any("Generated" in name for name in linecache.cache)
    assert circle() is None
    assert Generated(1) == Generated(1)
