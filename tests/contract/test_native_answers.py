"""TGI 3.3.7's native HTTP contract, row by row, the answers: headers, errors, whole answers, streams, small routes.

A row that differs from TGI says why beside it; the decisions stand in docs/reference/endpoints.md.
"""

import asyncio
import re
from dataclasses import replace
from typing import Any

import pytest
from tests.contract.house import BOS, EOS, Script, build_house, ids_of, say, text_of

from weft.errors import GenerationError, IncompleteGenerationError, NotReadyError, OverloadedError
from weft.router.lifecycle import ServerState

WHOLE, STREAM, COMPAT = "/generate", "/generate_stream", "/"

# --- headers ------------------------------------------------------------------------------------------------------

MILLISECONDS = ("x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token")
COUNTS = ("x-compute-characters", "x-prompt-tokens", "x-generated-tokens")
CHAT = {"messages": [{"role": "user", "content": "Hé"}]}
WHOLE_ANSWERS = [
    (WHOLE, {"inputs": "Hé"}, 2, 4),
    (COMPAT, {"inputs": "Hé"}, 2, 4),
    ("/invocations", {"inputs": "Hé"}, 2, 4),
    ("/v1/chat/completions", CHAT, 19, 20),
    ("/v1/completions", {"prompt": ["Hé", "a"]}, 3, 6),
]  # characters of the final prompt, prompt tokens


@pytest.mark.parametrize(("path", "body", "num_chars", "num_tokens"), WHOLE_ANSWERS)
async def test_a_whole_answer_has_every_header(path: str, body: dict[str, Any], num_chars: int, num_tokens: int):
    headers = (await build_house(say("hello")).post(path, body)).headers

    assert headers["x-compute-type"] == "cpu"
    assert re.fullmatch(r"[0-9]\.[0-9]{9}", headers["x-compute-time"])
    assert float(headers["x-compute-time"]) > 0
    assert all(headers[name].isdecimal() for name in (*MILLISECONDS, *COUNTS))
    assert headers["x-compute-characters"] == str(num_chars)
    assert headers["x-prompt-tokens"] == str(num_tokens)
    num_sequences = 2 if path == "/v1/completions" else 1
    assert headers["x-generated-tokens"] == str(6 * num_sequences)


STREAMS = [
    (STREAM, {"inputs": "Hé"}),
    (COMPAT, {"inputs": "Hé", "stream": True}),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/completions", {"prompt": "Hé", "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
async def test_a_stream_has_the_headers_known_before_it(path: str, body: dict[str, Any]):
    headers = (await build_house(say("hello")).post(path, body)).headers

    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert {"x-compute-type", "x-compute-characters"} <= set(headers)
    assert not {"x-compute-time", *MILLISECONDS, "x-generated-tokens"} & set(headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tokenize", {"inputs": "a"}), ("/chat_tokenize", CHAT), ("/vertex", {"instances": [{"inputs": "a"}]})],
)
async def test_other_answers_have_none(path: str, body: dict[str, Any]):
    headers = (await build_house().post(path, body)).headers

    assert not [name for name in headers if name.startswith(("x-compute", "x-prompt", "x-total"))]


async def test_queue_and_inference_times_are_milliseconds():
    house = build_house(say("hi", queue_ns=12_345_678))

    headers = (await house.post(WHOLE, {"inputs": "a"})).headers

    assert headers["x-queue-time"] == "12"


# --- errors -------------------------------------------------------------------------------------------------------

ERRORS = [
    (GenerationError("Server error: boom"), 424, "Request failed during generation: Server error: boom", "generation"),
    (OverloadedError("Model is overloaded"), 429, "Model is overloaded", "overloaded"),
    (IncompleteGenerationError("Incomplete generation"), 500, "Incomplete generation", "incomplete_generation"),
]


@pytest.mark.parametrize("path", [WHOLE, STREAM, COMPAT])
@pytest.mark.parametrize(("error", "status", "text", "error_type"), ERRORS)
async def test_an_error_before_the_first_token(path: str, error: Any, status: int, text: str, error_type: str):
    answer = await build_house(say("x", fail_after=0, error=error)).post(path, {"inputs": "a"})

    assert answer.status == status
    assert answer.json == {"error": text, "error_type": error_type}
    # TGI has no Retry-After.
    assert ("retry-after" in answer.headers) == (status == 429)


@pytest.mark.parametrize(("error", "status", "text", "error_type"), ERRORS[:2])
async def test_an_error_in_a_stream_is_its_last_event(error: Any, status: int, text: str, error_type: str):
    answer = await build_house(say("xyz", fail_after=1, error=error)).post(STREAM, {"inputs": "a"})

    assert answer.status == 200
    assert answer.events[-1] == {"error": text, "error_type": error_type}
    assert len(answer.events) == 2


async def test_a_model_without_a_template_says_so():
    answer = await build_house(has_template=False).post("/chat_tokenize", CHAT)

    assert (answer.status, answer.json["error_type"]) == (422, "template_error")
    assert answer.json["error"].startswith("Template error: ")


async def test_an_unhealthy_server_says_so():
    house = build_house()
    house.context.probe.health = lambda: asyncio.sleep(0, result=type(house.backend.health_now)(is_ready=False))

    answer = await house.get("/health")

    assert answer.status == 503
    assert answer.json["error"] == "unhealthy"
    assert answer.json["error_type"] == "healthcheck"


async def test_before_the_model_is_ready_a_generation_says_how_far_it_is():
    """TGI does not listen yet."""
    answer = await build_house(state=ServerState.LOADING).post(WHOLE, {"inputs": "a"})

    assert (answer.status, answer.json["error_type"]) == (503, NotReadyError.error_type)
    assert answer.json["percent"] == 40


async def test_a_wrong_key_is_401_and_a_wrong_path_404():
    """TGI's bodies are empty; ours have the form of every other error."""
    house = build_house(settings={"api_key": "right-key"})

    for path in (WHOLE, STREAM, COMPAT, "/tokenize", "/invocations", "/vertex"):
        assert (await house.post(path, {"inputs": "a"})).status == 401
    assert (await house.get("/nothing")).status == 404
    assert (await build_house().get("/generate")).status == 405


# --- the whole answer ---------------------------------------------------------------------------------------------


async def test_a_whole_answer_byte_for_byte():
    house = build_house(say("hi"))
    parameters = {"max_new_tokens": 2, "details": True, "top_n_tokens": 1}

    answer = await house.post(WHOLE, {"inputs": "Hi", "parameters": parameters})

    h, i = (
        f'{{"id":{token_id},"text":"{text}","logprob":-0.5,"special":false}}'
        for token_id, text in zip(ids_of("hi", eos=False), "hi", strict=True)
    )
    assert answer.body.decode() == (
        '{"generated_text":"hi","details":{"finish_reason":"length","generated_tokens":2,"seed":null,"prefill":[],'
        f'"tokens":[{h},{i}],"top_tokens":[[{h}],[{i}]]}}}}'
    )


@pytest.mark.parametrize(
    ("parameters", "has_details"),
    [({}, False), ({"details": True}, True), ({"decoder_input_details": True}, True), ({"details": False}, False)],
)
async def test_details_are_there_when_asked_for(parameters: dict[str, Any], has_details: bool):
    answer = await build_house(say("hi")).post(WHOLE, {"inputs": "a", "parameters": parameters})

    assert ("details" in answer.json) is has_details


async def test_prefill_is_empty_unless_asked_for():
    """TGI wants `--enable-prefill-logprobs` besides; here asking is enough."""
    house = build_house(say("hi"))

    without = await house.post(WHOLE, {"inputs": "a", "parameters": {"details": True}})
    asked_for = await house.post(WHOLE, {"inputs": "a", "parameters": {"decoder_input_details": True}})

    assert without.json["details"]["prefill"] == []
    assert asked_for.json["details"]["prefill"] == [
        {"id": BOS, "text": "<s>", "logprob": None},
        {"id": ids_of("a")[0], "text": "a", "logprob": -1.0},
    ]


@pytest.mark.parametrize("parameters", [{}, {"top_n_tokens": 0}, {"top_n_tokens": None}])
async def test_no_alternatives_is_no_key(parameters: dict[str, Any]):
    house = build_house(say("hi"))

    whole = await house.post(WHOLE, {"inputs": "a", "parameters": parameters | {"details": True}})
    stream = await house.post(STREAM, {"inputs": "a", "parameters": parameters})

    assert "top_tokens" not in whole.json["details"]
    assert "best_of_sequences" not in whole.json["details"]
    assert all("top_tokens" not in event for event in stream.events)


async def test_the_seed_is_null_where_chance_had_no_part():
    house = build_house(say("hi"))

    greedy = await house.post(WHOLE, {"inputs": "a", "parameters": {"details": True, "seed": 4}})
    sampled = await house.post(WHOLE, {"inputs": "a", "parameters": {"details": True, "seed": 4, "do_sample": True}})

    assert (greedy.json["details"]["seed"], sampled.json["details"]["seed"]) == (None, 4)


async def test_a_character_of_several_tokens_appears_with_its_last():
    house = build_house(say("é"))

    answer = await house.post(WHOLE, {"inputs": "a", "parameters": {"details": True}})

    assert [token["text"] for token in answer.json["details"]["tokens"]] == ["", "é", "</s>"]


async def test_a_logprob_that_is_no_number_is_null():
    house = build_house(say("h", logprob=float("-inf")))

    whole = await house.post(WHOLE, {"inputs": "a", "parameters": {"details": True}})
    stream = await house.post(STREAM, {"inputs": "a"})

    assert whole.json["details"]["tokens"][0]["logprob"] is None
    assert stream.events[0]["token"]["logprob"] is None


@pytest.mark.parametrize(
    ("script", "limit", "reason", "num_tokens"),
    [
        (say("hello"), 20, "eos_token", 6),
        (say("hello"), 3, "length", 3),
        # Both at once: the end of text wins, where TGI says length.
        (say("hello"), 6, "eos_token", 6),
    ],
)
async def test_finish_reasons(script: Any, limit: int, reason: str, num_tokens: int):
    answer = await build_house(script).post(
        WHOLE, {"inputs": "a", "parameters": {"details": True, "max_new_tokens": limit}}
    )

    details = answer.json["details"]
    assert (details["finish_reason"], details["generated_tokens"], len(details["tokens"])) == (
        reason, num_tokens, num_tokens,
    )  # fmt: skip


@pytest.mark.parametrize("path", [WHOLE, STREAM])
async def test_a_text_that_ends_inside_a_character_shows_what_there_is(path: str):
    """TGI's text is then empty."""
    house = build_house(say("aé"))

    answer = await house.post(path, {"inputs": "a", "parameters": {"max_new_tokens": 2, "details": True}})

    last = answer.json if path == WHOLE else answer.events[-1]
    assert last["generated_text"] == "a\ufffd"
    assert last["details"]["finish_reason"] == "length"


async def test_special_tokens_are_counted_and_not_written():
    """Wherever they stand, not at the end alone."""
    script = Script(token_ids=[*ids_of("a", eos=False), BOS, *ids_of("b")])
    house = build_house(lambda _: script)

    whole = await house.post(WHOLE, {"inputs": "a", "parameters": {"details": True}})
    stream = await house.post(STREAM, {"inputs": "a"})

    assert whole.json["generated_text"] == stream.events[-1]["generated_text"] == "ab"
    assert whole.json["details"]["generated_tokens"] == 4
    assert whole.json["details"]["tokens"][1] == {"id": BOS, "text": "<s>", "logprob": -0.5, "special": True}
    assert [event["token"]["special"] for event in stream.events] == [False, True, False, True]


async def test_an_image_in_a_prompt_for_a_text_model_is_text():
    house = build_house()

    await house.post(WHOLE, {"inputs": "![](http://127.0.0.1/a.png)"})

    assert text_of(house.backend.requests[0].prompt_token_ids) == "![](http://127.0.0.1/a.png)"


async def test_a_prompt_without_tokens_is_refused():
    house = build_house()
    house.context.model.tokenizer.encode_async = lambda *_, **__: asyncio.sleep(0, result=[])

    answer = await house.post(WHOLE, {"inputs": " "})

    assert answer.status == 422
    assert "`inputs` must give at least one token" in answer.json["error"]


STOPS = [("/test", None), ("/test;", "/test;"), ("/test; ", "/test;"), ("a/test;b", "a/test;")]


@pytest.mark.parametrize("path", [WHOLE, STREAM])
@pytest.mark.parametrize(("output", "shown"), STOPS)
async def test_a_stop_text_ends_the_text_and_stays_in_it(path: str, output: str, shown: str | None):
    answer = await build_house(say(output)).post(
        path, {"inputs": "x", "parameters": {"stop": ["/test;"], "details": True}}
    )

    last = answer.json if path == WHOLE else answer.events[-1]
    assert last["generated_text"] == (shown or output)
    assert last["details"]["finish_reason"] == ("stop_sequence" if shown else "eos_token")


class TestBestOf:
    async def test_only_losers_are_listed_and_the_first_of_equals_wins(self):
        scripts = iter([Script(token_ids=ids_of("one")), Script(token_ids=ids_of("two"))])
        house = build_house(lambda _: next(scripts))

        answer = await house.post(
            WHOLE, {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "details": True, "top_n_tokens": 1}}
        )

        details = answer.json["details"]
        (loser,) = details["best_of_sequences"]
        assert (answer.json["generated_text"], loser["generated_text"]) == ("one", "two")
        assert set(loser) == {
            "generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens", "top_tokens",
        }  # fmt: skip

    async def test_the_mean_decides_and_not_the_sum(self):
        """Or the shortest would win: here the end of text alone."""
        scripts = iter([
            Script(token_ids=ids_of(""), logprob=-1.0), Script(token_ids=ids_of("longer"), logprob=-0.9),
        ])  # fmt: skip
        house = build_house(lambda _: next(scripts))

        answer = await house.post(WHOLE, {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})

        assert answer.json == {"generated_text": "longer"}

    async def test_headers_count_the_tokens_of_the_winner(self):
        scripts = iter([Script(token_ids=ids_of("longer"), logprob=-2.0), Script(token_ids=ids_of("two"))])
        house = build_house(lambda _: next(scripts))

        answer = await house.post(
            WHOLE, {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "details": True}}
        )

        assert answer.json["generated_text"] == "two"
        assert answer.headers["x-generated-tokens"] == str(answer.json["details"]["generated_tokens"]) == "4"
        assert answer.headers["x-prompt-tokens"] == "2"

    async def test_losers_are_not_shown_without_details(self):
        answer = await build_house().post(WHOLE, {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})

        assert set(answer.json) == {"generated_text"}

    async def test_it_takes_a_place_per_sequence(self):
        house = build_house(settings={"max_concurrent_requests": 2})

        with house.context.admission.admit(1):
            answer = await house.post(WHOLE, {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})

        assert answer.status == 429


# --- streams ------------------------------------------------------------------------------------------------------


async def test_the_events_of_a_stream():
    house = build_house(say("ab"))

    answer = await house.post(STREAM, {"inputs": "x", "parameters": {"details": True, "top_n_tokens": 1}})

    first, second, last = answer.events
    assert list(first) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert [event["index"] for event in answer.events] == [1, 2, 3]
    assert first["generated_text"] is second["details"] is None
    assert last["token"] == {"id": EOS, "text": "</s>", "logprob": -0.5, "special": True}
    assert last["generated_text"] == "ab"
    assert last["details"] == {"finish_reason": "eos_token", "generated_tokens": 3, "seed": None, "input_length": 2}


async def test_a_native_stream_simply_ends():
    answer = await build_house(say("ab")).post(STREAM, {"inputs": "x"})

    assert b"[DONE]" not in answer.body
    assert b"event:" not in answer.body
    assert answer.body.endswith(b'"details":null}\n\n')


@pytest.mark.parametrize(
    ("tag", "shown"), [("text-generation", "abhi"), (None, "abhi"), ("text2text-generation", "hi")]
)
async def test_the_root_shows_the_prompt_as_the_models_task_says(tag: str | None, shown: str):
    house = build_house(say("hi"))
    house.context.model = replace(house.context.model, pipeline_tag=tag)

    whole = await house.post(COMPAT, {"inputs": "ab"})
    stream = await house.post(COMPAT, {"inputs": "ab", "stream": True})
    native = await house.post(WHOLE, {"inputs": "ab"})

    assert whole.json == [{"generated_text": shown}]
    assert stream.events[-1]["generated_text"] == shown
    assert native.json == {"generated_text": "hi"}


# --- small routes -------------------------------------------------------------------------------------------------


async def test_tokenize_reads_a_generate_body():
    house = build_house()

    plain = await house.post("/tokenize", {"inputs": "héy", "parameters": {"top_k": 0}})
    cut = await house.post("/tokenize", {"inputs": "abcdef", "parameters": {"truncate": 3}})

    assert plain.json[0] == {"id": BOS, "text": "", "start": 0, "stop": 0}
    assert plain.json[-1] == {"id": ids_of("y")[0], "text": "y", "start": 3, "stop": 4}
    # TGI ignores it.
    assert [token["text"] for token in cut.json] == ["", "e", "f"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("chat_template", "{{ messages }}"),
    ],
)
async def test_chat_tokenize_refuses_what_would_change_the_prompt(field: str, value: object):
    """TGI writes tools into the prompt; a prompt without them would be a wrong answer."""
    answer = await build_house().post("/chat_tokenize", CHAT | {field: value})

    assert (answer.status, answer.json["error_type"]) == (422, "validation")
    assert f"`{field}`" in answer.json["error"]


async def test_chat_tokenize_shows_tokens_and_their_places():
    answer = await build_house().post("/chat_tokenize", {"messages": [{"role": "user", "content": "é"}]})

    assert list(answer.json) == ["tokenize_response", "templated_text"]
    assert answer.json["templated_text"] == "[user]é[assistant]"
    assert answer.json["tokenize_response"][7] == {"id": "é".encode()[1] + 2, "text": "é", "start": 6, "stop": 8}


async def test_info_has_tgis_fields():
    answer = await build_house().get("/info")

    assert {
        "model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of", "max_stop_sequences",
        "max_input_tokens", "max_total_tokens", "validation_workers", "max_client_batch_size", "router", "version",
        "sha", "docker_label",
    } <= set(answer.json)  # fmt: skip
    assert answer.json["router"] == "text-generation-router"


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
async def test_health_is_200_and_empty(path: str):
    answer = await build_house().get(path)

    assert (answer.status, answer.body) == (200, b"")


async def test_metrics_are_prometheus_text():
    answer = await build_house().get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    assert b"# TYPE tgi_request_count counter\ntgi_request_count 0\n" in answer.body
