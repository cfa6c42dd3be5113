"""The load generator reads every dialect's stream, keeps its clock, and never counts a broken reply as speed."""

import asyncio
import random
import statistics
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest

from weft.benchmark.load import (
    Reply,
    Target,
    arrival_gaps_s,
    gaps_beside_newcomer,
    run_closed_loop,
    run_open_loop,
    run_stream_and_newcomer,
    stream_request,
    sum_of_metric,
)

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
OPENAI_END = b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'

Answer = Callable[[asyncio.StreamWriter], Coroutine[None, None, None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Target]:
    """A server on a free port that reads one request and lets `answer` write the reply."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        await answer(writer)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield Target(host="127.0.0.1", port=server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await server.wait_closed()


def writing(*pieces: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return answer


async def reply_to(*pieces: bytes) -> Reply:
    async with serving(writing(*pieces)) as target:
        return await stream_request(target, {"prompt": "x"}, timeout_s=5)


def text_event(text: str) -> bytes:
    return b'data: {"choices":[{"index":0,"text":"%s","finish_reason":null}]}\n\n' % text.encode()


async def test_a_completion_stream_gives_text_usage_and_one_time_per_event() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":null}}\n\n'

    reply = await reply_to(HEAD, text_event("a"), text_event("b"), usage, OPENAI_END)

    assert reply.error is None
    assert reply.text == "ab"
    assert len(reply.token_ns) == 2
    assert reply.prompt_tokens == 7
    assert reply.completion_tokens == 3
    assert reply.finish_reason == "length"
    assert reply.sent_ns <= reply.token_ns[0] <= reply.token_ns[1] <= reply.finished_ns


async def test_a_chat_stream_is_read_from_its_deltas() -> None:
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
    content = b'data: {"choices":[{"delta":{"content":"Paris"},"finish_reason":"stop"}]}\n\n'

    reply = await reply_to(HEAD, role, content, b"data: [DONE]\n\n")

    assert reply.error is None
    assert reply.text == "Paris"
    assert len(reply.token_ns) == 1, "an empty delta is no token"


async def test_a_native_stream_is_read_from_its_tokens() -> None:
    token = b'data:{"index":1,"token":{"id":5,"text":" a","logprob":-1,"special":false},"generated_text":null}\n\n'
    last = (
        b'data:{"index":2,"token":{"id":6,"text":" b","logprob":-1,"special":false},"generated_text":" a b",'
        b'"details":{"finish_reason":"length","generated_tokens":2,"input_length":9,"seed":null}}\n\n'
    )

    reply = await reply_to(HEAD, token, last)

    assert reply.error is None
    assert reply.text == " a b"
    assert (reply.prompt_tokens, reply.completion_tokens) == (9, 2)


async def test_events_may_be_cut_anywhere_by_the_network() -> None:
    stream = HEAD + text_event("one") + text_event("two") + OPENAI_END

    reply = await reply_to(*(stream[i : i + 1] for i in range(len(stream))))

    assert reply.error is None
    assert reply.text == "onetwo"


async def test_chunked_transfer_encoding_is_undone() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (text_event("a")[:9], text_event("a")[9:], OPENAI_END)]

    reply = await reply_to(head, *chunks, b"0\r\n\r\n")

    assert reply.error is None
    assert reply.text == "a"


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull",), "status 429 full"),
        ((HEAD, text_event("a")), "the stream ended early"),
        ((HEAD, OPENAI_END), "no text"),
        ((HEAD, b'data: {"error":{"message":"overloaded"}}\n\n'), "error event"),
        ((HEAD, b"data: {broken\n\n"), "unreadable reply"),
        ((b"SSH-2.0-OpenSSH\r\n",), "unreadable reply"),
        ((), "status 0"),
    ],
)
async def test_a_reply_that_is_not_complete_is_an_error(pieces: tuple[bytes, ...], error: str) -> None:
    reply = await reply_to(*pieces)

    assert reply.error is not None
    assert reply.error.startswith(error)


async def test_a_refused_connection_is_an_error_and_not_an_exception() -> None:
    async with serving(writing()) as target:
        pass

    reply = await stream_request(target, {}, timeout_s=5)

    assert reply.error is not None
    assert reply.error.startswith("connection failed")


async def test_a_server_that_never_answers_runs_into_the_timeout() -> None:
    left = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        await left.wait()

    async with serving(answer) as target:
        reply = await stream_request(target, {}, timeout_s=0.05)
        left.set()

    assert reply.error == "no complete reply within 0.05 s"


class CountingSend:
    """Sends nothing; notes how many are in flight."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.most_in_flight = 0
        self.sent: list[object] = []

    async def __call__(self, body: dict[str, object]) -> Reply:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.sent.append(body["n"])
        await asyncio.sleep(0)
        self.in_flight -= 1
        return Reply(sent_ns=0)


async def test_a_closed_loop_keeps_exactly_so_many_requests_in_flight() -> None:
    send = CountingSend()

    replies = await run_closed_loop(send, [{"n": n} for n in range(20)], concurrency=4)

    assert len(replies) == 20
    assert sorted(send.sent) == list(range(20))
    assert send.most_in_flight == 4


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    num_sent = 0
    all_sent = asyncio.Event()

    async def send(_body: object) -> Reply:
        nonlocal num_sent
        num_sent += 1
        if num_sent == 5:
            all_sent.set()
        await all_sent.wait()
        return Reply(sent_ns=0)

    async with asyncio.timeout(5):
        replies = await run_open_loop(send, [{}] * 5, [0.001] * 5)

    assert len(replies) == 5


def test_poisson_arrivals_have_the_rate_and_the_spread_of_an_exponential() -> None:
    gaps = arrival_gaps_s(4.0, 20_000, random.Random(1))

    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)


def test_gaps_beside_a_newcomer_span_its_sending_to_its_first_token() -> None:
    running = Reply(sent_ns=0, token_ns=[10, 20, 30, 70, 90, 100])
    newcomer = Reply(sent_ns=25, token_ns=[80, 95])

    assert gaps_beside_newcomer(running, newcomer) == [10, 40, 20]


def test_a_newcomer_without_a_token_counts_until_its_end() -> None:
    running = Reply(sent_ns=0, token_ns=[10, 20, 30])

    assert gaps_beside_newcomer(running, Reply(sent_ns=15, finished_ns=18)) == [10]


def test_values_of_a_metric_add_up_over_its_labels() -> None:
    text = """# TYPE x_sum counter
x_sum{method="a"} 1.5
x_sum{method="b"} 2
x_sum_total 8
y 1
"""

    assert sum_of_metric(text, "x_sum") == 3.5
    assert sum_of_metric(text, "x_sum", '"b"') == 2
    assert sum_of_metric(text, "z") == 0


async def test_a_newcomer_is_sent_while_the_stream_still_runs() -> None:
    newcomer_is_here = asyncio.Event()
    is_first = True

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal is_first
        if not is_first:
            newcomer_is_here.set()
            await writing(HEAD, text_event("new"), OPENAI_END)(writer)
            return
        is_first = False
        await writing(HEAD, text_event("a"), text_event("b"))(writer)
        await newcomer_is_here.wait()
        await writing(text_event("c"), OPENAI_END)(writer)

    async with asyncio.timeout(5), serving(answer) as target:
        running, newcomer = await run_stream_and_newcomer(target, {"n": 1}, {"n": 2}, tokens_before=2)

    assert (running.text, newcomer.text) == ("abc", "new")
    assert running.token_ns[1] <= newcomer.sent_ns
