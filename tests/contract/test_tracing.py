"""From an HTTP request to its spans, in process, with a real collector."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.contract.house import House, build_house, say
from tests.otlp_collector import Collector, attributes_of, collecting

from weft.config import Settings
from weft.router.backend import Script
from weft.telemetry.tracing import open_tracing

TRACE, PARENT_SPAN = "ab" * 16, "cd" * 8
TRACEPARENT = f"00-{TRACE}-{PARENT_SPAN}-01"
PROMPT = "my secret prompt"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def traced(collector: Collector, house: House) -> House:
    settings = Settings(otlp_endpoint=collector.endpoint)
    house.context.tracing = open_tracing(settings, "router", "1", house.clock)
    return house


def received(collector: Collector, house: House) -> dict[str, Any]:
    """All spans, by name."""
    assert house.context.tracing is not None
    house.context.tracing.close()
    return {span.name: span for span in collector.spans}


async def test_a_request_is_a_span_with_its_parts(collector: Collector):
    house = traced(collector, build_house(say("hello")))
    body = {"inputs": PROMPT, "parameters": {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_new_tokens": 30}}

    await house.post("/generate", body, {"traceparent": TRACEPARENT, "x-request-id": "r-1"})

    spans = received(collector, house)
    root = spans["POST /generate"]
    assert set(spans) == {"POST /generate", "validate", "queue", "inference"}
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT_SPAN)
    assert root.kind == root.SPAN_KIND_SERVER
    parts = [spans[name] for name in ("validate", "queue", "inference")]
    assert all(part.parent_span_id == root.span_id for part in parts)
    assert root.start_time_unix_nano == parts[0].start_time_unix_nano
    assert [part.end_time_unix_nano for part in parts[:2]] == [part.start_time_unix_nano for part in parts[1:]]
    assert abs(root.start_time_unix_nano - time.time_ns()) < 60e9
    assert [event.name for event in root.events] == ["first_token"]
    attributes = attributes_of(root)
    assert attributes.items() >= {
        "http.request.method": "POST", "http.route": "/generate", "http.response.status_code": 200,
        "weft.request_id": "r-1", "gen_ai.operation.name": "text_completion", "gen_ai.request.model": "test/bytes",
        "gen_ai.request.temperature": 0.5, "gen_ai.request.top_p": 0.9, "gen_ai.request.seed": "7",
        "gen_ai.request.max_tokens": 30, "gen_ai.usage.input_tokens": 17, "gen_ai.usage.output_tokens": 6,
    }.items()  # fmt: skip
    assert attributes["gen_ai.response.finish_reasons"] == ["eos_token"]
    assert "secret" not in str(collector.spans)


async def test_a_request_for_vectors_has_a_span_without_sampling(collector: Collector):
    info = {"pooling": "last", "embedding_size": 2, "normalizes": True}
    house = traced(collector, build_house(lambda _: Script(token_ids=(), vector=(3.0, 4.0)), info=info))

    await house.post("/v1/embeddings", {"input": ["ab", "c"]}, {"traceparent": TRACEPARENT})

    attributes = attributes_of(received(collector, house)["POST /v1/embeddings"])
    assert (attributes["gen_ai.operation.name"], attributes["gen_ai.usage.input_tokens"]) == ("embeddings", 5)
    assert not {"gen_ai.request.max_tokens", "gen_ai.request.frequency_penalty"} & set(attributes)


async def test_the_engine_is_told_the_span_it_works_for(collector: Collector):
    house = traced(collector, build_house())

    await house.post("/v1/completions", {"prompt": "a", "n": 2}, {"traceparent": TRACEPARENT})

    root = received(collector, house)["POST /v1/completions"]
    told = {request.trace_parent for request in house.backend.requests}
    assert told == {f"00-{TRACE}-{root.span_id.hex()}-01"}


async def test_without_a_collector_the_callers_trace_goes_to_the_engine():
    house = build_house()

    await house.post("/generate", {"inputs": "a"}, {"traceparent": TRACEPARENT})
    await house.post("/generate", {"inputs": "a"}, {"traceparent": "nonsense"})

    assert [request.trace_parent for request in house.backend.requests] == [TRACEPARENT, ""]


async def test_a_stream_and_a_chat_are_traced_to_their_end(collector: Collector):
    house = traced(collector, build_house(say("hello")))
    body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True}

    await house.post("/v1/chat/completions", body)

    attributes = attributes_of(received(collector, house)["POST /v1/chat/completions"])
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.usage.output_tokens"] == 6


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [({"inputs": "a", "parameters": {"top_k": 0}}, 422, "validation"), ({"inputs": "boom"}, 424, "generation")],
)
async def test_a_failure_is_on_its_span(collector: Collector, body: dict[str, Any], status: int, code: str):
    house = traced(collector, build_house(say("x", fail_after=0)))

    await house.post("/generate", body)

    root = received(collector, house)["POST /generate"]
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert attributes_of(root).items() >= {"error.type": code, "http.response.status_code": status}.items()


async def test_probes_and_pages_are_not_traced(collector: Collector):
    house = traced(collector, build_house())

    for path in ("/health", "/metrics", "/info", "/nothing"):
        await house.get(path)

    assert received(collector, house) == {}


async def test_every_generation_route_ends_its_span(collector: Collector):
    house = traced(collector, build_house(settings={"api_key": "k" * 8}))
    key = {"authorization": "Bearer " + "k" * 8}

    await house.post("/vertex", {"instances": [{"inputs": "a"}]}, key)
    await house.post("/tokenize", {"inputs": "a"}, key)
    await house.post("/generate", {"inputs": "a"})

    spans = received(collector, house)
    assert {"POST /vertex", "POST /tokenize", "POST /generate"} <= set(spans)
    assert attributes_of(spans["POST /generate"])["error.type"] == "invalid_api_key"


async def test_the_fate_of_spans_is_a_metric(collector: Collector):
    house = traced(collector, build_house())
    await house.post("/tokenize", {"inputs": "a"})
    received(collector, house)

    lines = (await house.get("/metrics")).body.decode().splitlines()

    assert 'weft_trace_spans{result="ended"} 1' in lines
    assert 'weft_trace_spans{result="delivered"} 1' in lines
