"""An east-west gateway as a process: a member of the mesh that hands tunnels on to endpoints of its own network.

`python -m tests.support.gateway_process ADDRESS PORT`, with the settings of a ztunnel in the environment.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import trio

import hbone
import hbone.trio
from hbone.trio.relay import relay
from ztunnel.control.enroll import settings
from ztunnel.membership import Membership
from ztunnel.metrics import Metrics

if TYPE_CHECKING:
    from hbone.identity import Identity


class _Source:
    def __init__(self, mesh: Membership) -> None:
        self._svids = mesh.svids
        self.subscribe = mesh.svids.subscribe

    def current(self) -> Identity:
        identity = self._svids.current()
        if identity is None:
            raise RuntimeError("no certificate")
        return identity


async def main(address: str, port: int) -> None:
    """Serve until the process ends."""
    config = settings(os.environ)
    mesh = Membership(config, Metrics("gateway"), None)

    async def handle(stream: hbone.trio.HboneStream) -> None:
        service = mesh.store.service_by_host(stream.request.authority.host)
        for uid in mesh.store.endpoints(service) if service is not None else ():
            workload = mesh.store.workloads[uid]
            if workload.network == config.network and workload.addresses:
                try:
                    upstream = await trio.open_tcp_stream(str(workload.addresses[0]), 15_008)
                except OSError:
                    continue
                await relay(stream, upstream)
                return
        stream.reject(503)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mesh.run)
        await mesh.first_picture()
        await mesh.svids.fetch()
        await hbone.trio.serve(handle, _Source(mesh), port=port, host=address, authorize=hbone.same_trust_domain)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))
