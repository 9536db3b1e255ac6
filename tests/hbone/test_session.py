"""What the Trio and asyncio adapters share, without a loop."""

from __future__ import annotations

import contextlib
import functools
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.tls import take
from tests.support.tunnels import who

from hbone.endpoint import Endpoint
from hbone.errors import ConnectionLost, ConnectRejected, ErrorCode, HboneError, LocalProtocolError, StreamResetError
from hbone.session import Session, as_request
from hbone.sessionstream import SessionStream
from hbone.testing import frames
from hbone.tls import TlsConnection, TlsContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from hbone.connect import ConnectRequest
    from hbone.identity import SpiffeId


class Stream(SessionStream):
    """An adapter's stream whose application does something each time that it is told something."""

    react: Callable[[Stream], None] = staticmethod(lambda _: None)

    def on_readable(self) -> None:
        self.react(self)

    def on_writable(self) -> None:
        self.react(self)

    def on_answer(self) -> None:
        pass


class Side(Session[Stream]):
    """An adapter without a loop."""

    def __init__(self, endpoint: Endpoint, *, client: bool) -> None:
        self.requested: list[Stream] = []
        self.finished = 0
        super().__init__(
            endpoint, client=client, on_request=self.requested.append, on_stream_end=lambda _: self._count()
        )

    def _count(self) -> None:
        self.finished += 1

    def now(self) -> float:
        return 0.0

    def wake_writer(self) -> None:
        pass

    def rearm(self) -> None:
        pass

    def make_stream(self, request: ConnectRequest, peer: SpiffeId) -> Stream:
        return Stream(self, request, peer)  # type: ignore[arg-type]  # Session is invariant in its streams

    def on_established(self) -> None:
        pass

    def on_pong(self) -> None:
        pass

    def on_lost(self) -> None:
        pass


class RawPeer:
    """A session whose peer's frames a test writes."""

    def __init__(self, *, client: bool) -> None:
        own, other = who("orders"), who("web")
        self.side = Side(
            Endpoint(
                TlsContext.client(own) if client else TlsContext.server(own),
                client=client,
                authorize=lambda _: True,
                now=0.0,
            ),
            client=client,
        )
        context = TlsContext.server(other) if client else TlsContext.client(other)
        self.tls = TlsConnection(context, server=client)
        for _ in range(4):
            self.tls.handshake()
            self.give(b"")
            self.take()
        assert self.side.endpoint.established
        self.give((b"" if client else frames.PREFACE) + frames.settings({}) + frames.settings_ack())

    def give(self, data: bytes) -> None:
        """Let the session read `data` at once."""
        if data:
            self.tls.write(data)
        ciphertext = take(self.tls)
        if self.side.failure is not None:
            return
        try:
            events = self.side.endpoint.receive_data(ciphertext, 0.0)
        except HboneError as error:
            self.side.lose(error)
        else:
            self.side.dispatch(events)

    def take(self) -> None:
        """Let the peer have what the session sends."""
        while data := self.side.endpoint.data_to_send():
            self.tls.receive_data(data)


def test_a_malformed_request_that_its_reset_follows_in_the_same_read_costs_nothing() -> None:
    peer = RawPeer(client=False)
    bad = frames.headers(1, frames.connect_headers("no port"))
    filler = b"".join(frames.unknown(0, bytes(60_000)) for _ in range(5))  # beyond one buffer of plaintext
    peer.give(bad + filler + frames.rst_stream(1, ErrorCode.CANCEL) + frames.connect(3))
    assert peer.side.failure is None
    assert [stream.stream_id for stream in peer.side.requested] == [3]


def test_what_an_application_does_before_it_knows_of_a_reset_is_passed_over() -> None:
    peer = RawPeer(client=False)
    peer.give(frames.connect(1) + frames.connect(3))
    first, second = peer.side.requested
    first.accept()
    for stream in (first, second):
        stream.react = SessionStream.close
    peer.give(
        b"".join(
            frames.data(stream, end_stream=True) + frames.rst_stream(stream, ErrorCode.CANCEL) for stream in (1, 3)
        )
    )
    assert peer.side.failure is None
    assert peer.side.finished == 2


def test_a_status_that_is_no_refusal_leaves_the_stream_to_be_answered() -> None:
    peer = RawPeer(client=False)
    peer.give(frames.connect(1))
    (stream,) = peer.side.requested
    with pytest.raises(LocalProtocolError, match="no refusal"):
        stream.reject(200)
    assert peer.side.finished == 0
    stream.reject(503)
    assert peer.side.finished == 1


class Hostile:
    """A peer that knows the protocol, and now and then breaks it."""

    def __init__(self, chance: random.Random, *, client: bool) -> None:
        self.chance = chance
        self.client = client
        """Whether it faces a client."""
        self.known: list[int] = []
        self.next = 1

    def open(self) -> bytes:
        """A request on a new stream."""
        stream, self.next = self.next, self.next + 2
        self.known.append(stream)
        fields = frames.connect_headers(self.chance.choice(["10.0.0.7:80", "10.0.0.7:80", "no port"]))
        return frames.headers(stream, fields, end_stream=self.chance.random() < 0.1)

    def answer(self, stream: int) -> bytes:
        """An answer to a request, mostly a good one."""
        if self.chance.random() < 0.05:
            return frames.headers(stream, ((b":status", b"nonsense"),))
        status = self.chance.choice([200, 200, 200, 100, 404, 503])
        return frames.response(stream, status, end_stream=self.chance.random() < 0.2)

    def frame(self) -> bytes:
        """What it sends next."""
        chance = self.chance
        if not self.known:
            return frames.ping() if self.client else self.open()
        stream = chance.choice(self.known) if chance.random() < 0.995 else chance.randrange(50)
        if chance.random() < 0.3:
            return self.answer(stream) if self.client else self.open()
        match chance.randrange(12):
            case 0:
                return frames.rst_stream(stream, chance.choice([0, 2, 5, 7, 8, 10, 99]))
            case 1:
                return frames.window_update(stream, chance.choice([1, 70_000, 2**30]))
            case 2:
                return frames.window_update(0, chance.choice([1, 70_000]))
            case 3 if chance.random() < 0.2:
                return frames.settings({4: chance.choice([0, 1, 65_535, 2**31 - 1])})
            case 4 if chance.random() < 0.2:
                return frames.settings({3: chance.choice([0, 1, 100]), 6: chance.choice([0, 40, 16_384])})
            case 5:
                return frames.ping(bytes(8), ack=chance.random() < 0.2)
            case 6 if chance.random() < 0.1:
                return frames.goaway(chance.choice([0, 1, 5, 2**31 - 1]))
            case 7:
                return frames.unknown(stream, bytes(10)) + frames.data(stream, b"x", pad=chance.randrange(5))
            case _:
                size = chance.choice([0, 1, 100, 5000])
                return frames.data(stream, bytes(size), end_stream=chance.random() < 0.2)


def use(stream: Stream, chance: random.Random) -> None:
    """What an application might do next with a stream; only why the stream is over may be raised."""
    with contextlib.suppress(StreamResetError, ConnectionLost, ConnectRejected):
        match chance.randrange(8):
            case 0 | 1 if not stream.session.client:
                stream.accept()
            case 2 if not stream.opened and not stream.session.client:
                stream.reject(503)
            case 4 if stream.opened and not stream.write_ended and not stream.closed:
                stream.write(memoryview(bytes(chance.choice([1, 100_000]))))
            case 5 if stream.opened:
                stream.end()
            case 6 if chance.random() < 0.3:
                stream.reset()
            case 7 if chance.random() < 0.3:
                stream.close()
            case _:
                stream.read(chance.choice([1, 10_000]))


@pytest.mark.parametrize("client", [True, False], ids=["client", "server"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_whatever_both_sides_do_raises_nothing_else_and_leaves_nothing_open(client: bool, seed: int) -> None:
    chance = random.Random(seed)
    peer = RawPeer(client=client)
    side = peer.side
    hostile = Hostile(chance, client=client)
    react = functools.partial(use, chance=chance)
    streams: list[Stream] = side.requested
    for _ in range(60):
        if client and chance.random() < 0.3:
            try:
                streams.append(side.open(as_request("10.0.0.7:80")))
                hostile.known.append(streams[-1].stream_id)
            except HboneError:
                pass
        for stream in streams:
            stream.react = react
        peer.give(b"".join(hostile.frame() for _ in range(chance.randrange(1, 4))))
        if streams:
            use(chance.choice(streams), chance)
        if chance.random() < 0.5:
            peer.take()
        assert set(side.streams) == set(side.engine._streams)
    side.lose(ConnectionLost("the end"))
    assert side.streams == {}
    assert side.blocked == {}
    assert side.engine._budget.used == 0
    assert side.finished == len(streams)
