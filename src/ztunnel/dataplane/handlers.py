"""What the reactor calls, and what it calls on."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Closable", "Farewell", "Flushable", "Handler", "Poller", "Swept"]


class Handler(Protocol):
    """What an event is given to."""

    def on_event(self, mask: int) -> None:
        """Something happened to the descriptor: bits of epoll."""

    def on_fault(self) -> None:
        """`on_event` raised: close the connection that it belongs to."""


class Flushable(Protocol):
    """Has bytes to send once, at the end of a turn."""

    def flush(self) -> None:
        """Send them."""

    def on_fault(self) -> None:
        """`flush` raised: close the connection that it belongs to."""


class Swept(Protocol):
    """Has deadlines that may be looked at once a second."""

    def on_time(self, now: float) -> None:
        """Do what is due."""


class Farewell(Swept, Protocol):
    """A connection that is over, but for what the other end does not have yet."""

    def close(self) -> None:
        """Wait no longer."""


class Poller(Protocol):
    """The part of `select.epoll` that is used."""

    def register(self, fd: int, eventmask: int = ..., /) -> None: ...  # noqa: D102
    def modify(self, fd: int, eventmask: int, /) -> None: ...  # noqa: D102
    def unregister(self, fd: int, /) -> None: ...  # noqa: D102
    def poll(self, timeout: float | None = ..., maxevents: int = ...) -> list[tuple[int, int]]: ...  # noqa: D102
    def fileno(self) -> int: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Closable(Protocol):
    """A socket, as far as closing goes."""

    def fileno(self) -> int: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102
