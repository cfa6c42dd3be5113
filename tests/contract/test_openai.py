"""`/v1` as OpenAI's API: objects, chunks, choices, log-probabilities, usage."""

import contextlib
import json
import math
from typing import Any

import pytest
from tests.contract.house import BOS, EOS, Script, build_house, ids_of, say, text_of

from weft.core.request import LogprobStyle, PenaltyStyle
from weft.errors import GenerationError
from weft.router.lifecycle import ServerState

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(**fields: object) -> dict[str, object]:
    return {"messages": MESSAGES, **fields}


class TestChat:
    async def test_a_whole_answer_is_an_openai_object(self):
        answer = await build_house(say("hello", num_cached_tokens=4)).post(CHAT, chat())

        body = answer.json
        assert answer.status == 200
        assert body["object"] == "chat.completion"
        assert body["id"].startswith("chatcmpl-")
        assert isinstance(body["created"], int)
        assert body["model"] == "test/bytes"
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        prompt_tokens = len("[user]Hi[assistant]")
        assert body["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 6,
            "total_tokens": prompt_tokens + 6,
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0, "cache_write_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    async def test_ids_are_unique(self):
        house = build_house()

        assert (await house.post(CHAT, chat())).json["id"] != (await house.post(CHAT, chat())).json["id"]

    async def test_a_stream_begins_with_the_role_and_ends_with_a_finish_reason_and_done(self):
        answer = await build_house(say("hé")).post(CHAT, chat(stream=True))

        *chunks, done = answer.events
        assert done == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
            {"role": "assistant", "content": "", "refusal": None},
            {"content": "h"},
            {"content": "é"},
            {},
        ]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
        assert all("usage" not in chunk for chunk in chunks)

    async def test_usage_comes_last_and_only_when_asked_for(self):
        answer = await build_house(say("ab")).post(CHAT, chat(stream=True, stream_options={"include_usage": True}))

        *chunks, usage, done = answer.events
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 3
        assert all(chunk["usage"] is None for chunk in chunks)

    @pytest.mark.parametrize("options", [None, {}, {"include_usage": None}])
    async def test_stream_options_may_be_empty(self, options: object):
        answer = await build_house().post(CHAT, chat(stream=True, stream_options=options))

        assert answer.events[-1] == "[DONE]"

    async def test_tokens_that_arrive_together_become_one_chunk(self):
        answer = await build_house(say("hello"), batch_size=100).post(CHAT, chat(stream=True))

        deltas = [chunk["choices"][0]["delta"] for chunk in answer.events[:-1]]
        assert deltas == [{"role": "assistant", "content": "", "refusal": None}, {"content": "hello"}, {}]

    @pytest.mark.parametrize("stop", ["two", ["no", "two"]])
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_stop_text_or_list_is_cut_off_and_reported_as_stop(self, stop: object, stream: bool):
        house = build_house(say("one, two, three"))

        answer = await house.post(CHAT, chat(stop=stop, stream=stream))

        if stream:
            chunks = answer.events[:-1]
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one, "
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        else:
            choice = answer.json["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("one, ", "stop")
            assert answer.json["usage"]["completion_tokens"] == len("one, two")
        assert len(house.backend.aborted) == 1

    @pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
    async def test_length_is_reported_as_length(self, field: str):
        answer = await build_house(say("hello")).post(CHAT, chat(**{field: 2}))

        assert answer.json["choices"][0]["finish_reason"] == "length"
        assert answer.json["choices"][0]["message"]["content"] == "he"

    async def test_both_names_of_max_tokens_may_be_given(self):
        house = build_house()

        assert (await house.post(CHAT, chat(max_tokens=9, max_completion_tokens=5))).status == 200
        assert house.backend.requests[0].stop.max_new_tokens == 5

    async def test_n_choices_have_their_own_text_and_derived_seeds(self):
        scripts = iter([Script(token_ids=ids_of(text)) for text in ("a", "bb", "ccc")])
        house = build_house(lambda _: next(scripts))

        answer = await house.post(CHAT, chat(n=3, seed=11))

        assert [choice["index"] for choice in answer.json["choices"]] == [0, 1, 2]
        assert [choice["message"]["content"] for choice in answer.json["choices"]] == ["a", "bb", "ccc"]
        seeds = [request.sampling.seed for request in house.backend.requests]
        assert seeds[0] == 11
        assert len(set(seeds)) == 3
        assert answer.json["usage"]["prompt_tokens"] == len("[user]Hi[assistant]")
        assert answer.json["usage"]["completion_tokens"] == 2 + 3 + 4

    async def test_n_choices_stream_interleaved_each_with_its_own_role_and_end(self):
        scripts = iter([Script(token_ids=ids_of(text)) for text in ("ab", "xyz")])
        answer = await build_house(lambda _: next(scripts)).post(CHAT, chat(n=2, stream=True))

        texts = {0: "", 1: ""}
        roles, ends = [], []
        for chunk in answer.events[:-1]:
            choice = chunk["choices"][0]
            texts[choice["index"]] += choice["delta"].get("content", "")
            roles += [choice["index"]] if "role" in choice["delta"] else []
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert texts == {0: "ab", 1: "xyz"}
        assert sorted(roles) == sorted(ends) == [0, 1]
        assert answer.events[-1] == "[DONE]"

    async def test_one_choice_may_stop_while_another_goes_on(self):
        scripts = iter([Script(token_ids=ids_of("ab STOP cd")), Script(token_ids=ids_of("a long answer without it"))])
        house = build_house(lambda _: next(scripts))

        answer = await house.post(CHAT, chat(n=2, stop="STOP"))

        assert [choice["message"]["content"] for choice in answer.json["choices"]] == [
            "ab ",
            "a long answer without it",
        ]
        assert house.backend.aborted == [house.backend.requests[0].request_id]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_logprobs_have_bytes_and_alternatives(self, stream: bool):
        answer = await build_house(say("hé")).post(CHAT, chat(logprobs=True, top_logprobs=2, stream=stream))

        if stream:
            content = [
                entry
                for chunk in answer.events[:-1]
                if chunk["choices"][0]["logprobs"]
                for entry in chunk["choices"][0]["logprobs"]["content"]
            ]
        else:
            content = answer.json["choices"][0]["logprobs"]["content"]
        assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "hé"
        assert content[0] == {
            "token": "h",
            "logprob": -0.5,
            "bytes": [104],
            "top_logprobs": [
                {"token": "h", "logprob": -0.5, "bytes": [104]},
                {"token": "<s>", "logprob": -1.5, "bytes": list(b"<s>")},
            ],
        }

    async def test_a_logprob_is_a_number_also_where_there_is_no_probability(self):
        answer = await build_house(say("a", logprob=-math.inf)).post(CHAT, chat(logprobs=True))

        assert answer.json["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0

    async def test_logprobs_of_text_that_a_stop_cut_off_are_cut_off_too(self):
        for stream in (False, True):
            answer = await build_house(say("ab STOP")).post(CHAT, chat(logprobs=True, stop="STOP", stream=stream))
            if stream:
                parts = [chunk["choices"][0]["logprobs"] for chunk in answer.events[:-1]]
                content = [entry for part in parts if part for entry in part["content"]]
            else:
                content = answer.json["choices"][0]["logprobs"]["content"]
            assert "".join(entry["token"] for entry in content) == "ab "

    async def test_parameters_reach_the_engine_with_openai_semantics(self):
        house = build_house()

        await house.post(
            CHAT,
            chat(
                temperature=0.5, top_p=0.25, presence_penalty=1.5, frequency_penalty=-1, logit_bias={"7": -100, "3": 5},
                seed=-1, top_k=4, min_p=0.05, repetition_penalty=1.1, min_tokens=2, ignore_eos=True, max_tokens=8,
                user="somebody", top_logprobs=5, logprobs=True,
            ),
        )  # fmt: skip

        request = house.backend.requests[0]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 4, 0.05)
        assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -1.0)
        assert sampling.repetition_penalty == 1.1
        assert sampling.logit_bias == ((3, 5.0), (7, -100.0))
        assert sampling.seed == 2**64 - 1
        assert sampling.top_n_tokens == 5
        assert sampling.penalty_style is PenaltyStyle.OPENAI
        assert sampling.logprob_style is LogprobStyle.RAW
        assert (request.stop.max_new_tokens, request.stop.min_new_tokens, request.stop.ignore_eos) == (8, 2, True)
        request.check(vocab_size=258, max_total_tokens=64)

    @pytest.mark.parametrize("fields", [{"temperature": 0}, {"top_p": 0}])
    async def test_zero_is_greedy(self, fields: dict[str, object]):
        house = build_house()

        assert (await house.post(CHAT, chat(**fields))).status == 200
        assert house.backend.requests[0].sampling.is_greedy

    async def test_nothing_given_samples_at_temperature_one(self):
        house = build_house()

        await house.post(CHAT, chat())

        sampling = house.backend.requests[0].sampling
        assert not sampling.is_greedy
        assert (sampling.temperature, sampling.top_p, sampling.presence_penalty) == (1.0, 1.0, 0.0)
        assert house.backend.requests[0].stop.max_new_tokens == 64 - len("[user]Hi[assistant]")


class TestMessages:
    @pytest.mark.parametrize(
        ("messages", "prompt"),
        [
            ([{"role": "user", "content": "a"}], "[user]a[assistant]"),
            ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], None),
            ([{"role": "system", "content": "s"}, {"role": "user", "content": "a", "name": "bob"}], None),
            (
                [{"role": "assistant", "content": None}, {"role": "user", "content": "a"}],
                "[assistant][user]a[assistant]",
            ),
        ],
    )
    async def test_content_may_be_text_parts_or_nothing(self, messages: list[dict[str, object]], prompt: str | None):
        house = build_house()

        answer = await house.post(CHAT, {"messages": messages})

        assert answer.status == 200
        if prompt is not None:
            assert text_of(house.backend.requests[0].prompt_token_ids) == prompt

    @pytest.mark.parametrize(
        ("messages", "prompt"),
        [
            ([("developer", "d"), ("user", "a")], "[system]d[user]a"),
            ([("system", "s"), ("developer", "d"), ("user", "a")], "[system]s\n\nd[user]a"),
            ([("developer", "d"), ("system", "s"), ("user", "a")], "[system]d\n\ns[user]a"),
            ([("user", "a"), ("developer", "d")], "[user]a[system]d"),
            ([("system", "s"), ("system", "t"), ("user", "a")], "[system]s[system]t[user]a"),
        ],
    )
    async def test_developer_is_system_to_a_template_that_does_not_know_the_word(
        self, messages: list[tuple[str, str]], prompt: str
    ):
        house = build_house()
        body = {"messages": [{"role": role, "content": text} for role, text in messages]}

        await house.post(CHAT, body)
        house.template.words = frozenset({"developer"})
        await house.post(CHAT, body)

        unaware, aware = (text_of(request.prompt_token_ids) for request in house.backend.requests)
        assert unaware == prompt + "[assistant]"
        assert aware == "".join(f"[{role}]{text}" for role, text in messages) + "[assistant]"

    async def test_a_role_is_openais_or_one_that_the_template_speaks_of(self):
        house = build_house()
        body = {"messages": [*MESSAGES, {"role": "ipython", "content": "4"}]}

        refused = await house.post(CHAT, body)
        house.template.words = frozenset({"ipython"})
        accepted = await house.post(CHAT, body)

        assert (refused.status, refused.json["error"]["param"]) == (400, "messages[1].role")
        assert accepted.status == 200
        assert text_of(house.backend.requests[0].prompt_token_ids) == "[user]Hi[ipython]4[assistant]"

    @pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
    async def test_only_an_assistant_may_have_said_nothing(self, role: str):
        answer = await build_house().post(CHAT, {"messages": [*MESSAGES, {"role": role, "content": None}]})

        assert answer.status == 400
        assert answer.json["error"]["param"] == "messages[1].content"

    @pytest.mark.parametrize(
        "said",
        [
            {"content": None, "refusal": "No."},
            {"content": [{"type": "refusal", "refusal": "No."}]},
            {"content": [{"type": "text", "text": "N"}, {"type": "refusal", "refusal": "o."}], "refusal": None},
        ],
    )
    async def test_an_earlier_refusal_is_what_the_assistant_said(self, said: dict[str, object]):
        house = build_house()

        await house.post(CHAT, {"messages": [*MESSAGES, {"role": "assistant", **said}, *MESSAGES]})

        assert text_of(house.backend.requests[0].prompt_token_ids) == "[user]Hi[assistant]No.[user]Hi[assistant]"

    async def test_the_earlier_form_of_tool_calls_reaches_the_template(self):
        house = build_house()
        seen = []
        house.template.render = _remember(house.template.render, seen)
        call = {"name": "f", "arguments": '{"a": 1}'}
        messages = [
            *MESSAGES,
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "42"},
        ]

        assert (await house.post(CHAT, {"messages": messages})).status == 200
        assert seen[0][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
        assert seen[0][2] == {"role": "tool", "name": "f", "content": "42"}

    @pytest.mark.parametrize(
        "said", [{"audio": {"id": "a"}}, {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f"}}]}]
    )
    async def test_what_an_earlier_answer_cannot_have_been_is_refused_by_name(self, said: dict[str, object]):
        answer = await build_house().post(CHAT, {"messages": [*MESSAGES, {"role": "assistant", **said}]})

        assert answer.status == 400
        assert "`messages[1]." in answer.json["error"]["message"]

    async def test_no_special_tokens_are_added_to_a_rendered_prompt(self):
        house = build_house()

        await house.post(CHAT, chat())

        assert BOS not in house.backend.requests[0].prompt_token_ids

    async def test_a_conversation_that_ends_with_the_assistant_is_continued(self):
        house = build_house()

        await house.post(CHAT, {"messages": [*MESSAGES, {"role": "assistant", "content": "The answer is "}]})

        assert text_of(house.backend.requests[0].prompt_token_ids) == "[user]Hi[assistant]The answer is"

    async def test_add_generation_prompt_asks_for_an_answer_instead(self):
        house = build_house()
        messages = [*MESSAGES, {"role": "assistant", "content": "A"}]

        await house.post(CHAT, {"messages": messages, "add_generation_prompt": True})

        assert text_of(house.backend.requests[0].prompt_token_ids) == "[user]Hi[assistant]A[assistant]"

    async def test_earlier_tool_calls_reach_the_template_with_arguments_as_objects(self):
        house = build_house()
        seen = []
        house.template.render = _remember(house.template.render, seen)
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]

        assert (await house.post(CHAT, {"messages": messages})).status == 200
        assert seen[0][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
        assert seen[0][2] == {"role": "tool", "tool_call_id": "1", "content": "42"}

    async def test_template_variables_are_passed_on(self):
        house = build_house()

        await house.post(CHAT, chat(chat_template_kwargs={"enable_thinking": False}))

        assert house.template.kwargs == {"enable_thinking": False}

    async def test_a_model_without_a_template_says_so(self):
        answer = await build_house(has_template=False).post(CHAT, chat())

        assert answer.status == 400
        assert answer.json["error"]["code"] == "template_error"

    async def test_images_are_refused_by_name(self):
        part = {"type": "image_url", "image_url": {"url": "http://localhost/"}}

        answer = await build_house().post(CHAT, {"messages": [{"role": "user", "content": [part]}]})

        assert answer.status == 400
        assert "image_url" in answer.json["error"]["message"]


def _remember(render, seen):
    async def remembering(messages, **options):
        seen.append(messages)
        return await render(messages, **options)

    return remembering


class TestCompletions:
    async def test_a_whole_answer_is_an_openai_object(self):
        house = build_house(say("lo"))

        answer = await house.post(COMPLETIONS, {"prompt": "hel"})

        body = answer.json
        assert body["object"] == "text_completion"
        assert body["choices"] == [{"index": 0, "text": "lo", "logprobs": None, "finish_reason": "stop"}]
        assert body["usage"]["prompt_tokens"] == 4
        assert house.backend.requests[0].prompt_token_ids[0] == BOS
        assert house.backend.requests[0].stop.max_new_tokens == 16

    @pytest.mark.parametrize(
        ("prompt", "ids"),
        [
            ("ab", [(BOS, *ids_of("ab", eos=False))]),
            (["a", "b"], [(BOS, *ids_of("a", eos=False)), (BOS, *ids_of("b", eos=False))]),
            ([5, 6], [(5, 6)]),
            ([[5], [6, 7]], [(5,), (6, 7)]),
        ],
    )
    async def test_a_prompt_is_text_ids_or_a_list_of_either(self, prompt: object, ids: list[tuple[int, ...]]):
        house = build_house()

        answer = await house.post(COMPLETIONS, {"prompt": prompt})

        assert [request.prompt_token_ids for request in house.backend.requests] == ids
        assert [choice["index"] for choice in answer.json["choices"]] == list(range(len(ids)))
        assert answer.json["usage"]["prompt_tokens"] == sum(map(len, ids))

    async def test_choices_are_numbered_prompt_by_prompt(self):
        house = build_house(lambda request: Script(token_ids=(*request.prompt_token_ids[1:], EOS)))

        answer = await house.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 2})

        assert [choice["text"] for choice in answer.json["choices"]] == ["a", "a", "b", "b"]

    async def test_a_stream_has_null_then_a_reason_and_one_done(self):
        answer = await build_house(say("ab")).post(COMPLETIONS, {"prompt": ["x", "y"], "stream": True})

        *chunks, done = answer.events
        assert done == "[DONE]"
        assert answer.body.count(b"[DONE]") == 1
        for index in (0, 1):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == "ab"
            assert [choice["finish_reason"] for choice in own] == [None, None, "stop"]

    async def test_echo_puts_the_prompt_before_the_text(self):
        house = build_house(say("lo"))

        whole = await house.post(COMPLETIONS, {"prompt": "hel", "echo": True})
        stream = await house.post(COMPLETIONS, {"prompt": "hel", "echo": True, "stream": True})
        from_ids = await house.post(COMPLETIONS, {"prompt": ids_of("hel", eos=False), "echo": True})

        assert whole.json["choices"][0]["text"] == "hello"
        assert "".join(chunk["choices"][0]["text"] for chunk in stream.events[:-1]) == "hello"
        assert from_ids.json["choices"][0]["text"] == "hello"

    async def test_echo_with_logprobs_scores_the_prompt(self):
        house = build_house(say("c"))

        answer = await house.post(
            COMPLETIONS, {"prompt": ids_of("ab", eos=False), "echo": True, "logprobs": 1, "max_tokens": 1}
        )

        assert answer.json["choices"][0]["logprobs"] == {
            "tokens": ["a", "b", "c"],
            "token_logprobs": [None, -1.0, -0.5],
            "top_logprobs": [None, {"<s>": -0.5, "b": -1.0}, {"c": -0.5}],
            "text_offset": [0, 1, 2],
        }

    async def test_a_prompt_token_that_is_the_likeliest_stands_alone_with_its_own_number(self):
        """Evaluation harnesses compare the two numbers for equality."""
        house = build_house(say("c"))

        answer = await house.post(COMPLETIONS, {"prompt": [2, 0, 1], "echo": True, "logprobs": 1, "max_tokens": 0})

        assert answer.json["choices"][0]["logprobs"]["top_logprobs"] == [None, {"<s>": -1}, {"<s>": -0.5, "</s>": -1}]
        (request,) = house.backend.requests
        assert (request.sampling.prompt_logprobs, request.sampling.prompt_top_n_tokens) == (True, 1)

    async def test_offsets_of_an_echoed_prompt_count_its_characters(self):
        """A token may be a part of a character, and a text begins with a token that it does not show."""
        house = build_house(say("c"))

        answer = await house.post(COMPLETIONS, {"prompt": "aéb", "echo": True, "logprobs": 0, "max_tokens": 1})

        choice = answer.json["choices"][0]
        assert choice["text"] == "aébc"
        assert choice["logprobs"]["tokens"] == ["<s>", "a", "bytes:\\xc3", "bytes:\\xa9", "b", "c"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3]

    async def test_max_tokens_zero_with_echo_only_scores(self):
        house = build_house(say("c"))

        for stream in (False, True):
            answer = await house.post(
                COMPLETIONS,
                {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream},
            )
            if stream:
                text = "".join(chunk["choices"][0]["text"] for chunk in answer.events[:-1])
            else:
                text = answer.json["choices"][0]["text"]
                assert answer.json["usage"]["completion_tokens"] == 0
                assert answer.json["choices"][0]["logprobs"]["top_logprobs"] is None
            assert text == "ab"

    async def test_max_tokens_zero_alone_says_nothing(self):
        answer = await build_house(say("c")).post(COMPLETIONS, {"prompt": "ab", "max_tokens": 0})

        choice = answer.json["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
        assert answer.json["usage"]["completion_tokens"] == 0

    @pytest.mark.parametrize("prompt", [[], "", [[]], [1, "a"], [1, [2]], [-1], [258], ["a"] * 5])
    async def test_a_bad_prompt_is_named(self, prompt: object):
        answer = await build_house().post(COMPLETIONS, {"prompt": prompt})

        assert answer.status == 400
        assert answer.json["error"]["param"] == "prompt"
        assert "`prompt`" in answer.json["error"]["message"] or "prompts" in answer.json["error"]["message"]


class TestModels:
    async def test_every_name_of_the_model_is_listed(self):
        house = build_house(settings={"served_model_name": ("nice", "other")})

        answer = await house.get("/v1/models")

        assert [model["id"] for model in answer.json["data"]] == ["nice", "other"]
        assert answer.json["data"][0]["created"] == 1_700_000_000
        assert (await house.get("/v1/models/other")).json["id"] == "other"
        assert (await house.get("/v1/models/test/bytes")).json["id"] == "test/bytes"

    async def test_no_answer_shows_where_the_model_lies(self):
        house = build_house(settings={"model_id": "/srv/private/Model.Q4.gguf"})

        for path in ("/v1/models", "/info", "/metrics", "/v1/models/gpt-4"):
            assert b"private" not in (await house.get(path)).body
        assert b"private" not in (await house.post(CHAT, chat())).body

    @pytest.mark.parametrize("name", ["test/bytes", "nice", "tgi", None])
    async def test_known_names_are_served(self, name: str | None):
        house = build_house(settings={"served_model_name": ("nice",)})

        answer = await house.post(CHAT, chat(model=name))

        assert answer.status == 200
        assert answer.json["model"] == "nice"

    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
    async def test_an_unknown_name_is_model_not_found(self, path: str):
        body = chat(model="gpt-4") if path == CHAT else {"prompt": "a", "model": "gpt-4"}

        answer = await build_house().post(path, body)

        assert answer.status == 404
        assert answer.json["error"]["code"] == "model_not_found"
        assert answer.json["error"]["param"] == "model"
        assert answer.json["error"]["type"] == "invalid_request_error"

    async def test_any_name_is_served_when_the_operator_says_so(self):
        house = build_house(settings={"any_model_name": True})

        assert (await house.post(CHAT, chat(model="gpt-4"))).status == 200


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("tools", [{"type": "function", "function": {"name": "f"}}]),
            ("tool_choice", "required"),
            ("tool_choice", {"type": "function", "function": {"name": "f"}}),
            ("response_format", {"type": "json_object"}),
            ("response_format", {"type": "json_schema", "json_schema": {}}),
            ("functions", [{"name": "f"}]),
            ("function_call", {"name": "f"}),
            ("web_search_options", {}),
            ("moderation", {"model": "m"}),
            ("store", True),
            ("audio", {"voice": "x"}),
            ("modalities", ["audio"]),
            ("chat_template", "{{ 1 }}"),
            ("guided_json", {}),
            ("structured_outputs", {"regex": "a"}),
        ],
    )
    async def test_what_is_not_there_yet_is_refused_by_name(self, field: str, value: object):
        answer = await build_house().post(CHAT, chat(**{field: value}))

        assert answer.status == 400
        assert answer.json["error"]["param"] == field
        assert answer.json["error"]["code"] == "unsupported_parameter"
        assert f"`{field}`" in answer.json["error"]["message"]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("tools", []), ("tools", None), ("tool_choice", "none"), ("tool_choice", "auto"), ("tool_choice", None),
            ("response_format", {"type": "text"}), ("response_format", None), ("modalities", ["text"]),
            ("functions", []), ("logit_bias", {}), ("stop", None), ("stop", []), ("n", None), ("logprobs", None),
            ("metadata", {"a": "b"}), ("service_tier", "auto"), ("store", False), ("reasoning_effort", "low"),
            ("function_call", "auto"), ("parallel_tool_calls", False), ("verbosity", "high"),
            ("safety_identifier", "x"),
            ("prediction", {"type": "content", "content": "a"}), ("prompt_cache_key", "k"), ("store", None),
            ("prediction", {"type": "content", "content": [{"type": "text", "text": "a"}]}),
            ("prompt_cache_retention", "24h"), ("prompt_cache_options", {"mode": "explicit", "ttl": "30m"}),
            ("stream_options", {"include_obfuscation": False}), ("moderation", None), ("audio", None),
        ],
    )  # fmt: skip
    async def test_harmless_forms_are_accepted(self, field: str, value: object):
        assert (await build_house().post(CHAT, chat(**{field: value}))).status == 200

    @pytest.mark.parametrize(
        ("field", "value", "param"),
        [
            ("service_tier", "gold", "service_tier"),
            ("reasoning_effort", "most", "reasoning_effort"),
            ("verbosity", "mute", "verbosity"),
            ("prompt_cache_retention", "1y", "prompt_cache_retention"),
            ("prompt_cache_options", {"mode": "off"}, "prompt_cache_options.mode"),
            ("prediction", {"type": "audio", "content": "a"}, "prediction.type"),
            ("metadata", {"a" * 65: "b"}, "metadata"),
            ("metadata", {str(i): "b" for i in range(17)}, "metadata"),
        ],
    )
    async def test_what_changes_nothing_is_checked_all_the_same(self, field: str, value: object, param: str):
        answer = await build_house().post(CHAT, chat(**{field: value}))

        assert answer.status == 400
        error = answer.json["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid_value")

    @pytest.mark.parametrize(
        ("body", "code", "param"),
        [
            ({}, "missing_required_parameter", "messages"),
            ({"messages": "a"}, "invalid_type", "messages"),
            ({"messages": MESSAGES, "n": 0}, "invalid_value", "n"),
            ({"messages": MESSAGES, "max_tokens": 1000}, "context_length_exceeded", "max_tokens"),
            (b"{", "invalid_json", None),
        ],
    )
    async def test_codes_are_openais(self, body: object, code: str, param: str | None):
        answer = await build_house().post(CHAT, body)

        error = answer.json["error"]
        assert answer.status == 400
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
        assert answer.headers["x-request-id"]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_the_answer_names_the_tier_when_one_was_asked_for(self, stream: bool):
        house = build_house()
        options = {"stream": stream, "stream_options": {"include_usage": True}}

        asked = await house.post(CHAT, chat(service_tier="priority", **options))
        silent = await house.post(CHAT, chat(**options))

        objects = asked.events[:-1] if stream else [asked.json]
        assert {answer["service_tier"] for answer in objects} == {"default"}
        assert b"service_tier" not in silent.body

    async def test_the_effort_reaches_a_template_that_reads_it(self):
        house = build_house()

        await house.post(CHAT, chat(reasoning_effort="high"))
        assert house.template.kwargs == {}

        house.template.known_variables |= {"reasoning_effort"}
        await house.post(CHAT, chat(reasoning_effort="high"))
        assert house.template.kwargs == {"reasoning_effort": "high"}

        await house.post(CHAT, chat(reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"}))
        assert house.template.kwargs == {"reasoning_effort": "low"}

    async def test_suffix_and_best_of_are_refused_by_name(self):
        house = build_house()

        for field, value in (("suffix", "x"), ("best_of", 3)):
            answer = await house.post(COMPLETIONS, {"prompt": "a", field: value})
            assert (answer.status, answer.json["error"]["param"]) == (400, field)

    async def test_grammar_is_refused_by_name_on_native_routes(self):
        grammar = {"type": "regex", "value": "a"}

        answer = await build_house().post("/generate", {"inputs": "a", "parameters": {"grammar": grammar}})

        assert answer.status == 422
        assert "`grammar` is not supported yet" in answer.json["error"]


class TestFailures:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("house", "body", "status", "kind", "param", "code"),
        [
            ({}, {"n": 0}, 400, "invalid_request_error", "n", "invalid_value"),
            ({"settings": {"api_key": "k"}}, {}, 401, "invalid_request_error", None, "invalid_api_key"),
            ({}, {"model": "gpt-4"}, 404, "invalid_request_error", "model", "model_not_found"),
            ({"settings": {"payload_limit": 10}}, {}, 413, "invalid_request_error", None, "payload_too_large"),
            ({"settings": {"max_concurrent_requests": 1}}, {}, 429, "rate_limit_error", None, "rate_limit_exceeded"),
            ({"state": ServerState.LOADING}, {}, 503, "server_error", None, "not_ready"),
        ],
    )
    async def test_every_status_has_openais_object_and_an_id(
        self,
        house: dict[str, Any],
        body: dict[str, object],
        status: int,
        kind: str,
        param: str | None,
        code: str,
        *,
        stream: bool,
    ):
        served = build_house(**house)

        with served.context.admission.admit(1) if status == 429 else contextlib.nullcontext():
            answer = await served.post(CHAT, chat(stream=stream, **body), {"x-request-id": "mine"})

        assert answer.status == status
        error = answer.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == (kind, param, code)
        assert answer.headers["x-request-id"] == "mine"
        assert ("retry-after" in answer.headers) == (status in (429, 503))

    @pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
    async def test_a_failure_in_a_stream_is_an_error_object_and_done(self, path: str):
        body = chat(stream=True) if path == CHAT else {"prompt": "a", "stream": True}

        answer = await build_house(say("abc", fail_after=2)).post(path, body)

        *_, error, done = answer.events
        assert answer.status == 200
        assert done == "[DONE]"
        assert error == {
            "error": {"message": "Server error: scripted", "type": "server_error", "param": None, "code": "generation"}
        }
        assert answer.body.count(b'"error"') == 1

    async def test_a_failure_before_the_first_token_is_a_503_with_retry_after(self):
        error = GenerationError("The model server stopped", retry_after_s=2)

        answer = await build_house(say("x", fail_after=0, error=error)).post(CHAT, chat(stream=True))

        assert answer.status == 503
        assert answer.headers["retry-after"] == "2"
        assert answer.headers["content-type"] == "application/json"

    @pytest.mark.parametrize(("path", "last"), [(CHAT, "[DONE]"), ("/generate_stream", None)])
    async def test_a_bug_in_the_middle_of_a_stream_ends_it_with_one_typed_error(self, path: str, last: str | None):
        house = build_house(say("abc", fail_after=2, error=ValueError("private")))

        answer = await house.post(path, chat(stream=True, inputs="a"))

        events = answer.events[:-1] if last else answer.events
        assert last is None or answer.events[-1] == last
        assert [event for event in events if "error" in event] == [events[-1]]
        assert b"private" not in answer.body
        assert house.context.admission.used == 0

    async def test_one_failing_choice_ends_all(self):
        scripts = iter([Script(token_ids=ids_of("a" * 30)), Script(token_ids=ids_of("bcd"), fail_after=2)])
        house = build_house(lambda _: next(scripts))

        answer = await house.post(CHAT, chat(n=2, stream=True))

        assert answer.events[-1] == "[DONE]"
        assert "error" in answer.events[-2]
        assert house.backend.requests[0].request_id in house.backend.aborted
        assert house.context.admission.used == 0

    async def test_asking_for_more_than_the_context_is_context_length_exceeded(self):
        answer = await build_house().post(CHAT, chat(max_tokens=1000))

        assert answer.status == 400
        assert answer.json["error"]["code"] == "context_length_exceeded"
        assert "64" in answer.json["error"]["message"]

    async def test_error_objects_are_json_whatever_the_message(self):
        answer = await build_house().post(CHAT, chat(model='"\\\n\u2028'))

        assert json.loads(answer.body)["error"]["code"] == "model_not_found"
