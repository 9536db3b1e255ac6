"""The completions for bash and zsh are those of the parsers as they are."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from tools.completions import DIRECTORY, PARSERS, SHELLS, scripts


def test_completions_are_current() -> None:
    written = {path.name: path.read_text() for path in DIRECTORY.iterdir()}
    stale = sorted(name for name, text in scripts() if written.get(name) != text)
    assert not stale, "the command lines changed; run 'make completions'"
    assert set(written) == {f"{command}.{shell}" for command in PARSERS for shell in SHELLS}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["hbone", ""], {"connect", "dev-ca", "inspect", "listen"}),
        (["hbone", "listen", "--al"], {"--allow"}),
        (["ztunnel", "sta"], {"status"}),
        (["miniistiod", "token", "cr"], {"create"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    command = words[0]
    asked = " ".join(f"'{word}'" for word in words)
    script = (
        f"source '{DIRECTORY / command}.bash'; COMP_WORDS=({asked}); COMP_CWORD={len(words) - 1};"
        f" _shtab_{command}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert expected <= set(done.stdout.split())
