"""Many clients at once, and clients that leave: every answer right and ended once, every block given back."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.harness import RawClient, RunningServer, serving

pytestmark = pytest.mark.e2e

PROMPTS = (
    "The capital of France is",
    "One, two, three, four,",
    "def add(a, b):\n    return",
    "Water is made of",
)
LONG_PROMPT = "All work and no play makes Jack a dull boy. " * 600
"""About 7,000 tokens: some seconds of prefill."""


Send = Callable[..., RawClient]


@pytest.fixture(scope="module")
def narrow_server(default_model_gguf: Path) -> Iterator[RunningServer]:
    """Float32, so that answers do not depend on company; two sequences at once, so that the third one waits."""
    flags = ("--dtype", "float32", "--kv-pool-bytes", "512MiB", "--max-batch-size", "2")
    with serving(default_model_gguf, *flags) as server:
        yield server


# Many at once


@dataclass
class Stream:
    """What one client saw."""

    token_ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    final_texts: list[str] = field(default_factory=list)


async def read_stream(http: httpx.AsyncClient, prompt: str, num_tokens: int) -> Stream:
    stream = Stream()
    body = {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens, "details": True}}
    async with http.stream("POST", "/generate_stream", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data:"):
                continue
            event = json.loads(line[5:])
            assert not stream.final_texts, f"an event behind the final one: {event}"
            stream.token_ids.append(event["token"]["id"])
            stream.indices.append(event["index"])
            stream.texts.append("" if event["token"]["special"] else event["token"]["text"])
            if event["generated_text"] is not None:
                stream.final_texts.append(event["generated_text"])
    return stream


async def test_64_concurrent_streams_are_all_complete_and_right(default_model_gguf: Path) -> None:
    with serving(default_model_gguf, "--dtype", "float32", "--kv-pool-bytes", "512MiB") as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=120, limits=limits, trust_env=False) as http:
            alone = [await read_stream(http, prompt, 16) for prompt in PROMPTS]
            streams = await asyncio.gather(*(read_stream(http, PROMPTS[i % 4], 16) for i in range(64)))
        server.wait_idle()

    for i, stream in enumerate(streams):
        assert stream == alone[i % 4]
        assert stream.indices == list(range(1, len(stream.indices) + 1))
        assert stream.final_texts == ["".join(stream.texts)]


async def test_requests_beyond_the_places_get_429_and_the_others_finish(default_model_gguf: Path) -> None:
    with serving(default_model_gguf, "--max-concurrent-requests", "4", "--kv-pool-bytes", "256MiB") as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=120, limits=limits, trust_env=False) as http:
            body = {"inputs": PROMPTS[0], "parameters": {"max_new_tokens": 200}}
            answers = await asyncio.gather(*(http.post("/generate", json=body) for _ in range(16)))
            openai = {"prompt": PROMPTS[0], "max_tokens": 200, "ignore_eos": True, "stream": True}
            streams = await asyncio.gather(*(http.post("/v1/completions", json=openai) for _ in range(16)))
        server.wait_idle()

    for group in (answers, streams):
        statuses = sorted(answer.status_code for answer in group)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4
        for answer in group:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
    assert {answer.json()["error_type"] for answer in answers if answer.status_code == 429} == {"overloaded"}
    assert {answer.json()["error"]["code"] for answer in streams if answer.status_code == 429} == {
        "rate_limit_exceeded"
    }
    assert all("data: [DONE]" in answer.text for answer in streams if answer.status_code == 200)


# Clients that leave


@pytest.fixture
def send(narrow_server: RunningServer) -> Iterator[Send]:
    """Sends a request by a client of its own; whoever is still there afterwards leaves."""
    clients: list[RawClient] = []

    def send_by_new_client(path: str, body: dict[str, Any], share: float = 1.0) -> RawClient:
        clients.append(RawClient(narrow_server.port))
        return clients[-1].send(path, body, share)

    yield send_by_new_client
    for client in clients:
        client.leave()


def generate_body(prompt: str, num_tokens: int) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": num_tokens}}


def num_running(server: RunningServer) -> float:
    return server.metrics().value("tgi_batch_current_size")


def num_waiting(server: RunningServer) -> float:
    return server.metrics().value("tgi_queue_size")


def num_cancelled(server: RunningServer, stage: str) -> float:
    return server.metrics().value("weft_request_cancelled", stage=stage)


def test_leaving_a_stream_frees_its_blocks(send: Send, narrow_server: RunningServer) -> None:
    before = num_cancelled(narrow_server, "decode")
    client = send("/generate_stream", generate_body(PROMPTS[1], 4000))
    client.read_until(b'"index":3')
    assert narrow_server.metrics().value("weft_kv_blocks", state="used") > 0

    client.leave()

    narrow_server.wait_idle()
    assert num_cancelled(narrow_server, "decode") == before + 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", generate_body(PROMPTS[1], 4000)),
        ("/v1/completions", {"prompt": PROMPTS[1], "max_tokens": 4000, "ignore_eos": True, "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}),
    ],
)
def test_leaving_before_an_unstreamed_answer_frees_its_blocks(
    send: Send, narrow_server: RunningServer, path: str, body: dict[str, Any]
) -> None:
    client = send(path, body)
    narrow_server.wait_until(lambda: num_running(narrow_server) > 0, "the request runs")

    client.leave()

    narrow_server.wait_idle()


def test_leaving_during_prefill_frees_its_blocks(send: Send, narrow_server: RunningServer) -> None:
    client = send("/generate", generate_body(LONG_PROMPT, 1))
    narrow_server.wait_until(lambda: num_running(narrow_server) > 0, "the prompt is being computed")

    client.leave()

    narrow_server.wait_idle()
    last_ones = narrow_server.generate(PROMPTS[0], max_new_tokens=4)
    assert "Paris" in last_ones["generated_text"]


def test_leaving_the_queue_takes_nothing_from_those_who_run(send: Send, narrow_server: RunningServer) -> None:
    running = [send("/generate_stream", generate_body(PROMPTS[1], 4000)).read_until(b'"index":2') for _ in range(2)]
    waiting = send("/generate_stream", generate_body(PROMPTS[2], 4000))
    narrow_server.wait_until(lambda: num_waiting(narrow_server) == 1, "the third request waits")

    waiting.leave()

    narrow_server.wait_until(lambda: num_waiting(narrow_server) == 0, "the queue is empty", 5)
    assert num_running(narrow_server) == 2
    for client in running:
        client.read_until(b'"index":')
        client.leave()
    narrow_server.wait_idle()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_leaving_before_the_body_is_complete_costs_nothing(
    send: Send, narrow_server: RunningServer, share: float
) -> None:
    before = narrow_server.metrics().value("weft_engine_steps")

    send("/generate", generate_body(PROMPTS[0] * 100, 100), share).leave()

    narrow_server.wait_until(
        lambda: narrow_server.metrics().value("weft_http_requests_in_flight") <= 1, "only our own look is in flight"
    )
    assert narrow_server.metrics().value("weft_engine_steps") == before
    narrow_server.wait_idle()
