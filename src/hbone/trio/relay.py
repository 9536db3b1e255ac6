"""Join a CONNECT stream and a TCP connection, for programs that need no data path of their own."""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING

import trio

from hbone.errors import ErrorCode, StreamResetError

if TYPE_CHECKING:
    from hbone.trio.stream import HboneStream

__all__ = ["relay"]

_LINGER_0 = struct.pack("ii", 1, 0)


async def relay(stream: HboneStream, tcp: trio.SocketStream) -> None:
    """Copy both ways until both have ended, then close both.

    FIN and END_STREAM stand for each other, each direction on its own. A reset of the TCP connection becomes
    RST_STREAM CONNECT_ERROR, and a reset stream, or a lost tunnel, a TCP reset: at once, also where the other end of
    the TCP connection neither reads nor writes. Source: RFC 9113 §8.5.
    """
    async with stream, tcp, trio.open_nursery() as nursery:
        nursery.start_soon(_watch, stream, tcp, nursery.cancel_scope)
        async with trio.open_nursery() as copying:
            copying.start_soon(_to_stream, tcp, stream, nursery.cancel_scope)
            copying.start_soon(_to_tcp, stream, tcp, nursery.cancel_scope)
        nursery.cancel_scope.cancel()


async def _watch(stream: HboneStream, tcp: trio.SocketStream, both: trio.CancelScope) -> None:
    if not _is_end(await stream.wait_failure()):
        _reset_tcp(tcp)
        both.cancel()


async def _to_stream(tcp: trio.SocketStream, stream: HboneStream, both: trio.CancelScope) -> None:
    while True:
        try:
            data = await tcp.receive_some(65_536)
        except trio.ClosedResourceError:
            return  # the other direction reset it
        except trio.BrokenResourceError:
            stream.reset(ErrorCode.CONNECT_ERROR)
            both.cancel()
            return
        try:
            if not data:
                await stream.send_eof()
                return
            await stream.send_all(data)
        except trio.BrokenResourceError as error:
            if _is_end(error.__cause__):
                return  # the peer reads no more; what it still sends is its own matter
            _reset_tcp(tcp)
            both.cancel()
            return
        except trio.ClosedResourceError:
            return


async def _to_tcp(stream: HboneStream, tcp: trio.SocketStream, both: trio.CancelScope) -> None:
    while True:
        try:
            data = await stream.receive_some()
        except trio.ClosedResourceError:
            return
        except trio.BrokenResourceError:
            _reset_tcp(tcp)
            both.cancel()
            return
        try:
            if not data:
                await tcp.send_eof()
                return
            await tcp.send_all(data)
        except trio.ClosedResourceError:
            return
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            if data or not (isinstance(cause, OSError) and cause.errno == errno.ENOTCONN):
                stream.reset(ErrorCode.CONNECT_ERROR)
                both.cancel()
            return


def _is_end(failure: BaseException | None) -> bool:
    """Whether the peer only says that it is done."""
    return isinstance(failure, StreamResetError) and failure.code in (
        ErrorCode.NO_ERROR,
        ErrorCode.CANCEL,
        ErrorCode.STREAM_CLOSED,
    )


def _reset_tcp(tcp: trio.SocketStream) -> None:
    """Close with RST instead of FIN."""
    try:
        tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    except OSError:
        pass  # it is gone already
    tcp.socket.close()
