"""From a command to a first answer: the port speaks at once, the banner is short and true, the answer is right."""

import json
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.harness import RunningServer, chat, launch

pytestmark = pytest.mark.e2e

QUESTION = "What is the capital of France?"


def test_the_port_answers_with_phase_and_percent_until_the_model_is_ready(default_model_gguf: Path) -> None:
    server = launch(default_model_gguf, "--kv-pool-bytes", "256MiB")
    answers: list[httpx.Response] = []
    refused: list[httpx.Response] = []

    def collect_until_ready() -> bool:
        answer = server.health()
        if answer is not None:
            answers.append(answer)
            if answer.status_code == 503 and not refused:
                refused.append(server.http.post("/generate", json={"inputs": "Hello"}))
                refused.append(server.http.post("/v1/chat/completions", json=chat(QUESTION)))
        return answer is not None and answer.status_code == 200

    try:
        server.wait_until(collect_until_ready, "ready", 90)
    finally:
        server.destroy()

    loading = [answer.json() for answer in answers[:-1]]
    assert {answer.status_code for answer in answers[:-1]} == {503}
    assert all(body["state"] == "loading" and 0 <= body["percent"] <= 100 for body in loading)
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers[:-1])
    assert "load" in {body["phase"] for body in loading}, "loading the weights takes longer than one poll"
    native, openai = refused
    assert (native.status_code, openai.status_code) == (503, 503)
    assert "error_type" in native.json()
    assert openai.json()["error"]["code"] == "not_ready"


def test_the_banner_fits_on_a_screen_and_its_seconds_add_up(running_server: RunningServer) -> None:
    lines = banner_of(running_server)

    assert len(lines) <= 15
    text = "\n".join(lines)
    for needed in ("SmolLM2-135M-Instruct", "135M parameters", "weights", "KV pool", "activations", "free", "/docs"):
        assert needed in text
    [ready_in] = [line for line in lines if line.strip().startswith("ready in")]
    total, _, phases = ready_in.split("ready in")[1].partition(" s = ")
    seconds = [float(phase.split()[-1]) for phase in phases.split(" + ")]
    assert sum(seconds) == pytest.approx(float(total), abs=0.05 * (len(seconds) + 1))


def test_the_command_in_the_banner_gets_a_right_answer(running_server: RunningServer) -> None:
    words = shlex.split(banner_of(running_server)[-1])
    url, body = words[1], words[words.index("-d") + 1]

    answer = httpx.post(
        url, content=body, headers={"content-type": "application/json"}, timeout=60, trust_env=False
    ).json()

    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_chat_says_the_same_streamed_and_not(running_server: RunningServer) -> None:
    body = chat(QUESTION, temperature=0, max_tokens=24)

    whole = running_server.http.post("/v1/chat/completions", json=body).json()
    usage_wanted = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = read_events(running_server, "/v1/chat/completions", {**body, **usage_wanted})

    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert "Paris" in text
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"]]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    assert counts(chunks[-1]["usage"]) == counts(whole["usage"])


def test_native_routes_say_the_same_streamed_and_not(running_server: RunningServer) -> None:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 12, "details": True}}

    whole = running_server.http.post("/generate", json=body).json()
    events = read_events(running_server, "/generate_stream", body)
    [compat] = running_server.http.post("/", json=body).json()

    assert "Paris" in whole["generated_text"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert [event["token"]["id"] for event in events] == [token["id"] for token in whole["details"]["tokens"]]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert compat["details"]["tokens"] == whole["details"]["tokens"]


def test_the_default_model_knows_how_likely_paris_is(running_server: RunningServer) -> None:
    """Reference log-probability of the float32 model: -0.2581; bfloat16 moves it a little."""
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 1, "details": True}}

    [token] = running_server.http.post("/generate", json=body).json()["details"]["tokens"]

    assert token["text"] == " Paris"
    assert token["logprob"] == pytest.approx(-0.2581, abs=0.05)


def banner_of(server: RunningServer) -> list[str]:
    """Lines from the product's name to the command to paste."""
    lines = server.wait_until(
        lambda: any(line.startswith("curl ") for line in server.output.splitlines()) and server.output.splitlines(),
        "the banner",
    )
    first = next(index for index, line in enumerate(lines) if line.startswith("Weft "))
    last = next(index for index, line in enumerate(lines) if line.startswith("curl "))
    return list(lines[first : last + 1])


def read_events(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Every event of a stream, without the end mark of /v1."""
    with server.http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data:").strip() for line in answer.iter_lines() if line.startswith("data:")]
    if path.startswith("/v1"):
        assert data.pop() == "[DONE]"
    return [json.loads(event) for event in data]


def counts(usage: dict[str, Any]) -> tuple[int, int, int]:
    """Token counts; how many came from the prefix cache may differ between two calls."""
    return usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]
