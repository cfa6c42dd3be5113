"""A client that leaves, at every stage, ends its request at once; one that does not read costs a bounded amount."""

import asyncio
from collections.abc import Callable

import pytest
from tests.contract.house import Answer, House, build_house, ids_of, say

from weft.core.events import TokenEvent
from weft.errors import OverloadedError
from weft.limits import LIMITS
from weft.router.backend import OpenRequest, Script

BODIES = {
    "/generate": {"inputs": "a"},
    "/generate_stream": {"inputs": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": ["a", "b"], "n": 2},
}


STREAMS = {
    "/": {"inputs": "a"},
    "/generate_stream": {"inputs": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/v1/messages": {"model": "tgi", "max_tokens": 9, "messages": [{"role": "user", "content": "a"}]},
    "/v1/responses": {"input": "a", "store": False},
}


def event_names(answer: Answer) -> list[bytes]:
    """In order; routes that name no events have none."""
    return [line for line in answer.body.splitlines() if line.startswith(b"event: ")]


def everything_is_free(house: House) -> bool:
    return (
        house.context.admission.used == 0
        and house.context.lifecycle.num_generating == 0
        and len(house.backend.aborted) == len(house.backend.requests)
    )


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)


def cancelled_at(house: House, stage: str) -> float:
    return house.context.metrics.counter("weft_request_cancelled").value(stage)


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_while_queued_aborts(path: str, stream: bool):
    house = build_house(steps=asyncio.Semaphore(0))
    num_sequences = 4 if path == "/v1/completions" else 1

    async with house.exchange("POST", path, {**BODIES[path], "stream": stream}) as answer:
        await until(lambda: len(house.backend.requests) == num_sequences)
        answer.leave()
        await answer.finished()

    assert answer.status == 0
    assert everything_is_free(house)
    assert cancelled_at(house, "queue") == 1


@pytest.mark.parametrize("path", list(BODIES))
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_between_tokens_aborts(path: str, stream: bool):
    steps = asyncio.Semaphore(0)
    house = build_house(say("hello" * 5), steps=steps)

    async with house.exchange("POST", path, {**BODIES[path], "stream": stream}) as answer:
        for _ in range(8):
            steps.release()
        await until(house.context.metrics.histogram("weft_time_to_first_token_seconds").count)
        await settle()
        answer.leave()
        await answer.finished()

    assert everything_is_free(house)
    assert cancelled_at(house, "decode") == 1


async def test_leaving_while_the_template_renders_starts_nothing():
    house = build_house()
    rendering = asyncio.Event()

    async def render(*_: object, **__: object) -> str:
        rendering.set()
        await asyncio.Event().wait()
        return ""

    house.template.render = render
    async with house.exchange("POST", "/v1/chat/completions", BODIES["/v1/chat/completions"]) as answer:
        await rendering.wait()
        answer.leave()
        await answer.finished()

    assert house.backend.requests == []
    assert cancelled_at(house, "template") == 1


async def test_leaving_while_the_prompt_is_tokenized_starts_nothing():
    house = build_house()
    tokenizing = asyncio.Event()

    async def encode(*_: object, **__: object) -> list[int]:
        tokenizing.set()
        await asyncio.Event().wait()
        return []

    house.context.model.tokenizer.encode_async = encode
    async with house.exchange("POST", "/generate", BODIES["/generate"]) as answer:
        await tokenizing.wait()
        answer.leave()
        await answer.finished()

    assert house.backend.requests == []
    assert cancelled_at(house, "tokenize") == 1


async def test_leaving_before_the_body_is_complete_is_noticed():
    house = build_house()
    messages = iter([{"type": "http.request", "body": b'{"inp', "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, object]:
        return next(messages)

    async def send(message: dict[str, object]) -> None:
        raise AssertionError(message)

    headers = [(b"content-type", b"application/json")]
    await house.app({"type": "http", "method": "POST", "path": "/generate", "headers": headers}, receive, send)

    assert cancelled_at(house, "body") == 1


async def test_leaving_after_the_answer_changes_nothing():
    house = build_house()

    answer = await house.post("/v1/chat/completions", BODIES["/v1/chat/completions"])

    assert answer.status == 200
    assert house.context.metrics.exposition().count("weft_request_cancelled{") == 0


async def test_a_thousand_departures_leave_nothing_behind():
    """Random cut points: before, between and behind tokens; places and tasks return to where they were."""
    house = build_house(say("hello world"), settings={"max_concurrent_requests": 1000})
    tasks_before = len(asyncio.all_tasks())

    async def come_and_go(turns: int, path: str) -> None:
        async with house.exchange("POST", path, {**BODIES[path], "stream": turns % 2 == 0}) as answer:
            for _ in range(turns):
                await asyncio.sleep(0)
            answer.leave()
            await answer.finished()

    paths = list(BODIES)
    for turns in range(50):
        await asyncio.gather(*(come_and_go(turns, paths[index % len(paths)]) for index in range(20)))
    await settle()

    assert house.context.admission.used == 0
    assert house.context.lifecycle.num_generating == 0
    assert house.context.metrics.gauge("weft_http_requests_in_flight").value() == 0
    watches = [task for task in asyncio.all_tasks() if task.get_name() == "stream-watch"]
    assert len(asyncio.all_tasks()) - len(watches) <= tasks_before
    for task in watches:
        task.cancel()


class TestSlowReaders:
    async def test_a_reader_that_takes_nothing_is_cut_off_after_the_stall_timeout(self):
        house = build_house(say("a" * 40))
        async with house.exchange("POST", "/generate_stream", BODIES["/generate_stream"]) as answer:
            await answer.until(lambda so_far: len(so_far.parts) > 0)
            answer.reads.clear()
            await settle()
            house.context.streams.look()
            house.clock.ns += int((LIMITS.stream_stall_timeout_s - 1) * 1e9)
            house.context.streams.look()
            await settle()
            assert not answer.task.done()
            house.clock.ns += 2_000_000_000
            house.context.streams.look()
            await answer.finished()

        assert everything_is_free(house)
        assert house.context.metrics.counter("weft_stream_stalled").value() == 1
        assert cancelled_at(house, "decode") == 1

    async def test_a_reader_that_stalls_at_the_last_frame_is_cut_off_too(self):
        steps = asyncio.Semaphore(0)
        house = build_house(say(""), steps=steps)
        async with house.exchange(
            "POST", "/v1/chat/completions", BODIES["/v1/chat/completions"] | {"stream": True}
        ) as answer:
            answer.reads.clear()
            steps.release()
            await until(lambda: answer.status == 200)
            await settle()
            house.context.streams.look()
            house.clock.ns += int((LIMITS.stream_stall_timeout_s + 1) * 1e9)
            house.context.streams.look()
            await answer.finished()

        assert house.context.admission.used == 0

    async def test_a_silent_stream_gets_comments_and_stays_open(self):
        steps = asyncio.Semaphore(1)
        house = build_house(say("ab"), steps=steps)
        async with house.exchange("POST", "/generate_stream", BODIES["/generate_stream"]) as answer:
            await answer.until(lambda so_far: len(so_far.parts) == 1)
            house.context.streams.look()
            house.clock.ns += 16_000_000_000
            house.context.streams.look()
            await answer.until(lambda so_far: len(so_far.parts) == 2)
            assert answer.parts[1] == b":\n\n"
            steps.release()
            steps.release()
            await answer.finished()

        assert answer.events[-1]["generated_text"] == "ab"

    @pytest.mark.parametrize("knows_flow", [False, True])
    @pytest.mark.parametrize("path", list(STREAMS))
    async def test_a_stream_that_waits_long_for_its_first_token_opens_with_a_comment(self, path: str, knows_flow: bool):
        """Silence of a minute is what proxies take for death; TGI opens every stream at once."""
        steps = asyncio.Semaphore(0)
        house = build_house(say("ab"), steps=steps)
        body = STREAMS[path] | {"stream": True}
        async with house.exchange("POST", path, body, knows_flow=knows_flow) as answer:
            await self.wait_in_queue(house, answer, seconds=14)
            assert answer.status == 0
            await self.wait_in_queue(house, answer, seconds=2)
            await answer.until(lambda so_far: len(so_far.parts) == 1)
            assert (answer.status, answer.parts[0]) == (200, b":\n\n")
            for _ in range(3):
                steps.release()
            await answer.finished()

        quick = await build_house(say("ab")).post(path, body)
        assert answer.body.count(b"data: ") == quick.body.count(b"data: ")
        assert event_names(answer) == event_names(quick)
        assert house.context.metrics.gauge("weft_streams_open").value() == 0

    @pytest.mark.parametrize("path", list(STREAMS))
    async def test_a_failure_behind_that_comment_is_an_event(self, path: str):
        steps = asyncio.Semaphore(0)
        house = build_house(say("ab", fail_after=0), steps=steps)
        async with house.exchange("POST", path, STREAMS[path] | {"stream": True}) as answer:
            await self.wait_in_queue(house, answer, seconds=16)
            await answer.until(lambda so_far: len(so_far.parts) == 1)
            steps.release()
            await answer.finished()

        assert answer.status == 200
        assert b"scripted" in answer.body
        assert house.context.admission.used == 0

    @staticmethod
    async def wait_in_queue(house: House, answer: Answer, *, seconds: int) -> None:
        """Let the watch look before and behind a time in which nothing happens."""
        await until(lambda: bool(house.backend.requests))
        await settle()
        house.context.streams.look()
        house.clock.ns += seconds * 1_000_000_000
        house.context.streams.look()
        await settle()

    def test_events_that_nobody_reads_are_bounded(self):
        entry = OpenRequest(request=None)

        for index in range(LIMITS.max_stream_buffer_events + 1):
            entry.put(TokenEvent(request_id=1, token_index=index, token_id=5, logprob=0.0))

        assert len(entry.pending) == LIMITS.max_stream_buffer_events
        assert isinstance(entry.failure, OverloadedError)


async def test_a_stop_string_aborts_what_the_engine_would_still_say():
    house = build_house(lambda _: Script(token_ids=ids_of("abc" * 10)))

    answer: Answer = await house.post("/generate", {"inputs": "a", "parameters": {"stop": ["b"]}})

    assert answer.json["generated_text"] == "ab"
    assert house.backend.aborted == [house.backend.requests[0].request_id]
