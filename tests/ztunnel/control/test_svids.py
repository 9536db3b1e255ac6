from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from tests.support.control_plane import START, Authority, ScriptedControlPlane, wall

from hbone.identity import SpiffeId
from ztunnel.control.ca import CaClient
from ztunnel.control.svids import Backoff, NoCertificate, SvidManager
from ztunnel.control.transport import ControlPlaneError

if TYPE_CHECKING:
    from hbone.identity import Identity

ME = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
CA = Authority()


class Bench:
    """A manager on a scripted CA."""

    def __init__(self, lifetime: float = 3600, authority: Authority = CA) -> None:
        self.control = ScriptedControlPlane()
        self.control.sign_with(authority, lifetime=lifetime)
        self.saved: list[Identity] = []
        self.svids = SvidManager(
            CaClient(self.control.dial, lifetime=lifetime, wall=wall),
            save=self.saved.append,
            wall=wall,
            rng=random.Random(1),
        )


async def test_first_certificate_is_fetched_as_soon_as_the_identity_is_known(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    nursery.start_soon(bench.svids.run)
    assert bench.svids.status().state == "Initializing"
    bench.svids.want(ME)
    identity = await bench.svids.fetch()
    assert identity.svid.id == ME
    assert bench.svids.current() is identity
    assert bench.saved == [identity]
    assert bench.svids.status().state == "Available"
    assert trio.current_time() == 0


async def test_callers_share_one_fetch(autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    bench = Bench()
    bench.svids.want(ME)
    async with trio.open_nursery() as callers:
        for _ in range(20):
            callers.start_soon(bench.svids.fetch)
        nursery.start_soon(bench.svids.run)
    assert bench.control.dials == 1


async def test_renewal_comes_at_half_life_counted_from_receipt(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(lifetime=3600, authority=Authority(backdate=3600))  # by its dates, half life is over at once
    rotated: list[float] = []
    bench.svids.subscribe(lambda _: rotated.append(trio.current_time()))
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    await trio.sleep(3500)
    assert rotated[0] == 0
    assert 0.9 * 1800 <= rotated[1] <= 1.1 * 1800
    assert len(rotated) == 2


async def test_lifetime_of_seconds_renews_at_most_once_a_second(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    for lifetime in (1, 4):
        bench = Bench(lifetime=lifetime, authority=Authority(backdate=120))
        bench.svids.want(ME)
        nursery.start_soon(bench.svids.run)
        await trio.sleep(100)
        assert bench.control.dials <= 101
        assert bench.control.dials >= 100 / lifetime


async def test_certificate_of_four_seconds_never_lapses(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(lifetime=4)
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    await bench.svids.fetch()
    for _ in range(400):
        await trio.sleep(0.1)
        assert bench.svids.current() is not None


async def test_failure_keeps_the_certificate_until_it_expires_and_then_fails_closed(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(lifetime=100)
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    first = await bench.svids.fetch()
    bench.control.dial_error = ControlPlaneError("the control plane cannot be reached: connection refused")
    await trio.sleep(99)
    assert bench.svids.current() is first
    assert await bench.svids.fetch() is first
    assert "connection refused" in (bench.svids.status().last_error or "")
    await trio.sleep(2)
    assert bench.svids.current() is None
    with pytest.raises(NoCertificate, match=r"expired .* connection refused"):
        await bench.svids.fetch()
    assert bench.svids.status().state.startswith("Unavailable: ")
    bench.control.dial_error = None
    await trio.sleep(150)
    assert bench.svids.current() not in (None, first)


async def test_failures_back_off_from_one_second_to_at_most_150(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    bench.control.dial_error = ControlPlaneError("down")
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    times: list[float] = []
    dials = 0
    while len(times) < 12:
        await trio.sleep(0.05)
        if bench.control.dials > dials:
            dials = bench.control.dials
            times.append(trio.current_time())
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert 0.8 <= gaps[0] <= 1.3
    assert 1.6 <= gaps[1] <= 2.5
    assert max(gaps) <= 150.1
    assert min(gaps[-3:]) >= 119


async def test_caller_gets_the_error_of_a_failed_fetch_at_once(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    bench.control.dial_error = ControlPlaneError("the CA answered UNAUTHENTICATED: no")
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    await trio.testing.wait_all_tasks_blocked()
    before = trio.current_time()
    with pytest.raises(NoCertificate, match="UNAUTHENTICATED"):
        await bench.svids.fetch()
    assert trio.current_time() == before


async def test_caller_waits_ten_seconds_at_most(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    with pytest.raises(NoCertificate, match="not known yet"):
        await bench.svids.fetch()
    assert trio.current_time() == pytest.approx(10)


async def test_saved_certificate_is_used_without_asking_and_renewed_at_half_of_what_is_left(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(lifetime=100)
    saved = await CaClient(bench.control.dial, lifetime=100, wall=wall).create(ME, None)
    bench.control.dials = 0
    await trio.sleep(60)
    bench.svids.adopt(saved)
    nursery.start_soon(bench.svids.run)
    assert await bench.svids.fetch() is saved
    bench.svids.want(ME)  # discovery says the same: nothing changes
    await trio.sleep(10)
    assert bench.control.dials == 0
    await trio.sleep(15)
    assert bench.control.dials == 1
    assert bench.svids.current() is not saved


async def test_another_identity_drops_the_certificate_at_once(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    await bench.svids.fetch()
    other = SpiffeId.parse("spiffe://other.example/ns/shop/sa/web")
    bench.svids.want(other)
    assert bench.svids.current() is None
    assert (await bench.svids.fetch()).svid.id == other


async def test_clock_that_jumps_forward_makes_it_renew(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    skew = 0.0
    control = ScriptedControlPlane()
    control.sign_with(CA, lifetime=86400)
    svids = SvidManager(
        CaClient(control.dial, lifetime=86400, wall=wall), wall=lambda: wall() + skew, rng=random.Random(1)
    )
    svids.want(ME)
    nursery.start_soon(svids.run)
    await svids.fetch()
    skew = 70000.0  # the host slept
    await trio.sleep(61)
    assert control.dials >= 2


def test_backoff_doubles_with_a_fifth_of_jitter() -> None:
    backoff = Backoff(rng=random.Random(5))
    waits = [backoff.wait() for _ in range(12)]
    for number, wait in enumerate(waits):
        middle = min(150.0, 2.0**number)
        assert middle * 0.8 <= wait <= min(150.0, middle * 1.2)
    backoff.reset()
    assert backoff.wait() <= 1.2


def test_clock_begins_where_the_authority_is_valid() -> None:
    assert CA.root.not_valid_before_utc.timestamp() < START


async def test_fault_of_ours_costs_an_attempt_and_not_the_process(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench(lifetime=100)
    good = bench.control.on_unary

    def broken(_: bytes) -> bytes:
        raise KeyError("a bug")

    bench.control.on_unary = broken
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    with pytest.raises(NoCertificate, match="internal error: KeyError"):
        await bench.svids.fetch()
    bench.control.on_unary = good
    await trio.sleep(5)
    assert bench.svids.current() is not None


async def test_who_waits_while_the_identity_changes_gets_the_new_ones_certificate(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    bench = Bench()
    other = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/another")
    bench.control.hangs = True
    bench.svids.want(ME)
    nursery.start_soon(bench.svids.run)
    found: list[str] = []

    async def wait() -> None:
        found.append(str((await bench.svids.fetch()).svid.id))

    async with trio.open_nursery() as callers:
        callers.start_soon(wait)
        await trio.sleep(1)
        bench.svids.want(other)
        bench.control.hangs = False
    assert found == [str(other)]
    assert trio.current_time() == 1  # the request for the old one was given up
