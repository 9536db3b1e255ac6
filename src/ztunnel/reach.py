"""Which ports of this host can be reached past the mesh, as far as can be seen from outside the daemon."""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["capture_text", "exposed_text", "listening", "look", "redirects"]

LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp. Source: Linux, tcp_states.h."""
TIMEOUT = 5.0
MAX_TABLE = 16 * 1024 * 1024


def look(status: dict[str, Any]) -> dict[str, Any]:
    """Capture rules and listening ports in the daemon's network namespace.

    Args:
        status: The daemon's short view.

    Returns:
        `inboundCaptured`, `outboundCaptured` and `dnsCaptured` (null: could not be seen, and `why`), `ports`.
    """
    pid = int(status["pid"])
    own = {str(address).rpartition(":")[2] for address in status["listeners"].values()}
    ports = [
        {"address": str(address), "port": port}
        for address, port in listening(_tables(pid))
        if not address.is_loopback and str(port) not in own
    ]
    targets, why = _capture_targets(pid)
    found: dict[str, Any] = dict.fromkeys(("inboundCaptured", "outboundCaptured", "dnsCaptured"))
    found |= {"why": why, "ports": ports}
    if targets is not None:
        found["inboundCaptured"] = _port(status, "inbound") in targets
        found["outboundCaptured"] = _port(status, "outbound") in targets
        found["dnsCaptured"] = "dns" in status["listeners"] and _port(status, "dns") in targets
        if found["inboundCaptured"]:
            found["ports"] = []
    return found


def _port(status: dict[str, Any], name: str) -> int:
    return int(str(status["listeners"].get(name, ":0")).rpartition(":")[2])


def _tables(pid: int) -> list[str]:
    texts = []
    for name in ("tcp", "tcp6"):
        for path in (Path(f"/proc/{pid}/net/{name}"), Path(f"/proc/net/{name}")):
            try:
                with path.open() as file:
                    texts.append(file.read(MAX_TABLE))
                break
            except OSError:
                continue
    return texts


def listening(tables: Iterable[str]) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """Addresses and ports that sockets listen on, sorted. Source: Linux, proc_net_tcp.rst."""
    found = set()
    for table in tables:
        for line in table.splitlines()[1:]:
            fields = line.split()
            if len(fields) < 4 or fields[3] != LISTEN:
                continue
            raw, _, port = fields[1].partition(":")
            data = bytes.fromhex(raw)
            # Words of four bytes, each in the order of the host.
            words = [data[start : start + 4][::-1] for start in range(0, len(data), 4)]
            found.add((ipaddress.ip_address(b"".join(words)), int(port, 16)))
    return sorted(found, key=lambda item: (item[1], item[0].version, item[0].packed))


def _capture_targets(pid: int) -> tuple[set[int] | None, str | None]:
    """Ports that nftables sends connections to; None and the reason where that cannot be seen."""
    try:
        same = Path(f"/proc/{pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink()
    except OSError:
        same = True  # it may be another user's; then nft will not speak to us either
    if not same:
        return None, "the daemon is in another network namespace"
    nft = shutil.which("nft") or shutil.which("nft", path="/usr/sbin:/sbin")
    if nft is None:
        return None, "the nft command is not installed"
    try:
        done = subprocess.run([nft, "-j", "list", "ruleset"], capture_output=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            return None, "nft needs root"
        return redirects(json.loads(done.stdout or b"{}")), None
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None, "nft did not answer"


def redirects(ruleset: Any) -> set[int]:
    """Ports that a ruleset redirects to, wherever in it. Source: libnftables-json(5), redirect and tproxy."""
    found: set[int] = set()
    waiting = [ruleset]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            for key, value in item.items():
                if key in ("redirect", "tproxy", "dnat") and isinstance(value, dict):
                    port = value.get("port")
                    if isinstance(port, int):
                        found.add(port)
                waiting.append(value)
        elif isinstance(item, list):
            waiting.extend(item)
    return found


def capture_text(found: dict[str, Any]) -> str:
    """One line about capture."""
    if found["inboundCaptured"] is None:
        return f"not known: {found['why']}"
    words = {True: "yes", False: "no"}
    return (
        f"inbound {words[found['inboundCaptured']]}, outbound {words[found['outboundCaptured']]},"
        f" DNS {words[found['dnsCaptured']]} (by nftables rules)"
    )


def exposed_text(found: dict[str, Any]) -> str:
    """One line about ports that can be reached past the mesh."""
    ports = found["ports"]
    if not ports:
        return "inbound TCP is captured" if found["inboundCaptured"] else "no port of this host listens beyond loopback"
    shown = ", ".join(_text(entry) for entry in ports[:20]) + (", ..." if len(ports) > 20 else "")
    return f"{shown} (no capture rule for inbound TCP was seen)"


def _text(entry: dict[str, Any]) -> str:
    address = f"[{entry['address']}]" if ":" in entry["address"] else entry["address"]
    return f"{address}:{entry['port']}"
