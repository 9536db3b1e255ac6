"""What the kernel does for a family of processes: adopt orphans, and end children with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import time

from hbone.errors import ConfigurationError

__all__ = ["adopt_orphans", "call_ourselves", "end_with", "how_ended", "ignore_signals"]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_ADOPTION_SECONDS = 5.0
_ADOPTION_STEP = 0.001


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose parent ends, so that they can be waited for.

    Raises:
        ConfigurationError: the kernel does not do that.

    Source: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        raise ConfigurationError(
            f"workers cannot be started here: this kernel adopts no orphans ({error.strerror});"
            " unset ZTUNNEL_WORKER_THREADS"
        ) from None


def end_with(parent: int) -> None:
    """Be killed when process `parent` dies, after waiting to be its child.

    Raises:
        ProcessLookupError: it is dead already, or never became our parent.

    Source: prctl(2), PR_SET_PDEATHSIG: the signal is sent when the parent that there is then dies.
    """
    deadline = time.monotonic() + _ADOPTION_SECONDS
    while os.getppid() != parent:
        if time.monotonic() >= deadline:
            raise ProcessLookupError(f"process {parent} is not the parent of this one")
        time.sleep(_ADOPTION_STEP)  # until the process in between has ended, which it does at once
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(f"process {parent} is gone")


def call_ourselves(name: str) -> None:
    """What `ps -o comm` shows; 15 bytes of it."""
    _prctl(_PR_SET_NAME, name.encode())


def ignore_signals() -> None:
    """Leave SIGINT and SIGTERM, which a terminal or systemd sends to all processes, to the parent: it drains."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def how_ended(code: int | None) -> str:
    """An exit code in words, or the name of the signal; None: nobody knows."""
    if code is None:
        return "unknown"
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
