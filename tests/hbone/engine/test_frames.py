"""Frames that the engine writes."""

import pytest

from hbone.engine import frames
from hbone.engine.frames import FrameType
from hbone.errors import ErrorCode
from hbone.testing import frames as build


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (frames.settings([(4, 65_536), (5, 2**20)]), build.settings({4: 65_536, 5: 2**20})),
        (frames.settings(ack=True), build.settings_ack()),
        (frames.window_update(7, 2**31 - 1), build.window_update(7, 2**31 - 1)),
        (frames.rst_stream(7, ErrorCode.CANCEL), build.rst_stream(7, ErrorCode.CANCEL)),
        (frames.ping(b"12345678"), build.ping(b"12345678")),
        (frames.ping(b"12345678", ack=True), build.ping(b"12345678", ack=True)),
        (frames.goaway(9, ErrorCode.ENHANCE_YOUR_CALM, b"why"), build.goaway(9, ErrorCode.ENHANCE_YOUR_CALM, b"why")),
        (
            frames.header_block(3, b"block", end_stream=True, max_frame=16_384),
            build.headers(3, b"block", end_stream=True),
        ),
    ],
)
def test_builders_of_the_engine_and_of_the_tests_agree(ours: bytes, other: bytes) -> None:
    assert ours == other


def test_a_long_block_is_split_into_continuations_that_end_once() -> None:
    block = bytes(range(256)) * 200
    parts = build.split(frames.header_block(5, block, end_stream=True, max_frame=16_384))
    assert [kind for kind, *_ in parts] == [FrameType.HEADERS, FrameType.CONTINUATION, FrameType.CONTINUATION, 9]
    assert [flags for _, flags, *_ in parts] == [frames.END_STREAM, 0, 0, frames.END_HEADERS]
    assert b"".join(payload for *_, payload in parts) == block


def test_split_refuses_bytes_that_end_within_a_frame() -> None:
    wire = build.ping()
    assert build.split(build.PREFACE + wire) == [(FrameType.PING, 0, 0, bytes(8))]
    with pytest.raises(ValueError, match="8 bytes after the last frame"):
        build.split(wire + wire[:8])
    with pytest.raises(ValueError, match="a frame of 8 bytes has 7"):
        build.split(wire[:-1])
