"""The contract of the loop, line by line."""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
from tests.support.dataplane import scripted_reactor

from ztunnel.dataplane.reactor import READ, Reactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Recorder:
    """A handler that remembers, and does what it is told."""

    def __init__(self, act: Callable[[int], object] = lambda mask: None) -> None:
        self.masks: list[int] = []
        self.faults = 0
        self.act = act

    def on_event(self, mask: int) -> None:
        self.masks.append(mask)
        self.act(mask)

    def on_fault(self) -> None:
        self.faults += 1


class Flusher:
    def __init__(self) -> None:
        self.flushed = 0

    def flush(self) -> None:
        self.flushed += 1

    def on_fault(self) -> None:
        """Nothing to close."""


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def fail(*_: object) -> None:
    raise ValueError("a fault of ours")


def test_main_runs_as_guest_and_its_result_is_returned() -> None:
    async def main(a: int, b: int) -> int:
        await trio.lowlevel.checkpoint()
        return a + b

    assert Reactor().run(main, 2, 3) == 5


def test_an_exception_of_main_is_raised_as_it_is() -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        Reactor().run(main)


def test_a_descriptor_that_becomes_readable_calls_its_handler(pair: tuple[socket.socket, socket.socket]) -> None:
    reactor = Reactor()
    done = trio.Event()
    handler = Recorder(lambda mask: done.set())

    async def main() -> None:
        reactor.add(pair[0].fileno(), handler)
        pair[1].send(b"x")
        await done.wait()

    reactor.run(main)
    assert handler.masks == [select.EPOLLIN]


def test_a_fault_of_a_callback_closes_its_own_connection_and_no_other(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    reactor = Reactor()
    done = trio.Event()
    bad = Recorder(fail)
    good = Recorder(lambda mask: done.set())

    async def main() -> None:
        reactor.add(pair[0].fileno(), bad)
        reactor.add(pair[1].fileno(), good)
        pair[1].send(b"x")
        pair[0].send(b"x")
        await done.wait()

    reactor.run(main)
    assert bad.faults == 1
    assert good.faults == 0


def test_a_fault_that_cannot_even_be_closed_takes_the_descriptor_out_of_the_loop(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    reactor = Reactor()
    handler = Recorder(fail)
    handler.on_fault = fail  # type: ignore[method-assign]
    reactor.add(pair[0].fileno(), handler)
    reactor.turn([(pair[0].fileno(), READ)])
    assert pair[0].fileno() not in reactor.handlers
    reactor.dispose()


def test_a_fault_of_the_loop_cancels_main_and_ticks_until_its_finally_blocks_are_done() -> None:
    class Breaks:
        """A poller whose third wait fails."""

        def __init__(self) -> None:
            self.real = select.epoll()
            self.waits = 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
            self.waits += 1
            if self.waits == 3:
                raise OSError("the poller broke")
            return self.real.poll(0.01, maxevents)

    steps: list[str] = []

    async def main() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)
                steps.append("cleaned up")

    with pytest.raises(OSError, match="the poller broke"):
        Reactor(poller=Breaks()).run(main)  # type: ignore[arg-type]
    assert steps == ["cleaned up"]


def test_keyboard_interrupt_in_a_callback_ends_the_loop_and_main() -> None:
    reactor = Reactor()
    steps: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        try:
            reactor.later(interrupt)
            await trio.sleep_forever()
        finally:
            steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        reactor.run(main)
    assert steps == ["cleaned up"]


def test_once_main_is_done_the_loop_ends_before_it_blocks_again() -> None:
    polls: list[float | None] = []

    class Counts:
        def __init__(self) -> None:
            self.real = select.epoll()

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
            polls.append(timeout)
            return self.real.poll(timeout, maxevents)

    async def main() -> None:
        """Done at the first tick."""

    Reactor(poller=Counts()).run(main)  # type: ignore[arg-type]
    assert all(timeout == 0 for timeout in polls[-1:])


def test_an_event_for_a_closed_socket_does_not_reach_the_one_that_got_its_number() -> None:
    reactor = Reactor()
    first, peer = socket.socketpair()
    second: list[socket.socket] = []
    number = first.fileno()
    late = Recorder()

    def replace(_: int) -> None:
        reactor.close(first)
        second.extend(socket.socketpair())
        reactor.add(second[0].fileno(), late)

    reactor.add(number, Recorder(replace))
    reactor.turn([(number, READ), (number, READ)])
    assert second[0].fileno() != number  # the number is taken until the turn ends
    assert late.masks == []
    assert first.fileno() == -1
    for sock in (peer, *second):
        sock.close()
    reactor.dispose()


def test_an_event_for_a_removed_socket_is_dropped(pair: tuple[socket.socket, socket.socket]) -> None:
    reactor = Reactor()
    handler = Recorder()
    other = Recorder(lambda mask: reactor.remove(pair[0].fileno()))
    reactor.add(pair[0].fileno(), handler)
    reactor.add(pair[1].fileno(), other)
    reactor.turn([(pair[1].fileno(), READ), (pair[0].fileno(), READ)])
    assert handler.masks == []
    reactor.dispose()


def test_a_paused_socket_that_hangs_up_is_told_once_and_not_polled_in_circles(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    reactor = Reactor()
    told = trio.Event()
    paused = Recorder(lambda mask: told.set())  # it reads nothing

    async def main() -> None:
        reactor.add(pair[0].fileno(), paused)
        pair[1].close()
        await told.wait()
        before = reactor.turns
        await trio.sleep(0.05)
        assert reactor.turns - before < 10

    reactor.run(main)
    assert len(paused.masks) == 1


def test_handshakes_share_a_millisecond_a_turn() -> None:
    now = 0.0
    reactor = Reactor(clock=lambda: now)
    done: list[int] = []

    def handshake(number: int) -> Callable[[], None]:
        def step() -> None:
            nonlocal now
            now += 0.0004
            done.append(number)

        return step

    for number in range(7):
        reactor.handshake(handshake(number))
    reactor.turn(())
    assert done == [0, 1, 2]
    assert reactor.busy
    reactor.turn(())
    assert done == [0, 1, 2, 3, 4, 5]
    reactor.turn(())
    assert done == list(range(7))
    reactor.dispose()


def test_what_is_put_off_runs_in_the_next_turn_and_flushes_come_last() -> None:
    reactor = Reactor()
    order: list[str] = []
    flusher = Flusher()

    def first() -> None:
        order.append("first")
        reactor.later(lambda: order.append("second"))
        reactor.flush_later(flusher)

    reactor.later(first)
    reactor.turn(())
    assert order == ["first"]
    assert flusher.flushed == 1
    reactor.turn(())
    assert order == ["first", "second"]
    reactor.dispose()


def test_what_an_event_puts_off_runs_once() -> None:
    ran: list[int] = []

    class Handler:
        def on_event(self, mask: int) -> None:
            reactor.later(lambda: ran.append(reactor.turns))

        def on_fault(self) -> None:
            raise AssertionError

    reactor = scripted_reactor()
    reactor.handlers[7] = Handler()
    reactor.turn([(7, READ)])
    for _ in range(3):
        reactor.turn(())
    assert ran == [2]
    reactor.turn([(7, READ), (7, READ)])
    reactor.turn(())
    assert ran == [2, 6, 6]


def test_a_task_started_by_a_callback_runs_and_its_fault_ends_nothing() -> None:
    reactor = Reactor()
    done = trio.Event()

    async def bad() -> None:
        await trio.lowlevel.checkpoint()
        fail()

    async def good(value: int) -> None:
        await trio.lowlevel.checkpoint()
        assert value == 7
        done.set()

    async def main() -> None:
        reactor.later(lambda: reactor.start_task(bad))
        reactor.later(lambda: reactor.start_task(good, 7))
        await done.wait()

    reactor.run(main)


def test_no_task_is_started_when_main_is_done() -> None:
    reactor = Reactor()
    with pytest.raises(RuntimeError, match="does not run"):
        reactor.start_task(trio.sleep, 0)

    async def main() -> None:
        await trio.lowlevel.checkpoint()

    reactor.run(main)
    with pytest.raises(RuntimeError, match="does not run"):
        reactor.start_task(trio.sleep, 0)


def test_timers_run_in_the_order_of_their_deadlines_and_cancelled_ones_not() -> None:
    reactor = Reactor()
    order: list[str] = []
    done = trio.Event()

    async def main() -> None:
        now = reactor.clock()
        reactor.call_at(now + 0.02, done.set)
        reactor.call_at(now + 0.01, lambda: order.append("later"))
        reactor.call_at(now, lambda: order.append("now"))
        reactor.call_at(now + 0.005, lambda: order.append("never")).cancel()
        await done.wait()

    reactor.run(main)
    assert order == ["now", "later"]


async def test_a_sweep_asks_everyone_once_a_second_while_anyone_is_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    reactor = Reactor(clock=trio.current_time)
    asked: list[float] = []

    class Swept:
        def on_time(self, now: float) -> None:
            asked.append(round(now - begin))
            if len(asked) == 3:
                reactor.unsweep(self)

    async with trio.open_nursery() as nursery:
        begin = trio.current_time()
        reactor.sweep(Swept())
        await nursery.start(lambda task_status: reactor.run_in_trio(task_status=task_status))
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert asked == [1, 2, 3]


@pytest.mark.parametrize(("sends", "slices"), [(True, 25), (False, 1)])
def test_a_sweep_leaves_turns_to_others_when_many_have_something_to_send(sends: bool, slices: int) -> None:
    reactor = Reactor(clock=lambda: 0.0)
    asked: list[int] = []

    class Swept:
        def __init__(self, number: int) -> None:
            self.number = number

        def on_time(self, now: float) -> None:
            asked.append(self.number)
            if sends:
                reactor.flush_later(Flusher())

    everyone = [Swept(number) for number in range(100)]
    for one in everyone:
        reactor.sweep(one)
    reactor._sweep()
    turns = 1
    while reactor.busy:
        if turns == 2:
            reactor.unsweep(everyone[99])  # gone before its time came
        reactor.turn(())
        if reactor.busy:
            turns += 1
    assert turns == slices
    assert asked == list(range(99 if sends else 100))
    assert len(reactor._timers) == 2  # the first, which was not waited for, and that of the next sweep


def test_a_sweep_that_takes_long_leaves_turns_to_others() -> None:
    ticks = iter(range(1000))
    reactor = Reactor(clock=lambda: float(next(ticks)))
    asked: list[object] = []

    class Slow:
        def on_time(self, now: float) -> None:
            asked.append(self)

    for _ in range(3):
        reactor.sweep(Slow())
    reactor._sweep()
    assert len(asked) == 1
    reactor.turn(())
    assert len(asked) == 2
    reactor.turn(())
    assert len(asked) == 3
    assert not reactor.busy


async def test_the_loop_runs_as_a_task_of_a_program_that_owns_trio(pair: tuple[socket.socket, socket.socket]) -> None:
    reactor = Reactor()
    done, ran = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: reactor.run_in_trio(task_status=task_status))
        reactor.add(pair[0].fileno(), Recorder(lambda mask: done.set()))
        pair[1].send(b"x")
        await done.wait()
        await trio.testing.wait_all_tasks_blocked()
        reactor.later(ran.set)  # wakes the loop, which sleeps
        await ran.wait()
        nursery.cancel_scope.cancel()


def test_no_descriptor_is_left_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def main() -> None:
        await trio.lowlevel.checkpoint()

    for _ in range(3):
        Reactor().run(main)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_closed_socket_is_closed_when_the_loop_ends() -> None:
    reactor = Reactor()
    one, other = socket.socketpair()

    async def main() -> None:
        reactor.add(one.fileno(), Recorder())
        reactor.close(one)

    reactor.run(main)
    assert one.fileno() == -1
    other.close()
