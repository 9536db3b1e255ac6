"""A mesh whose ztunnels ask for addresses when connections need them, with a real control plane."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.support.shop import DENY_ALL, ECHO, echo, shop, until
from tests.support.sizes import FULL

if TYPE_CHECKING:
    from pathlib import Path

    from hbone.testing.mesh import Mesh

pytestmark = [pytest.mark.netns, pytest.mark.timeout(300)]

ON_DEMAND = {"XDS_ON_DEMAND": "true", "ISTIO_META_DNS_CAPTURE": "false"}


async def _answers(running: Mesh, wanted: bytes) -> bool:
    return await until(lambda: _is(running, wanted), seconds=30)


async def _is(running: Mesh, wanted: bytes) -> bool:
    return await echo(running) == wanted


async def _known(running: Mesh, host: str) -> set[str]:
    dump = json.loads((await running.ztunnels[host].http(15000, "/config_dump"))[1])
    return {workload["name"] for workload in dump["workloads"]}


@pytest.mark.parametrize("workers", ["1", "2"] if FULL else ["2"])
async def test_what_connections_need_is_asked_for_and_nothing_else_is_known(tmp_path: Path, workers: str) -> None:
    environment = {**ON_DEMAND, "ZTUNNEL_WORKER_THREADS": workers}
    async with shop(tmp_path, namespaces=True, environment=environment) as running:
        alpha, beta = running.ztunnels["alpha"], running.ztunnels["beta"]

        async def knows_itself() -> bool:
            return await _known(running, "alpha") == {"client"}

        assert await until(knows_itself, seconds=30)
        assert await _answers(running, b"hello")
        assert await _known(running, "alpha") == {"client", "orders"}
        address = running.hosts["beta"].address
        line = await alpha.until_logged(30.0, direction="outbound", dst__workload="orders", bytes_sent=5)
        assert (line["dst.addr"], line["dst.hbone_addr"]) == (f"{address}:15008", f"{address}:{ECHO}")
        came = await beta.until_logged(30.0, direction="inbound", dst__workload="orders", bytes_sent=5)
        assert came["src.identity"] == "spiffe://cluster.local/ns/shop/sa/client"
        running.apply("closed", DENY_ALL)
        assert await _answers(running, b"")
        running.withdraw("closed")
        assert await _answers(running, b"hello")
        for ztunnel in (alpha, beta):
            await ztunnel.stop()
            ztunnel.start()
            await ztunnel.until_ready(60.0)
        assert await _answers(running, b"hello")
