"""The table of TGI's metrics, row by row: what is on the page, what one request adds to it, and what adds nothing."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from tests.contract.house import MODEL_ID, build_house, say

from weft.core.request import FinishReason
from weft.router.app import GenerationAccounts
from weft.router.exchange import Timings
from weft.telemetry.metrics import METRICS, MetricKind

SECOND = 1_000_000_000
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
MESSAGES = {**CHAT, "model": MODEL_ID, "max_tokens": 9}
INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}]}
STREAM = {"stream": True}

GENERATIONS = [
    ("/", {"inputs": "Hi"}),
    ("/", {"inputs": "Hi", **STREAM}),
    ("/generate", {"inputs": "Hi"}),
    ("/generate", {"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": True}}),
    ("/generate_stream", {"inputs": "Hi"}),
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/completions", {"prompt": ["Hi", "Ho", "He"], "n": 2}),
    ("/v1/completions", {"prompt": "Hi", **STREAM}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 2, **STREAM}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/responses", {"input": "Hi", **STREAM}),
    ("/v1/messages", MESSAGES),
    ("/v1/messages", {**MESSAGES, **STREAM}),
    ("/invocations", {"inputs": "Hi"}),
    ("/invocations", CHAT),
    ("/vertex", {"instances": [{"inputs": "Hi"}, {"inputs": "Ho"}]}),
    ("/v2/models/m/infer", INFER),
    ("/v2/models/m/versions/1/infer", INFER),
]
ONCE = (
    "tgi_request_duration", "tgi_request_validation_duration", "tgi_request_queue_duration",
    "tgi_request_inference_duration", "tgi_request_mean_time_per_token_duration", "tgi_request_generated_tokens",
    "tgi_request_input_length", "tgi_request_max_new_tokens", "weft_time_to_first_token_seconds",
)  # fmt: skip


@pytest.mark.parametrize(("path", "body"), GENERATIONS)
async def test_a_generation_counts_once_on_every_route(path: str, body: dict[str, Any]) -> None:
    house = build_house(say("hello"))

    answer = await house.post(path, body, {"anthropic-version": "2023-06-01"})

    assert answer.status == 200, answer.body
    metrics = house.context.metrics
    assert metrics.counter("tgi_request_count").value() == 1
    assert metrics.counter("tgi_request_success").value() == 1
    assert {name: metrics.histogram(name).count() for name in ONCE} == dict.fromkeys(ONCE, 1)


@pytest.mark.parametrize(("path", "body"), GENERATIONS)
async def test_a_failed_generation_counts_once_and_has_no_durations(path: str, body: dict[str, Any]) -> None:
    house = build_house(say("x", fail_after=0))

    await house.post(path, body, {"anthropic-version": "2023-06-01"})

    metrics = house.context.metrics
    assert metrics.counter("tgi_request_count").value() == 1
    assert metrics.counter("tgi_request_failure").value("generation") == 1
    assert metrics.counter("tgi_request_success").value() == 0
    assert metrics.histogram("tgi_request_duration").count() == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"inputs": "Hi"}),
        ("/chat_tokenize", CHAT),
        ("/v1/messages/count_tokens", CHAT),
        ("/v1/responses/input_tokens", {"input": "Hi"}),
        ("/nowhere", {}),
    ],
)
async def test_what_generates_nothing_is_no_generation(path: str, body: dict[str, Any]) -> None:
    house = build_house()

    await house.post(path, body)
    for page in ("/info", "/health", "/metrics", "/v1/models"):
        await house.get(page)

    assert house.context.metrics.counter("tgi_request_count").value() == 0


def sums_of(text: str) -> dict[str, float]:
    """Name → value of each sample without labels."""
    return {name: float(value) for name, value in re.findall(r"^([a-z_]+) ([0-9.e+-]+)$", text, re.MULTILINE)}


def test_the_durations_of_a_request_are_cut_where_tgi_cuts_them() -> None:
    house = build_house()
    house.clock.ns = 20 * SECOND
    timings = Timings(
        started_ns=10 * SECOND, queued_ns=11 * SECOND, queue_ns=2 * SECOND, first_token_ns=14 * SECOND,
        finished_ns=18 * SECOND,
    )  # fmt: skip
    exchange: Any = SimpleNamespace(
        timings=timings, num_prompt_tokens=7, max_new_tokens=30, num_cached_tokens=3, num_completion_tokens=5,
        error=None, finish_reason=FinishReason.LENGTH, counts_vectors=False,
    )  # fmt: skip

    GenerationAccounts(house.context).add(exchange)

    shown = sums_of(house.context.metrics.exposition())
    assert shown["tgi_request_validation_duration_sum"] == 1
    assert shown["tgi_request_queue_duration_sum"] == 2
    assert shown["tgi_request_inference_duration_sum"] == 5
    assert shown["tgi_request_mean_time_per_token_duration_sum"] == 1
    assert shown["tgi_request_duration_sum"] == pytest.approx(10, abs=0.001)
    assert shown["tgi_request_input_length_sum"] == shown["weft_prompt_tokens"] == 7
    assert shown["weft_cached_prompt_tokens"] == 3
    assert shown["tgi_request_max_new_tokens_sum"] == 30
    assert shown["tgi_request_generated_tokens_sum"] == shown["weft_completion_tokens"] == 5


async def test_the_page_has_every_metric_that_has_a_sample_with_its_type() -> None:
    house = build_house(say("hello"))
    await house.post("/generate", {"inputs": "Hi"})

    answer = await house.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", answer.body.decode(), re.MULTILINE))
    # What has labels begins with its first label; the rest is there from the first scrape on.
    for spec in METRICS:
        labels = set(spec.labels) - {"model_name"}
        assert types.get(spec.name) == str(spec.kind) or labels, spec.name


async def test_durations_have_tgis_buckets() -> None:
    house = build_house(say("hello"))
    await house.post("/generate", {"inputs": "Hi"})

    text = (await house.get("/metrics")).body.decode()

    expected = [0.0001 * 1.5**power for power in range(1, 36)]
    for spec in METRICS:
        if spec.name.startswith("tgi_") and spec.name.endswith("duration") and not spec.labels:
            bounds = re.findall(rf'^{spec.name}_bucket{{le="([^"]+)"}}', text, re.MULTILINE)
            assert bounds[-1] == "+Inf"
            assert [float(bound) for bound in bounds[:-1]] == pytest.approx(expected), spec.name


async def test_names_of_vllm_show_the_same_numbers_under_the_models_name() -> None:
    house = build_house(say("hello"))
    await house.post("/generate", {"inputs": "Hi"})

    text = (await house.get("/metrics")).body.decode()

    for spec in METRICS:
        if not spec.same_as or len(spec.labels) != 1:
            continue
        suffix = "_count" if spec.kind is MetricKind.HISTOGRAM else ""
        (own,) = re.findall(rf"^{spec.same_as}{suffix} (\S+)$", text, re.MULTILINE)
        assert f'{spec.name}{suffix}{{model_name="{MODEL_ID}"}} {own}\n' in text


async def test_an_open_stream_is_a_gauge() -> None:
    house = build_house(say("hello"))
    gauge = house.context.metrics.gauge("weft_streams_open")

    async with house.exchange("POST", "/generate_stream", {"inputs": "Hi"}) as answer:
        answer.reads.clear()
        await answer.until(lambda seen: seen.status == 200)
        during = gauge.value()
        answer.reads.set()
        await answer.finished()

    assert (during, gauge.value()) == (1, 0)
