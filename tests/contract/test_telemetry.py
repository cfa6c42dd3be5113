"""Metrics and log events of real exchanges: each request once, nothing private."""

import io
import json

import pytest
from tests.contract.house import build_house, say

PROMPT = "my secret prompt"
REQUESTS = [
    ("/generate", {"inputs": PROMPT}),
    ("/generate_stream", {"inputs": PROMPT}),
    ("/", {"inputs": PROMPT}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "n": 3}),
    ("/v1/completions", {"prompt": [PROMPT, PROMPT], "stream": True}),
]


def event_of(log_lines: io.StringIO, name: str) -> dict[str, object]:
    """The only event of that name."""
    (event,) = (line for line in map(json.loads, log_lines.getvalue().splitlines()) if line["event"] == name)
    return event


@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_one_http_request_counts_once(path: str, body: dict[str, object]):
    house = build_house(say("hello"))

    assert (await house.post(path, body)).status == 200

    metrics = house.context.metrics
    assert metrics.counter("tgi_request_count").value() == 1
    assert metrics.counter("tgi_request_success").value() == 1
    for name in ("duration", "validation_duration", "queue_duration", "inference_duration", "generated_tokens"):
        assert metrics.histogram(f"tgi_request_{name}").count() == 1
    assert metrics.histogram("tgi_request_input_length").count() == 1
    assert metrics.histogram("weft_time_to_first_token_seconds").count() == 1
    num_sequences = {"/v1/chat/completions": 3, "/v1/completions": 2}.get(path, 1)
    assert metrics.counter("weft_completion_tokens").value() == 6 * num_sequences
    assert metrics.histogram("weft_inter_token_seconds").count() == 5 * num_sequences
    assert metrics.counter("weft_http_requests").value(path, "200") == 1


@pytest.mark.parametrize(
    ("body", "label"),
    [({"inputs": "a", "parameters": {"top_k": 0}}, "validation"), ({}, "validation")],
)
async def test_a_failure_is_counted_by_kind(body: dict[str, object], label: str):
    house = build_house()

    await house.post("/generate", body)

    metrics = house.context.metrics
    assert metrics.counter("tgi_request_failure").value(label) == 1
    assert metrics.counter("tgi_request_count").value() == 1
    assert metrics.counter("tgi_request_success").value() == 0


async def test_overload_and_generation_failures_have_labels_of_their_own():
    house = build_house(say("x", fail_after=0), settings={"max_concurrent_requests": 1})

    await house.post("/generate", {"inputs": "a"})
    with house.context.admission.admit(1):
        await house.post("/generate", {"inputs": "a"})

    failure = house.context.metrics.counter("tgi_request_failure")
    assert (failure.value("generation"), failure.value("overloaded")) == (1, 1)


async def test_sequences_are_counted_by_how_they_ended():
    house = build_house(say("one two"))

    await house.post("/v1/completions", {"prompt": "a", "n": 2, "stop": ["two"]})
    await house.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}})

    metrics = house.context.metrics
    finished = metrics.counter("weft_sequences_finished")
    assert (finished.value("stop_sequence"), finished.value("length")) == (2, 1)
    succeeded = metrics.counter("vllm:request_success_total")
    assert (succeeded.value("test/bytes", "stop"), succeeded.value("test/bytes", "length")) == (1, 1)


async def test_gateways_find_what_they_choose_by():
    house = build_house(say("hello"))
    await house.post("/generate", {"inputs": "a"})

    lines = (await house.get("/metrics")).body.decode().splitlines()

    model = '{model_name="test/bytes"}'
    for sample in (
        f"vllm:num_requests_running{model} 0", f"vllm:num_requests_waiting{model} 0",
        f"vllm:kv_cache_usage_perc{model} 0", f"vllm:generation_tokens_total{model} 6",
        f"vllm:time_to_first_token_seconds_count{model} 1", f"vllm:time_per_output_token_seconds_count{model} 5",
        f"vllm:e2e_request_latency_seconds_count{model} 1",
    ):  # fmt: skip
        assert sample in lines
    (adapters,) = (line for line in lines if line.startswith("vllm:lora_requests_info"))
    assert adapters.startswith(
        'vllm:lora_requests_info{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""} 1'
    )


async def test_unknown_paths_share_one_label():
    house = build_house()

    for index in range(5):
        await house.get(f"/scan/{index}")

    assert house.context.metrics.counter("weft_http_requests").value("unmatched", "404") == 5


async def test_the_page_shows_state_and_limits():
    house = build_house()
    house.context.num_connections = lambda: 7
    with house.context.admission.admit(3):
        text = (await house.get("/metrics")).body.decode()

    assert "\nweft_ready 1\n" in text
    assert "\nweft_http_connections 7\n" in text
    assert '\nweft_admission_permits{state="used"} 3\n' in text
    assert '\nweft_limit{name="max_header_bytes"} 32768\n' in text
    assert 'weft_build_info{version="' in text


@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_a_request_is_one_event_without_its_prompt(log_lines: io.StringIO, path: str, body: dict[str, object]):
    answer = await build_house(say("my secret answer")).post(path, body, {"x-request-id": "r-1"})

    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    finished = [line for line in lines if line["event"] == "request.finished"]
    assert answer.status == 200
    assert "secret" not in log_lines.getvalue()
    assert len(finished) == 1
    assert finished[0]["request_id"] == "r-1"
    assert finished[0]["route"] == path
    assert finished[0]["status"] == 200
    assert finished[0]["prompt_tokens"] > 10
    assert finished[0]["completion_tokens"] > 10
    assert finished[0]["finish_reason"] in ("eos_token", "length")


async def test_neither_errors_nor_logs_show_keys_and_prompts(log_lines: io.StringIO):
    house = build_house(settings={"api_key": "sk-canary"})
    house.backend._script_for = lambda _: 1 / 0
    headers = {"authorization": "Bearer sk-canary"}

    bug = await house.post("/generate", {"inputs": PROMPT}, headers)
    bad = await house.post("/generate", {"inputs": PROMPT, "parameters": {"stop": [PROMPT, 1]}}, headers)
    wrong_key = await house.get("/info", {"authorization": "Bearer sk-other-canary"})

    for text in (bug.body.decode(), bad.body.decode(), wrong_key.body.decode(), log_lines.getvalue()):
        assert "canary" not in text
        assert "secret" not in text
    assert bug.status == 500
    assert "request.bug" in log_lines.getvalue()


async def test_unknown_fields_are_named_for_those_who_debug(log_lines: io.StringIO):
    await build_house().post("/generate", {"inputs": "a", "surprise": PROMPT})

    line = next(
        line for line in map(json.loads, log_lines.getvalue().splitlines()) if "unknown_fields" in line["event"]
    )
    assert line["fields"] == ["surprise"]


async def test_a_client_that_leaves_is_499_in_the_log(log_lines: io.StringIO):
    import asyncio

    house = build_house(steps=asyncio.Semaphore(0))
    async with house.exchange("POST", "/generate", {"inputs": "a"}) as answer:
        async with asyncio.timeout(5):
            while not house.backend.requests:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0)
        answer.leave()

    line = next(
        line for line in map(json.loads, log_lines.getvalue().splitlines()) if line["event"] == "request.finished"
    )
    assert (line["status"], line["error"], line["stage"]) == (499, "client_gone", "queue")
    assert house.context.metrics.counter("tgi_request_failure").value("dropped") == 1
