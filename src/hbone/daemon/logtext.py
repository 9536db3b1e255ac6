"""What a log line looks like: tab-separated text, JSON, or colours for a terminal; and what never appears in it."""

from __future__ import annotations

import json
import re
import sys
import traceback
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, MutableMapping

    Renderer = Callable[[Any, str, MutableMapping[str, Any]], str]

__all__ = [
    "MAX_VALUE",
    "Bare",
    "console",
    "escape",
    "exception_text",
    "json_fields",
    "json_text",
    "plain_fields",
    "redact",
    "redact_line",
    "render_json",
    "render_message",
    "render_plain",
    "short",
]

MAX_VALUE: Final = 16 * 1024

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
json_text: Final = json.encoder.encode_basestring_ascii


class Bare(str):
    """Text that the plain format writes without quotes, such as an address. Must not hold a space."""

    __slots__ = ()


def redact(fields: MutableMapping[str, Any]) -> None:
    """Take secrets out of fields by their names, and bound their length."""
    for name, value in fields.items():
        if name in _SECRET_NAMES:
            fields[name] = _REDACTED
        elif type(value) is str and len(value) > MAX_VALUE:
            fields[name] = value[:MAX_VALUE] + "..."


def redact_line(line: str) -> str:
    """Take secrets out of a line by what they look like."""
    for mark, pattern in _SECRETS:  # cheap look first: nearly no line has one
        if mark in line:
            line = pattern.sub(_replacement, line)
    return line


def _replacement(match: re.Match[str]) -> str:
    return match.groupdict().get("kept", "") + _REDACTED


def render_plain(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    """Time, level, target, message and fields, between tabs."""
    stamp = fields.pop("time")
    level = "warn" if method == "warning" else method
    return f"{stamp}\t{level}\t{short(logger.name)}\t{_message_and_fields(fields)}"


def render_message(_: Any, __: str, fields: MutableMapping[str, Any]) -> str:
    """Message and fields alone, for a logger that adds the rest."""
    del fields["time"]
    return _message_and_fields(fields)


def _message_and_fields(fields: MutableMapping[str, Any]) -> str:
    message = escape(str(fields.pop("event")))
    if not fields:
        return message
    return message + "\t" + plain_fields(fields)


def plain_fields(fields: Mapping[str, Any]) -> str:
    """Fields as `name=value`, between spaces."""
    return " ".join([f"{escape(name)}={_plain_value(value)}" for name, value in fields.items()])


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
    return escape(str(value))


def _quote(value: str) -> str:
    if '"' in value or "\\" in value:
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escape(value)}"'


def escape(value: str) -> str:
    """Text in which nothing can begin another line or steer a terminal."""
    if value.isprintable():
        return value
    return _CONTROL.sub(lambda match: repr(match.group())[1:-1], value)


def short(target: str) -> str:
    """The target without the name of our package."""
    for package in ("ztunnel.", "miniistiod.", "hbone."):
        if target.startswith(package):
            return target[len(package) :]
    return target


def render_json(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    """An object a line."""
    stamp = fields.pop("time")
    message = fields.pop("event")
    level = "warn" if method == "warning" else method
    line = f'{{"level":"{level}","time":"{stamp}","scope":{json_text(logger.name)}'
    line += f',"message":{json_text(str(message))}'
    return line + json_fields(fields) + "}"


def json_fields(fields: Mapping[str, Any]) -> str:
    """A flat object of texts and numbers, once a connection: half the cost of a general encoder."""
    text = ""
    for name, value in fields.items():
        label = _labels.get(name)
        if label is None:
            label = f",{json_text(name)}:"
            if len(_labels) < MAX_LABELS:
                _labels[name] = label
        kind = type(value)
        if kind is str or kind is Bare:
            text += label + json_text(value)
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


def exception_text(given: Any) -> str:
    """The traceback of an exception, of what `sys.exc_info` returned, or with True of what is being handled."""
    error = given[1] if isinstance(given, tuple) else given if isinstance(given, BaseException) else sys.exception()
    return "".join(traceback.format_exception(error)).rstrip("\n") if error is not None else ""


def console(stream: TextIO) -> Renderer:
    """A renderer for people, coloured if `stream` is a terminal."""
    is_terminal = stream.isatty() if hasattr(stream, "isatty") else False
    import structlog.dev  # three megabytes, and asyncio with them

    renderer = structlog.dev.ConsoleRenderer(colors=is_terminal, timestamp_key="time", pad_event_to=0)

    def render(logger: Any, method: str, fields: MutableMapping[str, Any]) -> str:
        fields["level"] = method
        fields["time"] = fields["time"][11:23]
        if logger.name:
            fields["logger"] = short(logger.name)
        for name, value in fields.items():
            if isinstance(value, str) and name != "exception":
                fields[name] = escape(value)
            elif isinstance(value, bytes | bytearray):
                fields[name] = f"<{len(value)} bytes>"
        return renderer(logger, method, fields)

    return render
