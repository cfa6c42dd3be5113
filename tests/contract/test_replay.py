"""Recording and replay over HTTP, and the fingerprint that every dialect's answers carry."""

from pathlib import Path
from typing import Any

import pytest
from tests.contract.house import EOS, VOCAB_SIZE, House, build_house, ids_of, say

from weft.router.recording import Recorder, RequestLine, read_lines

FINGERPRINT = "fp_0123456789abcdef"
MESSAGES = [{"role": "user", "content": "Hi"}]
GENERATING = {
    "/generate": {"inputs": "Hi"},
    "/generate_stream": {"inputs": "Hi"},
    "/": {"inputs": "Hi"},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"model": "tgi", "messages": MESSAGES, "max_tokens": 8},
    "/invocations": {"inputs": "Hi"},
    "/vertex": {"instances": [{"inputs": "Hi"}]},
    "/v2/models/m/infer": {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["Hi"]}]},
    "/replay": {"prompt_token_ids": ids_of("Hi", eos=False), "sampling": {}, "stop": {"max_new_tokens": 8}},
}
STREAMED = ("/generate_stream", "/", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


def replay_body(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": ids_of("Hi", eos=False),
        "sampling": {"temperature": 0.5, "seed": 2**64 - 1, "logit_bias": [[5, -1.5]], "penalty_style": "openai"},
        "stop": {"max_new_tokens": 8, "eos_token_ids": [EOS]},
        **changes,
    }


@pytest.mark.parametrize("path", GENERATING)
async def test_every_dialect_says_who_answered(path: str) -> None:
    answer = await build_house().post(path, GENERATING[path])

    assert answer.status == 200
    assert answer.headers["x-system-fingerprint"] == FINGERPRINT


@pytest.mark.parametrize("path", STREAMED)
async def test_every_stream_says_who_answers(path: str) -> None:
    answer = await build_house().post(path, {**GENERATING[path], "stream": True})

    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-system-fingerprint"] == FINGERPRINT


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_answers_of_openai_have_the_field_streamed_or_not(path: str) -> None:
    house = build_house()

    whole = await house.post(path, GENERATING[path])
    stream = await house.post(path, {**GENERATING[path], "stream": True})

    assert whole.json["system_fingerprint"] == FINGERPRINT
    assert all(event["system_fingerprint"] == FINGERPRINT for event in stream.events if event != "[DONE]")


async def test_replay_gives_ids_and_every_bit() -> None:
    house = build_house(say("yes", logprob=-0.1))

    answer = await house.post("/replay", replay_body())

    assert answer.json == {
        "token_ids": ids_of("yes"),
        "logprobs": [(-0.1).hex()] * 4,
        "finish_reason": "eos_token",
        "system_fingerprint": FINGERPRINT,
    }
    (request,) = house.backend.requests
    assert request.sampling.seed == 2**64 - 1
    assert request.sampling.logit_bias == ((5, -1.5),)
    assert request.stop.eos_token_ids == (EOS,)


@pytest.mark.parametrize(
    ("changes", "field", "status"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids", 422),
        ({"prompt_token_ids": [VOCAB_SIZE]}, "prompt_token_ids", 422),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids", 422),
        ({"prompt_token_ids": [5] * 100}, "prompt_token_ids", 422),
        ({"sampling": {"temperature": 0}}, "temperature", 422),
        ({"sampling": {"seed": -1}}, "seed", 422),
        ({"sampling": {"top_n_tokens": 2}}, "sampling", 422),
        ({"sampling": {"prompt_logprobs": True}}, "sampling", 422),
        ({"sampling": {"penalty_style": "other"}}, "penalty_style", 422),
        ({"sampling": {"logit_bias": [[VOCAB_SIZE, 1.0]]}}, "logit_bias", 422),
        ({"stop": {"max_new_tokens": 100}}, "max_new_tokens", 422),
        ({"stop": {"max_new_tokens": 2, "eos_token_ids": [-7]}}, "eos_token_ids", 422),
        ({"stop": {}}, "max_new_tokens", 422),
    ],
)
async def test_a_wrong_replay_is_refused_by_name(changes: dict[str, Any], field: str, status: int) -> None:
    house = build_house()

    answer = await house.post("/replay", replay_body(**changes))

    assert answer.status == status, answer.body
    assert field in answer.json["error"]
    assert not house.backend.requests


async def test_ids_become_text() -> None:
    house = build_house()

    answer = await house.post("/detokenize", {"tokens": ids_of("Hi ü")})
    refused = await house.post("/detokenize", {"tokens": [VOCAB_SIZE]})

    assert answer.json == {"prompt": "Hi ü</s>"}
    assert refused.status == 422
    assert "tokens" in refused.json["error"]


def recorded(path: Path) -> list[RequestLine]:
    with path.open("rb") as file:
        return [line for line in read_lines(file, "recording") if isinstance(line, RequestLine)]


def recording_house(path: Path, text: str) -> tuple[House, Recorder]:
    house = build_house(say(text))
    house.context.recorder = recorder = Recorder(path, 2**20)
    return house, recorder


async def test_a_replay_is_not_recorded_again(tmp_path: Path) -> None:
    house, recorder = recording_house(tmp_path / "recording", "yes")

    await house.post("/replay", replay_body())

    recorder.close()
    assert recorded(tmp_path / "recording") == []


@pytest.mark.parametrize("path", [path for path in GENERATING if path != "/replay"])
async def test_every_dialect_is_recorded(path: str, tmp_path: Path) -> None:
    house, recorder = recording_house(tmp_path / "recording", "yes")

    answer = await house.post(path, GENERATING[path], {"x-request-id": "mine"})

    recorder.close()
    (line,) = recorded(tmp_path / "recording")
    (request,) = house.backend.requests
    assert answer.status == 200
    assert (line.request_id, line.index, line.system_fingerprint) == ("mine", 0, FINGERPRINT)
    assert tuple(line.prompt_token_ids) == request.prompt_token_ids
    assert (line.sampling, line.stop) == (request.sampling, request.stop)
    assert line.token_ids == ids_of("yes")
    assert line.finish_reason == "eos_token"


async def test_choices_are_recorded_one_by_one(tmp_path: Path) -> None:
    house, recorder = recording_house(tmp_path / "recording", "yes")

    await house.post("/v1/completions", {"prompt": "Hi", "n": 3, "temperature": 1, "seed": 5})

    recorder.close()
    lines = recorded(tmp_path / "recording")
    assert sorted(line.index for line in lines) == [0, 1, 2]
    assert len({line.sampling.seed for line in lines}) == 3


@pytest.mark.parametrize("batch_size", [1, 3, 50])
async def test_what_stands_behind_a_stop_string_is_not_recorded(batch_size: int, tmp_path: Path) -> None:
    house = build_house(say("one two three"), batch_size=batch_size)
    house.context.recorder = recorder = Recorder(tmp_path / "recording", 2**20)

    await house.post("/v1/completions", {"prompt": "Hi", "stop": "two"})

    recorder.close()
    (line,) = recorded(tmp_path / "recording")
    assert line.finish_reason == "stop_sequence"
    assert line.token_ids == ids_of("one two", eos=False)


async def test_what_failed_is_not_recorded(tmp_path: Path) -> None:
    house = build_house(say("yes", fail_after=2))
    house.context.recorder = recorder = Recorder(tmp_path / "recording", 2**20)

    assert (await house.post("/generate", {"inputs": "Hi"})).status == 424

    recorder.close()
    assert recorded(tmp_path / "recording") == []
