"""Which lines are written: a level for everything, and others for single scopes, such as `info,ztunnel.dns=debug`.

A scope is the name of loggers up to a dot; the longest that fits counts. Source: Rust's RUST_LOG, of which spans and
regular expressions are not understood.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LEVELS", "Levels", "Scopes", "UnknownScope"]

LEVELS: Final[Mapping[str, int]] = {
    "trace": 5,
    "debug": 10,
    "info": 20,
    "warn": 30,
    "warning": 30,
    "error": 40,
    "off": 100,
}
MAX_DIRECTIVES: Final = 100
_SCOPE: Final = re.compile(r"[\w.:-]{1,200}", re.ASCII)


class UnknownScope(ConfigurationError):
    """No logger has a name like that."""


@attrs.frozen(kw_only=True)
class Scopes:
    """The scopes that there are."""

    names: tuple[str, ...]
    """Of loggers."""
    aliases: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    """Other names of scopes, for what they stand for here; they hold for all below them too."""

    def find(self, scope: str) -> tuple[str, ...]:
        """What a scope stands for.

        Raises:
            UnknownScope: nothing.
        """
        name = scope.replace("::", ".")
        if any(_within(logger, name) for logger in self.names):
            return (name,)
        above = name
        while above not in self.aliases:
            above, dot, _ = above.rpartition(".")
            if not dot:
                raise UnknownScope(f"no log scope is called {scope[:200]!r}; there are {', '.join(sorted(self.names))}")
        return self.aliases[above]


def _within(logger: str, scope: str) -> bool:
    return logger == scope or logger.startswith(scope + ".")


@attrs.frozen
class _Directive:
    scope: str
    """As it was given; empty for everything."""
    level: str
    targets: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.scope}={self.level}" if self.scope else self.level


@attrs.frozen
class Levels:
    """Levels by scope; `info` where none is told."""

    directives: tuple[_Directive, ...] = ()

    @classmethod
    def parse(cls, text: str, scopes: Scopes | None = None) -> Levels:
        """Read `level`, `scope=level`, or several with commas between.

        Args:
            text: The list.
            scopes: Those that there are; None takes any.

        Raises:
            UnknownScope: there is no such scope.
            ConfigurationError: it cannot be read.
        """
        found = cls()
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if len(parts) > MAX_DIRECTIVES:
            raise ConfigurationError(f"{len(parts)} log levels are told; at most {MAX_DIRECTIVES} are taken")
        for part in parts:
            scope, equals, level = part.rpartition("=")
            level = level.lower()
            if level not in LEVELS:
                raise ConfigurationError(f"log level is {level[:100]!r}; it must be one of {', '.join(LEVELS)}")
            if equals and not _SCOPE.fullmatch(scope):
                raise ConfigurationError(f"log scope is {scope[:100]!r}; write a name such as ztunnel.dns")
            targets: tuple[str, ...] = ()
            if equals:
                targets = scopes.find(scope) if scopes is not None else (scope.replace("::", "."),)
            found = found.plus(cls((_Directive(scope, level, targets),)))
        return found

    def plus(self, other: Levels) -> Levels:
        """These, and then those of `other`, which win where both tell the same scope."""
        told = {directive.scope for directive in other.directives}
        kept = tuple(directive for directive in self.directives if directive.scope not in told)
        return Levels(kept + other.directives)

    def of(self, logger: str) -> int:
        """The number of the level of a logger."""
        level, best = "info", -1
        for directive in self.directives:
            if not directive.scope and best < 0:
                level = directive.level
            for target in directive.targets:
                if len(target) >= best and _within(logger, target):
                    level, best = directive.level, len(target)
        return LEVELS[level]

    def __str__(self) -> str:
        return ",".join(map(str, self.directives)) or "info"
