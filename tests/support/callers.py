"""Callers of a running control plane."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import trio
from tests.support.miniistiod import (
    ADDRESS,
    AUTHORIZATION,
    CREATE_CERTIFICATE,
    DELTA,
    Applicant,
    acknowledge,
    subscribe,
)

from hbone.grpc import GrpcError, StatusCode
from hbone.tls import TlsContext
from hbone.trio.grpc import GrpcClient
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    import miniistiod
    from hbone.identity import Identity
    from hbone.trio.grpc import GrpcStream

Metadata = list[tuple[str, str]]


@contextlib.asynccontextmanager
async def dial(
    cp: miniistiod.MiniIstiod, identity: Identity | None = None, *, roots: bytes | None = None
) -> AsyncGenerator[GrpcClient]:
    tls = TlsContext.client(identity, roots=roots or cp.root_pem, server_name="localhost")
    with trio.fail_after(20):
        async with GrpcClient.connect("127.0.0.1", cp.port, tls) as client:
            yield client


async def certificate(
    cp: miniistiod.MiniIstiod,
    metadata: Iterable[tuple[str, str]] = (),
    *,
    identity: Identity | None = None,
    applicant: Applicant | None = None,
    **request: Any,
) -> Identity:
    """Ask for a certificate, by a token in `metadata` or a certificate."""
    applicant = applicant or Applicant()
    async with dial(cp, identity) as client:
        answer = await client.unary(CREATE_CERTIFICATE, applicant.request(**request), list(metadata))
    return applicant.identity(answer)


async def refusal(
    cp: miniistiod.MiniIstiod,
    metadata: Iterable[tuple[str, str]] = (),
    *,
    identity: Identity | None = None,
    **request: Any,
) -> tuple[StatusCode, str]:
    """What somebody hears who gets no certificate."""
    async with dial(cp, identity) as client:
        with pytest.raises(GrpcError) as caught:
            await client.unary(CREATE_CERTIFICATE, Applicant().request(**request), list(metadata))
    return caught.value.code, caught.value.message


class Stream:
    """A client of discovery that acknowledges everything."""

    def __init__(self, stream: GrpcStream) -> None:
        self.stream = stream

    async def response(self) -> discovery_pb2.DeltaDiscoveryResponse:
        data = await self.stream.receive()
        assert data is not None
        response = discovery_pb2.DeltaDiscoveryResponse.FromString(data)
        await self.stream.send(acknowledge(response))
        return response

    async def ends_with(self) -> StatusCode:
        """Take what comes until the server ends the stream; how it did."""
        with pytest.raises(GrpcError) as caught:
            await self._all()
        return caught.value.code

    async def _all(self) -> None:
        while True:
            await self.response()


@contextlib.asynccontextmanager
async def discovery(
    cp: miniistiod.MiniIstiod,
    identity: Identity | None = None,
    metadata: Iterable[tuple[str, str]] = (),
    *,
    types: Iterable[str] = (AUTHORIZATION, ADDRESS),
    **node: Any,
) -> AsyncGenerator[Stream]:
    """A discovery stream that has subscribed."""
    async with dial(cp, identity) as client, client.stream(DELTA, list(metadata)) as stream:
        for url in types:
            await stream.send(subscribe(url, **node))
        yield Stream(stream)
