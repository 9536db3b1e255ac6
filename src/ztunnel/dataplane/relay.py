"""One app socket and what is at its far side, both ways, with half-close and back-pressure both ways.

The far side is a stream of a tunnel (`tunnel.StreamEnd`), or for plain TCP another relay: there is one relay.

Nothing is read that cannot be sent on: a read asks the far side how much it takes. Of what arrives only what the
socket did not take is kept, in `_queue`, which the stream's receive window bounds; and only what was written is given
back to that window.

How one end's close reaches the other:

| here | there |
| --- | --- |
| FIN from the app | END_STREAM |
| END_STREAM | FIN to the app, once all was written |
| RST from the app | RST_STREAM(CONNECT_ERROR) |
| RST_STREAM with a code of `ENDS` | as END_STREAM, and the socket closes once all was delivered |
| RST_STREAM with another code; the tunnel was lost | RST to the app, so that it takes nothing cut for complete |
"""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING, Final, Protocol

from hbone.errors import ErrorCode
from hbone.tls import IoBuffer
from ztunnel.dataplane.farewell import close_when_delivered
from ztunnel.dataplane.packets import BURST
from ztunnel.dataplane.reactor import READ, READ_WRITE, WRITE
from ztunnel.dataplane.sockets import DONTWAIT

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ztunnel.dataplane.reactor import Reactor
    from ztunnel.dataplane.sockets import SocketCalls, StreamSocket
    from ztunnel.errors import DataplaneError

__all__ = ["CHUNK", "ENDS", "HEADROOM", "READ_BUFFER", "FarEnd", "Owner", "Relay", "join"]

HEADROOM: Final = 9
"""Bytes kept free before a payload, for the header of its DATA frame."""
CHUNK: Final = BURST
"""Bytes of one read at most, and so of one DATA frame that we send: as many as leave in one packet."""
READ_BUFFER: Final = IoBuffer(HEADROOM + CHUNK)
"""What every relay reads into; a far end takes or keeps all of it before it returns."""
ENDS: Final = frozenset({ErrorCode.NO_ERROR, ErrorCode.CANCEL, ErrorCode.STREAM_CLOSED})
"""RST_STREAM codes that mean a normal end. Source: ztunnel's mapping of HTTP/2 to TCP."""

_READS: Final = 4  # of one callback, where each fills the buffer
_BODY: Final = memoryview(READ_BUFFER.array)[HEADROOM:]
_HANGUP: Final = select.EPOLLRDHUP | select.EPOLLHUP
_ERROR: Final = select.EPOLLERR
_ANYTHING_ELSE: Final = ~WRITE
_QUEUE_LIMIT: Final = 256 * 1024  # plain TCP: no window bounds the far side's queue, so this does


class FarEnd(Protocol):
    """Where a relay's bytes go."""

    def room(self) -> int:
        """Bytes that `take` would take now, at most `CHUNK`; 0: `Relay.resume` is called when there are."""

    def take(self, nbytes: int) -> None:
        """Send `READ_BUFFER.array[HEADROOM:HEADROOM + nbytes]`."""

    def end(self) -> None:
        """The app sends no more."""

    def reset(self, code: ErrorCode) -> None:
        """End both directions at once."""

    def credit(self, nbytes: int) -> None:
        """`nbytes` that `deliver` had kept were written to the app."""


class Owner(Protocol):
    """Whose relay it is."""

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        """The socket is closed, or will be when the turn ends; told once."""


class _Nobody:
    """Whose a closed relay is, and what is at its far end: it refers to neither, so that each goes with its last user.

    Left to the garbage collector, connections would stay until it comes by, and those that are there when it sets
    objects aside would stay for ever.
    """

    def relay_ended(self, relay: Relay, error: DataplaneError | None) -> None:
        """It was told before."""

    def room(self) -> int:
        """None."""
        return 0

    def take(self, nbytes: int) -> None:
        """Nothing is read any more."""

    def end(self) -> None:
        """It ended."""

    def reset(self, code: ErrorCode) -> None:
        """It ended."""

    def credit(self, nbytes: int) -> None:
        """Nothing is written any more."""


_NOBODY: Final = _Nobody()


def _takes_nothing(data: Buffer, flags: int = 0, /) -> int:
    raise BlockingIOError


def _was_reset(buffer: Buffer, nbytes: int = 0, flags: int = 0, /) -> int:
    raise ConnectionResetError


class Relay:
    """The socket side of one app connection.

    Args:
        reactor: watches the socket.
        calls: the socket calls.
        sock: connected; closed by the relay.
        owner: told when it is over.
    """

    __slots__ = (
        "_calls",
        "_ended_here",
        "_ended_there",
        "_far",
        "_fd",
        "_finishing",
        "_hangup",
        "_last",
        "_owner",
        "_queue",
        "_reactor",
        "_readable",
        "_recv_into",
        "_send",
        "_watching",
        "_writing",
        "closed",
        "read",
        "sock",
        "written",
    )

    def __init__(self, reactor: Reactor, calls: SocketCalls, sock: StreamSocket, owner: Owner) -> None:
        self.sock = sock
        self.read = 0
        """Bytes read from the app and handed on."""
        self.written = 0
        """Bytes written to the app."""
        self.closed = False
        self._reactor = reactor
        self._calls = calls
        self._owner = owner
        self._far: FarEnd
        self._fd = sock.fileno()
        self._recv_into = sock.recv_into
        self._send = sock.send
        self._queue = bytearray()
        self._readable = False  # the socket may have bytes that nobody was told of
        self._hangup = False  # the app's FIN or an error is there: read on until it shows
        self._watching = False
        self._writing = False  # room to write is watched for
        self._ended_here = False  # the app sends no more
        self._ended_there = False  # the far side sends no more
        self._finishing = False  # FIN was sent
        self._last = False  # nothing of the app is wanted any more: close when the queue is empty

    # Life

    def hold(self) -> None:
        """Keep what comes from the far side until `start`: something else is to be written to the app before it."""
        self._send = _takes_nothing

    def start(self, far: FarEnd, *, watched: bool = False, mask: int = READ) -> None:
        """Begin to relay. What the app has sent already is read at once.

        Args:
            far: the other side.
            watched: the reactor watches the descriptor already, for `READ_WRITE`; this relay becomes its handler.
            mask: what is known to be ready; by default it is tried.
        """
        self._far = far
        if self._send is _takes_nothing:
            self._send = self.sock.send
            if self._queue:
                self._write_queue()
            if self.closed:
                return
        if watched:
            self._watching = self._writing = True
            self._reactor.hand_over(self._fd, self)
        if mask & _ANYTHING_ELSE:
            self._readable = True
            self._pump()
        if not self._watching and not self.closed:
            self._watching = True
            self._writing = bool(self._queue)
            self._reactor.add(self._fd, self, READ_WRITE if self._writing else READ)

    def on_event(self, mask: int) -> None:
        """The app's socket can be read or written, or was reset."""
        if mask & _ERROR:
            self._app_reset()
            return
        if mask & WRITE and self._queue:
            self._write_queue()
        if mask & _ANYTHING_ELSE and not self._ended_here:
            if mask & _HANGUP:
                self._hangup = True
            self._readable = True
            self._pump()

    def on_fault(self) -> None:
        """A fault of ours while relaying: both ends are reset."""
        if not self.closed:
            self._far.reset(ErrorCode.INTERNAL_ERROR)
            self._close(None, reset=True)

    # App -> far side

    def resume(self) -> bool:
        """The far side takes bytes again. Returns whether any were there for it."""
        if self._readable and not self._ended_here and not self.closed:
            before = self.read
            self._pump()
            return self.read != before
        return False

    def _pump(self) -> None:
        far = self._far
        reads = _READS
        while reads:
            room = far.room()
            if room <= 0:
                return
            try:
                nbytes = self._recv_into(_BODY, room, DONTWAIT)
            except BlockingIOError:
                self._readable = False
                return
            except OSError:
                self._app_reset()
                return
            if not nbytes:
                self._app_ended()
                return
            self.read += nbytes
            far.take(nbytes)
            if nbytes < room and not self._hangup:
                self._readable = False
                return
            if self._ended_here or self.closed:
                return
            reads -= 1
        self._reactor.later(self.resume)

    def _app_ended(self) -> None:
        self._readable = False
        self._ended_here = True
        self._far.end()
        if self._ended_there and not self._queue:
            self._close(None)

    def _app_reset(self) -> None:
        if not self.closed:
            self._far.reset(ErrorCode.CONNECT_ERROR)
            self._close(None, reset=True)

    # Far side -> app

    def deliver(self, view: memoryview) -> int:
        """Write to the app, and keep what it does not take now. Returns the bytes written.

        The stream's sink: nothing is closed in here, because the engine is in the middle of a frame.
        """
        sent = 0
        if not self._queue:
            try:
                sent = self._send(view, DONTWAIT)
            except BlockingIOError:
                pass
            except OSError:
                self._recv_into = _was_reset  # the kernel says so once: a read would now find an end that looks clean
                self._reactor.later(self._app_reset)
                return len(view)
            self.written += sent
            if sent == len(view):
                return sent
            view = view[sent:]
            if self._watching and not self._writing:
                self._writing = True
                self._reactor.modify(self._fd, READ_WRITE)
        self._queue += view
        return sent

    def finish(self) -> None:
        """The far side sends no more: FIN to the app once all was written."""
        self._ended_there = True
        if not self._queue and not self.closed:
            self._all_written()

    def end_after_reset(self, code: ErrorCode, error: DataplaneError | None) -> None:
        """The far side is gone, with the code of its RST_STREAM; `error` is for the log if that was no normal end."""
        if self.closed:
            return
        if code not in ENDS:
            self._close(error, reset=True)
            return
        self._ended_here = self._ended_there = self._last = True
        self._readable = False
        if not self._queue:
            self._close(None)

    def abort(self, error: DataplaneError | None, *, code: ErrorCode = ErrorCode.CONNECT_ERROR) -> None:
        """Cut both ends, for a policy or a drain. The far side gets RST_STREAM with `code`, the app an RST.

        The code is not CANCEL, which the other proxy would show its app as a normal end.
        """
        if not self.closed:
            self._far.reset(code)
            self._close(error, reset=True)

    def _write_queue(self) -> None:
        queue = self._queue
        try:
            sent = self._send(queue, DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            self._app_reset()
            return
        self.written += sent
        del queue[:sent]
        if not self._last:
            self._far.credit(sent)
        if not queue and self._ended_there:
            self._all_written()

    def _all_written(self) -> None:
        if self._ended_here:
            self._close(None)
            return
        if not self._finishing:
            self._finishing = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self._reactor.later(self._app_reset)

    def _close(self, error: DataplaneError | None, *, reset: bool = False) -> None:
        self.closed = True
        self._readable = False
        self._queue.clear()
        if self._last and not reset:
            close_when_delivered(self._reactor, self._calls, self.sock)
        else:
            if reset:
                self._calls.reset_on_close(self.sock)
            self._reactor.close(self.sock)
        owner = self._owner
        self._owner = self._far = _NOBODY
        owner.relay_ended(self, error)

    # As the far end of another relay

    def room(self) -> int:
        """Bytes that this socket's app takes, as the far end of another relay."""
        return 0 if len(self._queue) >= _QUEUE_LIMIT or self.closed else CHUNK

    def take(self, nbytes: int) -> None:
        """As the far end of another relay: write to this socket's app."""
        self.deliver(_BODY[:nbytes])

    def end(self) -> None:
        """As the far end of another relay: that one's app sends no more."""
        self.finish()

    def reset(self, code: ErrorCode) -> None:
        """As the far end of another relay: that one is closed."""
        if not self.closed:
            self._close(None, reset=True)

    def credit(self, nbytes: int) -> None:
        """As the far end of another relay: that one wrote from its queue, so this one may read again."""
        if self._readable:
            self._reactor.later(self.resume)


def join(one: Relay, other: Relay, *, watched: bool = False) -> None:
    """Relay plain TCP between two sockets.

    Args:
        one: accepted, and not watched yet.
        other: the other end.
        watched: the reactor watches `other` already, for `READ_WRITE`.
    """
    other._far = one
    one._far = other
    other.start(one, watched=watched)
    if not one.closed:
        one.start(other)
