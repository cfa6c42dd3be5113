"""`/v1/responses` as OpenAI's API: objects, events, memory, background runs."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from tests.contract.house import Answer, House, Script, build_house, ids_of, say, text_of

from weft.core.request import LogprobStyle
from weft.errors import GenerationError
from weft.router.lifecycle import ServerState
from weft.router.response_runs import BackgroundRun

PATH = "/v1/responses"
TENANT = {"tenant_header": "x-tenant"}


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """Data of the events, each checked against its name and its place; the last frame is [DONE]."""
    *frames, done = answer.body.decode().removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def deltas_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")


def big_house(script=None, **options: Any) -> House:
    return build_house(script or say("hello"), max_total_tokens=512, **options)


async def ended(house: House, response_id: str) -> dict[str, Any]:
    """The response once it is no longer being made."""
    run = house.context.live_responses.get(response_id)
    async with asyncio.timeout(5):
        if isinstance(run, BackgroundRun):
            await run.wait_over()
        return (await house.get(f"{PATH}/{response_id}")).json


class TestCreate:
    async def test_a_whole_answer_is_an_openai_object(self):
        answer = await big_house(say("hello", num_cached_tokens=4)).post(
            PATH, {"input": "Hi", "metadata": {"a": "b"}, "max_output_tokens": 50, "temperature": 0.5, "user": "u"}
        )

        body = answer.json
        assert answer.status == 200
        assert (body["object"], body["status"], body["model"]) == ("response", "completed", "test/bytes")
        assert body["id"].startswith("resp_")
        assert body["output"] == [
            {
                "type": "message",
                "id": body["output"][0]["id"],
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}],
            }
        ]
        prompt_tokens = len("[user]Hi[assistant]")
        assert body["usage"] == {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens": 6,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + 6,
        }
        assert body["metadata"] == {"a": "b"}
        assert (body["max_output_tokens"], body["temperature"], body["top_p"]) == (50, 0.5, 1.0)
        assert (body["error"], body["incomplete_details"], body["store"]) == (None, None, True)

    @pytest.mark.parametrize("stream", [False, True])
    async def test_an_answer_that_is_cut_is_incomplete(self, stream: bool):
        answer = await big_house().post(PATH, {"input": "Hi", "max_output_tokens": 2, "stream": stream})

        if stream:
            last = events_of(answer)[-1]
            assert last["type"] == "response.incomplete"
        body = last["response"] if stream else answer.json
        assert body["status"] == body["output"][0]["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert body["output"][0]["content"][0]["text"] == "he"
        assert body["completed_at"] is None

    async def test_a_stream_has_every_event_in_order(self):
        events = events_of(await big_house(say("hé")).post(PATH, {"input": "Hi", "stream": True}))

        assert [event["type"] for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["delta"] for event in events[4:6]] == ["h", "é"]
        assert events[0]["response"]["status"] == "in_progress"
        assert events[0]["response"]["output"] == []
        assert events[6]["text"] == events[7]["part"]["text"] == events[8]["item"]["content"][0]["text"] == "hé"
        item_id = events[2]["item"]["id"]
        assert {event["item_id"] for event in events[3:8]} == {item_id}
        assert events[9]["response"]["output"][0]["id"] == item_id
        assert events[9]["response"]["usage"]["output_tokens"] == 4

    async def test_a_stream_and_a_whole_answer_report_the_same(self):
        house = big_house(say("hello", num_cached_tokens=3))
        fields = {"input": "Hi", "stop": "l", "top_logprobs": 1}

        whole = (await house.post(PATH, fields)).json
        streamed = events_of(await house.post(PATH, {**fields, "stream": True}))[-1]["response"]

        for name in ("id", "created_at", "completed_at"):
            whole.pop(name)
            streamed.pop(name)
        whole["output"][0].pop("id")
        streamed["output"][0].pop("id")
        assert whole == streamed
        assert whole["output"][0]["content"][0]["text"] == "he"

    async def test_an_empty_answer_is_an_empty_text(self):
        events = events_of(await big_house(say("")).post(PATH, {"input": "Hi", "stream": True}))

        assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""
        assert len(events) == 8

    async def test_logprobs_come_with_the_text_when_they_are_included(self):
        house = big_house(say("hé"))
        fields = {"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}

        whole = (await house.post(PATH, fields)).json["output"][0]["content"][0]["logprobs"]
        events = events_of(await house.post(PATH, {**fields, "stream": True}))

        assert bytes(byte for entry in whole for byte in entry["bytes"]).decode() == "hé"
        assert len(whole[0]["top_logprobs"]) == 2
        assert [entry for event in events[4:-4] for entry in event["logprobs"]] == whole
        assert events[-4]["logprobs"] == events[-3]["part"]["logprobs"] == whole
        assert house.backend.requests[0].sampling.logprob_style is LogprobStyle.RAW

    async def test_parameters_reach_the_engine(self):
        house = big_house()

        answer = await house.post(
            PATH, {"input": "Hi", "temperature": 0.5, "top_p": 0.25, "seed": 3, "top_k": 4, "max_output_tokens": 9}
        )

        request = house.backend.requests[0]
        assert answer.status == 200
        assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0.5, 0.25, 4)
        assert request.sampling.seed == 3
        assert request.stop.max_new_tokens == 9

    async def test_a_client_that_leaves_ends_the_generation(self):
        house = big_house(steps=asyncio.Semaphore(2))

        async with house.exchange("POST", PATH, {"input": "Hi", "stream": True}) as answer:
            await answer.until(lambda answer: b"output_text.delta" in answer.body)

        assert len(house.backend.aborted) == 1
        assert house.context.live_responses == {}
        assert house.context.admission.used == 0


class TestInput:
    @pytest.mark.parametrize(
        ("items", "prompt"),
        [
            ([{"role": "user", "content": "a"}], "[user]a"),
            ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}], "[user]a"),
            ([{"role": "developer", "content": "d"}, {"role": "user", "content": "a"}], "[system]d[user]a"),
            (
                [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                    {"role": "user", "content": "c"},
                ],
                "[user]a[assistant]b[user]c",
            ),
            ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "[user]a[assistant]b"),
        ],
    )
    async def test_items_are_messages(self, items: list[dict[str, Any]], prompt: str):
        house = big_house()

        answer = await house.post(PATH, {"input": items})

        assert answer.status == 200, answer.body
        assert text_of(house.backend.requests[0].prompt_token_ids) == prompt + "[assistant]"

    async def test_instructions_and_leading_system_messages_are_one_message_in_front(self):
        house = big_house()

        await house.post(PATH, {"instructions": "I", "input": [{"role": "system", "content": "S"}, user("a")]})

        assert text_of(house.backend.requests[0].prompt_token_ids) == "[system]I\n\nS[user]a[assistant]"

    async def test_earlier_calls_of_tools_reach_the_template(self):
        house, seen = big_house(), []
        render = house.template.render

        async def remembering(messages, **options):
            seen.extend(messages)
            return await render(messages, **options)

        house.template.render = remembering
        items = [
            user("a"),
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
            {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "42"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "43"}]},
        ]

        answer = await house.post(PATH, {"input": items})

        assert answer.status == 200, answer.body
        assert seen[1]["reasoning_content"] == "hm"
        assert [call["function"] for call in seen[1]["tool_calls"]] == [
            {"name": "f", "arguments": {"x": 1}},
            {"name": "g", "arguments": {}},
        ]
        assert seen[2:] == [
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            {"role": "tool", "content": "43", "tool_call_id": "2"},
        ]

    async def test_input_tokens_are_those_of_the_answer(self):
        house = big_house()
        first = (await house.post(PATH, {"input": "Hi"})).json
        fields = {"input": "More", "instructions": "Be", "previous_response_id": first["id"]}

        count = await house.post(f"{PATH}/input_tokens", fields)

        usage = (await house.post(PATH, fields)).json["usage"]
        assert count.json == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class TestMemory:
    async def test_a_response_can_be_had_again_until_it_is_deleted(self):
        house = big_house()
        response = (await house.post(PATH, {"input": "Hi"})).json
        path = f"{PATH}/{response['id']}"

        assert (await house.get(path)).json == response
        assert (await house.request("DELETE", path)).json == {
            "id": response["id"],
            "object": "response",
            "deleted": True,
        }
        assert (await house.get(path)).status == 404
        assert (await house.request("DELETE", path)).status == 404

    async def test_a_streamed_response_is_stored_as_it_was_said(self):
        house = big_house()

        last = events_of(await house.post(PATH, {"input": "Hi", "stream": True}))[-1]["response"]

        assert (await house.get(f"{PATH}/{last['id']}")).json == last

    async def test_a_conversation_goes_on_behind_an_earlier_response(self):
        house = big_house()
        first = (await house.post(PATH, {"input": "a", "instructions": "I"})).json
        second = (await house.post(PATH, {"input": "b", "previous_response_id": first["id"]})).json

        third = await house.post(
            PATH, {"input": "c", "previous_response_id": second["id"], "instructions": "J", "store": False}
        )

        assert third.json["previous_response_id"] == second["id"]
        prompt = text_of(house.backend.requests[2].prompt_token_ids)
        assert prompt == "[system]J[user]a[assistant]hello[user]b[assistant]hello[user]c[assistant]"

    @pytest.mark.parametrize("kind", [{"type": "item_reference"}, {}])
    async def test_an_item_of_an_earlier_answer_may_be_named_by_its_id(self, kind: dict[str, str]):
        house = big_house()
        first = (await house.post(PATH, {"input": "a"})).json
        [message] = first["output"]
        items = [{"role": "user", "content": "a"}, {**kind, "id": message["id"]}, {"role": "user", "content": "b"}]

        second = await house.post(PATH, {"input": items})
        counted = await house.post(f"{PATH}/input_tokens", {"input": items})

        prompt = text_of(house.backend.requests[1].prompt_token_ids)
        assert prompt == "[user]a[assistant]hello[user]b[assistant]"
        assert counted.json["input_tokens"] == second.json["usage"]["input_tokens"]
        listed = (await house.get(f"{PATH}/{second.json['id']}/input_items?order=asc")).json["data"]
        assert listed[1] == message

    async def test_an_item_that_is_not_stored_is_not_found(self):
        house = big_house()
        first = (await house.post(PATH, {"input": "a", "store": False})).json
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}

        for answer in (
            await house.post(PATH, {"input": [reference]}),
            await house.post(PATH, {"input": [{**reference, "id": "rs_1"}]}),
        ):
            assert (answer.status, answer.json["error"]["param"]) == (404, "input")

    async def test_what_was_asked_for_is_shown_again(self):
        asked = {"tool_choice": "none", "prompt_cache_retention": "24h", "prompt_cache_key": "k", "max_tool_calls": 3}

        response = (await big_house().post(PATH, {"input": "a", **asked})).json

        assert {name: response[name] for name in asked} == asked

    async def test_store_false_is_not_stored(self):
        house = big_house()

        response = (await house.post(PATH, {"input": "Hi", "store": False})).json

        assert response["store"] is False
        assert (await house.get(f"{PATH}/{response['id']}")).status == 404

    async def test_a_missing_link_is_named(self):
        house = big_house()
        first = (await house.post(PATH, {"input": "a"})).json
        second = (await house.post(PATH, {"input": "b", "previous_response_id": first["id"]})).json
        await house.request("DELETE", f"{PATH}/{first['id']}")

        answer = await house.post(PATH, {"input": "c", "previous_response_id": second["id"]})

        error = answer.json["error"]
        assert answer.status == 400
        assert (error["param"], error["code"]) == ("previous_response_id", "previous_response_not_found")
        assert first["id"] in error["message"]

    async def test_input_items_are_everything_before_the_answer(self):
        house = big_house()
        first = (await house.post(PATH, {"input": "a"})).json
        second = (await house.post(PATH, {"input": [user("b"), user("c")], "previous_response_id": first["id"]})).json
        path = f"{PATH}/{second['id']}/input_items"

        everything = (await house.get(f"{path}?order=asc")).json
        newest = (await house.get(f"{path}?limit=1")).json
        rest = (await house.get(f"{path}?after={newest['last_id']}&limit=100")).json

        assert [item["content"][0]["text"] for item in everything["data"]] == ["a", "hello", "b", "c"]
        assert everything["has_more"] is False
        assert [item["content"][0]["text"] for item in newest["data"]] == ["c"]
        assert newest["has_more"] is True
        assert rest["data"] == everything["data"][2::-1]

    @pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=null", "order=up", "after=nothing"])
    async def test_a_bad_query_is_named(self, query: str):
        house = big_house()
        response = (await house.post(PATH, {"input": "a"})).json

        answer = await house.get(f"{PATH}/{response['id']}/input_items?{query}")

        assert answer.status == 400
        assert answer.json["error"]["param"] == query.partition("=")[0]

    async def test_another_tenant_finds_nothing(self):
        house = big_house(settings=TENANT)
        response = (await house.post(PATH, {"input": "a"}, {"x-tenant": "one"})).json
        path = f"{PATH}/{response['id']}"

        for headers in ({}, {"x-tenant": "two"}):
            assert (await house.get(path, headers)).status == 404
            assert (await house.request("DELETE", path, None, headers)).status == 404
            fields = {"input": "b", "previous_response_id": response["id"]}
            assert (await house.post(PATH, fields, headers)).status == 400
        assert (await house.get(path, {"x-tenant": "one"})).status == 200

    async def test_a_file_outlives_the_server(self, tmp_path: Path):
        settings = {"response_store": str(tmp_path / "kept" / "responses.sqlite")}
        house = big_house(settings=settings)
        response = (await house.post(PATH, {"input": "a"})).json
        await house.context.responses.close()

        again = big_house(settings=settings)

        assert (await again.get(f"{PATH}/{response['id']}")).json == response
        assert (tmp_path / "kept" / "responses.sqlite").stat().st_mode & 0o777 == 0o600
        await again.context.responses.close()

    async def test_a_store_that_cannot_write_is_no_reason_to_lose_the_answer(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        house = big_house(settings={"response_store": str(tmp_path / "file" / "responses.sqlite")})

        answer = await house.post(PATH, {"input": "a"})

        assert answer.status == 200
        assert answer.json["store"] is False
        assert (await house.get(f"{PATH}/{answer.json['id']}")).status == 500

    async def test_the_operator_may_switch_it_off(self):
        house = big_house(settings={"response_store": "off"})

        response = await house.post(PATH, {"input": "a"})

        assert response.json["store"] is False
        assert (await house.get(f"{PATH}/{response.json['id']}")).status == 404
        for field, value in (("background", True), ("previous_response_id", "resp_1")):
            refused = await house.post(PATH, {"input": "a", field: value})
            assert refused.json["error"]["param"] == field


class TestBackground:
    async def test_it_goes_on_without_a_client(self):
        steps = asyncio.Semaphore(0)
        house = big_house(steps=steps)

        begun = await house.post(PATH, {"input": "a", "background": True})
        path = f"{PATH}/{begun.json['id']}"
        waiting = await house.get(path)
        steps.release()
        async with asyncio.timeout(5):
            while not (running := (await house.get(path)).json)["output"]:  # noqa: ASYNC110 - as a client would ask
                await asyncio.sleep(0)
        for _ in range(10):
            steps.release()
        final = await ended(house, begun.json["id"])

        assert begun.json["status"] == waiting.json["status"] == "queued"
        assert (running["status"], running["output"][0]["content"][0]["text"]) == ("in_progress", "h")
        assert (final["status"], final["output"][0]["content"][0]["text"]) == ("completed", "hello")
        assert (await house.get(path)).json == final
        assert house.context.live_responses == {}
        assert house.context.admission.used == 0

    async def test_it_holds_its_place_and_is_counted_once(self):
        steps = asyncio.Semaphore(0)
        house = big_house(steps=steps, settings={"max_concurrent_requests": 1})

        begun = await house.post(PATH, {"input": "a", "background": True})
        refused = await house.post(PATH, {"input": "b"})
        for _ in range(10):
            steps.release()
        await ended(house, begun.json["id"])

        assert refused.status == 429
        metrics = (await house.get("/metrics")).body.decode()
        assert "tgi_request_count 2" in metrics
        assert "tgi_request_success 1" in metrics
        assert "tgi_request_generated_tokens_sum 6" in metrics

    async def test_it_can_be_cancelled_once_and_again(self):
        house = big_house(steps=asyncio.Semaphore(2))
        begun = (await house.post(PATH, {"input": "a", "background": True})).json

        cancelled = await house.request("POST", f"{PATH}/{begun['id']}/cancel")
        again = await house.request("POST", f"{PATH}/{begun['id']}/cancel")

        assert cancelled.status == 200
        assert cancelled.json["status"] == "cancelled"
        assert again.json == cancelled.json == (await house.get(f"{PATH}/{begun['id']}")).json
        assert len(house.backend.aborted) == 1
        assert house.context.admission.used == 0

    async def test_only_a_running_background_response_can_be_cancelled(self):
        house = big_house()
        plain = (await house.post(PATH, {"input": "a"})).json
        over = await ended(house, (await house.post(PATH, {"input": "a", "background": True})).json["id"])

        for response in (plain, over):
            answer = await house.request("POST", f"{PATH}/{response['id']}/cancel")
            assert answer.status == 400
        assert (await house.request("POST", f"{PATH}/resp_none/cancel")).status == 404

    async def test_deleting_stops_it(self):
        house = big_house(steps=asyncio.Semaphore(1))
        begun = (await house.post(PATH, {"input": "a", "background": True})).json

        assert (await house.request("DELETE", f"{PATH}/{begun['id']}")).status == 200

        assert (await house.get(f"{PATH}/{begun['id']}")).status == 404
        assert len(house.backend.aborted) == 1

    async def test_it_cannot_be_continued_before_it_has_ended(self):
        house = big_house(steps=asyncio.Semaphore(0))
        begun = (await house.post(PATH, {"input": "a", "background": True})).json

        answer = await house.post(PATH, {"input": "b", "previous_response_id": begun["id"]})

        assert answer.status == 400
        assert "still" in answer.json["error"]["message"]
        await house.request("DELETE", f"{PATH}/{begun['id']}")

    async def test_a_failure_is_told_to_whoever_asks(self):
        house = big_house(say("hello", fail_after=2, error=GenerationError("Server error: scripted")))

        begun = (await house.post(PATH, {"input": "a", "background": True})).json
        final = await ended(house, begun["id"])

        assert final["status"] == "failed"
        assert final["error"] == {"code": "server_error", "message": "Server error: scripted"}
        assert final["output"][0]["content"][0]["text"] == "he"

    async def test_a_stream_can_be_left_and_followed_again_from_any_place(self):
        steps = asyncio.Semaphore(3)
        house = big_house(steps=steps)
        fields = {"input": "a", "background": True, "stream": True, "top_logprobs": 1}

        async with house.exchange("POST", PATH, fields) as answer:
            await answer.until(lambda answer: answer.body.count(b"output_text.delta\n") == 3)
        response_id = json.loads(answer.body.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
        async with house.exchange("GET", f"{PATH}/{response_id}?stream=true&starting_after=5") as live:
            await live.until(lambda answer: b'"sequence_number":6' in answer.body)
            for _ in range(10):
                steps.release()
            await live.finished()
        await ended(house, response_id)
        stored = await house.get(f"{PATH}/{response_id}?stream=true")

        events = events_of(stored)
        assert [event["sequence_number"] for event in events] == list(range(14))
        assert [event["type"] for event in events[:3]] == [
            "response.created",
            "response.queued",
            "response.in_progress",
        ]
        assert events_of(live) == events[6:]
        assert stored.body.startswith(answer.body)
        assert deltas_of(events) == "hello"
        assert house.backend.aborted == []

    @pytest.mark.parametrize("fields", [{}, {"background": True}])
    async def test_only_what_was_begun_as_a_background_stream_can_be_streamed_again(self, fields: dict[str, Any]):
        house = big_house()
        response = await ended(house, (await house.post(PATH, {"input": "a", **fields})).json["id"])

        answer = await house.get(f"{PATH}/{response['id']}?stream=true")

        assert answer.status == 400
        assert answer.json["error"]["param"] == "stream"

    async def test_a_response_whose_server_died_has_failed(self, tmp_path: Path):
        settings = {"response_store": str(tmp_path / "responses.sqlite")}
        house = big_house(settings=settings, steps=asyncio.Semaphore(0))
        begun = (await house.post(PATH, {"input": "a", "background": True})).json
        [run] = house.context.live_responses.values()
        other = big_house(settings=settings)

        meanwhile = await other.get(f"{PATH}/{begun['id']}")
        dead = run.stored()
        object.__setattr__(dead, "owner", "1:0.0")
        await other.context.responses.put(dead)
        afterwards = await other.get(f"{PATH}/{begun['id']}")

        assert meanwhile.json["status"] == "queued"
        assert afterwards.json["status"] == "failed"
        assert "stopped" in afterwards.json["error"]["message"]
        run.cancel()
        await run.wait_over()
        await house.context.responses.close()
        await other.context.responses.close()


class TestFailures:
    async def test_before_the_first_token_a_failure_has_a_status(self):
        answer = await big_house(say("hello", fail_after=0)).post(PATH, {"input": "a", "stream": True})

        assert answer.status == 503
        assert answer.json["error"]["code"] == "generation"

    @pytest.mark.parametrize("error", [GenerationError("scripted"), None])
    async def test_in_the_middle_it_is_the_last_event(self, error: GenerationError | None):
        script = say("hello", fail_after=2, error=error) if error else say("hello", stop_silently=True)
        house = big_house(script)

        events = events_of(await house.post(PATH, {"input": "a", "stream": True}))

        assert events[-1]["type"] == "response.failed"
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        response = events[-1]["response"]
        assert response["status"] == "failed"
        assert response["error"]["code"] == "server_error"
        assert response["output"][0]["status"] == "incomplete"
        assert (await house.get(f"{PATH}/{response['id']}")).json == response

    async def test_a_bug_in_the_middle_of_a_stream_ends_it_once(self):
        class Odd(Exception):
            pass

        def script(_: object) -> Script:
            return Script(token_ids=ids_of("hello"), fail_after=2, error=Odd("secret"))

        answer = await big_house(script).post(PATH, {"input": "a", "stream": True})

        events = events_of(answer)
        assert events[-1]["type"] == "response.failed"
        assert b"secret" not in answer.body

    @pytest.mark.parametrize("state", [ServerState.LOADING, ServerState.DRAINING])
    async def test_a_server_that_is_not_ready_says_so(self, state: ServerState):
        assert (await big_house(state=state).post(PATH, {"input": "a"})).status == 503


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("tools", [{"type": "function", "name": "f"}]), ("tool_choice", "required"),
            ("conversation", "conv_1"), ("prompt", {"id": "p"}), ("truncation", "auto"), ("moderation", {"model": "m"}),
            ("context_management", [{"type": "compaction"}]), ("image", {"detail": "low"}), ("access_programs", {}),
            ("prompt_cache_options", {"prewarm": True}), ("prompt_cache_options", {"comparison_response_id": "r"}),
        ],
    )  # fmt: skip
    async def test_what_is_not_there_yet_is_refused_by_name(self, field: str, value: object):
        answer = await big_house().post(PATH, {"input": "a", field: value})

        assert answer.status == 400
        assert (answer.json["error"]["param"], answer.json["error"]["code"]) == (field, "unsupported_parameter")
        assert f"`{field}" in answer.json["error"]["message"]

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"text": {"format": {"type": "json_object"}}}, "text.format"),
            ({"text": {"verbosity": "loud"}}, "text.verbosity"),
            ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
            ({"include": ["everything"]}, "include"),
            ({"background": True, "store": False}, "background"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"max_output_tokens": 10_000}, "max_output_tokens"),
            ({"max_tool_calls": 0}, "max_tool_calls"),
            ({"temperature": 3}, "temperature"),
            ({"top_logprobs": 21}, "top_logprobs"),
            ({"metadata": {str(index): "" for index in range(17)}}, "metadata"),
            ({"metadata": {"a": "b" * 513}}, "metadata"),
            ({"previous_response_id": "resp_none"}, "previous_response_id"),
            ({"input": None}, "input"),
            ({"input": []}, "input"),
            ({"input": "a" * 10_000}, "input"),
            ({"input": [{"role": "user"}]}, "input"),
            ({"input": [{"role": "king", "content": "a"}]}, "input"),
            ({"input": [{"content": "a"}]}, "input"),
            ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
            ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input"),
            ({"input": [{"type": "item_reference"}]}, "input"),
            ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input"),
            ({"service_tier": "gold"}, "service_tier"),
            ({"prompt_cache_retention": "1y"}, "prompt_cache_retention"),
            ({"prompt_cache_options": {"mode": "off"}}, "prompt_cache_options.mode"),
            ({"input": [{"type": "function_call", "name": "f"}]}, "input"),
            ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input"),
        ],
    )
    async def test_a_bad_value_is_named(self, fields: dict[str, Any], param: str):
        answer = await big_house().post(PATH, {"input": "a", **fields})

        assert answer.status == 400, answer.body
        assert answer.json["error"]["param"] == param
        assert f"`{param}" in answer.json["error"]["message"]
        assert "`messages`" not in answer.json["error"]["message"]

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False}, {"truncation": "disabled"},
            {"text": {"format": {"type": "text"}, "verbosity": "low"}},
            {"reasoning": {"effort": "low", "summary": "auto"}},
            {"include": ["reasoning.encrypted_content"]}, {"service_tier": "auto", "prompt_cache_key": "k"},
            {"stream_options": {"include_obfuscation": False}}, {"store": None, "metadata": None, "instructions": None},
        ],
    )  # fmt: skip
    async def test_what_changes_nothing_is_fine(self, fields: dict[str, Any]):
        assert (await big_house().post(PATH, {"input": "a", **fields})).status == 200

    async def test_an_unknown_model_is_not_found(self):
        answer = await big_house().post(PATH, {"input": "a", "model": "gpt-4"})

        assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
