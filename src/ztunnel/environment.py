"""Environment variables as settings: text -> value, and one sentence for what cannot be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import attrs

from hbone.config import parse_duration
from hbone.errors import ConfigurationError
from ztunnel.mesh.address import parse_ip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ztunnel.mesh.address import Address, IpAddress

__all__ = [
    "MAX_WORKERS",
    "Variable",
    "exactly_true",
    "invalid",
    "one_of",
    "parse_address",
    "parse_bool",
    "parse_cores",
    "parse_grace",
    "parse_int",
    "parse_optional_path",
    "parse_path",
    "parse_port",
    "parse_seconds",
    "parse_servers",
    "parse_share",
    "parse_text",
    "parse_url",
    "parse_variable",
    "prefixed",
    "read_headers",
    "read_json_metadata",
    "setting",
]

_MAX_SHOWN = 100
MAX_WORKERS = 256
"""Processes that carry traffic."""


@attrs.frozen
class Variable:
    """An environment variable, for the documentation."""

    name: str
    default: str
    meaning: str


def parse_text(value: str) -> str:
    """The text itself."""
    return value


def parse_bool(value: str) -> bool:
    """Exactly `true` or `false`."""
    if value not in {"true", "false"}:
        raise ValueError("expected exactly true or false")
    return value == "true"


def exactly_true(value: str) -> bool:
    """Whether the text is `true`; anything else is off, as in ztunnel."""
    return value == "true"


def parse_int(value: str) -> int:
    """A decimal number."""
    if not re.fullmatch(r"\d{1,18}", value, re.ASCII):
        raise ValueError("expected a decimal number")
    return int(value)


def parse_share(value: str) -> str:
    """A number of workers, or a share of the cores in percent."""
    if value.endswith("%"):
        if not 0 < parse_int(value[:-1]) <= 100:
            raise ValueError("a share is more than 0% and at most 100%")
    elif parse_int(value) > MAX_WORKERS:
        raise ValueError(f"at most {MAX_WORKERS} workers are started")
    return value


def parse_cores(value: str) -> int:
    """Whole cores of a Kubernetes quantity, rounded up."""
    match = re.fullmatch(r"(\d{1,9})(?:\.(\d{1,9}))?(m?)", value, re.ASCII)
    if match is None:
        raise ValueError("expected a quantity such as 2, 1.5 or 500m")
    billionths = int(match[1] + (match[2] or "").ljust(9, "0"))
    if not billionths:
        raise ValueError("it must be more than 0")
    return -(-billionths // (10**12 if match[3] else 10**9))


def parse_port(value: str) -> int:
    """A port from 0 to 65535."""
    port = parse_int(value)
    if port > 65_535:
        raise ValueError("a port is at most 65535")
    return port


def parse_seconds(value: str) -> float:
    """Seconds of a duration such as `10s`."""
    return parse_duration(value)


def parse_grace(value: str) -> float:
    """A drain deadline in seconds out of a pod's whole grace period."""
    seconds = parse_int(value)
    return float(max(seconds - 5 if seconds > 10 else seconds - 1, 1))


def parse_address(value: str) -> IpAddress:
    """An IP address."""
    try:
        return parse_ip(value)
    except ValueError:
        raise ValueError("expected an IP address") from None


def parse_servers(value: str) -> tuple[Address, ...]:
    """DNS servers with a comma between them, each `ip`, `ip:port` or `[ip]:port`."""
    servers = []
    for text in value.split(","):
        text = text.strip()
        host, colon, port = text.rpartition(":")
        if not colon or (":" in host and not text.startswith("[")) or text.endswith("]"):
            host, port = text, "53"
        number = parse_port(port)
        if not number:
            raise ValueError("a server's port is at least 1")
        servers.append((parse_address(host[1:-1] if host.startswith("[") else host), number))
    return tuple(servers)


def parse_optional_path(value: str) -> Path | None:
    """A path; empty for none."""
    return Path(value) if value else None


def parse_path(value: str) -> Path:
    """A path that is not empty."""
    if not value:
        raise ValueError("expected a path")
    return Path(value)


def parse_url(value: str) -> str:
    """The URL of a control-plane server, `https://` added; empty stays empty."""
    if not value:
        return ""
    text = value if "://" in value else f"https://{value}"
    parts = urlsplit(text)
    if parts.scheme != "https":
        raise ValueError("only https is possible, because what the control plane says decides who is trusted")
    if not parts.hostname:
        raise ValueError("expected host:port")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username is not None:
        raise ValueError("expected https://host:port and nothing else")
    _ = parts.port  # raises ValueError for a wrong one
    return text


def one_of(*names: str) -> Callable[[str], str]:
    """A parser that takes these texts only."""

    def parse(value: str) -> str:
        if value not in names:
            raise ValueError(f"expected {' or '.join(names)}")
        return value

    return parse


def setting(
    default: Any,
    *,
    env: str,
    parse: Callable[[str], Any] = parse_text,
    meaning: str,
    shown: str | None = None,
    validator: Any = None,
    secret: bool = False,
) -> Any:
    """A field of `Config` with the variable that sets it.

    Args:
        default: Its value when the variable is not set.
        env: Name of the variable.
        parse: Text -> value; raises ValueError.
        meaning: What it does, with its unit.
        shown: The default as the documentation shows it.
        validator: Limits of the value.
        secret: The value is kept out of dumps and errors.
    """
    if shown is None:
        shown = "unset" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    return attrs.field(
        default=default,
        validator=validator,
        repr=not secret,
        metadata={"env": env, "parse": parse, "meaning": meaning, "shown": shown or '""', "secret": secret},
    )


def invalid(name: str, value: str, why: object) -> ConfigurationError:
    """The one sentence about a variable that cannot be used."""
    shown = value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "…"
    return ConfigurationError(f"invalid env var {name}={shown} ({why})")


def parse_variable(
    environ: Mapping[str, str],
    name: str,
    parse: Callable[[str], Any],
    field: attrs.Attribute[Any] | None = None,
    *,
    secret: bool = False,
) -> Any:
    """Parse one variable that is set, and check the limits of its field.

    Raises:
        ConfigurationError: what is wrong with it; the value of a secret is not shown.
    """
    text = environ[name]
    try:
        value = parse(text)
        if field is not None and field.validator is not None:
            field.validator(None, field, value)
    except (ValueError, OverflowError) as error:  # ConfigurationError is a ValueError
        raise invalid(name, "…" if secret else text, error) from None
    return value


def prefixed(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The variables whose names begin with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in environ.items() if name.startswith(prefix)}


_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")


def read_headers(environ: Mapping[str, str], prefix: str) -> tuple[tuple[str, str], ...]:
    """Header fields from `<prefix><name>` variables, names in lower case.

    Raises:
        ConfigurationError: no header name or value; values are not shown, as they may be tokens.
    """
    headers = []
    for name, value in sorted(prefixed(environ, prefix).items()):
        lower = name.lower()
        if not _HEADER_NAME.fullmatch(lower):
            raise invalid(prefix + name, "…", "the name is no header name")
        if not all(0x20 <= ord(letter) < 0x7F for letter in value):
            raise invalid(prefix + name, "…", "the value is not printable ASCII")
        headers.append((lower, value))
    return tuple(headers)


def read_json_metadata(environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Parsed `ISTIO_METAJSON_<key>` variables, and one sentence for each that is no JSON."""
    parsed: dict[str, Any] = {}
    complaints: list[str] = []
    for name, value in prefixed(environ, "ISTIO_METAJSON_").items():
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            complaints.append(f"ISTIO_METAJSON_{name} is not JSON and was skipped")
    return parsed, complaints
