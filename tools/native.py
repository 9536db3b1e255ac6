"""Builds the little C that there is, `src/hbone/_native.c`, for the Python that runs this.

```shell
python tools/native.py DIRECTORY     # makes DIRECTORY/_native.*.so
```
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "hbone" / "_native.c"


def compiler() -> str | None:
    """The C compiler that Python was built with, or another; None: there is none."""
    return shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")


def build(directory: Path) -> Path:
    """Compile into `directory`.

    Returns:
        The module.

    Raises:
        FileNotFoundError: there is no C compiler.
        subprocess.CalledProcessError: it failed; what it said is on standard error.
    """
    found = compiler()
    if found is None:
        raise FileNotFoundError("there is no C compiler: apt-get install gcc")
    target = directory / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    headers = f"-I{sysconfig.get_path('include')}"
    subprocess.run([found, "-O2", "-Wall", "-fPIC", "-shared", headers, str(SOURCE), "-o", str(target)], check=True)
    return target


if __name__ == "__main__":
    build(Path(sys.argv[1]))
