"""What lint says: file and line, what, why, and how to mend it."""

from __future__ import annotations

import enum
from typing import Any

import attrs

__all__ = ["Finding", "Findings", "Severity"]

MAX_LENGTH = 1000
"""Characters of each part of a finding."""
MAX_FINDINGS = 200
"""Findings that are kept of one load; a file of noise should not fill the log."""


class Severity(enum.Enum):
    """How much a finding weighs."""

    ERROR = "error"
    """The documents are not used."""
    WARNING = "warning"
    """They are used, and probably do not do what was meant."""


def _one_line(text: str) -> str:
    """A text from anywhere as part of one line: nothing in it moves a terminal's cursor, and it ends."""
    if len(text) > MAX_LENGTH:
        text = f"{text[:MAX_LENGTH]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@attrs.frozen
class Finding:
    """One thing that is wrong with a document."""

    path: str
    line: int
    """Line in the file, from 1; 0 when it is about the file as a whole."""
    severity: Severity
    what: str = attrs.field(converter=_one_line)
    """What is wrong, naming the value."""
    fix: str = attrs.field(converter=_one_line)
    """What to do about it."""

    def __str__(self) -> str:
        path = _one_line(self.path)
        where = f"{path}:{self.line}" if self.line else path
        return f"{where}: {self.severity.value}: {self.what}; {self.fix}"

    def to_json(self) -> dict[str, Any]:
        """For `check --json` and the debug pages."""
        return {**attrs.asdict(self), "severity": self.severity.value}


class Findings:
    """Collects findings of one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.items: list[Finding] = []
        self.errors = 0
        """Errors noted, kept or not."""

    def error(self, line: int, what: str, fix: str) -> None:
        """Note an error; the documents will not be used."""
        self.errors += 1
        self._add(Severity.ERROR, line, what, fix)

    def warning(self, line: int, what: str, fix: str) -> None:
        """Note something that probably is not what was meant."""
        self._add(Severity.WARNING, line, what, fix)

    def _add(self, severity: Severity, line: int, what: str, fix: str) -> None:
        # The first error is always kept: without one the file would be taken.
        if len(self.items) < MAX_FINDINGS or (severity is Severity.ERROR and self.errors == 1):
            self.items.append(Finding(self.path, line, severity, what, fix))
