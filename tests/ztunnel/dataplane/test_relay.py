"""The relay against scripted sockets: every order of ends, and would-block, partial send and reset at every step."""

from __future__ import annotations

import itertools
import random
import select
from typing import TYPE_CHECKING

import pytest
from tests.support.dataplane import FakeFar, RelayOwner, ScriptedPoller, ScriptedSocket, relay_of, scripted_reactor

from hbone.errors import ErrorCode
from ztunnel.dataplane.relay import CHUNK, Relay, join
from ztunnel.dataplane.sockets import SocketCalls
from ztunnel.errors import PolicyChanged, ReceiveFailed

if TYPE_CHECKING:
    from ztunnel.dataplane.reactor import Reactor

IN, OUT, ERR, HUP, RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLERR, select.EPOLLHUP, select.EPOLLRDHUP
RESET = ConnectionResetError(104, "Connection reset by peer")


def tell(reactor: Reactor, sock: ScriptedSocket, mask: int) -> None:
    """One turn with one event, and the turns that it asks for."""
    reactor.turn([(sock.number, mask)])
    settle(reactor)


def settle(reactor: Reactor) -> None:
    for _ in range(50):
        if not reactor.busy:
            return
        reactor.turn(())
    pytest.fail("the reactor does not come to rest")


def watched(reactor: Reactor) -> ScriptedPoller:
    poller = reactor._poller
    assert isinstance(poller, ScriptedPoller)
    return poller


# Bytes


def test_what_the_app_sent_before_the_start_is_relayed_at_once() -> None:
    sock = ScriptedSocket(b"hello")
    _, relay, far, _ = relay_of(sock)
    assert far.taken == b"hello"
    assert relay.read == 5


def test_a_short_read_costs_no_second_call() -> None:
    sock = ScriptedSocket()
    reactor, _, far, _ = relay_of(sock)
    sock.calls.clear()
    sock.to_read.append(b"y")
    tell(reactor, sock, IN)
    assert far.taken == b"y"
    assert sock.calls == {"recv": 1}


def test_a_write_that_fits_costs_one_call() -> None:
    sock = ScriptedSocket()
    reactor, relay, _, _ = relay_of(sock)
    sock.calls.clear()
    before = watched(reactor).calls
    assert relay.deliver(memoryview(b"answer")) == 6
    assert sock.calls == {"send": 1}
    assert watched(reactor).calls == before


def test_nothing_is_read_that_cannot_be_sent_on() -> None:
    sock = ScriptedSocket(b"x" * 100)
    reactor, relay, far, _ = relay_of(sock, FakeFar(window=30))
    assert len(far.taken) == 30
    assert sock.calls["recv"] == 1
    far.window = 50
    assert relay.resume()
    far.window = 50
    assert relay.resume()
    assert far.taken == b"x" * 100
    assert relay.read == 100
    assert not relay.resume()
    settle(reactor)


def test_a_callback_reads_four_chunks_at_most_and_goes_on_in_the_next_turn() -> None:
    sock = ScriptedSocket(*[b"x" * CHUNK] * 10)
    reactor = scripted_reactor()
    relay = Relay(reactor, SocketCalls(), sock, RelayOwner())
    far = FakeFar()
    relay.start(far)
    assert len(far.taken) == 4 * CHUNK
    reactor.turn(())
    assert len(far.taken) == 8 * CHUNK
    settle(reactor)
    assert len(far.taken) == 10 * CHUNK


def test_only_what_the_app_did_not_take_is_kept_and_credited_when_written() -> None:
    sock = ScriptedSocket()
    sock.takes.extend([3])
    reactor, relay, far, _ = relay_of(sock)
    assert relay.deliver(memoryview(b"abcdefgh")) == 3
    assert relay.deliver(memoryview(b"ijk")) == 0
    assert sock.calls["send"] == 1  # what is behind a queue is not tried
    sock.takes.extend([4, 0])
    tell(reactor, sock, OUT)
    assert far.credits == [4]
    tell(reactor, sock, OUT)
    assert far.credits == [4]
    tell(reactor, sock, OUT)
    assert far.credits == [4, 4]
    assert sock.written == b"abcdefghijk"
    assert relay.written == 11


def test_a_write_that_blocks_is_watched_for_once() -> None:
    sock = ScriptedSocket()
    sock.takes.extend([0])
    reactor, relay, _, _ = relay_of(sock)
    before = watched(reactor).calls
    assert relay.deliver(memoryview(b"abc")) == 0
    assert watched(reactor).calls == before + 1
    assert watched(reactor).masks[sock.number] & OUT
    tell(reactor, sock, OUT)
    sock.takes.extend([0])
    relay.deliver(memoryview(b"def"))
    tell(reactor, sock, OUT)
    assert sock.written == b"abcdef"
    assert watched(reactor).calls == before + 1


def test_bytes_that_come_before_the_start_are_written_in_order() -> None:
    sock = ScriptedSocket()
    sock.takes.extend([2, 0])
    reactor = scripted_reactor()
    owner = RelayOwner()
    relay = Relay(reactor, SocketCalls(), sock, owner)
    relay.deliver(memoryview(b"early"))
    far = FakeFar()
    relay.start(far)
    tell(reactor, sock, OUT)  # blocks again
    tell(reactor, sock, OUT)
    assert sock.written == b"early"
    assert far.credits == [3]


def test_a_relay_that_is_held_writes_from_its_start_on() -> None:
    sock = ScriptedSocket()
    reactor = scripted_reactor()
    relay = Relay(reactor, SocketCalls(), sock, RelayOwner())
    relay.hold()
    assert relay.deliver(memoryview(b"early")) == 0
    assert relay.deliver(memoryview(b" bird")) == 0
    assert not sock.written
    sock.takes.extend([3])
    far = FakeFar()
    relay.start(far)
    tell(reactor, sock, OUT)
    assert sock.written == b"early bird"
    assert far.credits == [3, 7]
    assert relay.deliver(memoryview(b"late")) == 4


# Ends


def test_fin_of_the_app_is_end_stream_and_the_other_direction_goes_on() -> None:
    sock = ScriptedSocket()
    reactor, relay, far, owner = relay_of(sock)
    sock.to_read.extend([b"last", b""])
    tell(reactor, sock, IN | RDHUP)
    assert far.taken == b"last"
    assert far.ended
    relay.deliver(memoryview(b"still"))
    assert sock.written == b"still"
    assert owner.ended == 0


def test_end_stream_is_a_fin_once_all_was_written() -> None:
    sock = ScriptedSocket()
    sock.takes.extend([0])
    reactor, relay, far, owner = relay_of(sock)
    relay.deliver(memoryview(b"slow"))
    relay.finish()
    assert sock.calls["shutdown"] == 0
    tell(reactor, sock, OUT)
    assert sock.written == b"slow"
    assert sock.calls["shutdown"] == 1
    sock.to_read.extend([b"more", b""])
    tell(reactor, sock, IN | RDHUP)
    assert far.taken == b"more"
    assert sock.end == "closed"
    assert owner.ended == 1


def test_the_end_of_both_needs_no_shutdown() -> None:
    sock = ScriptedSocket(b"")
    reactor, relay, _, owner = relay_of(sock)
    relay.finish()
    settle(reactor)
    assert sock.end == "closed"
    assert sock.calls["shutdown"] == 0
    assert owner.ended == 1
    assert owner.error is None


def test_a_reset_app_is_connect_error_even_while_reading_is_paused() -> None:
    sock = ScriptedSocket(b"x" * 100)
    reactor, _, far, owner = relay_of(sock, FakeFar(window=10))
    tell(reactor, sock, IN | RDHUP | HUP | ERR)
    assert far.code == ErrorCode.CONNECT_ERROR
    assert sock.closed
    assert owner.ended == 1


def test_a_reset_found_by_a_read_is_connect_error() -> None:
    sock = ScriptedSocket()
    reactor, _, far, _ = relay_of(sock)
    sock.to_read.append(RESET)
    tell(reactor, sock, IN)
    assert far.code == ErrorCode.CONNECT_ERROR


def test_a_reset_found_by_a_write_is_connect_error_after_the_frame_was_taken() -> None:
    sock = ScriptedSocket()
    reactor, relay, far, owner = relay_of(sock)
    sock.takes.append(BrokenPipeError(32, "Broken pipe"))
    assert relay.deliver(memoryview(b"gone")) == 4
    assert owner.ended == 0  # the engine is in the middle of a frame
    settle(reactor)
    assert owner.ended == 1
    assert far.code == ErrorCode.CONNECT_ERROR


def test_a_reset_found_by_writing_the_queue_is_connect_error() -> None:
    sock = ScriptedSocket()
    sock.takes.extend([0, RESET])
    reactor, relay, far, _ = relay_of(sock)
    relay.deliver(memoryview(b"kept"))
    tell(reactor, sock, OUT)
    assert far.code == ErrorCode.CONNECT_ERROR
    assert sock.closed


def test_a_reset_that_writing_found_is_no_end_to_who_reads() -> None:
    sock = ScriptedSocket()
    sock.takes.append(RESET)
    reactor, relay, far, _ = relay_of(sock)
    relay.deliver(memoryview(b"lost"))
    sock.to_read.extend([b"tail", b""])  # as the kernel has it once it has told of the reset
    tell(reactor, sock, IN | RDHUP | HUP)
    settle(reactor)
    assert not far.ended
    assert far.code == ErrorCode.CONNECT_ERROR
    assert sock.closed


@pytest.mark.parametrize("code", [ErrorCode.NO_ERROR, ErrorCode.CANCEL, ErrorCode.STREAM_CLOSED])
def test_some_codes_are_a_normal_end_and_what_came_is_written(code: ErrorCode) -> None:
    sock = ScriptedSocket()
    sock.takes.extend([0])
    reactor, relay, far, owner = relay_of(sock)
    relay.deliver(memoryview(b"rest"))
    relay.end_after_reset(code, ReceiveFailed("never used"))
    assert sock.end == "open"
    tell(reactor, sock, OUT)
    assert sock.written == b"rest"
    assert sock.end == "closed"
    assert owner.error is None
    assert far.credits == []  # the stream is gone


@pytest.mark.parametrize("code", [ErrorCode.CONNECT_ERROR, ErrorCode.INTERNAL_ERROR, ErrorCode.REFUSED_STREAM])
def test_other_codes_reset_the_app(code: ErrorCode) -> None:
    sock = ScriptedSocket()
    sock.takes.extend([0])
    reactor, relay, _, owner = relay_of(sock)
    relay.deliver(memoryview(b"rest"))
    error = ReceiveFailed("broken")
    relay.end_after_reset(code, error)
    settle(reactor)
    assert sock.end == "reset"
    assert owner.error is error


def test_an_abort_cuts_both_ends_and_keeps_its_reason() -> None:
    sock = ScriptedSocket()
    reactor, relay, far, owner = relay_of(sock)
    relay.abort(PolicyChanged())
    relay.abort(PolicyChanged())
    settle(reactor)
    assert far.code == ErrorCode.CONNECT_ERROR
    assert sock.end == "reset"
    assert owner.ended == 1
    assert isinstance(owner.error, PolicyChanged)


def test_a_fault_of_ours_resets_both_ends() -> None:
    class Breaks(FakeFar):
        def take(self, nbytes: int) -> None:
            raise ValueError("a fault of ours")

    sock = ScriptedSocket()
    reactor, _, far, owner = relay_of(sock, Breaks())
    sock.to_read.append(b"x")
    tell(reactor, sock, IN)
    assert far.code == ErrorCode.INTERNAL_ERROR
    assert sock.end == "reset"
    assert owner.ended == 1


ENDS = ("app fin", "app reset", "far end", "far reset")
ORDERS = [pair for pair in itertools.product(ENDS, repeat=2) if pair[0] != pair[1]]


@pytest.mark.parametrize("blocked", [False, True], ids=["flowing", "blocked"])
@pytest.mark.parametrize(("first", "second"), ORDERS)
def test_every_order_of_two_ends_closes_once(first: str, second: str, blocked: bool) -> None:
    """Twelve orders; `blocked`: the app takes nothing until both ends have happened."""
    sock = ScriptedSocket()
    reactor, relay, far, owner = relay_of(sock)
    if blocked:
        sock.takes.extend([0] * 20)
        relay.deliver(memoryview(b"tail"))
    for end in (first, second):
        if relay.closed:
            break
        if end == "app fin":
            sock.to_read.append(b"")
            tell(reactor, sock, IN | RDHUP)
        elif end == "app reset":
            sock.to_read.append(RESET)
            tell(reactor, sock, IN | RDHUP | HUP | ERR)
        elif end == "far end":
            relay.finish()
        else:
            relay.end_after_reset(ErrorCode.CONNECT_ERROR, ReceiveFailed("reset"))
    sock.takes.clear()
    tell(reactor, sock, OUT)
    assert relay.closed
    assert sock.closed
    assert owner.ended == 1
    assert sock.number not in reactor.handlers
    clean = {first, second} == {"app fin", "far end"}
    assert (sock.end == "closed") == clean
    assert bytes(sock.written) == (b"tail" if blocked and clean else b"")
    if clean:
        assert far.ended
        assert far.code is None


# Plain TCP: two relays


def joined(one: ScriptedSocket, other: ScriptedSocket) -> tuple[Reactor, RelayOwner]:
    reactor = scripted_reactor()
    owner = RelayOwner()
    near = Relay(reactor, SocketCalls(), one, owner)
    far = Relay(reactor, SocketCalls(), other, owner)
    join(near, far)
    settle(reactor)
    return reactor, owner


def test_two_sockets_relay_both_ways_with_half_close() -> None:
    one, other = ScriptedSocket(b"request"), ScriptedSocket()
    reactor, owner = joined(one, other)
    assert other.written == b"request"
    one.to_read.append(b"")
    tell(reactor, one, IN | RDHUP)
    assert other.end == "fin"
    other.to_read.extend([b"answer", b""])
    tell(reactor, other, IN | RDHUP)
    assert one.written == b"answer"
    assert (one.end, other.end) == ("closed", "closed")
    assert owner.ended == 2


def test_a_slow_socket_pauses_the_other() -> None:
    one, other = ScriptedSocket(*[b"x" * CHUNK] * 20), ScriptedSocket()
    other.takes.extend([0] * 100)
    reactor, _ = joined(one, other)
    reads = one.calls["recv"]
    assert reads < 10
    other.takes.clear()
    tell(reactor, other, OUT)
    assert len(other.written) == 20 * CHUNK


@pytest.mark.parametrize("seed", range(4))
def test_any_cuts_of_reads_and_writes_keep_content_and_order(seed: int) -> None:
    rng = random.Random(seed)
    socks = ScriptedSocket(), ScriptedSocket()
    sent = bytearray(), bytearray()
    reactor, owner = joined(*socks)
    for number in range(1280):
        for side, sock in enumerate(socks):
            data = rng.randbytes(1 + number * 3 // 2)
            sent[side].extend(data)
            sock.to_read.append(data)
        # How much the next writes take: nothing, a few bytes, or whatever there is.
        for sock in rng.sample(socks, 2):
            sock.takes.clear()
            sock.takes.extend(rng.choice((0, 1, 7, 500, 20_000, 1 << 20)) for _ in range(rng.randrange(12)))
            tell(reactor, sock, IN | rng.choice((0, OUT)))
    for sock in socks:
        sock.takes.clear()
        sock.to_read.append(b"")
    while not all(sock.closed for sock in socks):
        for sock in socks:
            if not sock.closed:
                tell(reactor, sock, IN | OUT | RDHUP)
    assert bytes(socks[1].written) == sent[0]
    assert bytes(socks[0].written) == sent[1]
    assert owner.ended == 2


def test_a_reset_of_one_socket_resets_the_other() -> None:
    one, other = ScriptedSocket(), ScriptedSocket()
    reactor, owner = joined(one, other)
    one.to_read.append(RESET)
    tell(reactor, one, IN | HUP | ERR)
    assert other.end == "reset"
    assert one.closed
    assert owner.ended == 2
