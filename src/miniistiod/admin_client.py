"""Asks a running control plane through the private socket of its state."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any

from hbone.commandline import CommandError, ExitCode
from hbone.daemon.httpclient import UnixConnection

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["fetch"]

_SECONDS = 30.0
_MAX_BYTES = 512 << 20


def fetch(path: Path, page: str) -> Any:
    """The JSON of a page.

    Raises:
        CommandError: nobody answers there.
    """
    connection = UnixConnection(path, _SECONDS)
    try:
        connection.request("GET", page)
        response = connection.getresponse()
        body = response.read(_MAX_BYTES)
        if response.status != 200:
            raise CommandError(f"{str(path)!r} answered {response.status} for {page}; is it of another version?")
        return json.loads(body)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise CommandError(
            f"no control plane answers at {str(path)!r} ({reason}); start 'miniistiod run', or name its --state",
            code=ExitCode.UNREACHABLE,
        ) from None
    except (http.client.HTTPException, ValueError) as error:
        raise CommandError(f"{str(path)!r} did not answer as a control plane does: {error}") from None
    finally:
        connection.close()
