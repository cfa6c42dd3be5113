"""ShardBackend against a shard of this process: order, aborts, failures, death and return of the shard."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.fake_shard import FakeShard, running

from weft.core.events import EmbeddingEvent, FailureEvent, PromptReport, TokenEvent
from weft.core.info import EngineHealth, EngineInfo, EngineStats
from weft.core.request import FinishReason, Pooling, Request, RequestId, SamplingParams, StopConditions
from weft.errors import GenerationError, NotReadyError, NumericalError, OverloadedError, RequestError, ValidationError
from weft.limits import LIMITS
from weft.proto import convert
from weft.proto.v1 import generate_pb2 as pb
from weft.router.backend import Script, ScriptedBackend, ShardBackend, error_from_event

INFO = EngineInfo(model_id="m", vocab_size=10, max_total_tokens=20)


class Clock:
    def now_ns(self) -> int:
        return 5


def request(number: int) -> Request:
    return Request(
        request_id=RequestId(number),
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(seed=7),
        stop=StopConditions(max_new_tokens=9),
    )


def token(number: int, index: int, *, final: bool = False) -> TokenEvent:
    return TokenEvent(
        request_id=RequestId(number),
        token_index=index,
        token_id=index + 3,
        logprob=-0.5,
        finish_reason=FinishReason.LENGTH if final else None,
        prompt=PromptReport(num_cached_tokens=1, queue_ns=2) if index == 0 else None,
    )


class NotingShard(FakeShard):
    """Notes what comes in."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.added: asyncio.Queue[Request] = asyncio.Queue()
        self.aborted: asyncio.Queue[int] = asyncio.Queue()

    def receive(self, frame: pb.ClientFrame) -> None:
        if frame.WhichOneof("kind") == "add":
            self.added.put_nowait(convert.request_from_wire(frame.add, 0))
        else:
            self.aborted.put_nowait(frame.abort.request_id)


@asynccontextmanager
async def connected(socket: Path, **callbacks: Callable[..., None]) -> AsyncIterator[ShardBackend]:
    backend = ShardBackend(f"unix://{socket}", Clock(), **callbacks)
    try:
        async with asyncio.timeout(5):
            await backend.wait_connected()
        yield backend
    finally:
        await backend.close()


async def collect(backend: ShardBackend, wanted: Request) -> list[TokenEvent]:
    async with asyncio.timeout(5), aclosing(backend.generate(wanted)) as batches:
        return [event async for batch in batches for event in batch]


async def test_a_request_arrives_whole_and_its_events_come_back_in_order(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        task = asyncio.create_task(collect(backend, request(1)))
        assert await shard.added.get() == request(1)
        shard.send(token(1, 0))
        shard.send(token(1, 1), token(1, 2, final=True))

        assert await task == [token(1, 0), token(1, 1), token(1, 2, final=True)]
        assert backend.open_requests == ()
        assert shard.aborted.empty()


async def test_frames_are_split_by_request(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        tasks = [asyncio.create_task(collect(backend, request(number))) for number in (1, 2)]
        for _ in tasks:
            await shard.added.get()
        shard.send(token(1, 0), token(2, 0))
        shard.send(token(2, 1, final=True), token(1, 1, final=True))

        assert await tasks[0] == [token(1, 0), token(1, 1, final=True)]
        assert await tasks[1] == [token(2, 0), token(2, 1, final=True)]


async def test_closing_the_generator_aborts(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        batches = backend.generate(request(1))
        first = asyncio.create_task(anext(batches))
        await shard.added.get()
        shard.send(token(1, 0))
        await first
        await batches.aclose()

        async with asyncio.timeout(5):
            assert await shard.aborted.get() == 1
        shard.send(token(1, 1))  # a late event for a request that is gone harms nobody
        assert backend.open_requests == ()


async def test_cancelling_a_waiting_reader_aborts(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        task = asyncio.create_task(collect(backend, request(1)))
        await shard.added.get()
        task.cancel()

        async with asyncio.timeout(5):
            assert await shard.aborted.get() == 1


async def test_a_failure_keeps_its_class_and_touches_no_neighbour(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        broken = asyncio.create_task(collect(backend, request(1)))
        healthy = asyncio.create_task(collect(backend, request(2)))
        for _ in range(2):
            await shard.added.get()
        failure = FailureEvent(request_id=RequestId(1), code=NumericalError.code, message="NaN")
        shard.send(token(2, 0, final=True), failure)

        with pytest.raises(NumericalError, match="NaN"):
            await broken
        assert len(await healthy) == 1
        assert shard.aborted.empty()


async def test_a_dead_shard_ends_each_open_request_once_and_its_successor_serves(tmp_path: Path):
    shard, connections = NotingShard(), []
    async with connected_after(running(shard, tmp_path / "s"), tmp_path / "s", connections) as (backend, stop):
        batches = backend.generate(request(1))
        first = asyncio.create_task(anext(batches))
        await shard.added.get()
        shard.send(token(1, 0))
        await first
        kept = backend.open_requests[0]

        await stop()

        with pytest.raises(GenerationError, match="restarted"):
            await anext(batches)
        assert (kept.request, kept.emitted_token_ids) == (request(1), [3])
        with pytest.raises(NotReadyError):
            await collect(backend, request(2))
        assert not (await backend.health()).is_ready

        successor = NotingShard()
        async with running(successor, tmp_path / "s"):
            async with asyncio.timeout(10):
                await backend.wait_connected()
            task = asyncio.create_task(collect(backend, request(3)))
            assert (await successor.added.get()).request_id == 3
            successor.send(token(3, 0, final=True))
            assert len(await task) == 1
        assert connections[:3] == [True, False, True]


@asynccontextmanager
async def connected_after(shard_running, socket: Path, connections: list[bool]):
    await shard_running.__aenter__()
    stopped = False

    async def stop() -> None:
        nonlocal stopped
        stopped = True
        await shard_running.__aexit__(None, None, None)
        async with asyncio.timeout(5):
            while connections[-1]:  # noqa: ASYNC110 - the callback is the event
                await asyncio.sleep(0)

    async with connected(socket, on_connection=connections.append) as backend:
        try:
            yield backend, stop
        finally:
            if not stopped:
                await stop()


async def test_a_reader_that_lags_loses_its_request_and_the_stream_goes_on(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        batches = backend.generate(request(1))
        first = asyncio.create_task(anext(batches))
        await shard.added.get()
        shard.send(token(1, 0))
        await first
        shard.send(*(token(1, index) for index in range(1, 600)))
        other = asyncio.create_task(collect(backend, request(2)))
        await shard.added.get()
        shard.send(token(2, 0, final=True))
        assert len(await other) == 1

        assert len(await anext(batches)) == 512
        with pytest.raises(OverloadedError):
            await anext(batches)
        async with asyncio.timeout(5):
            assert await shard.aborted.get() == 1


async def test_statistics_and_facts_come_along(tmp_path: Path):
    shard, seen = NotingShard(), []
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s", on_stats=seen.append) as backend:
        await shard.has_router.wait()
        shard.send(stats=EngineStats(num_steps=4, num_running=2))
        async with asyncio.timeout(5):
            while not seen:  # noqa: ASYNC110 - the callback is the event
                await asyncio.sleep(0)

        assert seen == [EngineStats(num_steps=4, num_running=2)]
        assert await backend.info() == INFO
        assert await backend.health() == EngineHealth(is_ready=True, stalled_ns=3)


async def test_without_a_shard_nothing_hangs(tmp_path: Path):
    backend = ShardBackend(f"unix://{tmp_path / 'nobody'}", Clock())

    assert await backend.health() == EngineHealth(is_ready=False)
    with pytest.raises(NotReadyError):
        await backend.info()
    with pytest.raises(NotReadyError):
        await collect(backend, request(1))
    await backend.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [("overloaded", OverloadedError), ("validation", ValidationError), ("unheard-of", GenerationError)],
)
def test_codes_become_errors(code: str, kind: type[RequestError]):
    error = error_from_event(FailureEvent(request_id=RequestId(1), code=code, message="text"))

    assert type(error) is kind
    assert error.message == "text"


async def test_the_scripted_backend_obeys_max_new_tokens_and_notes_aborts():
    backend = ScriptedBackend(lambda _: Script(token_ids=range(100)), INFO)

    async with aclosing(backend.generate(request(1))) as batches:
        events = [event async for batch in batches for event in batch]
    assert len(events) == 9
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert backend.aborted == []

    batches = backend.generate(request(2))
    await anext(batches)
    await batches.aclose()
    assert backend.aborted == [2]


def vector(number: int) -> EmbeddingEvent:
    prompt = PromptReport(num_cached_tokens=1, queue_ns=2)
    return EmbeddingEvent(request_id=RequestId(number), values=b"\0\0\x80\x3f", prompt=prompt)


async def test_a_vector_comes_back_to_its_request(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        wanted = [replace(request(number), pooling=Pooling.MEAN) for number in (1, 2)]
        tasks = [asyncio.create_task(backend.embed(each)) for each in wanted]
        assert [await shard.added.get() for _ in wanted] == wanted
        shard.send(vector(2))
        shard.send(FailureEvent(request_id=RequestId(1), code=NumericalError.code, message="twice"))

        async with asyncio.timeout(5):
            assert await tasks[1] == vector(2)
            with pytest.raises(NumericalError, match="twice"):
                await tasks[0]
        assert backend.open_requests == ()
        assert shard.aborted.empty()


async def test_cancelling_the_wait_for_a_vector_aborts(tmp_path: Path):
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        task = asyncio.create_task(backend.embed(request(1)))
        await shard.added.get()
        task.cancel()

        async with asyncio.timeout(5):
            assert await shard.aborted.get() == 1
        shard.send(vector(1))  # a late event for a request that is gone harms nobody
        assert backend.open_requests == ()


@pytest.mark.parametrize("sent", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00\x0a\xff"], ids=["length", "message"])
async def test_a_frame_that_cannot_be_read_ends_the_stream_and_a_new_one_is_opened(tmp_path: Path, sent: bytes):
    shard, connections = NotingShard(), []
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s", on_connection=connections.append) as backend:
        task = asyncio.create_task(collect(backend, request(1)))
        await shard.added.get()
        shard.send_bytes(sent)

        with pytest.raises(GenerationError):
            await task
        async with asyncio.timeout(5):
            while len(connections) < 3:  # noqa: ASYNC110 - the callback is the event
                await asyncio.sleep(0.01)
        task = asyncio.create_task(collect(backend, request(2)))
        await shard.added.get()
        shard.send(token(2, 0, final=True))
        assert len(await task) == 1


async def test_a_shard_that_does_not_read_is_overloaded_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("weft.router.backend.LIMITS", replace(LIMITS, max_frame_backlog_bytes=100_000))
    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        await shard.has_router.wait()
        shard.stop_reading()
        wanted = replace(request(1), prompt_token_ids=(70_000,) * 50_000)
        asked = (replace(wanted, request_id=RequestId(number)) for number in range(40))
        readers = [asyncio.create_task(collect(backend, each)) for each in asked]
        done, _ = await asyncio.wait(readers, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert {type(reader.exception()) for reader in done} == {OverloadedError}
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


class Taking:
    """Takes every event that `takes` allows, and notes it."""

    def __init__(self, takes: Callable[[TokenEvent], bool] = lambda _: True) -> None:
        self._takes = takes
        self.taken: list[TokenEvent] = []

    def __call__(self, event: TokenEvent) -> bool:
        if not self._takes(event):
            return False
        self.taken.append(event)
        return True


async def collect_rest(backend: ShardBackend, wanted: Request, taking: Taking) -> list[TokenEvent]:
    async with asyncio.timeout(5), aclosing(backend.generate(wanted, taking)) as batches:
        return [event async for batch in batches for event in batch]


async def test_what_a_taker_takes_is_not_read_again_and_the_final_event_always_is(tmp_path: Path):
    shard, taking = NotingShard(), Taking()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        task = asyncio.create_task(collect_rest(backend, request(1), taking))
        await shard.added.get()
        shard.send(token(1, 0), token(1, 1))
        shard.send(token(1, 2), token(1, 3, final=True))

        assert await task == [token(1, 3, final=True)]
        assert taking.taken == [token(1, 0), token(1, 1), token(1, 2)]


async def test_behind_an_event_that_nobody_took_the_order_is_kept(tmp_path: Path):
    shard, taking = NotingShard(), Taking(lambda event: event.token_index != 1)
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        task = asyncio.create_task(collect_rest(backend, request(1), taking))
        await shard.added.get()
        shard.send(token(1, 0), token(1, 1), token(1, 2), token(1, 3, final=True))

        assert await task == [token(1, 1), token(1, 2), token(1, 3, final=True)]
        assert taking.taken == [token(1, 0)]


async def test_a_taker_that_fails_ends_its_own_request_alone(tmp_path: Path):
    def explode(_: TokenEvent) -> bool:
        raise ValueError("a bug")

    shard = NotingShard()
    async with running(shard, tmp_path / "s"), connected(tmp_path / "s") as backend:
        broken = asyncio.create_task(collect_rest(backend, request(1), Taking(explode)))
        healthy = asyncio.create_task(collect_rest(backend, request(2), Taking()))
        for _ in range(2):
            await shard.added.get()
        shard.send(token(1, 0), token(2, 0))
        shard.send(token(2, 1, final=True))

        with pytest.raises(ValueError, match="a bug"):
            await broken
        assert await healthy == [token(2, 1, final=True)]
        async with asyncio.timeout(5):
            assert await shard.aborted.get() == 1
