"""Writes log lines without holding up who logs: a bounded queue, and one thread that writes it in batches.

When the reader of the output stands still and the queue is full, lines are dropped and counted, and the count is
written as soon as writing goes on.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import threading
import time
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["MAX_BATCH_LINES", "MAX_QUEUED_LINES", "Writer", "share_output"]

MAX_QUEUED_LINES: Final = 10_000
MAX_BATCH_LINES: Final = 64
_GATHER_SECONDS: Final = 0.05
"""How long the writer waits for more lines after the first: a busy process wakes it twenty times a second."""
_output_lock: int | None = None


class Writer:
    """A bounded queue of lines and the thread that empties it.

    Args:
        stream: where lines are written.
        render_dropped: makes the line that says how many were dropped.
    """

    def __init__(self, stream: TextIO, render_dropped: Callable[[int], str]) -> None:
        self._stream = stream
        self._render_dropped = render_dropped
        self._lines: collections.deque[str] = collections.deque()
        self._dropped = 0
        self._busy = False
        self._ended = False
        self.forked()

    def forked(self) -> None:
        """There is no thread: at first, and in a forked child."""
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._running = False
        self._idle = True  # the thread waits, or is about to look whether it must

    def write(self, line: str) -> None:
        """Queue a line, or count it as dropped."""
        if len(self._lines) >= MAX_QUEUED_LINES:
            self._dropped += 1
            return
        self._lines.append(line)
        if self._idle:
            self._idle = False
            self._wake.set()
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def _run(self) -> None:
        while not self._ended:
            self._wake.clear()
            self._idle = True
            if not self._lines:
                self._wake.wait()
            self._idle = False
            self._hurry.wait(_GATHER_SECONDS)
            self._busy = True
            while self._lines:
                self._write_batch()
            self._busy = False

    def _write_batch(self) -> None:
        batch = [self._lines.popleft() for _ in range(min(len(self._lines), MAX_BATCH_LINES))]
        dropped, self._dropped = self._dropped, 0
        if dropped:
            batch.append(self._render_dropped(dropped))
        try:
            with _alone():
                self._stream.write("\n".join(batch) + "\n")
                self._stream.flush()
        except (OSError, ValueError):
            self._lines.clear()  # the reader is gone: there is nobody to tell

    def flush(self, timeout: float) -> bool:
        """Wait until all is written, at most `timeout` seconds; False when something is not."""
        deadline = time.monotonic() + timeout
        self._hurry.set()
        try:
            while self._lines or self._busy:
                if not self._running or time.monotonic() >= deadline:
                    return False
                time.sleep(0.001)  # only at exit and in tests
        finally:
            self._hurry.clear()
        return True

    def close(self, timeout: float) -> None:
        """Write what waits, for `timeout` seconds at most, and end the thread."""
        self.flush(timeout)
        self._ended = True
        self._wake.set()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """No other process writes meanwhile, of those that share the output."""
    lock = _output_lock
    if lock is None:
        yield
        return
    fcntl.lockf(lock, fcntl.LOCK_EX)  # of a process that dies it is let go by the kernel
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # closed at shutdown
            fcntl.lockf(lock, fcntl.LOCK_UN)


def share_output(lock: int | None) -> None:
    """Write lines whole although other processes write to the same output.

    Args:
        lock: descriptor of a file that all of them lock while they write, open for writing; None ends it.
    """
    global _output_lock
    _output_lock = lock
