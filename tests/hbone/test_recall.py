"""Revocation lists of a pool and of a server: at the handshake, and for tunnels that live."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.hbone.asyncio.test_streams import serving, source_of, under_asyncio
from tests.support.tunnels import ca

import hbone
import hbone.asyncio
from hbone.errors import ConnectionLost, PeerRevokedError, TlsError
from hbone.identity import RevocationLists

if TYPE_CHECKING:
    from collections.abc import Callable

ORDERS = "spiffe://cluster.local/ns/shop/sa/orders"


class Lists:
    """A source whose lists the test changes."""

    def __init__(self) -> None:
        self.current = RevocationLists()
        self.callbacks: list[Callable[[], object]] = []

    def subscribe(self, callback: Callable[[], object]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)

    def revoke(self, source: hbone.StaticSource) -> None:
        self.current = RevocationLists([ca().crl(source.current().svid.leaf)])
        for callback in self.callbacks:
            callback()


@under_asyncio
async def test_a_pool_cuts_a_peer_whose_certificate_was_taken_back() -> None:
    lists = Lists()
    refused: list[Exception] = []
    async with serving() as (port, _):
        pool = hbone.asyncio.ConnectionPool(source_of("web"), revocations=lists, refused=refused.append)
        async with pool:
            lists.revoke(source_of("web"))  # ours concerns nobody's tunnel of ours
            reader, writer = await pool.connect("10.0.0.7:80", via=("127.0.0.1", port), peer=ORDERS)
            writer.write(b"x")
            assert await reader.read(1) == b"x"
            lists.revoke(source_of("orders"))
            with pytest.raises(ConnectionError):
                await reader.read(1)
            assert [type(error) for error in refused] == [PeerRevokedError]
            with pytest.raises(PeerRevokedError, match="revoked by"):
                await pool.connect("10.0.0.7:80", via=("127.0.0.1", port), peer=ORDERS)
        assert not lists.callbacks


@under_asyncio
async def test_a_server_cuts_a_client_whose_certificate_was_taken_back() -> None:
    lists = Lists()
    async with serving(revocations=lists) as (port, _), hbone.asyncio.ConnectionPool(source_of("web")) as pool:
        reader, writer = await pool.connect("10.0.0.7:80", via=("127.0.0.1", port), peer=ORDERS)
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        lists.revoke(source_of("web"))
        with pytest.raises(ConnectionError):
            await reader.read(1)
        with pytest.raises((ConnectionLost, TlsError)):
            await pool.connect("10.0.0.7:80", via=("127.0.0.1", port), peer=ORDERS)
    assert not lists.callbacks
