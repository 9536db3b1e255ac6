"""`hbone.inspect` over TCP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from hbone.engine import Engine
from hbone.errors import ConnectionLost, TlsError
from hbone.inspect import Look, read_settings
from hbone.tls import IoBuffer, TlsConnection, TlsContext
from hbone.trio.client import open_tcp

if TYPE_CHECKING:
    from hbone.identity import Identity
    from hbone.inspect import Presented

__all__ = ["look_at", "settings_of"]


async def look_at(address: tuple[str, int], timeout: float) -> Presented:
    """What a server shows to everybody.

    Raises:
        ConnectionLost: nobody answers, or not within `timeout` seconds.
        TlsError: it does not speak TLS.
    """
    with trio.move_on_after(timeout):
        async with await open_tcp(*address) as transport:
            look = Look()
            while look.presented is None:
                await transport.send_all(look.data_to_send())
                look.receive_data(await _receive(transport))
            return look.presented
    raise _late(address, timeout)


async def settings_of(address: tuple[str, int], identity: Identity, timeout: float) -> dict[str, int]:
    """Make a verified TLS connection, and read the server's first SETTINGS.

    Raises:
        ConnectionLost: nobody answers, or not within `timeout` seconds.
        PeerIdentityError: its certificate is not one that we accept.
        TlsError: the handshake failed, or it refuses our certificate.
    """
    with trio.move_on_after(timeout):
        async with await open_tcp(*address) as transport:
            tls = TlsConnection(TlsContext.client(identity), server=False)
            buffer = IoBuffer(65_536)
            while not tls.handshake():
                await _flush(transport, tls, buffer)
                tls.receive_data(await _receive(transport))
            engine = Engine(client=True)
            engine.start(trio.current_time())
            tls.write(engine.data_to_send())
            await _flush(transport, tls, buffer)
            plaintext = bytearray()
            while True:
                while nbytes := tls.read_into(buffer, 0, buffer.size):
                    plaintext += buffer.view[:nbytes]
                settings = read_settings(plaintext)
                if settings is not None:
                    tls.shutdown()
                    await _flush(transport, tls, buffer)
                    return settings
                tls.receive_data(await _receive(transport))
    raise _late(address, timeout)


async def _receive(transport: trio.abc.Stream) -> bytes:
    try:
        data = await transport.receive_some(65_536)
    except trio.BrokenResourceError as error:
        raise ConnectionLost(f"the peer broke the connection off: {error}") from error
    if not data:
        raise TlsError("the peer closed the connection during the TLS handshake")
    return bytes(data)


async def _flush(transport: trio.abc.Stream, tls: TlsConnection, buffer: IoBuffer) -> None:
    while nbytes := tls.data_to_send_into(buffer):
        await transport.send_all(bytes(buffer.view[:nbytes]))


def _late(address: tuple[str, int], timeout: float) -> ConnectionLost:
    return ConnectionLost(f"{address[0]}:{address[1]} did not answer within {timeout:g} s")
