"""`ztunnel status` in lines for people."""

from __future__ import annotations

import datetime
from typing import Any

from ztunnel import reach

__all__ = ["status_lines"]


def status_lines(found: dict[str, Any], now: float) -> list[str]:
    """What the command prints.

    Args:
        found: The daemon's short view, with `reach`.
        now: Seconds since 1970.
    """
    rows: list[tuple[str, str]] = [
        ("workload", f"{found['workload']} ({found['state']}, pid {found['pid']}, ztunnel {found['version']})")
    ]
    for identity in found["identities"]:
        text = f"{identity['identity']}, {identity['state']}"
        if identity["expires"]:
            text += f", expires {_when(identity['expires'], now)}, renewed in {_span(identity['renewsInSeconds'])}"
        error = identity["error"]
        rows.append(("identity", text + (f"; last error: {error}" if error and error not in text else "")))
    ends = [(found[key], what) for key, what in (("rootsExpire", "roots"), ("tokenExpires", "token")) if found[key]]
    if ends:
        rows.append(("", ", ".join(f"{what} until {_when(when, now)}" for when, what in ends)))
    if not found["identities"]:
        rows.append(("identity", "none yet: the control plane has not described this workload"))
    plane = found["controlPlane"]
    if plane is None:
        rows.append(("control plane", "none; the mesh is from the local file"))
    else:
        since = plane["connectedSince"] if plane["connected"] else plane["staleSince"]
        text = "connected" if plane["connected"] else "away"
        text = f"{plane['address']} {text}" + (f" since {_when(since, now)}" if since else "")
        if plane["staleSince"] and plane["connected"]:
            text += f"; the mesh is as of {_when(plane['staleSince'], now)}"
        if plane["rejected"]:
            text += f"; {_many(plane['rejected'], 'resource')} rejected"
        rows.append(("control plane", text + (f"; {plane['error']}" if plane["error"] else "")))
    mesh = found["mesh"]
    text = f"{_many(mesh['workloads'], 'workload')}, {_many(mesh['services'], 'service')}"
    text += f", {mesh['policies']} {'policy' if mesh['policies'] == 1 else 'policies'}"
    if mesh["rulingPolicies"] is not None:
        text += f", {mesh['rulingPolicies'] or 'none'} of them for this workload"
    rows.append(("mesh", text))
    if not mesh["knowsWorkload"]:
        rows.append(("", "this workload is not in it: its connections are refused"))
    rows.append(("revocation", _revocation_text(found["revocation"], now)))
    tunnels = found["tunnels"]
    streams = sum(tunnel["streams"] for tunnel in tunnels)
    outbound = sum(tunnel["direction"] == "outbound" for tunnel in tunnels)
    rows.append(
        ("tunnels", f"{outbound} outbound, {len(tunnels) - outbound} inbound, {_many(streams, 'stream')} on them")
    )
    connections = found["connections"]
    rows.append(("connections", f"{connections['outbound']} outbound, {connections['inbound']} inbound"))
    workers = found.get("workers")
    if workers:
        rows.append(("workers", _workers_text(workers)))
    rows.append(("listening", ", ".join(f"{name} {where}" for name, where in sorted(found["listeners"].items()))))
    rows.append(("captured", reach.capture_text(found["reach"])))
    rows.append(("past the mesh", reach.exposed_text(found["reach"])))
    return [f"{name:14} {text}" for name, text in rows]


def _revocation_text(revocation: dict[str, Any], now: float) -> str:
    text = "no lists"
    if revocation["lists"]:
        text = f"{_many(revocation['certificates'], 'certificate')} taken back, by {_many(revocation['lists'], 'list')}"
        text += f", as of {_when(revocation['asOf'], now)}"
        if revocation["overdue"]:
            text += f", due for replacement since {_when(revocation['nextUpdate'], now)} and still in force"
        elif revocation["nextUpdate"]:
            text += f", next due {_when(revocation['nextUpdate'], now)}"
    return text + (f"; {revocation['file']} is not read: {revocation['error']}" if revocation["error"] else "")


def _workers_text(workers: list[dict[str, Any]]) -> str:
    serving = sum(worker["state"] == "serving" for worker in workers)
    pids = ", ".join(str(worker["pid"] or "-") for worker in workers)
    restarts = sum(worker["restarts"] for worker in workers)
    text = f"{serving} of {len(workers)} serving (pid {pids})"
    return text + (f"; {restarts} replaced since the start" if restarts else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _when(timestamp: str, now: float) -> str:
    """A moment, and how far it is."""
    seconds = datetime.datetime.fromisoformat(timestamp).timestamp() - now
    return f"{timestamp} (in {_span(seconds)})" if seconds >= 0 else f"{timestamp} ({_span(-seconds)} ago)"


def _span(seconds: float) -> str:
    """A length of time in its two largest units."""
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for name, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size or parts:
            parts.append((left // size, name))
            left %= size
    return " ".join(f"{count} {name}" for count, name in parts[:2] if count) or "0 s"
