"""The acceptance vectors of TGI 3.3.7, one test per line of the table: input → expected.

Where Weft decides otherwise on purpose the test shows what it does, and its docstring says why.
"""

from typing import Any

import pytest
from tests.contract.house import BOS, build_house, ids_of, say, text_of

from weft.core.request import PenaltyStyle

CHAT_PATH = "/v1/chat/completions"
CHAT = {"messages": [{"role": "user", "content": "a"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
LARGE = {"max_total_tokens": 4096, "max_input_tokens": 4095}


async def sampling_of(body: dict[str, Any], path: str = "/generate"):
    house = build_house()
    answer = await house.post(path, body)
    assert answer.status == 200, answer.body
    return answer, house.backend.requests[0].sampling


async def test_generate_without_parameters_samples_at_temperature_1_with_a_random_seed_and_no_details():
    answer, sampling = await sampling_of({"inputs": "a"})
    _, other = await sampling_of({"inputs": "a"})

    assert (sampling.do_sample, sampling.temperature, sampling.is_greedy) == (True, 1.0, False)
    assert sampling.seed != other.seed
    assert "details" not in answer.json


async def test_generate_with_empty_parameters_is_greedy():
    assert (await sampling_of({"inputs": "a", "parameters": {}}))[1].is_greedy


async def test_temperature_1_is_greedy_and_passes_as_sampling_for_best_of():
    assert (await sampling_of({"inputs": "a", "parameters": {"temperature": 1.0}}))[1].is_greedy

    answer = await build_house().post("/generate", {"inputs": "a", "parameters": {"temperature": 1.0, "best_of": 2}})

    assert answer.status == 200


async def test_more_new_tokens_than_a_small_context_has_are_clamped_and_said():
    """TGI refuses them when they are at most 1024 and cuts silently above; here it is one rule, said in a header."""
    house = build_house(max_input_tokens=5, max_total_tokens=6)

    answer = await house.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 10}})

    assert (answer.status, answer.headers["x-max-new-tokens-clamped"]) == (200, "4")


async def test_a_million_new_tokens_are_accepted_behind_a_prompt_of_100():
    house = build_house(**LARGE)

    answer = await house.post("/generate", {"inputs": "a" * 99, "parameters": {"max_new_tokens": 1_000_000}})

    assert answer.status == 200
    assert len(house.backend.requests[0].prompt_token_ids) == 100
    assert answer.headers["x-max-new-tokens-clamped"] == "3996"


async def test_an_output_beyond_1024_tokens_ends_at_the_limit_to_the_token():
    """TGI generates in pieces of 1024 and rounds up."""
    house = build_house(say("x" * 2000), **LARGE)

    answer = await house.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1500, "details": True}})

    details = answer.json["details"]
    assert (details["generated_tokens"], details["finish_reason"]) == (1500, "length")
    assert len(house.backend.requests) == 1


@pytest.mark.parametrize(("value", "status"), [(0, 200), (4, 200), (5, 422)])
async def test_top_n_tokens_up_to_a_limit_of_4(value: int, status: int):
    house = build_house(settings={"max_top_n_tokens": 4})

    assert (await house.post("/generate", {"inputs": "a", "parameters": {"top_n_tokens": value}})).status == status


@pytest.mark.parametrize(("value", "status"), [(0.99, 200), (1.0, 200), (0.0, 422)])
async def test_top_p_between_0_and_1(value: float, status: int):
    """TGI refuses 1.0, the neutral value that clients send."""
    answer = await build_house().post("/generate", {"inputs": "a", "parameters": {"top_p": value}})

    assert answer.status == status


async def test_a_presence_penalty_of_0_is_none():
    """TGI makes a repetition penalty of 2.0 of it."""
    _, sampling = await sampling_of(CHAT | {"presence_penalty": 0.0}, CHAT_PATH)

    assert (sampling.presence_penalty, sampling.repetition_penalty) == (0.0, 1.0)
    assert sampling.penalty_style is PenaltyStyle.OPENAI


@pytest.mark.parametrize(
    ("choice", "is_refused"),
    [
        ("none", False),
        ("auto", False),
        (None, False),
        ("required", True),
        ("f", True),
        ({"type": "function", "function": {"name": "f"}}, True),
    ],
)
async def test_tool_choices_without_tools_are_idle_or_refused_by_name(choice: object, is_refused: bool):
    """Tools are not supported yet: what would need one is refused."""
    answer = await build_house().post(CHAT_PATH, CHAT | {"tool_choice": choice})

    assert answer.status == (400 if is_refused else 200)
    assert not is_refused or answer.json["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [], "response_format": {"type": "json_object", "value": {"properties": {}}}}, "response_format"),
        ({"response_format": {"type": "regex", "value": "a"}}, "response_format"),
    ],
)
async def test_tools_and_formats_are_refused_by_name(fields: dict[str, Any], name: str):
    """TGI's vector wants its tool error for both together; until they exist each is refused by itself."""
    answer = await build_house().post(CHAT_PATH, CHAT | fields)

    assert (answer.status, answer.json["error"]["param"]) == (400, name)


async def test_chunks_of_text_are_joined_and_an_image_is_refused_by_a_model_without_eyes():
    """TGI writes the image as text into the prompt of any model."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
    house = build_house()

    joined = await house.post(CHAT_PATH, {"messages": [{"role": "user", "content": parts}]})
    refused = await house.post(CHAT_PATH, {"messages": [{"role": "user", "content": [*parts, image]}]})

    assert joined.status == 200
    assert text_of(house.backend.requests[0].prompt_token_ids) == "[user]ab[assistant]"
    assert refused.status == 400
    assert "image_url" in refused.json["error"]["message"]


async def test_a_conversation_that_ends_with_the_assistant_ends_the_prompt_with_its_words():
    house = build_house()
    messages = [*CHAT["messages"], {"role": "assistant", "content": "The answer is \n"}]

    await house.post(CHAT_PATH, {"messages": messages})

    assert text_of(house.backend.requests[0].prompt_token_ids) == "[user]a[assistant]The answer is"


async def test_five_prompts_are_more_than_a_client_may_send_together():
    answer = await build_house().post("/v1/completions", {"prompt": list("abcde")})

    assert answer.status == 400
    assert answer.json["error"]["param"] == "prompt"
    assert "4" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("output", "reason"), [("/test", "eos_token"), ("/test;", "stop_sequence"), ("/test; ", "stop_sequence")]
)
async def test_a_stop_text_matches_where_it_ends(output: str, reason: str):
    """TGI looks at the end of the output alone and lets `/test; ` pass when its last two characters are one token."""
    answer = await build_house(say(output)).post(
        "/generate", {"inputs": "a", "parameters": {"stop": ["/test;"], "details": True}}
    )

    assert answer.json["details"]["finish_reason"] == reason
    assert answer.json["generated_text"] == output.rstrip()


async def test_of_two_bad_values_the_temperature_is_reported():
    answer = await build_house().post("/generate", {"inputs": "a", "parameters": {"top_p": 0.0, "temperature": 0.0}})

    assert answer.json["error"].startswith("Input validation error: `temperature` must be strictly positive")


async def test_prompts_of_native_routes_begin_with_bos_and_those_of_chat_with_what_the_template_writes():
    """The rows `add_special_tokens` of the parameter matrix; TGI's padded models have BOS twice in chats."""
    house = build_house()

    await house.post("/generate", {"inputs": "a"})
    await house.post(CHAT_PATH, CHAT)
    await house.post("/v1/completions", {"prompt": "a"})
    await house.post("/vertex", {"instances": [{"inputs": "a"}]})

    firsts = [request.prompt_token_ids[0] for request in house.backend.requests]
    assert firsts == [BOS, ids_of("[")[0], BOS, BOS]
