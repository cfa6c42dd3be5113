"""Frames survive however the bytes are cut, and nothing else is taken for one."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.limits import LIMITS
from weft.proto import frames
from weft.proto.frames import BrokenFrameError, pack_frame, read_frames
from weft.proto.v1 import generate_pb2 as pb


async def read_all(pieces: list[bytes]) -> list[pb.Abort]:
    reader = asyncio.StreamReader()
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return [message async for message in read_frames(reader, pb.Abort)]


@given(st.lists(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 200)))
def test_messages_come_out_as_they_went_in_however_they_are_cut(ids: list[int], cuts: list[int]):
    sent = b"".join(pack_frame(pb.Abort(request_id=each)) for each in ids)
    bounds = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    pieces = [sent[start:stop] for start, stop in pairwise(bounds)]

    assert [message.request_id for message in asyncio.run(read_all(pieces))] == ids


async def test_the_rest_of_a_frame_that_was_cut_off_is_dropped():
    whole = pack_frame(pb.Abort(request_id=7))

    for length in range(len(whole)):
        assert [message.request_id for message in await read_all([whole, whole[:length]])] == [7]


async def test_a_length_above_the_limit_is_refused_before_anything_is_read():
    with pytest.raises(BrokenFrameError, match="4294967295 bytes; at most 67108864"):
        await read_all([b"\xff\xff\xff\xff"])


async def test_bytes_that_are_no_message_are_refused():
    with pytest.raises(BrokenFrameError, match="2 bytes are no Abort"):
        await read_all([b"\x02\0\0\0\x09\x01"])


def test_a_message_that_the_other_end_would_refuse_is_not_packed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "LIMITS", replace(LIMITS, max_wire_message_bytes=9))
    pack_frame(pb.Abort(request_id=1))

    with pytest.raises(BrokenFrameError):
        pack_frame(pb.Failure(message="0123456789"))
