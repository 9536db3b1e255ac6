"""The routing with which a proxy may speak to applications of its host from the address of their client."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbone.testing.hosts import NamespaceHost

__all__ = ["bring_replies_back"]

RULES = """
table ip mangle {
  chain prerouting {
    type filter hook prerouting priority mangle; policy accept;
    meta mark & 0xfff == 0x539 ct mark set 0x111
    ct mark & 0xfff == 0x111 meta mark set 0x111
  }
  chain output {
    type route hook output priority mangle; policy accept;
    meta mark & 0xfff == 0x539 ct mark set 0x111
    ct mark & 0xfff == 0x111 meta mark & 0xfff != 0x539 meta mark set 0x111
  }
}
"""
ROUTES = (
    ["ip", "rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"],
    ["ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"],
)


def bring_replies_back(host: NamespaceHost) -> None:
    """Lead what applications answer to connections of the proxy back to it, whatever address they came from."""
    subprocess.run(host.command("nft", "-f", "-"), input=RULES, text=True, timeout=10, check=True)
    for command in ROUTES:
        subprocess.run(host.command(*command), timeout=10, check=True)
