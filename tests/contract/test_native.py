"""TGI's routes, byte for byte where a client could notice."""

import pytest
from tests.contract.house import BOS, EOS, FinishReason, Script, build_house, ids_of, say, text_of

from weft.core.request import LogprobStyle, PenaltyStyle
from weft.errors import GenerationError, NumericalError


async def test_generate_answers_with_the_text_alone():
    house = build_house(say("hello"))

    answer = await house.post("/generate", {"inputs": "Hi"})

    assert answer.status == 200
    assert answer.body == b'{"generated_text":"hello"}'


async def test_a_whole_answer_carries_tgi_headers():
    house = build_house(say("hello", queue_ns=7_000_000))

    headers = (await house.post("/generate", {"inputs": "Hé"})).headers

    assert headers["content-type"] == "application/json"
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-prompt-tokens"] == "4"
    assert headers["x-generated-tokens"] == "6"
    assert headers["x-queue-time"] == "7"
    assert float(headers["x-compute-time"]) > 0
    for name in ("x-total-time", "x-validation-time", "x-inference-time", "x-time-per-token"):
        assert headers[name].isdecimal()


async def test_details_have_every_field_of_tgi():
    house = build_house(say("hi", queue_ns=1))

    answer = await house.post(
        "/generate",
        {
            "inputs": "ab",
            "parameters": {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "max_new_tokens": 2},
        },
    )

    def token(token_id: int, text: str, logprob: float, *, special: bool = False) -> dict[str, object]:
        return {"id": token_id, "text": text, "logprob": logprob, "special": special}

    h, i = ids_of("hi", eos=False)
    assert answer.json == {
        "generated_text": "hi",
        "details": {
            "finish_reason": "length",
            "generated_tokens": 2,
            "seed": None,
            "prefill": [
                {"id": BOS, "text": "<s>", "logprob": None},
                {"id": ids_of("a")[0], "text": "a", "logprob": -1.0},
                {"id": ids_of("b")[0], "text": "b", "logprob": -1.0},
            ],
            "tokens": [token(h, "h", -0.5), token(i, "i", -0.5)],
            "top_tokens": [
                [token(h, "h", -0.5), token(BOS, "<s>", -1.5, special=True)],
                [token(i, "i", -0.5), token(BOS, "<s>", -1.5, special=True)],
            ],
        },
    }


async def test_details_leave_out_what_was_not_asked_for():
    answer = await build_house(say("hi")).post("/generate", {"inputs": "a", "parameters": {"details": True}})

    assert set(answer.json["details"]) == {"finish_reason", "generated_tokens", "seed", "prefill", "tokens"}
    assert answer.json["details"]["prefill"] == []
    assert answer.json["details"]["tokens"][-1] == {"id": EOS, "text": "</s>", "logprob": -0.5, "special": True}
    assert answer.json["details"]["finish_reason"] == "eos_token"
    assert answer.json["details"]["generated_tokens"] == 3


async def test_a_stream_has_the_frames_of_tgi():
    house = build_house(say("hi"))

    answer = await house.post("/generate_stream", {"inputs": "a", "parameters": {"details": True}})

    h, i = ids_of("hi", eos=False)
    assert answer.body.decode() == (
        f'data: {{"index":1,"token":{{"id":{h},"text":"h","logprob":-0.5,"special":false}},'
        '"generated_text":null,"details":null}\n\n'
        f'data: {{"index":2,"token":{{"id":{i},"text":"i","logprob":-0.5,"special":false}},'
        '"generated_text":null,"details":null}\n\n'
        f'data: {{"index":3,"token":{{"id":{EOS},"text":"</s>","logprob":-0.5,"special":true}},'
        '"generated_text":"hi","details":{"finish_reason":"eos_token","generated_tokens":3,"seed":null,'
        '"input_length":2}}\n\n'
    )
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "x-compute-time" not in answer.headers


@pytest.mark.parametrize("batch_size", [1, 3, 100])
async def test_a_stream_says_the_same_however_tokens_arrive(batch_size: int):
    text = 'naïve "quotes" \\ and 🙂\n'
    house = build_house(say(text), batch_size=batch_size)
    body = {"inputs": "a", "parameters": {"top_n_tokens": 1}}

    events = (await house.post("/generate_stream", body)).events

    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert "".join(event["token"]["text"] for event in events[:-1]) == text
    assert events[-1]["generated_text"] == text
    assert all(len(event["top_tokens"]) == 1 for event in events)


async def test_the_root_answers_an_array_that_begins_with_the_prompt():
    answer = await build_house(say("lo")).post("/", {"inputs": "hel"})

    assert answer.json == [{"generated_text": "hello"}]


async def test_the_root_streams_when_the_body_says_so():
    answer = await build_house(say("lo")).post("/", {"inputs": "hel", "stream": True})

    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.events[-1]["generated_text"] == "hello"


@pytest.mark.parametrize("path", ["/", "/generate", "/generate_stream"])
@pytest.mark.parametrize(("full", "expected"), [(True, "hello"), (False, "lo")])
async def test_return_full_text_decides_about_the_prompt(path: str, full: bool, expected: str):
    body = {"inputs": "hel", "parameters": {"return_full_text": full}}

    answer = await build_house(say("lo")).post(path, body)

    last = answer.events[-1] if path == "/generate_stream" else answer.json
    assert (last[0] if path == "/" else last)["generated_text"] == expected


async def test_omitted_parameters_sample_and_empty_ones_are_greedy():
    house = build_house()

    await house.post("/generate", {"inputs": "a"})
    await house.post("/generate", {"inputs": "a", "parameters": {}})
    await house.post("/generate", {"inputs": "a", "parameters": None})
    await house.post("/generate", {"inputs": "a", "parameters": {"temperature": 1.0}})

    assert [request.sampling.is_greedy for request in house.backend.requests] == [False, True, False, True]


async def test_every_parameter_reaches_the_engine():
    house = build_house()
    parameters = {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "typical_p": 0.8, "repetition_penalty": 1.2,
        "frequency_penalty": -0.5, "seed": 2**64 - 1, "do_sample": True, "watermark": True, "top_n_tokens": 3,
        "max_new_tokens": 9, "decoder_input_details": True,
    }  # fmt: skip

    await house.post("/generate", {"inputs": "a", "parameters": parameters})

    request = house.backend.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.7, 5, 0.9, 0.8)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.2, -0.5)
    assert (sampling.seed, sampling.do_sample, sampling.watermark) == (2**64 - 1, True, True)
    assert (sampling.top_n_tokens, sampling.prompt_logprobs) == (3, True)
    assert sampling.penalty_style is PenaltyStyle.TGI
    assert sampling.logprob_style is LogprobStyle.PROCESSED
    assert request.stop.max_new_tokens == 9
    assert request.stop.eos_token_ids == (EOS,)
    assert request.deadline_ns is not None
    request.check(vocab_size=258, max_total_tokens=64)


async def test_null_equals_absent_in_every_parameter():
    """The text_generation client sends every parameter, most of them as null."""
    house = build_house()
    names = [
        "best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p", "do_sample",
        "max_new_tokens", "return_full_text", "stop", "truncate", "watermark", "details", "decoder_input_details",
        "seed", "top_n_tokens", "grammar", "adapter_id",
    ]  # fmt: skip

    answer = await house.post("/generate", {"inputs": "a", "parameters": dict.fromkeys(names)})

    assert answer.status == 200
    assert house.backend.requests[0].sampling.is_greedy


async def test_unknown_fields_are_accepted():
    body = {"inputs": "a", "parameters": {"max_time": 3, "no_such_field": {}}, "options": {"wait_for_model": True}}

    assert (await build_house().post("/generate", body)).status == 200


async def test_a_sampled_sequence_shows_its_seed():
    house = build_house()

    chosen = await house.post(
        "/generate", {"inputs": "a", "parameters": {"do_sample": True, "seed": 7, "details": True}}
    )
    drawn = await house.post("/generate", {"inputs": "a", "parameters": {"do_sample": True, "details": True}})

    assert chosen.json["details"]["seed"] == 7
    assert drawn.json["details"]["seed"] == house.backend.requests[1].sampling.seed


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_stop_sequence_stays_in_the_text_and_ends_the_request(path: str):
    house = build_house(say("one, two, three"))

    answer = await house.post(path, {"inputs": "a", "parameters": {"stop": ["two"], "details": True}})

    last = answer.json if path == "/generate" else answer.events[-1]
    assert last["generated_text"] == "one, two"
    assert last["details"]["finish_reason"] == "stop_sequence"
    assert last["details"]["generated_tokens"] == len("one, two")
    assert house.backend.aborted == [house.backend.requests[0].request_id]


async def test_truncate_keeps_the_end_of_the_prompt_behind_bos():
    house = build_house()

    await house.post("/generate", {"inputs": "abcdef", "parameters": {"truncate": 3}})

    assert house.backend.requests[0].prompt_token_ids[0] == BOS
    assert text_of(house.backend.requests[0].prompt_token_ids) == "ef"
    assert len(house.backend.requests[0].prompt_token_ids) == 3


async def test_max_new_tokens_beyond_the_context_is_clamped_and_said():
    house = build_house(max_total_tokens=20)

    answer = await house.post("/generate", {"inputs": "abc", "parameters": {"max_new_tokens": 1000}})

    assert answer.status == 200
    assert answer.headers["x-max-new-tokens-clamped"] == "16"
    assert house.backend.requests[0].stop.max_new_tokens == 16


async def test_absent_max_new_tokens_is_what_the_context_leaves():
    house = build_house(max_total_tokens=20)

    answer = await house.post("/generate", {"inputs": "abc"})

    assert house.backend.requests[0].stop.max_new_tokens == 16
    assert "x-max-new-tokens-clamped" not in answer.headers


async def test_a_prompt_that_fills_max_input_tokens_exactly_is_accepted():
    house = build_house(max_input_tokens=5, max_total_tokens=6)

    fits = await house.post("/generate", {"inputs": "abcd"})
    too_long = await house.post("/generate", {"inputs": "abcde"})

    assert fits.status == 200
    assert too_long.status == 422
    assert too_long.json == {
        "error": "Input validation error: `inputs` must have less than 5 tokens. Given: 6; 5 is the most that is read "
        "(--max-input-tokens): shorten it, or set `truncate`",
        "error_type": "validation",
    }


async def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized():
    house = build_house(settings={"payload_limit": 10_000_000})
    house.context.model.tokenizer.encode_async = None

    answer = await house.post("/generate", {"inputs": "a" * 1_000_000})

    assert answer.status == 422
    assert "1000000 characters" in answer.json["error"]


class TestBestOf:
    async def test_the_likeliest_by_mean_logprob_wins_and_the_others_are_shown(self):
        scripts = iter([Script(token_ids=ids_of("bad"), logprob=-2.0), Script(token_ids=ids_of("good"), logprob=-1.0)])
        house = build_house(lambda _: next(scripts))

        answer = await house.post(
            "/generate", {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "details": True}}
        )

        assert answer.json["generated_text"] == "good"
        assert [loser["generated_text"] for loser in answer.json["details"]["best_of_sequences"]] == ["bad"]

    async def test_sequences_have_their_own_seeds_and_share_the_prompt(self):
        house = build_house()

        await house.post("/generate", {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "seed": 5}})

        first, second = house.backend.requests
        assert first.sampling.seed == 5
        assert second.sampling.seed != 5
        assert first.prompt_token_ids == second.prompt_token_ids
        assert first.request_id != second.request_id

    async def test_one_failure_fails_all(self):
        scripts = iter([Script(token_ids=ids_of("fine")), Script(token_ids=ids_of("x"), fail_after=0)])
        house = build_house(lambda _: next(scripts))

        answer = await house.post("/generate", {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})

        assert answer.status == 424
        assert house.context.admission.used == 0


class TestFailures:
    async def test_a_failure_before_the_first_token_has_its_own_status(self):
        house = build_house(say("x", fail_after=0))

        for path in ("/generate", "/generate_stream"):
            answer = await house.post(path, {"inputs": "a"})
            assert answer.status == 424
            assert answer.json == {
                "error": "Request failed during generation: Server error: scripted",
                "error_type": "generation",
            }

    async def test_a_failure_in_a_stream_is_its_last_event(self):
        house = build_house(say("abc", fail_after=2))

        answer = await house.post("/generate_stream", {"inputs": "a"})

        assert answer.status == 200
        assert [("token" in event) for event in answer.events] == [True, True, False]
        assert answer.events[-1]["error_type"] == "generation"
        assert answer.is_over

    async def test_a_numerical_error_is_a_generation_error(self):
        house = build_house(say("x", fail_after=0, error=NumericalError("The model produced NaN")))

        assert (await house.post("/generate", {"inputs": "a"})).status == 424

    async def test_a_stream_that_just_stops_is_incomplete(self):
        house = build_house(say("ab", finish_reason=FinishReason.LENGTH, stop_silently=True))

        whole = await house.post("/generate", {"inputs": "a"})
        stream = await house.post("/generate_stream", {"inputs": "a"})

        assert (whole.status, whole.json["error_type"]) == (500, "incomplete_generation")
        assert stream.events[-1] == {
            "error": "Incomplete generation stream",
            "error_type": "incomplete_generation_stream",
        }

    async def test_a_bug_in_the_backend_is_a_typed_500_and_the_server_goes_on(self):
        house = build_house(say("x"))
        house.backend._script_for = lambda _: 1 / 0

        broken = await house.post("/generate", {"inputs": "a"})
        house.backend._script_for = say("x")
        healthy = await house.post("/generate", {"inputs": "a"})

        assert broken.status == 500
        assert "division" not in broken.body.decode()
        assert healthy.status == 200
        assert house.context.admission.used == 0

    async def test_a_token_out_of_order_is_never_shown(self):
        house = build_house(say("x", fail_after=0, error=GenerationError("lost")))

        assert (await house.post("/generate_stream", {"inputs": "a"})).status == 424


class TestTokenize:
    async def test_tokens_have_byte_offsets(self):
        answer = await build_house().post("/tokenize", {"inputs": "é!"})

        e = "é".encode()
        assert answer.json == [
            {"id": BOS, "text": "", "start": 0, "stop": 0},
            {"id": e[0] + 2, "text": "é", "start": 0, "stop": 2},
            {"id": e[1] + 2, "text": "é", "start": 0, "stop": 2},
            {"id": ord("!") + 2, "text": "!", "start": 2, "stop": 3},
        ]

    async def test_chat_tokenize_shows_the_prompt_and_adds_no_special_tokens(self):
        answer = await build_house().post("/chat_tokenize", {"messages": [{"role": "user", "content": "a"}]})

        assert answer.json["templated_text"] == "[user]a[assistant]"
        assert len(answer.json["tokenize_response"]) == len("[user]a[assistant]")
        assert BOS not in [token["id"] for token in answer.json["tokenize_response"]]


async def test_info_has_the_fields_of_tgi_and_the_facts_of_the_shard():
    answer = await build_house().get("/info")

    expected = {
        "model_id": "test/bytes", "model_sha": None, "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 128, "max_best_of": 2, "max_stop_sequences": 4, "max_input_tokens": 63,
        "max_total_tokens": 64, "validation_workers": 2, "max_client_batch_size": 4,
        "router": "text-generation-router", "sha": None, "docker_label": None, "model_dtype": "float32",
    }  # fmt: skip
    assert answer.json.items() >= expected.items()
    assert (await build_house().get("/model_info")).json == answer.json


async def test_a_template_that_refuses_is_a_template_error():
    answer = await build_house().post("/chat_tokenize", {"messages": [{"role": "forbidden", "content": "a"}]})

    assert answer.status == 422
    assert answer.json == {"error": "Template error: Conversation roles must alternate", "error_type": "template_error"}
