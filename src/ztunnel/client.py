"""One GET of the daemon's admin pages, for the commands."""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING

from hbone.errors import HboneError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DaemonAway", "ask"]

TIMEOUT = 10.0
MAX_ANSWER = 64 * 1024 * 1024


class DaemonAway(HboneError):
    """No daemon answers."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket's path instead of a host."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(TIMEOUT)
            self.sock.connect(self._path)
        except BaseException:
            self.sock.close()
            raise


def ask(path: str, *, socket_path: Path, host: str, port: int) -> tuple[int, bytes]:
    """Get a page by the Unix socket where there is one, else by TCP.

    Returns:
        Status and body.

    Raises:
        DaemonAway: neither answers within ten seconds.
    """
    reasons: list[str] = []
    for where, connection in (
        (str(socket_path), _UnixConnection(str(socket_path))),
        (f"{host}:{port}", http.client.HTTPConnection(host, port, timeout=TIMEOUT)),
    ):
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read(MAX_ANSWER)
        except TimeoutError:
            reasons.append(f"{where} did not answer within {TIMEOUT:g} s")
        except (OSError, http.client.HTTPException) as error:
            why = error.strerror if isinstance(error, OSError) else "it speaks no HTTP"
            reasons.append(f"{where}: {(why or str(error)).lower()}")
        finally:
            connection.close()
    raise DaemonAway(f"no daemon answers ({'; '.join(reasons)})")
