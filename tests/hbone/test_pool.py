"""The pool's decisions, as tables and as one property over random histories."""

from __future__ import annotations

import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbone.identity import SpiffeId
from hbone.pool import Dial, Ping, Pool, PoolKey, Use, Wait

ME = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/web")
PEER = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/orders")
KEY = PoolKey(ME, ("10.0.0.7", 15008), frozenset({PEER}))
OTHER_ADDRESS = PoolKey(ME, ("10.0.0.8", 15008), frozenset({PEER}))
OTHER_PEER = PoolKey(ME, ("10.0.0.7", 15008), frozenset({ME}))
OTHER_SOURCE = PoolKey(PEER, ("10.0.0.7", 15008), frozenset({PEER}))


@attrs.define(eq=False)
class Tunnel:
    """What the pool sees of a tunnel."""

    name: str = ""
    draining: bool = False
    limit: int = 1000
    open: int = 0
    heard_at: float = -math.inf

    @property
    def available_streams(self) -> int:
        return self.limit - self.open


def make_pool(**options: float) -> Pool[Tunnel]:
    return Pool(lambda tunnel: tunnel, heard_at=lambda tunnel: tunnel.heard_at, **options)  # type: ignore[arg-type]


def dial(pool: Pool[Tunnel], key: PoolKey = KEY, *, now: float = 0.0, **state: object) -> Tunnel:
    assert isinstance(pool.checkout(key, now), Dial)
    tunnel = Tunnel(**state)  # type: ignore[arg-type]
    pool.dialed(key, tunnel, now)
    return tunnel


def open_streams(pool: Pool[Tunnel], tunnel: Tunnel, count: int) -> None:
    for _ in range(count):
        pool.opened(tunnel)
        tunnel.open += 1


def finish(pool: Pool[Tunnel], tunnel: Tunnel, now: float) -> None:
    tunnel.open -= 1
    pool.finished(tunnel, now)


def test_one_caller_dials_and_the_others_wait() -> None:
    pool = make_pool()
    assert [type(pool.checkout(KEY, 0.0)) for _ in range(1000)] == [Dial, *[Wait] * 999]
    assert pool.ready(KEY) == 0


def test_a_tunnel_serves_those_who_waited() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    assert pool.ready(KEY) == 101  # its streams, and one who dials the next
    assert pool.checkout(KEY, 0.0) == Use(tunnel)


@pytest.mark.parametrize("other", [OTHER_ADDRESS, OTHER_PEER, OTHER_SOURCE])
def test_tunnels_are_not_shared_between_keys(other: PoolKey) -> None:
    pool = make_pool()
    dial(pool)
    assert isinstance(pool.checkout(other, 0.0), Dial)


def test_the_stream_after_the_hundredth_gets_a_further_tunnel() -> None:
    pool = make_pool()
    first = dial(pool)
    open_streams(pool, first, 100)
    second = dial(pool)
    assert pool.checkout(KEY, 0.0) == Use(second)


def test_the_peers_lower_limit_counts() -> None:
    pool = make_pool()
    tunnel = dial(pool, limit=2)
    open_streams(pool, tunnel, 2)
    assert isinstance(pool.checkout(KEY, 0.0), Dial)


def test_a_tunnel_that_was_full_is_used_again_when_a_stream_ends() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    open_streams(pool, tunnel, 100)
    finish(pool, tunnel, 1.0)
    assert pool.checkout(KEY, 1.0) == Use(tunnel)


def test_the_newest_tunnel_is_preferred_so_that_older_ones_become_idle() -> None:
    pool = make_pool(max_streams=1)
    first = dial(pool)
    open_streams(pool, first, 1)
    second = dial(pool)
    open_streams(pool, second, 1)
    finish(pool, first, 1.0)
    finish(pool, second, 1.0)
    assert pool.checkout(KEY, 1.0) == Use(second)


def test_a_failed_dial_is_its_callers_and_the_next_one_dials() -> None:
    pool = make_pool()
    assert isinstance(pool.checkout(KEY, 0.0), Dial)
    assert isinstance(pool.checkout(KEY, 0.0), Wait)
    pool.dial_failed(KEY)
    assert pool.ready(KEY) == 1
    assert isinstance(pool.checkout(KEY, 0.0), Dial)
    assert isinstance(pool.checkout(KEY, 0.0), Wait)


def test_goaway_retires_at_once_and_the_next_stream_dials() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    open_streams(pool, tunnel, 3)
    tunnel.draining = True
    assert isinstance(pool.checkout(KEY, 0.0), Dial)
    assert isinstance(pool.checkout(KEY, 0.0), Wait)
    assert pool.key_of(tunnel) is None
    finish(pool, tunnel, 1.0)  # its streams end later, which is no matter of the pool's


def test_a_tunnel_silent_for_long_is_asked_before_it_is_used() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    assert pool.checkout(KEY, 9.9) == Use(tunnel)
    assert pool.checkout(KEY, 10.0) == Ping(tunnel)
    assert isinstance(pool.checkout(KEY, 10.0), Wait)
    assert pool.ready(KEY) == 0
    pool.alive(tunnel, 10.1)
    assert pool.checkout(KEY, 10.1) == Use(tunnel)


def test_a_tunnel_heard_lately_is_not_asked() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    tunnel.heard_at = 59.0
    assert pool.checkout(KEY, 60.0) == Use(tunnel)


def test_a_tunnel_that_does_not_answer_is_replaced() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    assert pool.checkout(KEY, 60.0) == Ping(tunnel)
    pool.retire(tunnel)
    assert isinstance(pool.checkout(KEY, 60.0), Dial)


def test_idle_tunnels_are_closed_after_their_time_and_busy_ones_are_not() -> None:
    pool = make_pool()
    idle, busy = dial(pool, now=5.0), dial(pool, OTHER_ADDRESS, now=0.0)
    open_streams(pool, busy, 1)
    assert pool.next_deadline() == 305.0
    assert pool.on_time(304.9) == []
    assert pool.on_time(305.0) == [idle]
    assert pool.next_deadline() is None
    finish(pool, busy, 400.0)
    assert pool.next_deadline() == 700.0


def test_a_stream_restarts_the_idle_time() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    open_streams(pool, tunnel, 1)
    finish(pool, tunnel, 299.0)
    assert pool.on_time(300.0) == []
    assert pool.on_time(599.0) == [tunnel]


def test_beyond_the_capacity_the_longest_unused_goes() -> None:
    pool = make_pool(capacity=2)
    keys = [PoolKey(ME, ("10.0.0.1", port), None) for port in (1, 2, 3, 4)]
    a, b, c = (dial(pool, key, now=float(i)) for i, key in enumerate(keys[:3]))
    assert pool.next_deadline() == -math.inf
    assert pool.on_time(2.0) == [a]
    open_streams(pool, b, 1)
    open_streams(pool, c, 1)
    d = dial(pool, keys[3], now=3.0)
    open_streams(pool, d, 1)
    assert pool.on_time(3.0) == []  # every one is busy
    finish(pool, c, 4.0)
    assert pool.on_time(4.0) == [c]


def test_an_asked_tunnel_is_not_closed_as_idle() -> None:
    pool = make_pool()
    tunnel = dial(pool)
    assert pool.checkout(KEY, 300.0) == Ping(tunnel)
    assert pool.on_time(300.0) == []


def test_close_gives_every_tunnel_back() -> None:
    pool = make_pool()
    tunnels = [dial(pool), dial(pool, OTHER_PEER)]
    assert pool.close() == tunnels
    assert pool.statistics().tunnels == 0


@given(st.lists(st.tuples(st.sampled_from("cofrgtw"), st.integers(0, 5), st.floats(0.0, 40.0)), max_size=80))
def test_random_histories_keep_the_rules(steps: list[tuple[str, int, float]]) -> None:
    pool = make_pool(max_streams=3, capacity=4, idle_timeout=60.0)
    keys = [KEY, OTHER_ADDRESS]
    now = 0.0
    dialing: set[PoolKey] = set()
    live: list[Tunnel] = []
    pinged: list[Tunnel] = []
    for verb, pick, wait in steps:
        key = keys[pick % 2]
        if verb == "c":
            match pool.checkout(key, now):
                case Use(tunnel):
                    assert not tunnel.draining
                    assert tunnel.open < 3
                    assert pool.key_of(tunnel) is key
                    open_streams(pool, tunnel, 1)
                case Ping(tunnel):
                    assert tunnel not in pinged
                    pinged.append(tunnel)
                case Dial():
                    assert key not in dialing
                    dialing.add(key)
                case Wait():
                    assert key in dialing or any(pool.key_of(tunnel) is key for tunnel in pinged)
        elif verb == "o" and key in dialing:
            dialing.discard(key)
            tunnel = Tunnel()
            live.append(tunnel)
            pool.dialed(key, tunnel, now)
        elif verb == "f" and key in dialing:
            dialing.discard(key)
            pool.dial_failed(key)
        elif verb == "r" and live:
            tunnel = live[pick % len(live)]
            if tunnel.open:
                finish(pool, tunnel, now)
        elif verb == "g" and live:
            live[pick % len(live)].draining = True
        elif verb == "w" and pinged:
            pool.alive(pinged.pop(), now)
        elif verb == "t":
            now += wait
            for closed in pool.on_time(now):
                assert closed.open == 0
                live.remove(closed)
        counts = pool.statistics()
        assert counts.dialing == len(dialing)
        assert counts.idle <= counts.tunnels
        for each in keys:
            ready = pool.ready(each)
            assert ready >= 0
