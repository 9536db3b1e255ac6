"""A connection to an address that nobody has told of, where addresses are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from tests.support.pair import Pair, echo, open_pair

from ztunnel.control.demand import Demand

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def pair(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pair]:
    monkeypatch.setattr("ztunnel.control.demand.is_loopback", lambda _: False)  # the hosts of a pair are
    async with open_pair() as pair:
        with trio.fail_after(60):
            yield pair


async def test_connection_waits_for_the_answer_and_goes_by_it(pair: Pair) -> None:
    await pair.serve(echo)
    server = pair.server.workload
    pair.store.apply_addresses([], [server.uid])
    demand = pair.client.plane._plane.demand = Demand(pair.store, "")
    async with await pair.connect() as stream:
        await stream.send_all(b"x")
        await demand.more.wait()
        assert demand.unsaid() == [f"/{pair.server.ip}"]
        pair.store.apply_addresses([server])
        demand.answered([server.uid, f"/{pair.server.ip}"])
        assert await stream.receive_some(1) == b"x"
    await pair.settle(lambda: bool(pair.client.log.completed))
    assert pair.client.log.completed[0][0].parties.hbone_authority == f"{pair.server.ip}:{pair.app_port}"
    async with await pair.connect() as stream:  # known now
        await stream.send_all(b"y")
        assert await stream.receive_some(1) == b"y"
    assert demand.unsaid() == []


async def test_connection_is_refused_while_nobody_says_what_its_destination_is(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztunnel.control.demand.ANSWER_TIMEOUT", 0.01)
    await pair.serve(echo)
    pair.store.apply_addresses([], [pair.server.workload.uid])
    pair.client.plane._plane.demand = Demand(pair.store, "")
    stream = await pair.connect()
    async with stream:
        try:
            assert await stream.receive_some(1) == b""
        except trio.BrokenResourceError:
            pass
    await pair.settle(lambda: bool(pair.client.log.denied))
    assert "the control plane did not say" in str(pair.client.log.denied[0])
    assert not pair.client.log.completed  # nothing was dialled, above all not in plaintext
