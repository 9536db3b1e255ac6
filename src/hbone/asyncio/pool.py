"""A pool of tunnels under asyncio; the same rules as `hbone.pool`."""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Self, Unpack

from hbone.asyncio.connection import Tunnel
from hbone.asyncio.stream import TunnelStream
from hbone.errors import ConnectionLost
from hbone.session import FLUSH_TIMEOUT
from hbone.tunnelpool import TunnelPool

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hbone.connect import Authority, ConnectRequest
    from hbone.identity import Identity, IdentitySource, SpiffeId
    from hbone.pool import PoolKey
    from hbone.tunnelpool import PoolOptions

__all__ = ["ConnectionPool"]


class ConnectionPool(TunnelPool[Tunnel, TunnelStream]):
    """Opens streams, over as few tunnels as its rules allow.

    ```python
    async with hbone.asyncio.ConnectionPool(svid) as pool:
        reader, writer = await pool.connect("10.0.0.7:8080", via=("10.0.0.7", 15008), peer="spiffe://…")
    ```

    Args:
        svid: who we are. Each new tunnel uses what is current; a rotation breaks no tunnel that lives.
        authorize: asked about the peer where `connect` names none; by default whether the trust domain is ours.
        config: parameters of HTTP/2.
        budget: what receive windows of all tunnels together may grow by.
        dial_timeout: seconds for connecting and the handshake; 10 by default.
        ping_timeout: seconds that a tunnel unused for long has to prove that it lives; 2 by default.
        max_streams: streams on one tunnel; 100 by default.
        idle_timeout: seconds that a tunnel without a stream is kept; 300 by default.
        capacity: tunnels kept, 500 by default; beyond it idle ones are closed.
    """

    def __init__(self, svid: IdentitySource, **options: Unpack[PoolOptions]) -> None:
        super().__init__(svid, **options)
        self._tunnels: set[Tunnel] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the streams that are still open, send what was queued, and close the tunnels; about a second at most."""
        self._close_pool()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tunnels = list(self._tunnels)
        for tunnel in tunnels:
            tunnel.close()
        if tunnels:
            await asyncio.wait([tunnel.ended for tunnel in tunnels], timeout=FLUSH_TIMEOUT + 1.0)

    async def connect(
        self,
        target: str | Authority | ConnectRequest,
        *,
        via: tuple[str, int],
        peer: str | SpiffeId | Iterable[str | SpiffeId] | None,
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to `target` through the tunnel endpoint at `via`. Bring a deadline for the answer.

        Args:
            target: `host:port` that the other end shall connect us to, or a whole request.
            via: host and port of the tunnel endpoint.
            peer: who may answer there; None leaves it to the pool's `authorize`.

        Returns:
            As asyncio.open_connection; `writer.get_extra_info("peer")` is the peer's SpiffeId.

        Raises:
            ConnectRejected: the answer was not 200.
            ConnectionLost: nobody answers at `via`, or the tunnel ended before the answer.
            PeerIdentityError: somebody else answers.
            TlsError: the handshake failed.
            StreamResetError: the peer reset the stream instead of answering.
            IdentityError: our own certificate cannot be had.
            LocalProtocolError: the request's headers are larger than the peer takes.
        """
        stream = await self._open(target, via, peer)
        return stream.make_pair()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _make_event(self) -> asyncio.Event:
        return asyncio.Event()

    async def _make_tunnel(self, key: PoolKey, identity: Identity) -> Tunnel:
        host, port = key.address
        tunnel: Tunnel | None = None

        def make() -> Tunnel:
            return Tunnel(
                self._make_endpoint(key, identity),
                client=True,
                on_unusable=self._on_unusable,
                on_stream_end=self._on_stream_end,
            )

        try:
            async with asyncio.timeout(self._dial_timeout):
                _, tunnel = await asyncio.get_running_loop().create_connection(make, host, port)
                self._tunnels.add(tunnel)
                tunnel.ended.add_done_callback(functools.partial(self._forget, tunnel))
                self._check_open()
                await tunnel.established
        except TimeoutError:
            if tunnel is not None:
                tunnel.close()
            raise ConnectionLost(
                f"{host}:{port} did not complete a connection and TLS handshake within {self._dial_timeout:g} s"
            ) from None
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver can be asked for
            reason = str(getattr(error, "strerror", None) or error).lower()
            raise ConnectionLost(f"cannot connect to {host}:{port}: {reason}") from error
        except BaseException:
            if tunnel is not None:
                tunnel.close()
            raise
        if not tunnel.endpoint.established:
            raise tunnel.failure or ConnectionLost(f"the handshake with {host}:{port} ended early")
        return tunnel

    async def _answers(self, tunnel: Tunnel) -> bool:
        try:
            async with asyncio.timeout(self._ping_timeout):
                await tunnel.ping()
                return True
        except TimeoutError:
            return False

    async def _wait_answer(self, stream: TunnelStream) -> None:
        await stream.wait_answer()

    def _forget(self, tunnel: Tunnel, _: object) -> None:
        self._tunnels.discard(tunnel)

    def _reap(self) -> None:
        super()._reap()
        if self._timer is None and not self._closed:  # come again when the next one is due
            deadline = self._pool.next_deadline()
            if deadline is not None:
                self._timer = asyncio.get_running_loop().call_at(max(deadline, self._now() + 1.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._reap()
