"""Structured logs on standard output: tab-separated text, JSON, or colours for a terminal.

Writing never holds up the program: lines wait in a bounded queue for one thread that writes them in batches.
When the reader of standard output stands still and the queue is full, lines are dropped and counted, and
the count is logged as soon as writing goes on.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import fcntl
import json
import logging
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import structlog

from hbone.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping

    _Renderer = Callable[[Any, str, MutableMapping[str, Any]], str]

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
    "debugging",
    "flush",
    "get_logger",
    "set_level",
    "share_output",
    "shutdown",
]

Format = Literal["plain", "json", "console"]

LEVELS: Final[Mapping[str, int]] = {
    "trace": 5,
    "debug": 10,
    "info": 20,
    "warn": 30,
    "warning": 30,
    "error": 40,
    "off": 100,
}
MAX_QUEUED_LINES: Final = 10_000
MAX_BATCH_LINES: Final = 64
MAX_VALUE: Final = 16 * 1024
_GATHER_SECONDS: Final = 0.05
"""How long the writer waits for more lines after the first: a busy process wakes it twenty times a second."""

_SECRET_NAMES: Final = frozenset(
    ["authorization", "token", "auth_token", "password", "secret", "private_key", "key_pem", "jwt", "cookie"]
)
_REDACTED: Final = "[redacted]"
_IN_STRING: Final = r'(?:\\.|[^"\\])*'
_SECRETS: Final = (
    (
        "PRIVATE KEY",
        re.compile(rf"-----BEGIN [A-Z ]*PRIVATE KEY-----{_IN_STRING}?(-----END [A-Z ]*PRIVATE KEY-----|(?=\"|$))"),
    ),
    ("earer ", re.compile(r"\b(?P<kept>[Bb]earer )[\w.~+/=:-]+")),
    ("eyJ", re.compile(r"\beyJ[\w-]{5,}\.[\w-]+\.[\w-]*")),
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


MAX_LABELS: Final = 256
"""Field names whose JSON form is kept."""
_labels: Final[dict[str, str]] = {}
_json_text: Final = json.encoder.encode_basestring_ascii


class Bare(str):
    """Text that the plain format writes without quotes, such as an address. Must not hold a space."""

    __slots__ = ()


class Logger(structlog.BoundLoggerBase):
    """A structlog logger whose level can change while it is in use; a line below it costs one comparison."""

    def _emit(self, method: str, event: str, fields: dict[str, Any]) -> None:
        if self._processors is not _PROCESSORS:  # the program has its own
            self._proxy_to_logger(method, event, **fields)
            return
        if self._context:
            fields = {**self._context, **fields}
        fields["event"] = event
        getattr(self._logger, method)(_render(self._logger, method, fields))

    def trace(self, event: str, **fields: Any) -> None:
        """Log for whoever follows single frames."""
        if _state.level <= 5:
            self._emit("trace", event, fields)

    def debug(self, event: str, **fields: Any) -> None:
        """Log for whoever looks for a fault."""
        if _state.level <= 10:
            self._emit("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log what an operator wants to know in normal operation."""
        if _state.level <= 20:
            self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log that a peer misbehaved, or that something works less well than it should."""
        if _state.level <= 30:
            self._emit("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log that we failed."""
        if _state.level <= 40:
            self._emit("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log that we failed, with the exception being handled."""
        fields.setdefault("exc_info", True)
        self.error(event, **fields)

    def template(self, method: str, event: str, fields: Mapping[str, Any]) -> str:
        """A line whose time and slots are left to the % operator; "" where lines cannot be made from one."""
        render = _state.render_fields
        if render is None or self._context or self._processors is not _PROCESSORS:
            return ""
        in_json = render is _json_fields
        parts = []
        for name, value in fields.items():
            if isinstance(value, Slot):
                written = f",{_json_text(name)}:{value.json}" if in_json else f"{_escape(name)}={value.plain}"
            else:
                field = {name: value}
                _redact(field)
                written = _redact_line(render(field)).replace("%", "%%")
            parts.append(written)
        level = "warn" if method == "warning" else method
        name = self._logger.name
        if in_json:
            scope, message = _json_text(name).replace("%", "%%"), _json_text(event).replace("%", "%%")
            return f'{{"level":"{level}","time":"%s","scope":{scope},"message":{message}' + "".join(parts) + "}"
        head = f"{level}\t{_short(name)}\t{_escape(event)}\t".replace("%", "%%")
        return "%s\t" + head + " ".join(parts)

    def log(self, level: str, event: str, **fields: Any) -> None:
        """Log at the level of that name."""
        if _state.level <= LEVELS[level]:
            self._emit(level, event, fields)


class Slot:
    """Stands in `Lines` for a value that each line brings itself, and which holds nothing to escape or to hide.

    Args:
        make: The value as other lines would have it.
        json: Its format in JSON.
        plain: Its format in plain text.
    """

    __slots__ = ("json", "make", "plain")

    def __init__(self, make: Callable[[Any], Any], json: str, plain: str) -> None:
        self.make = make
        self.json = json
        self.plain = plain


ADDRESS: Final = Slot(Bare, '"%s"', "%s")
"""Text of an address with its port."""
COUNT: Final = Slot(int, "%d", "%d")
"""A number."""
MILLISECONDS: Final = Slot("{}ms".format, '"%dms"', '"%dms"')
"""A whole number of them."""


class Lines:
    """Lines that differ in few values; all else is written out once, for the format in force. For every connection.

    Args:
        logger: Whose lines they are.
        method: `info`, `warning` or another of its methods.
        event: The message.
        fields: In order, with a `Slot` where each line has a value of its own.
    """

    __slots__ = ("_epoch", "_event", "_fields", "_level", "_logger", "_method", "_text")

    def __init__(self, logger: Logger, method: str, event: str, fields: dict[str, Any]) -> None:
        self._logger = logger
        self._method = method
        self._level = LEVELS[method]
        self._event = event
        self._fields = fields
        self._epoch = -1
        self._text = ""

    def write(self, *values: Any) -> None:
        """Write the line with these values, one for each slot in order."""
        if _state.level > self._level:
            return
        if self._epoch != _state.epoch:
            self._epoch = _state.epoch
            self._text = self._logger.template(self._method, self._event, self._fields)
        writer = _state.writer
        if writer is not None and self._text:
            writer.write(self._text % (_timestamp(), *values))
        else:
            left = iter(values)
            fields = {
                name: value.make(next(left)) if isinstance(value, Slot) else value
                for name, value in self._fields.items()
            }
            self._logger._emit(self._method, self._event, fields)


class _Named:
    """The end of a logger: its name, and where rendered lines go."""

    __slots__ = ("name",)

    def __init__(self, name: str = "") -> None:
        self.name = name

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


class _Writer:
    """A bounded queue of lines and the thread that empties it to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque()
        self._dropped = 0
        self._busy = False
        self._ended = False
        self.forked()

    def forked(self) -> None:
        """There is no thread: at first, and in a forked child."""
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._running = False
        self._idle = True  # the thread waits, or is about to look whether it must

    def write(self, line: str) -> None:
        if len(self._lines) >= MAX_QUEUED_LINES:
            self._dropped += 1
            return
        self._lines.append(line)
        if self._idle:
            self._idle = False
            self._wake.set()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def _run(self) -> None:
        while not self._ended:
            self._wake.clear()
            self._idle = True
            if not self._lines:
                self._wake.wait()
            self._idle = False
            self._hurry.wait(_GATHER_SECONDS)
            self._busy = True
            while self._lines:
                self._write_batch()
            self._busy = False

    def _write_batch(self) -> None:
        batch = [self._lines.popleft() for _ in range(min(len(self._lines), MAX_BATCH_LINES))]
        dropped, self._dropped = self._dropped, 0
        if dropped:
            batch.append(_state.render_dropped(dropped))
        try:
            with _alone():
                self._stream.write("\n".join(batch) + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            self._lines.clear()  # the reader is gone: there is nobody to tell

    def flush(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        self._hurry.set()
        try:
            while self._lines or self._busy:
                if not self._running or time.monotonic() >= deadline:
                    return False
                time.sleep(0.001)  # only at exit and in tests
        finally:
            self._hurry.clear()
        return True

    def close(self, timeout: float) -> None:
        self.flush(timeout)
        self._ended = True
        self._wake.set()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other process writes meanwhile, of those that share the output."""
    lock = _state.output_lock
    if lock is None:
        yield
        return
    fcntl.lockf(lock, fcntl.LOCK_EX)  # of a process that dies it is let go by the kernel
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # closed at shutdown
            fcntl.lockf(lock, fcntl.LOCK_UN)


class _State:
    """What `configure` chose; one per process. Until then lines go to the standard library's loggers."""

    def __init__(self) -> None:
        self.level = LEVELS["info"]
        self.writer: _Writer | None = None
        self.render: _Renderer = _render_message
        self.render_fields: Callable[[Mapping[str, Any]], str] | None = None
        """Fields of a line whose parts can be joined; None where they cannot."""
        self.format: Format = "plain"
        self.output_lock: int | None = None
        """Descriptor of a file to lock while lines are written."""
        self.epoch = 0
        """How often `configure` and `shutdown` were called."""

    def write(self, name: str, level: int, line: str) -> None:
        if self.writer is not None:
            self.writer.write(line)
        else:
            logging.getLogger(name).log(level, "%s", line)

    def render_dropped(self, count: int) -> str:
        fields = {"event": "log lines dropped: standard output is not being read", "count": count, "time": _timestamp()}
        return self.render(_Named("logs"), "warning", fields)


def configure(format: Format = "plain", level: str = "info", *, stream: TextIO | None = None) -> None:  # noqa: A002
    """Send the logs of this process, structlog's and the standard library's warnings, to standard output.

    Args:
        format: `plain` (time, level, target, message, fields; between tabs), `json` (an object a line),
            or `console` (for people; coloured on a terminal).
        level: `trace`, `debug`, `info`, `warn`, `error` or `off`.
        stream: where to instead of standard output.

    Raises:
        ConfigurationError: an unknown format or level.
    """
    output = stream or sys.stdout
    renderers: dict[str, Callable[[], _Renderer]] = {
        "plain": lambda: _render_plain,
        "json": lambda: _render_json,
        "console": lambda: _console(output),
    }
    if format not in renderers:
        raise ConfigurationError(f"log format is {format!r}; it must be plain, json or console")
    set_level(level)
    shutdown()
    _state.format = format
    _state.render = renderers[format]()
    _state.render_fields = {"plain": _plain_fields, "json": _json_fields}.get(format)
    _state.writer = _Writer(output)
    structlog.configure(
        processors=_PROCESSORS, wrapper_class=Logger, logger_factory=_Named, cache_logger_on_first_use=True
    )
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _FromStandardLibrary)]:
        root.removeHandler(handler)
    root.addHandler(_FromStandardLibrary(logging.WARNING))


def get_logger(target: str, **fields: Any) -> Logger:
    """A logger whose lines carry `target`, and `fields` each.

    It may be made and used before `configure`; then its lines go to the standard library's logger of that name,
    so a program that embeds us sees them where it sees others.
    """
    return Logger(_Named(target), _PROCESSORS, dict(fields))


def set_level(level: str) -> None:
    """Log what is at `level` or above from now on.

    Raises:
        ConfigurationError: no level has this name.
    """
    name = level.strip().lower()
    if name not in LEVELS:
        raise ConfigurationError(f"log level is {level!r}; it must be one of {', '.join(LEVELS)}")
    _state.level = LEVELS[name]


def current_format() -> Format:
    """The format that `configure` chose last."""
    return _state.format


def share_output(lock: int | None) -> None:
    """Write lines whole although other processes write to the same output.

    Args:
        lock: descriptor of a file that all of them lock while they write, open for writing; None ends it.
    """
    _state.output_lock = lock


def current_level() -> str:
    """The name of the level in force."""
    return next(name for name, value in LEVELS.items() if value == _state.level)


def debugging() -> bool:
    """Whether lines at debug level are written; costs less than `current_level`."""
    return _state.level <= 10


def flush(timeout: float = 1.0) -> bool:
    """Wait until all lines are written, at most `timeout` seconds; False when some are not."""
    return _state.writer is None or _state.writer.flush(timeout)


def shutdown(timeout: float = 1.0) -> None:
    """Write what waits, for `timeout` seconds at most, and end the writer. Called at exit."""
    writer, _state.writer = _state.writer, None
    _state.render = _render_message
    _state.render_fields = None
    _state.epoch += 1
    if writer is not None:
        writer.close(timeout)


def _timestamp() -> str:
    global _second, _second_text
    second, fraction = divmod(time.time_ns() // 1000, 1_000_000)
    if second != _second:
        _second, _second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
    return f"{_second_text}.{fraction:06d}Z"


def _render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    if "exc_info" in fields:
        fields = structlog.processors.format_exc_info(logger, method, fields)
    _redact(fields)
    fields["time"] = _timestamp()
    return _redact_line(_state.render(logger, method, fields))


def _redact(fields: MutableMapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in _SECRET_NAMES:
            fields[name] = _REDACTED
        elif type(value) is str and len(value) > MAX_VALUE:
            fields[name] = value[:MAX_VALUE] + "..."


def _redact_line(line: str) -> str:
    for mark, pattern in _SECRETS:  # cheap look first: nearly no line has one
        if mark in line:
            line = pattern.sub(_replacement, line)
    return line


def _replacement(match: re.Match[str]) -> str:
    return match.groupdict().get("kept", "") + _REDACTED


def _render_plain(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    stamp = fields.pop("time")
    level = "warn" if method == "warning" else method
    return f"{stamp}\t{level}\t{_short(logger.name)}\t{_message_and_fields(fields)}"


def _render_message(_: Any, __: str, fields: MutableMapping[str, Any]) -> str:
    del fields["time"]
    return _message_and_fields(fields)


def _message_and_fields(fields: MutableMapping[str, Any]) -> str:
    message = _escape(str(fields.pop("event")))
    if not fields:
        return message
    return message + "\t" + _plain_fields(fields)


def _plain_fields(fields: Mapping[str, Any]) -> str:
    return " ".join([f"{_escape(name)}={_plain_value(value)}" for name, value in fields.items()])


def _plain_value(value: Any) -> str:
    kind = type(value)
    if kind is str:
        return _quote(value)
    if kind is int or kind is float:
        return repr(value)
    if kind is bool:
        return "true" if value else "false"
    if kind is bytes or kind is bytearray:
        return f"<{len(value)} bytes>"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return json.dumps(value, ensure_ascii=False, default=_json_value)
    return _escape(str(value))


def _quote(value: str) -> str:
    if '"' in value or "\\" in value:
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_escape(value)}"'


def _escape(value: str) -> str:
    if value.isprintable():
        return value
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], value)


def _short(target: str) -> str:
    for package in ("ztunnel.", "miniistiod.", "hbone."):
        if target.startswith(package):
            return target[len(package) :]
    return target


def _render_json(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    stamp = fields.pop("time")
    message = fields.pop("event")
    level = "warn" if method == "warning" else method
    line = f'{{"level":"{level}","time":"{stamp}","scope":{_json_text(logger.name)}'
    line += f',"message":{_json_text(str(message))}'
    return line + _json_fields(fields) + "}"


def _json_fields(fields: Mapping[str, Any]) -> str:
    """A flat object of texts and numbers, once a connection: half the cost of a general encoder."""
    text = ""
    for name, value in fields.items():
        label = _labels.get(name)
        if label is None:
            label = f",{_json_text(name)}:"
            if len(_labels) < MAX_LABELS:
                _labels[name] = label
        kind = type(value)
        if kind is str or kind is Bare:
            text += label + _json_text(value)
        elif kind is int:
            text += f"{label}{value}"
        else:
            text += label + json.dumps(value, default=_json_value)
    return text


def _json_value(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)


def _console(stream: TextIO) -> _Renderer:
    is_terminal = stream.isatty() if hasattr(stream, "isatty") else False
    renderer = structlog.dev.ConsoleRenderer(colors=is_terminal, timestamp_key="time", pad_event_to=0)

    def render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
        fields["level"] = method
        fields["time"] = fields["time"][11:23]
        if logger.name:
            fields["logger"] = _short(logger.name)
        for name, value in fields.items():
            if isinstance(value, str) and name != "exception":
                fields[name] = _escape(value)
            elif isinstance(value, bytes | bytearray):
                fields[name] = f"<{len(value)} bytes>"
        return renderer(logger, method, fields)

    return render


class _FromStandardLibrary(logging.Handler):
    """Lets warnings of libraries that log the standard way appear in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = get_logger(record.name)
        fields: dict[str, Any] = {}
        if record.exc_info and record.exc_info[0] is not None:
            fields["exc_info"] = record.exc_info
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            message = str(record.msg)
        if record.levelno >= logging.ERROR:
            logger.error(message, **fields)
        else:
            logger.warning(message, **fields)


_PROCESSORS: Final[list[Any]] = [_render]
_state = _State()
_second = 0
_second_text = ""
atexit.register(shutdown)
os.register_at_fork(after_in_child=lambda: _state.writer.forked() if _state.writer is not None else None)
