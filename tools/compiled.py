"""The build hook of a wheel whose data path is compiled: mypyc makes machine code of the very same sources.

And a C compiler makes some of the little C that there is, `hbone/_native.c`, which has its twin in Python.

It is off unless asked for, so that `pip install` needs no C compiler:

```shell
HATCH_BUILD_HOOKS_ENABLE=1 pip wheel --no-deps .     # a wheel for this machine and this Python
make compiled                                        # the same, unpacked into build/compiled
```

Each compiled module stands in the wheel beside the source that it was made of, and Python prefers it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SETTINGS = "[mypy]\nignore_missing_imports = True\n"
"""A stub that isn't installed where the wheel is made costs speed at most, never the build."""
OUTPUT_LINES = 30
"""Of a compilation that failed, what is shown."""


class CompilationError(Exception):
    """The modules cannot be compiled here."""


def compile_modules(source: Path, names: list[str], directory: Path) -> list[Path]:
    """Compile modules in a copy of the sources.

    Args:
        source: the folder of the packages.
        names: of the modules' files, below `source`.
        directory: where the copy is made.

    Returns:
        The compiled files, below `directory`, each where its module has its place.

    Raises:
        CompilationError: there is no C compiler, or it or mypyc failed.
    """
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if not any(map(shutil.which, (compiler, "cc"))):
        raise CompilationError(f"there is no C compiler {compiler}: apt-get install gcc, or build without the hook")
    shutil.copytree(source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (directory / "mypy.ini").write_text(SETTINGS)
    _run("mypyc", [sys.executable, "-c", "import sys, mypyc.__main__; mypyc.__main__.main()", *names], directory)
    shutil.rmtree(directory / "build")
    _run("the C compiler", [sys.executable, str(source.parent / "tools" / "native.py"), "hbone"], directory)
    return sorted(directory.rglob("*.so"))


def _run(name: str, command: list[str], directory: Path) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, "MYPY_CONFIG_FILE_DIR": str(directory), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()[-OUTPUT_LINES:]
        raise CompilationError(f"{name} failed; its last lines: " + "\n".join(lines))


class CompiledDataPath(BuildHookInterface[Any]):
    """Adds the compiled modules that `[tool.hatch.build.targets.wheel.hooks.custom]` names to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the packages are installed to be edited."""
        if version == "editable":
            return
        self._directory = Path(mkdtemp(prefix="compiled-"))
        found = compile_modules(Path(self.root, "src"), self.config["modules"], self._directory)
        for path in found:
            build_data["force_include"][str(path)] = str(path.relative_to(self._directory))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the copy."""
        if version != "editable":
            shutil.rmtree(self._directory)
