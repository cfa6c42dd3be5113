"""RouterStreams with a real socket and an engine that only notes what it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from weft.core.events import Event, FailureEvent, TokenEvent
from weft.core.info import EngineInfo, EngineStats
from weft.core.request import FinishReason, Pooling, Request, RequestId, SamplingParams, StopConditions
from weft.errors import OverloadedError
from weft.limits import LIMITS
from weft.proto import convert
from weft.proto.frames import pack_frame, read_frames
from weft.proto.v1 import generate_pb2 as pb
from weft.server import streams as streams_module
from weft.server.streams import RouterStreams

INFO = EngineInfo(model_id="m", vocab_size=10, max_total_tokens=20)
STEP = EngineStats(num_steps=1, step_tokens=1)


class Clock:
    def now_ns(self) -> int:
        return 5


@dataclass
class NotingEngine:
    added: asyncio.Queue[Request] = field(default_factory=asyncio.Queue)
    aborted: asyncio.Queue[RequestId] = field(default_factory=asyncio.Queue)
    is_full: bool = False

    def add(self, request: Request) -> None:
        if self.is_full:
            raise OverloadedError("Model is overloaded")
        self.added.put_nowait(request)

    def abort(self, request_id: RequestId) -> None:
        self.aborted.put_nowait(request_id)


def request(number: int) -> Request:
    return Request(
        request_id=RequestId(number),
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(seed=7),
        stop=StopConditions(max_new_tokens=9),
    )


def token(number: int, index: int = 0, *, final: bool = False) -> TokenEvent:
    reason = FinishReason.LENGTH if final else None
    return TokenEvent(request_id=RequestId(number), token_index=index, token_id=3, logprob=-0.5, finish_reason=reason)


class Router:
    """The other end of one stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = read_frames(reader, pb.ServerFrame)

    def add(self, wanted: Request) -> None:
        self.writer.write(pack_frame(pb.ClientFrame(add=convert.request_to_wire(wanted, 5))))

    def abort(self, number: int) -> None:
        self.writer.write(pack_frame(pb.ClientFrame(abort=pb.Abort(request_id=number))))

    async def next_frame(self) -> pb.ServerFrame:
        async with asyncio.timeout(5):
            return await anext(self._frames)

    async def next_events(self) -> list[Event]:
        """Of the next frame that has any."""
        while not (events := convert.events_from_frame(await self.next_frame())):
            pass
        return events

    async def wait_closed(self) -> None:
        async with asyncio.timeout(5):
            assert [frame async for frame in self._frames if frame.request_ids] == []


@dataclass
class House:
    streams: RouterStreams
    engine: NotingEngine
    path: Path
    routers: list[Router] = field(default_factory=list)

    async def connect(self) -> Router:
        self.routers.append(Router(*await asyncio.open_unix_connection(self.path)))
        return self.routers[-1]

    async def connect_and_add(self, *numbers: int) -> Router:
        router = await self.connect()
        for number in numbers:
            router.add(request(number))
            assert (await self.engine.added.get()) == request(number)
        return router

    async def next_abort(self) -> RequestId:
        async with asyncio.timeout(5):
            return await self.engine.aborted.get()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as house:
        yield house


@asynccontextmanager
async def open_house(directory: Path) -> AsyncIterator[House]:
    streams, engine = RouterStreams(Clock(), directory / "f"), NotingEngine()
    await streams.listen(engine, INFO)
    house = House(streams, engine, streams.path)
    try:
        yield house
    finally:
        await streams.close()
        for router in house.routers:
            router.writer.transport.abort()
        await asyncio.sleep(0)


async def test_events_go_to_the_router_that_brought_the_request(house: House):
    left, right = await house.connect_and_add(1), await house.connect_and_add(2)
    house.streams.deliver_threadsafe([token(1), token(2, final=True)], STEP)

    assert await left.next_events() == [token(1)]
    assert await right.next_events() == [token(2, final=True)]


async def test_a_router_that_leaves_takes_its_requests_along_and_no_others(house: House):
    left, right = await house.connect_and_add(1, 2), await house.connect_and_add(3)
    left.writer.close()

    assert {await house.next_abort(), await house.next_abort()} == {1, 2}
    house.streams.deliver_threadsafe([token(1), token(3)], STEP)
    assert await right.next_events() == [token(3)]
    assert house.engine.aborted.empty()


async def test_a_router_can_only_abort_what_it_brought(house: House):
    left, right = await house.connect_and_add(1), await house.connect_and_add(2)
    right.abort(1)
    right.abort(99)
    right.abort(2)
    left.abort(1)

    assert {await house.next_abort(), await house.next_abort()} == {1, 2}
    assert house.engine.aborted.empty()


async def test_an_id_that_is_taken_is_left_to_its_owner(house: House):
    owner, other = await house.connect_and_add(1), await house.connect()
    other.add(request(1))
    other.add(request(2))
    assert (await house.engine.added.get()).request_id == 2

    house.streams.deliver_threadsafe([token(1)], STEP)
    assert await owner.next_events() == [token(1)]


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (replace(request(1), prompt_token_ids=(1, 10)), "validation"),
        (replace(request(1), pooling=Pooling.MEAN), "validation"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused_by_its_code(house: House, wanted: Request, code: str):
    router = await house.connect()
    router.add(wanted)

    [failure] = await router.next_events()
    assert isinstance(failure, FailureEvent)
    assert (failure.request_id, failure.code) == (1, code)
    assert house.engine.added.empty()


async def test_a_full_engine_refuses_and_the_stream_goes_on(house: House):
    house.engine.is_full = True
    router = await house.connect()
    router.add(request(1))
    [failure] = await router.next_events()
    assert isinstance(failure, FailureEvent)
    assert failure.code == OverloadedError.code

    house.engine.is_full = False
    router.add(request(1))
    assert (await house.engine.added.get()).request_id == 1


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\x02\0\0\0\x0a\xff", b"\x09\0\0\0half"])
async def test_what_is_no_frame_ends_its_stream_alone(house: House, sent: bytes):
    broken, sound = await house.connect_and_add(1), await house.connect_and_add(2)
    broken.writer.write(sent)
    broken.writer.write_eof()

    assert await house.next_abort() == 1
    await broken.wait_closed()
    house.streams.deliver_threadsafe([token(2)], STEP)
    assert await sound.next_events() == [token(2)]


async def test_a_router_that_does_not_read_is_hung_up_on_before_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams_module, "LIMITS", replace(LIMITS, max_frame_backlog_bytes=10_000))
    async with open_house(tmp_path) as house:
        slow, quick = await house.connect_and_add(1), await house.connect_and_add(2)
        slow.writer.transport.pause_reading()
        for index in range(100):
            house.streams.deliver_threadsafe([token(1, index)] * 1000, STEP)
            await asyncio.sleep(0)

        assert await house.next_abort() == 1
        house.streams.deliver_threadsafe([token(2)], STEP)
        assert await quick.next_events() == [token(2)]


async def test_a_silent_stream_still_tells_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams_module, "STATS_INTERVAL_S", 0.01)
    async with open_house(tmp_path) as house:
        router = await house.connect()
        house.streams.deliver_threadsafe([], EngineStats(num_steps=7))

        while (frame := await router.next_frame()).stats.num_steps != 7:
            assert not frame.request_ids


async def test_a_step_of_prompt_tokens_alone_is_told_to_who_waits_for_it(house: House):
    waiting = await house.connect_and_add(1)
    house.streams.deliver_threadsafe([], STEP)

    assert (await waiting.next_frame()).stats.step_tokens == 1


async def test_closing_hangs_up_on_every_router(house: House):
    router = await house.connect_and_add(1)
    await house.streams.close()

    await router.wait_closed()
    with pytest.raises(OSError):
        await house.connect()
