"""Where time went, from what `perf`, `strace` and `py-spy` print. Pure."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Breakdown", "python_functions", "samples", "system_calls"]

_FRAME = re.compile(r"^\s+[0-9a-f]+\s+(?P<symbol>.*?)\s+\((?P<module>[^()]*)\)$")
_CALL = re.compile(r"^_*(?:x64|arm64|se|do|ia32)_sys_(?P<name>\w+)$")
_TRACED = re.compile(r"^\s+(?P<name>[a-z_0-9]+)\s+(?P<calls>\d+)\s+\d+\s+[\d.]+\s")
_COUNTED = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(?P<calls>\d+)\s+(?:\d+\s+)?(?P<name>[a-z_0-9]+)$")


@attrs.define
class Breakdown:
    """Samples of one workload through one peer."""

    user: Counter[str] = attrs.field(factory=Counter)
    """By function, where it ran; its module in brackets."""
    system: Counter[str] = attrs.field(factory=Counter)
    """By system call."""
    python: Counter[str] = attrs.field(factory=Counter)
    """By Python function; only for programs in Python."""
    calls: Counter[str] = attrs.field(factory=Counter)
    """How often each system call was made."""
    units: float = 1.0
    """Bytes, round trips or connections in the pass that counted calls."""

    @property
    def modules(self) -> Counter[str]:
        """User time by module."""
        found: Counter[str] = Counter()
        for name, count in self.user.items():
            found[name.rpartition(" [")[2].rstrip("]")] += count
        return found


def samples(text: str) -> Breakdown:
    """Read `perf script -F ip,sym,dso` of a recording with kernel call chains."""
    found = Breakdown()
    for stack in _stacks(text.splitlines()):
        symbol, module = stack[0]
        if _in_kernel(module):
            found.system[_kernel_work([frame for frame, _ in stack])] += 1
        else:
            name = symbol if symbol != "[unknown]" else "?"
            found.user[f"{name} [{module.rpartition('/')[2]}]"] += 1
    return found


def _stacks(lines: Iterable[str]) -> Iterator[list[tuple[str, str]]]:
    stack: list[tuple[str, str]] = []
    for line in lines:
        match = _FRAME.match(line)
        if match:
            stack.append((match["symbol"].partition("+0x")[0], match["module"]))
        elif stack:
            yield stack
            stack = []
    if stack:
        yield stack


def _in_kernel(module: str) -> bool:
    return (module.startswith("[") and module not in ("[vdso]", "[unknown]")) or module.endswith(".ko")


def _kernel_work(symbols: list[str]) -> str:
    """What the kernel was at, by the functions from the innermost to the outermost."""
    for symbol in symbols:
        match = _CALL.match(symbol)
        if match:
            return match["name"]
    whole = " ".join(symbols)
    if "page_fault" in whole:
        return "page faults"
    if "sysvec" in whole or "irq" in whole:
        return "interrupts"
    return "entry and exit" if "syscall" in whole.lower() else "other"


def system_calls(text: str) -> Counter[str]:
    """How often each was made, by the summary of `perf trace -s` or of `strace -c`."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        match = _TRACED.match(line) or _COUNTED.match(line)
        if match and match["name"] != "total":
            found[match["name"]] += int(match["calls"])
    return found


def python_functions(text: str) -> Counter[str]:
    """Samples by the function that ran, from the collapsed stacks of `py-spy record --format raw`."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdigit():
            function, _, place = stack.rpartition(";")[2].partition(" (")
            file = place.rpartition(":")[0] or place.rstrip(")")
            found[f"{function} ({'/'.join(file.split('/')[-2:])})"] += int(count)
    return found


def shares(counts: Mapping[str, int], whole: float, most: int = 8, least: float = 0.01) -> str:
    """The largest of them as per cent of the whole, in one line."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [f"{name} {count / whole:.0%}" for name, count in ordered[:most] if count / whole >= least]
    return ", ".join(shown) or "-"


def report(title: str, found: Breakdown, unit: str, per: float) -> str:
    """What people read of one workload through one peer.

    Args:
        title: which workload and peer.
        found: the samples.
        unit: what system calls are counted per.
        per: how many units of the workload make one of it.
    """
    user, system = sum(found.user.values()), sum(found.system.values())
    whole = max(1, user + system)
    lines = [f"{title}: user {user / whole:.0%}, system {system / whole:.0%} of {whole} samples"]
    lines.append(f"  user by module    {shares(found.modules, whole)}")
    lines.append(f"  user by function  {shares(found.user, whole, 10)}")
    if found.python:
        lines.append(f"  Python functions  {shares(found.python, sum(found.python.values()), 12)}")
    lines.append(f"  system by call    {shares(found.system, whole)}")
    count = sum(found.calls.values()) / found.units * per
    each = sorted(found.calls.items(), key=lambda item: (-item[1], item[0]))
    calls = ", ".join(f"{name} {n / found.units * per:,.1f}" for name, n in each[:10])
    lines.append(f"  calls per {unit}  {count:,.1f}: {calls}")
    return "\n".join(lines)
