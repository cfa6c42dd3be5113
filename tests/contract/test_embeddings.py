"""/v1/embeddings and /embed as bytes: every form of input and answer, every refusal, accounts and aborts."""

import asyncio
import base64
import math
import struct
from typing import Any

import huggingface_hub
import jsonschema
import openai
import pytest
from tests.contract.house import BOS, EOS, MODEL_ID, House, build_house, ids_of
from tests.contract.live import serve

from weft.core.request import Pooling
from weft.errors import NumericalError
from weft.router.backend import Script

VECTOR = (3.0, 4.0, 0.0, 12.0)
UNIT = [3 / 13, 4 / 13, 0.0, 12 / 13]


def embedding_house(**changes: Any) -> House:
    """Answers every text with `VECTOR`, which has length 13."""
    changes.setdefault("script_for", lambda request: Script(token_ids=(), vector=VECTOR, num_cached_tokens=2))
    changes.setdefault("info", {})
    changes["info"] = {"pooling": "last", "embedding_size": len(VECTOR), "normalizes": True} | changes["info"]
    return build_house(**changes)


async def sent(house: House, number: int) -> None:
    """Until the engine has been asked for `number` vectors."""
    async with asyncio.timeout(5):
        while len(house.backend.requests) < number:  # noqa: ASYNC110 - the backend has no event for it
            await asyncio.sleep(0)


def error_of(answer: Any) -> tuple[str, str, str]:
    error = answer.json["error"]
    return error["param"], error["code"], error["message"]


async def test_a_text_becomes_a_vector_of_length_one() -> None:
    house = embedding_house()

    answer = await house.post("/v1/embeddings", {"input": "hey", "model": MODEL_ID, "user": "somebody"})

    assert answer.status == 200
    [datum] = answer.json["data"]
    assert datum["object"] == "embedding"
    assert datum["index"] == 0
    assert datum["embedding"] == pytest.approx(UNIT)
    assert {key: value for key, value in answer.json.items() if key != "data"} == {
        "object": "list",
        "model": MODEL_ID,
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }
    [request] = house.backend.requests
    assert list(request.prompt_token_ids) == [BOS, *ids_of("hey", eos=False)]
    assert (request.pooling, request.stop.max_new_tokens) == (Pooling.LAST, 1)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", [[BOS, *ids_of("ab", eos=False)]]),
        (["a", "b"], [[BOS, *ids_of(text, eos=False)] for text in "ab"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", [7]], [[BOS, *ids_of("a", eos=False)], [7]]),
    ],
)
async def test_every_form_of_input_is_one_request_per_text(given: Any, prompts: list[list[int]]) -> None:
    house = embedding_house()

    answer = await house.post("/v1/embeddings", {"input": given})

    assert [list(request.prompt_token_ids) for request in house.backend.requests] == prompts
    assert [datum["index"] for datum in answer.json["data"]] == list(range(len(prompts)))
    assert answer.json["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_base64_is_float32_in_little_endian_order() -> None:
    answer = await embedding_house().post("/v1/embeddings", {"input": "a", "encoding_format": "base64"})

    raw = base64.b64decode(answer.json["data"][0]["embedding"])
    assert struct.unpack("<4f", raw) == pytest.approx(UNIT)


async def test_a_cut_vector_has_length_one_again() -> None:
    answer = await embedding_house().post("/v1/embeddings", {"input": "a", "dimensions": 2})

    assert answer.json["data"][0]["embedding"] == pytest.approx([0.6, 0.8])


async def test_a_model_without_normalize_module_gives_its_vector_as_it_is() -> None:
    answer = await embedding_house(info={"normalizes": False}).post("/v1/embeddings", {"input": "a"})

    assert answer.json["data"][0]["embedding"] == list(VECTOR)


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({"input": ""}, "input", "`input` must not be empty"),
        ({"input": []}, "input", "1 to 2048 entries. Given: 0"),
        ({"input": ["a"] * 2049}, "input", "1 to 2048 entries. Given: 2049"),
        ({"input": ["a", ""]}, "input", "`input[1]` must not be empty"),
        ({"input": [[5], []]}, "input", "`input[1]` must hold at least one token"),
        ({"input": [5, "a"]}, "input", "mix token ids"),
        ({"input": [5, 258]}, "input", "`input` token ids must be >= 0 and <= 257. Given: 258"),
        ({"input": [5, -1]}, "input", "Given: -1"),
        ({"input": 7}, "input", "`input` must be"),
        ({}, "input", "missing field `input`"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float or base64. Given: hex"),
        ({"input": "a", "dimensions": 0}, "dimensions", ">= 1 and <= 4. Given: 0"),
        ({"input": "a", "dimensions": 5}, "dimensions", "Given: 5"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1, or >= 1 and <= 64. Given: 0"),
        ({"input": "a", "truncate_prompt_tokens": 65}, "truncate_prompt_tokens", "Given: 65"),
    ],
)
async def test_what_is_wrong_is_named(body: dict[str, Any], field: str, text: str) -> None:
    house = embedding_house(max_input_tokens=64)

    answer = await house.post("/v1/embeddings", body)

    param, _, message = error_of(answer)
    assert (answer.status, param) == (400, field)
    assert text.lower() in message.lower()
    assert not house.backend.requests


async def test_a_text_that_is_too_long_is_refused_with_the_limit() -> None:
    house = embedding_house(max_input_tokens=64)

    answer = await house.post("/v1/embeddings", {"input": ["a", list(range(2, 67))]})

    param, code, message = error_of(answer)
    assert (answer.status, param, code) == (400, "input", "context_length_exceeded")
    assert "`input[1]` must have at most 64 tokens. Given: 65" in message


async def test_a_text_of_exactly_the_limit_is_served() -> None:
    answer = await embedding_house(max_input_tokens=64).post("/v1/embeddings", {"input": list(range(2, 66))})

    assert answer.status == 200


@pytest.mark.parametrize(("truncate", "length"), [(8, 8), (-1, 64)])
async def test_truncation_keeps_the_last_tokens_behind_the_first_one(truncate: int, length: int) -> None:
    house = embedding_house(max_input_tokens=64)

    answer = await house.post("/v1/embeddings", {"input": "x" * 400 + "end", "truncate_prompt_tokens": truncate})

    [request] = house.backend.requests
    assert len(request.prompt_token_ids) == answer.json["usage"]["prompt_tokens"] == length
    assert request.prompt_token_ids[0] == BOS
    assert list(request.prompt_token_ids[-3:]) == ids_of("end", eos=False)


async def test_listed_dimensions_are_the_only_ones() -> None:
    house = embedding_house(info={"embedding_dimensions": (2,)})

    assert (await house.post("/v1/embeddings", {"input": "a", "dimensions": 2})).status == 200
    assert (await house.post("/v1/embeddings", {"input": "a", "dimensions": 4})).status == 200
    refused = await house.post("/v1/embeddings", {"input": "a", "dimensions": 3})
    assert "one of 2 and 4. Given: 3" in error_of(refused)[2]


async def test_an_unknown_model_is_404() -> None:
    answer = await embedding_house().post("/v1/embeddings", {"input": "a", "model": "other"})

    assert answer.status == 404
    assert error_of(answer)[1] == "model_not_found"


async def test_a_generating_model_says_what_to_do() -> None:
    answer = await build_house().post("/v1/embeddings", {"input": "a"})

    assert answer.status == 400
    assert "--task embed" in error_of(answer)[2]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, 400),
        ("/v1/completions", {"prompt": "a"}, 400),
        ("/v1/responses", {"input": "a"}, 400),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "model": "tgi"}, 400),
        ("/generate", {"inputs": "a"}, 422),
        ("/generate_stream", {"inputs": "a"}, 422),
        ("/", {"inputs": "a"}, 422),
        ("/invocations", {"inputs": "a"}, 422),
    ],
)
async def test_an_embedding_model_generates_nothing(path: str, body: dict[str, Any], status: int) -> None:
    house = embedding_house()

    answer = await house.post(path, body)

    assert answer.status == status
    assert b"/v1/embeddings" in answer.body
    assert not house.backend.requests


async def test_info_and_models_say_the_task() -> None:
    embedding, generating = embedding_house(), build_house()

    info = (await embedding.get("/info")).json
    assert (info["task"], info["pooling"], info["embedding_size"]) == ("embed", "last", 4)
    assert (await embedding.get("/v1/models")).json["data"][0]["task"] == "embed"
    info = (await generating.get("/info")).json
    assert (info["task"], info["pooling"], info["embedding_size"]) == ("generate", None, None)
    assert (await generating.get("/v1/models")).json["data"][0]["task"] == "generate"


async def test_it_counts_as_one_request_without_tokens_between() -> None:
    house = embedding_house()

    await house.post("/v1/embeddings", {"input": ["ab", "c"]})

    text = (await house.get("/metrics")).body.decode()
    assert "tgi_request_count 1" in text
    assert "tgi_request_success 1" in text
    assert "tgi_request_input_length_sum 5" in text
    assert "tgi_request_generated_tokens_count 0" in text
    assert "tgi_request_max_new_tokens_count 0" in text
    assert "tgi_request_mean_time_per_token_duration_count 0" in text


async def test_a_long_list_goes_through_a_window_and_leaves_places_to_others() -> None:
    steps = asyncio.Semaphore(0)
    house = embedding_house(steps=steps, settings={"max_concurrent_requests": 8})

    async with house.exchange("POST", "/v1/embeddings", {"input": ["a"] * 20}) as answer:
        await sent(house, 4)
        for _ in range(20):
            await asyncio.sleep(0)
        assert (len(house.backend.requests), house.context.admission.used) == (4, 4)
        for _ in range(20):
            steps.release()
        await answer.finished()

    assert len(answer.json["data"]) == 20
    assert house.context.admission.used == 0


async def test_a_client_that_leaves_aborts_what_is_open_and_starts_nothing_more() -> None:
    house = embedding_house(steps=asyncio.Semaphore(1), settings={"max_concurrent_requests": 4})

    async with house.exchange("POST", "/v1/embeddings", {"input": ["a"] * 9}):
        await sent(house, 3)

    asked = {request.request_id for request in house.backend.requests}
    assert len(house.backend.aborted) == 2
    assert set(house.backend.aborted) < asked
    assert len(asked) == 3
    assert (house.context.admission.used, house.context.lifecycle.num_generating) == (0, 0)


async def test_one_failure_ends_the_request_and_aborts_the_others() -> None:
    def script_for(request: Any) -> Script:
        is_bad = len(request.prompt_token_ids) == 1
        return Script(token_ids=(), vector=VECTOR, fail_after=0 if is_bad else None, error=NumericalError("twice"))

    house = embedding_house(script_for=script_for)

    answer = await house.post("/v1/embeddings", {"input": [[5, 6], [7], [8, 9]]})

    assert (answer.status, error_of(answer)[1]) == (500, "numerical_error")
    assert house.context.admission.used == 0


async def test_no_place_is_429() -> None:
    house = embedding_house(settings={"max_concurrent_requests": 1}, steps=asyncio.Semaphore(0))

    async with house.exchange("POST", "/v1/embeddings", {"input": "a"}):
        await sent(house, 1)
        answer = await house.post("/v1/embeddings", {"input": "b"})

    assert (answer.status, "retry-after" in answer.headers) == (429, True)


async def test_an_end_token_that_the_tokenizer_leaves_out_is_appended() -> None:
    house = embedding_house(appended_token_id=EOS)

    await house.post("/v1/embeddings", {"input": ["a", [7, 8]]})

    text, ids = house.backend.requests
    assert list(text.prompt_token_ids) == [BOS, *ids_of("a")]
    assert ids.prompt_token_ids == (7, 8)


class TestTei:
    async def test_the_answer_is_a_list_of_vectors(self) -> None:
        one = await embedding_house().post("/embed", {"inputs": "a"})
        two = await embedding_house().post("/embed", {"inputs": ["a", "b"], "normalize": False, "dimensions": 2})

        assert one.json == [pytest.approx(UNIT)]
        assert two.json == [[3.0, 4.0], [3.0, 4.0]]

    @pytest.mark.parametrize(("direction", "kept"), [("Right", "xx"), ("Left", "nd"), (None, "xx")])
    async def test_truncation_cuts_one_end(self, direction: str | None, kept: str) -> None:
        house = embedding_house(max_input_tokens=3)

        body = {"inputs": "xxx" * 50 + "end", "truncate": True, "truncation_direction": direction}
        assert (await house.post("/embed", body)).status == 200

        [request] = house.backend.requests
        assert list(request.prompt_token_ids) == [BOS, *ids_of(kept, eos=False)]

    async def test_the_end_token_survives_a_cut(self) -> None:
        house = embedding_house(max_input_tokens=3, appended_token_id=EOS)

        await house.post("/embed", {"inputs": "xyz", "truncate": True})

        assert list(house.backend.requests[0].prompt_token_ids) == [BOS, *ids_of("x")]

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            ({"inputs": "x" * 9}, "`inputs` must have at most 3 tokens"),
            ({"inputs": ["x", ""]}, "`inputs[1]` must not be empty"),
            ({"inputs": "x", "prompt_name": "query"}, "`prompt_name`"),
            ({"inputs": "x", "truncation_direction": "up"}, "Right or Left"),
        ],
    )
    async def test_refusals_are_in_the_native_form(self, body: dict[str, Any], text: str) -> None:
        answer = await embedding_house(max_input_tokens=3).post("/embed", body)

        assert (answer.status, answer.json["error_type"]) == (422, "validation")
        assert text in answer.json["error"]


def test_the_official_client_reads_the_vectors() -> None:
    with serve(embedding_house) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        answer = client.embeddings.create(model="tgi", input=["a", "b"])
        plain = client.embeddings.create(model="tgi", input="a", encoding_format="float", dimensions=2)
        with pytest.raises(openai.BadRequestError, match="dimensions"):
            client.embeddings.create(model="tgi", input="a", dimensions=99)

    assert [datum.embedding for datum in answer.data] == [pytest.approx(UNIT)] * 2
    assert plain.data[0].embedding == pytest.approx([0.6, 0.8])
    assert math.isclose(sum(number**2 for number in answer.data[0].embedding), 1, rel_tol=1e-6)


def test_the_client_of_hugging_face_reads_the_vectors() -> None:
    with serve(embedding_house) as live:
        vectors = huggingface_hub.InferenceClient(f"{live.url}/embed").feature_extraction("a", normalize=False)

    assert vectors.tolist() == [list(VECTOR)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["a", "b"]}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
        ("/embed", {"inputs": ["a", "b"]}),
    ],
)
async def test_answers_are_as_the_document_describes_them(path: str, body: dict[str, Any]) -> None:
    house = embedding_house()
    document = (await house.get("/openapi.json")).json

    answer = await house.post(path, body)

    described = document["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json, described | {"components": document["components"]})
