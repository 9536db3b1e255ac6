"""One GET of the daemon's admin pages, for the commands."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

from hbone.daemon.httpclient import UnixConnection
from hbone.errors import HboneError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DaemonAway", "ask"]

TIMEOUT = 10.0
MAX_ANSWER = 64 * 1024 * 1024


class DaemonAway(HboneError):
    """No daemon answers."""


def ask(path: str, *, socket_path: Path, host: str, port: int) -> tuple[int, bytes]:
    """Get a page by the Unix socket where there is one, else by TCP.

    Returns:
        Status and body.

    Raises:
        DaemonAway: neither answers within ten seconds.
    """
    reasons: list[str] = []
    for where, connection in (
        (str(socket_path), UnixConnection(socket_path, TIMEOUT)),
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
