"""One discovery stream, from its first response on: one task hears, others put in force and answer.

Of two responses a policy that changes may overtake workloads; see `lanes`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import trio
from google.protobuf.message import DecodeError

from ztunnel.control.lanes import Lanes
from ztunnel.control.response import read
from ztunnel.control.transport import ControlPlaneError
from ztunnel.mesh import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.wire import discovery_pb2

if TYPE_CHECKING:
    from ztunnel.control.demand import Demand
    from ztunnel.control.discovery import DiscoveryClient
    from ztunnel.control.response import Response
    from ztunnel.control.transport import MessageStream

__all__ = ["NAMES_AT_ONCE", "TYPES", "Conversation"]

TYPES = (ADDRESS_TYPE, AUTHORIZATION_TYPE)
FIRST_ANSWER_TIMEOUT = 60.0
"""Seconds from the subscription to the first response of each type, on every stream."""
MAX_WAITING = 64 * 1024 * 1024
"""Bytes of responses that are being applied, above which no further one is read."""
NAMES_AT_ONCE = 100
"""Names and versions that a request is put together from at a time."""


class Conversation:
    """What is said on one stream.

    Args:
        client: whose it is.
        stream: open, with the subscriptions sent.
    """

    def __init__(self, client: DiscoveryClient, stream: MessageStream) -> None:
        self._client = client
        self._stream = stream
        self._sending = trio.Lock()
        self._hearing = trio.CancelScope()
        self._failure: Exception | None = None

    async def run(self) -> None:
        """Until the stream ends; what was heard by then is in force.

        Raises:
            Exception: whatever ended the stream.
        """
        async with trio.open_nursery() as nursery:
            lanes = Lanes(nursery)
            with self._hearing:
                async with trio.open_nursery() as talking:
                    if self._client.demand is not None:
                        talking.start_soon(self._ask, self._client.demand)
                    try:
                        await self._hear(lanes)
                    except Exception as error:
                        self._fail(error)
                    talking.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _fail(self, error: Exception) -> None:
        if isinstance(error, DecodeError):
            error = ControlPlaneError("the control plane sent bytes that are no DeltaDiscoveryResponse")
        self._failure = self._failure or error
        self._hearing.cancel()

    async def _ask(self, demand: Demand) -> None:
        """Subscribe to what connections ask for."""
        while True:
            await demand.more.wait()
            names = demand.unsaid()
            for start in range(0, len(names), NAMES_AT_ONCE):
                request = discovery_pb2.DeltaDiscoveryRequest(
                    type_url=ADDRESS_TYPE, resource_names_subscribe=names[start : start + NAMES_AT_ONCE]
                )
                try:
                    async with self._sending:
                        await self._stream.send(request.SerializeToString())
                except Exception as error:
                    self._fail(error)

    async def _hear(self, lanes: Lanes) -> None:
        limit = trio.current_time() + FIRST_ANSWER_TIMEOUT
        heard: set[str] = set()
        while True:
            missing = [url for url in self._client.needed if url not in heard]
            with trio.CancelScope(deadline=limit if missing else math.inf) as scope:
                raw = await self._stream.receive()
            if scope.cancelled_caught:
                names = " and no ".join(url.rpartition(".")[2] for url in missing)
                raise ControlPlaneError(f"the control plane sent no {names} within {FIRST_ANSWER_TIMEOUT:g} s")
            if raw is None:
                return
            response = await read(raw, self._client.pace)
            raw, response = await self._client.completed(raw, response)
            heard.add(response.type_url)
            url = response.type_url
            after = lanes.after(url, removes=bool(response.removed))
            lanes.start(functools.partial(self._take, raw, response), (url,), after, len(raw))
            await lanes.below(MAX_WAITING)

    async def _take(self, raw: bytes, response: Response) -> None:
        client, url = self._client, response.type_url
        ours = url in TYPES
        try:
            if ours:
                answer = await client.put_in_force(raw, response)
            else:
                answer = await client.other_type(raw, url, response.nonce)
            if self._failure is None:
                async with self._sending:
                    await self._stream.send(answer.SerializeToString())
                if ours:
                    client.answered(answer)
        except Exception as error:
            self._fail(error)
