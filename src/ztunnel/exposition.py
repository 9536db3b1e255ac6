"""Metrics as a page shows them: families of samples, line by line.

Source: OpenMetrics 1.0; labels stand in the order that they are given in, which prometheus_client would sort.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    Sample = tuple[str, Mapping[str, str], float]

__all__ = ["Family", "by_label", "content_type", "lines", "process", "single"]


@attrs.frozen
class Family:
    """A metric by name."""

    name: str
    documentation: str
    type: str
    samples: Iterable[Sample]
    """Name, labels and value of each; may be made when they are read."""


def single(name: str, documentation: str, value: int) -> Family:
    """A counter without labels."""
    return Family(name, documentation, "counter", [(f"{name}_total", {}, value)])


def by_label(name: str, documentation: str, label: str, values: Mapping[str, int]) -> Family:
    """A counter with one label."""
    return Family(
        name, documentation, "counter", [(f"{name}_total", {label: key}, value) for key, value in values.items()]
    )


def process() -> Iterator[Family]:
    """What the kernel counts of this process."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = "Maximum number of open file descriptors"
    yield Family("process_max_fds", text, "gauge", [("process_max_fds", {}, limit)])
    try:
        count = len(os.listdir("/proc/self/fd")) - 1  # less the listing's own
    except OSError:
        return  # no /proc: the family is left out
    yield Family("process_open_fds", "Number of open file descriptors", "gauge", [("process_open_fds", {}, count)])


def lines(families: Iterable[Family]) -> Iterator[str]:
    """The text, a sample at a time. A family without a sample is left out."""
    for family in families:
        head = f"# HELP {family.name} {_escape_help(family.documentation)}.\n# TYPE {family.name} {family.type}\n"
        for name, labels, value in family.samples:
            text = ",".join([f'{label}="{_escape(content)}"' for label, content in labels.items()])
            yield f"{head}{name}{{{text}}} {value}\n" if text else f"{head}{name} {value}\n"
            head = ""
    yield "# EOF\n"


def content_type(accept: str | Iterable[str]) -> str:
    """What a page is sent as, by the value or values of the request's Accept header."""
    values = [accept] if isinstance(accept, str) else list(accept)
    items = [item.partition(";")[0].strip().lower() for value in values for item in value.split(",")]
    if "application/openmetrics-text" in items:
        return "application/openmetrics-text;charset=utf-8;version=1.0.0"
    return "text/plain; charset=utf-8"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _escape_help(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n")
