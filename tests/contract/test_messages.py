"""`/v1/messages` as Anthropic's API: objects, named events, stop reasons, errors."""

import json
from typing import Any, ClassVar

import pytest
from tests.contract.house import MODEL_ID, Answer, build_house, say, text_of

from weft.errors import GenerationError, RequestError

PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": "tgi", "max_tokens": 30, "messages": [{"role": "user", "content": "Hi"}]}


def body(**fields: Any) -> dict[str, Any]:
    return {**BODY, **fields}


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """Data of the events, each checked against its name."""
    events = []
    for frame in answer.body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


class TestCreate:
    async def test_a_whole_answer_is_a_message(self):
        answer = await build_house(say("hello", num_cached_tokens=4)).post(PATH, body())

        message = answer.json
        prompt_tokens = len("[user]Hi[assistant]")
        assert answer.status == 200
        assert message.pop("id").startswith("msg_")
        assert message == {
            "type": "message",
            "role": "assistant",
            "model": "test/bytes",
            "content": [{"type": "text", "text": "hello", "citations": None}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": prompt_tokens - 4,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 6,
                "output_tokens_details": {"thinking_tokens": 0},
                "service_tier": "standard",
            },
        }

    async def test_a_stream_has_every_event_in_order(self):
        events = events_of(await build_house(say("hé", num_cached_tokens=4)).post(PATH, body(stream=True)))

        assert [event["type"] for event in events] == [
            "message_start",
            "content_block_start",
            "ping",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        start = events[0]["message"]
        assert (start["content"], start["stop_reason"], start["usage"]["output_tokens"]) == ([], None, 0)
        assert start["usage"]["cache_read_input_tokens"] == 4
        assert [event["delta"]["text"] for event in events[3:5]] == ["h", "é"]
        assert events[6]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        assert events[6]["usage"]["output_tokens"] == 4

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        ("fields", "reason", "sequence", "text"),
        [
            ({}, "end_turn", None, "one, two"),
            ({"max_tokens": 3}, "max_tokens", None, "one"),
            ({"stop_sequences": ["no", " two"]}, "stop_sequence", " two", "one,"),
        ],
    )
    async def test_stop_reasons(
        self, fields: dict[str, Any], reason: str, sequence: str | None, text: str, *, stream: bool
    ):
        answer = await build_house(say("one, two")).post(PATH, body(**fields, stream=stream))

        if stream:
            events = events_of(answer)
            shown = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
            end = events[-2]["delta"]
        else:
            end, shown = answer.json, answer.json["content"][0]["text"]
        assert (end["stop_reason"], end["stop_sequence"], shown) == (reason, sequence, text)

    async def test_more_tokens_than_the_context_has_are_no_error(self):
        house = build_house(say("a" * 200))

        answer = await house.post(PATH, body(max_tokens=100_000))

        assert answer.json["stop_reason"] == "model_context_window_exceeded"
        assert house.backend.requests[0].stop.max_new_tokens == 64 - len("[user]Hi[assistant]")

    async def test_a_prompt_that_fills_the_context_is_one(self):
        answer = await build_house().post(PATH, body(messages=[{"role": "user", "content": "a" * 60}]))

        assert answer.status == 400
        assert "`messages`" in answer.json["error"]["message"]

    async def test_parameters_reach_the_engine(self):
        house = build_house()

        await house.post(PATH, body(temperature=0.5, top_k=4, top_p=0.25, metadata={"user_id": "u"}))

        sampling = house.backend.requests[0].sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 4, 0.25)


class TestConversation:
    @pytest.mark.parametrize(
        ("fields", "prompt"),
        [
            ({"system": "S"}, "[system]S[user]Hi[assistant]"),
            (
                {"system": [{"type": "text", "text": "S", "cache_control": {"type": "ephemeral"}}]},
                "[system]S[user]Hi[assistant]",
            ),
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
                "[user]a\nb[assistant]",
            ),
            (
                {"messages": [*BODY["messages"], {"role": "assistant", "content": "The answer is "}]},
                "[user]Hi[assistant]The answer is",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
                "[user]a\nb[assistant]",
            ),
        ],
    )
    async def test_the_prompt_is_what_the_template_makes_of_it(self, fields: dict[str, Any], prompt: str):
        house = build_house()

        answer = await house.post(PATH, body(**fields))
        count = await house.post(f"{PATH}/count_tokens", {"model": "tgi", "messages": BODY["messages"], **fields})

        assert answer.status == 200, answer.body
        assert text_of(house.backend.requests[0].prompt_token_ids) == prompt
        assert count.json == {"input_tokens": len(prompt)}

    async def test_earlier_calls_of_tools_reach_the_template(self):
        house, seen = build_house(max_total_tokens=200), []
        render = house.template.render

        async def remembering(messages, **options):
            seen.extend(messages)
            return await render(messages, **options)

        house.template.render = remembering
        call = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}
        result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "42"}]}
        messages = [
            *BODY["messages"],
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, call]},
            {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
        ]

        answer = await house.post(PATH, body(messages=messages))

        assert answer.status == 200, answer.body
        assert seen[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
        assert seen[1]["reasoning_content"] == "hm"
        assert seen[2:] == [
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "user", "content": "so?"},
        ]


class TestErrors:
    @pytest.mark.parametrize(
        ("fields", "status", "kind", "word"),
        [
            ({"model": "claude"}, 404, "not_found_error", "`claude`"),
            ({"model": None}, 400, "invalid_request_error", "`model`"),
            ({"max_tokens": None}, 400, "invalid_request_error", "`max_tokens`"),
            ({"max_tokens": 0}, 400, "invalid_request_error", "`max_tokens`"),
            ({"messages": []}, 400, "invalid_request_error", "`messages`"),
            ({"messages": [{"role": "king", "content": "a"}]}, 400, "invalid_request_error", "`messages[0].role`"),
            ({"temperature": 1.5}, 400, "invalid_request_error", "`temperature`"),
            ({"stop_sequences": [""]}, 400, "invalid_request_error", "`stop_sequences`"),
            ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "`tools`"),
            ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "`tool_choice`"),
            ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "`thinking`"),
            ({"output_config": {"format": {"type": "json_schema"}}}, 400, "invalid_request_error", "`output_config"),
            ({"container": "c"}, 400, "invalid_request_error", "`container`"),
            ({"mcp_servers": [{}]}, 400, "invalid_request_error", "`mcp_servers`"),
            ({"context_management": {}}, 400, "invalid_request_error", "`context_management`"),
            ({"diagnostics": {"previous_message_id": "m"}}, 400, "invalid_request_error", "`diagnostics`"),
            ({"inference_geo": "us"}, 400, "invalid_request_error", "`inference_geo`"),
            ({"speed": "slow"}, 400, "invalid_request_error", "`speed`"),
            ({"service_tier": "gold"}, 400, "invalid_request_error", "`service_tier`"),
            ({"output_config": {"effort": "most"}}, 400, "invalid_request_error", "`output_config.effort`"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "'image'"),
            ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "invalid_request_error", ".text`"),
            (
                {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]},
                400, "invalid_request_error", "`messages[0].content[0]`",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "", "content": 5}]}]},
                400, "invalid_request_error", ".content`",
            ),
        ],
    )  # fmt: skip
    async def test_a_bad_value_is_named(self, fields: dict[str, Any], status: int, kind: str, word: str):
        answer = await build_house().post(PATH, {k: v for k, v in body(**fields).items() if v is not None})

        assert answer.status == status
        assert answer.json["type"] == "error"
        assert answer.json["error"]["type"] == kind
        assert word in answer.json["error"]["message"]
        assert answer.json["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]

    async def test_the_effort_reaches_a_template_that_reads_it(self):
        house = build_house()
        house.template.known_variables |= {"reasoning_effort"}

        await house.post(PATH, body(output_config={"effort": "high"}))

        assert house.template.kwargs == {"reasoning_effort": "high"}

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": [], "tool_choice": {"type": "auto"}, "thinking": {"type": "disabled"}},
            {"output_config": {"effort": "low"}, "service_tier": "auto", "system": None, "stop_sequences": None},
            {"cache_control": {"type": "ephemeral"}, "speed": "fast", "inference_geo": "global", "diagnostics": None},
        ],
    )
    async def test_what_changes_nothing_is_fine(self, fields: dict[str, Any]):
        headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "something-2026"}

        assert (await build_house().post(f"{PATH}?beta=true", body(**fields), headers)).status == 200

    async def test_overload_is_a_rate_limit(self):
        answer = await build_house(settings={"max_concurrent_requests": 1}).post(PATH, body())
        house = build_house(settings={"max_concurrent_requests": 1})

        with house.context.admission.admit(1):
            refused = await house.post(PATH, body())

        assert answer.status == 200
        assert (refused.status, refused.json["error"]["type"]) == (429, "rate_limit_error")
        assert refused.headers["retry-after"]

    @pytest.mark.parametrize("error", [GenerationError("scripted"), RuntimeError("secret")])
    async def test_in_the_middle_of_a_stream_an_error_is_the_last_event(self, error: RequestError):
        events = events_of(await build_house(say("hello", fail_after=2, error=error)).post(PATH, body(stream=True)))

        assert events[-1]["type"] == "error"
        assert [event["type"] for event in events].count("error") == 1
        assert "message_stop" not in {event["type"] for event in events}
        assert "secret" not in events[-1]["error"]["message"]

    async def test_before_the_first_token_an_error_has_a_status(self):
        answer = await build_house(say("hello", fail_after=0)).post(PATH, body(stream=True))

        assert (answer.status, answer.json["error"]["type"]) == (503, "overloaded_error")


class TestModels:
    HEADERS: ClassVar = {"anthropic-version": "2023-06-01"}

    async def test_they_are_listed_in_anthropics_form_to_its_clients(self):
        house = build_house(settings={"served_model_name": (MODEL_ID, "second")})

        answer = await house.get("/v1/models", self.HEADERS)

        first, second = answer.json["data"]
        assert first == {
            "type": "model",
            "id": MODEL_ID,
            "display_name": MODEL_ID,
            "created_at": "2023-11-14T22:13:20Z",
            "lifecycle": "active",
            "max_input_tokens": 63,
            "max_tokens": 63,
        }
        assert second["id"] == "second"
        assert {name: answer.json[name] for name in ("has_more", "first_id", "last_id")} == {
            "has_more": False,
            "first_id": MODEL_ID,
            "last_id": "second",
        }
        assert (await house.get(f"/v1/models/{MODEL_ID}", self.HEADERS)).json == first
        assert (await house.get("/v1/models")).json["object"] == "list"

    @pytest.mark.parametrize(
        ("query", "names", "has_more"),
        [
            ("limit=1", ["a"], True),
            ("limit=1&after_id=a", ["b"], True),
            ("after_id=b", ["c"], False),
            ("after_id=c", [], False),
            ("before_id=c", ["a", "b"], False),
            ("before_id=c&limit=1", ["b"], True),
        ],
    )
    async def test_they_come_in_pages(self, query: str, names: list[str], has_more: bool):
        house = build_house(settings={"served_model_name": ("a", "b", "c")})

        page = (await house.get(f"/v1/models?{query}", self.HEADERS)).json

        shown = [model["id"] for model in page["data"]]
        assert (shown, page["has_more"]) == (names, has_more)
        assert (page["first_id"], page["last_id"]) == ((names[0], names[-1]) if names else (None, None))

    @pytest.mark.parametrize(
        ("path", "status", "kind"),
        [
            ("/v1/models/nobody", 404, "not_found_error"),
            ("/v1/models?limit=0", 400, "invalid_request_error"),
            ("/v1/models?limit=x", 400, "invalid_request_error"),
            ("/v1/models?after_id=nobody", 400, "invalid_request_error"),
            (f"/v1/models?after_id={MODEL_ID}&before_id={MODEL_ID}", 400, "invalid_request_error"),
            ("/v1/files", 404, "not_found_error"),
        ],
    )
    async def test_errors_are_in_anthropics_form_to_its_clients(self, path: str, status: int, kind: str):
        answer = await build_house().get(path, self.HEADERS)

        assert answer.status == status
        assert (answer.json["type"], answer.json["error"]["type"]) == ("error", kind)

    async def test_a_missing_key_is_said_in_anthropics_form_too(self):
        answer = await build_house(settings={"api_key": "secret"}).get("/v1/models", self.HEADERS)

        assert (answer.status, answer.json["error"]["type"]) == (401, "authentication_error")
