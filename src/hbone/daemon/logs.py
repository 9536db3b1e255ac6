"""Structured logs on standard output. `logtext` says what a line looks like, `logwriter` writes it."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

from hbone.daemon.logbridge import FromStandardLibrary
from hbone.daemon.loglevels import LEVELS, Levels
from hbone.daemon.logtext import (
    Bare,
    console,
    escape,
    exception_text,
    json_fields,
    json_text,
    plain_fields,
    redact,
    redact_line,
    render_json,
    render_message,
    render_plain,
    short,
)
from hbone.daemon.logtime import timestamp
from hbone.daemon.logwriter import Writer, share_output
from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping

    from hbone.daemon.logtext import Renderer

__all__ = [
    "ADDRESS",
    "COUNT",
    "MILLISECONDS",
    "Bare",
    "Lines",
    "Logger",
    "Slot",
    "configure",
    "current_format",
    "current_level",
    "current_levels",
    "flush",
    "get_logger",
    "set_level",
    "share_output",
    "shutdown",
]

Format = Literal["plain", "json", "console"]


class Logger:
    """A logger whose level can change while it is in use; a line below it costs one comparison.

    It has what structlog asks of a bound logger, so structlog's own calls can end here; importing structlog for that
    would cost each daemon three megabytes.

    Args:
        logger: Where rendered lines go, by level.
        processors: Ours; there for structlog's sake.
        context: Fields of each line.
    """

    __slots__ = ("_context", "_logger", "_processors")

    def __init__(self, logger: _Named, processors: Iterable[Any], context: Mapping[str, Any]) -> None:
        self._logger = logger
        self._processors = processors
        self._context = context

    def bind(self, **fields: Any) -> Logger:
        """A logger whose lines carry these fields too."""
        return Logger(self._logger, self._processors, {**self._context, **fields})

    def unbind(self, *names: str) -> Logger:
        """A logger whose lines carry these fields no longer.

        Raises:
            KeyError: a line does not carry one.
        """
        left = dict(self._context)
        for name in names:
            del left[name]
        return Logger(self._logger, self._processors, left)

    def try_unbind(self, *names: str) -> Logger:
        """The same, where a line may carry none of them."""
        left = {name: value for name, value in self._context.items() if name not in names}
        return Logger(self._logger, self._processors, left)

    def new(self, **fields: Any) -> Logger:
        """A logger whose lines carry these fields alone."""
        return Logger(self._logger, self._processors, fields)

    @property
    def debugs(self) -> bool:
        """Whether its lines at debug level are written."""
        return bool(self._logger.level <= 10)

    def _emit(self, method: str, event: str, fields: dict[str, Any]) -> None:
        if self._context:
            fields = {**self._context, **fields}
        fields["event"] = event
        getattr(self._logger, method)(_render(self._logger, method, fields))

    def trace(self, event: str, **fields: Any) -> None:
        """Log for whoever follows single frames."""
        if self._logger.level <= 5:
            self._emit("trace", event, fields)

    def debug(self, event: str, **fields: Any) -> None:
        """Log for whoever looks for a fault."""
        if self._logger.level <= 10:
            self._emit("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log what an operator wants to know in normal operation."""
        if self._logger.level <= 20:
            self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log that a peer misbehaved, or that something works less well than it should."""
        if self._logger.level <= 30:
            self._emit("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log that we failed."""
        if self._logger.level <= 40:
            self._emit("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log that we failed, with the exception being handled."""
        fields.setdefault("exc_info", True)
        self.error(event, **fields)

    def template(self, method: str, event: str, fields: Mapping[str, Any]) -> list[str]:
        """What stands before, between and after a line's time and slots; nothing where lines cannot be made so."""
        render = _state.render_fields
        if render is None or self._context:
            return []
        in_json = render is json_fields
        parts = []
        for name, value in fields.items():
            if isinstance(value, Slot):
                written = f",{json_text(name)}:{value.json}" if in_json else f"{escape(name)}={value.plain}"
            else:
                field = {name: value}
                redact(field)
                written = redact_line(render(field))
            parts.append(written)
        level = "warn" if method == "warning" else method
        name = self._logger.name
        if in_json:
            head = f'{{"level":"{level}","time":"{_HOLE}","scope":{json_text(name)},"message":{json_text(event)}'
            line = head + "".join(parts) + "}"
        else:
            line = f"{_HOLE}\t{level}\t{short(name)}\t{escape(event)}\t" + " ".join(parts)
        return line.split(_HOLE)

    def log(self, level: str, event: str, **fields: Any) -> None:
        """Log at the level of that name."""
        if self._logger.level <= LEVELS[level]:
            self._emit(level, event, fields)


class Slot:
    """Stands in `Lines` for a value that each line brings itself, and which holds nothing to escape or to hide.

    Args:
        make: The value as other lines would have it.
        json: How it stands in JSON, with `_HOLE` for the value.
        plain: The same in plain text.
    """

    __slots__ = ("json", "make", "plain")

    def __init__(self, make: Callable[[Any], Any], json: str, plain: str) -> None:
        self.make = make
        self.json = json
        self.plain = plain


_HOLE: Final = "\n"
"""Where a line takes a value; no line has one of its own."""
ADDRESS: Final = Slot(Bare, f'"{_HOLE}"', _HOLE)
"""Text of an address with its port."""
COUNT: Final = Slot(int, _HOLE, _HOLE)
"""A number."""
MILLISECONDS: Final = Slot("{}ms".format, f'"{_HOLE}ms"', f'"{_HOLE}ms"')
"""A whole number of them."""


class Lines:
    """Lines that differ in few values; all else is written out once, for the format in force. For every connection.

    Args:
        logger: Whose lines they are.
        method: `info`, `warning` or another of its methods.
        event: The message.
        fields: In order, with a `Slot` where each line has a value of its own.
    """

    __slots__ = ("_end", "_epoch", "_event", "_fields", "_level", "_logger", "_method", "_texts")

    def __init__(self, logger: Logger, method: str, event: str, fields: dict[str, Any]) -> None:
        self._logger = logger
        self._end: _Named = logger._logger
        self._method = method
        self._level = LEVELS[method]
        self._event = event
        self._fields = fields
        self._epoch = -1
        self._texts: list[str] = []

    def write(self, *values: Any) -> None:
        """Write the line with these values, one for each slot in order."""
        if self._end.level > self._level:
            return
        if self._epoch != _state.epoch:
            self._epoch = _state.epoch
            self._texts = self._logger.template(self._method, self._event, self._fields)
        writer, texts = _state.writer, self._texts
        if writer is not None and texts:
            parts = [texts[0], timestamp(), texts[1]]
            for number, value in enumerate(values, 2):
                parts += (str(value), texts[number])
            writer.write("".join(parts))
        else:
            left = iter(values)
            fields = {
                name: value.make(next(left)) if isinstance(value, Slot) else value
                for name, value in self._fields.items()
            }
            self._logger._emit(self._method, self._event, fields)


class _Named:
    """The end of a logger: its name, its level, and where rendered lines go. All loggers of a name share one."""

    __slots__ = ("level", "name")

    def __init__(self, name: str, level: int) -> None:
        self.name = name
        self.level = level

    def trace(self, line: str) -> None:
        _state.write(self.name, logging.DEBUG, line)

    def debug(self, line: str) -> None:
        _state.write(self.name, logging.DEBUG, line)

    def info(self, line: str) -> None:
        _state.write(self.name, logging.INFO, line)

    def warning(self, line: str) -> None:
        _state.write(self.name, logging.WARNING, line)

    def error(self, line: str) -> None:
        _state.write(self.name, logging.ERROR, line)


class _State:
    """What `configure` chose; one per process. Until then lines go to the standard library's loggers."""

    def __init__(self) -> None:
        self.levels = Levels()
        self.ends: dict[str, _Named] = {}
        self.writer: Writer | None = None
        self.render: Renderer = render_message
        self.render_fields: Callable[[Mapping[str, Any]], str] | None = None
        """Fields of a line whose parts can be joined; None where they cannot."""
        self.format: Format = "plain"
        self.epoch = 0
        """How often `configure` and `shutdown` were called."""

    def write(self, name: str, level: int, line: str) -> None:
        if self.writer is not None:
            self.writer.write(line)
        else:
            logging.getLogger(name).log(level, "%s", line)

    def render_dropped(self, count: int) -> str:
        fields = {"event": "log lines dropped: standard output is not being read", "count": count, "time": timestamp()}
        return self.render(self.end("logs"), "warning", fields)

    def end(self, name: str = "") -> _Named:
        found = self.ends.get(name)
        if found is None:
            found = self.ends[name] = _Named(name, self.levels.of(name))
        return found


def configure(format: Format = "plain", level: str | Levels = "info", *, stream: TextIO | None = None) -> None:  # noqa: A002
    """Send the logs of this process, the standard library's warnings and structlog's, to standard output.

    structlog's, where it was imported before.

    Args:
        format: `plain` (time, level, target, message, fields; between tabs), `json` (an object a line),
            or `console` (for people; coloured on a terminal).
        level: `trace`, `debug`, `info`, `warn`, `error` or `off`, and others for single scopes.
        stream: where to instead of standard output.

    Raises:
        ConfigurationError: an unknown format or level.
    """
    output = stream or sys.stdout
    renderers: dict[str, Callable[[], Renderer]] = {
        "plain": lambda: render_plain,
        "json": lambda: render_json,
        "console": lambda: console(output),
    }
    if format not in renderers:
        raise ConfigurationError(f"log format is {format!r}; it must be plain, json or console")
    set_level(level)
    shutdown()
    _state.format = format
    _state.render = renderers[format]()
    _state.render_fields = {"plain": plain_fields, "json": json_fields}.get(format)
    _state.writer = Writer(output, _state.render_dropped)
    structlog = sys.modules.get("structlog")
    if structlog is not None:
        structlog.configure(
            processors=_PROCESSORS, wrapper_class=Logger, logger_factory=_state.end, cache_logger_on_first_use=True
        )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, FromStandardLibrary)]:
        root.removeHandler(handler)
    root.addHandler(FromStandardLibrary(get_logger))


def get_logger(target: str, **fields: Any) -> Logger:
    """A logger whose lines carry `target`, and `fields` each.

    It may be made and used before `configure`; then its lines go to the standard library's logger of that name,
    so a program that embeds us sees them where it sees others.
    """
    return Logger(_state.end(target), _PROCESSORS, dict(fields))


def set_level(level: str | Levels) -> None:
    """Log what is at `level` or above from now on.

    Args:
        level: for all, or a list such as `info,ztunnel.dns=debug`.

    Raises:
        ConfigurationError: no level has this name.
    """
    _state.levels = level if isinstance(level, Levels) else Levels.parse(level)
    for name, end in _state.ends.items():
        end.level = _state.levels.of(name)


def current_format() -> Format:
    """The format that `configure` chose last."""
    return _state.format


def current_level() -> str:
    """The levels in force, as `set_level` takes them."""
    return str(_state.levels)


def current_levels() -> Levels:
    """The same, with what their scopes stand for."""
    return _state.levels


def flush(timeout: float = 1.0) -> bool:
    """Wait until all lines are written, at most `timeout` seconds; False when some are not."""
    return _state.writer is None or _state.writer.flush(timeout)


def shutdown(timeout: float = 1.0) -> None:
    """Write what waits, for `timeout` seconds at most, and end the writer. Called at exit."""
    writer, _state.writer = _state.writer, None
    _state.render = render_message
    _state.render_fields = None
    _state.epoch += 1
    if writer is not None:
        writer.close(timeout)


def _render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    if "exc_info" in fields:
        text = exception_text(fields.pop("exc_info"))
        if text:
            fields["exception"] = text
    redact(fields)
    fields["time"] = timestamp()
    return redact_line(_state.render(logger, method, fields))


_PROCESSORS: Final[list[Any]] = [_render]
_state = _State()
atexit.register(shutdown)
os.register_at_fork(after_in_child=lambda: _state.writer.forked() if _state.writer is not None else None)
