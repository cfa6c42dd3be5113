"""Every object and event of `/v1`, held to the types that the official clients were generated with.

The clients themselves read anything (they build without validating); here their types validate what they are given.
"""

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import anthropic.types
import msgspec
import openai.types
import openai.types.chat
import openai.types.responses
import pydantic
import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params
from openai.types.responses.input_item_list_params import InputItemListParams
from openai.types.responses.input_token_count_params import InputTokenCountParams
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_retrieve_params import ResponseRetrieveParamsBase
from tests.contract.house import Answer, House, build_house, say

from weft.router.schemas_anthropic import CountTokensRequest, MessagesRequest
from weft.router.schemas_openai import ChatRequest, CompletionRequest, Message, PromptCacheOptions, StreamOptions
from weft.router.schemas_responses import (
    InputItemsQuery,
    InputTokensRequest,
    ResponseQuery,
    ResponsesRequest,
)

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TALK = [{"role": "user", "content": "Hi"}]
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
TEXT_LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
MESSAGE = {"model": "tgi", "max_tokens": 20, "messages": TALK}
TO_ANTHROPIC = {"anthropic-version": "2023-06-01"}


IN_HEADERS = {"user_profile_id", "workspace_id"}
"""Parameters of Anthropic's client that travel as headers."""


@pytest.mark.parametrize(
    ("documented", "body"),
    [
        (chat_params.CompletionCreateParamsBase, ChatRequest),
        (completion_params.CompletionCreateParamsBase, CompletionRequest),
        (response_params.ResponseCreateParamsBase, ResponsesRequest),
        (response_params.PromptCacheOptions, PromptCacheOptions),
        (InputTokenCountParams, InputTokensRequest),
        (ResponseRetrieveParamsBase, ResponseQuery),
        (InputItemListParams, InputItemsQuery),
        (openai.types.chat.ChatCompletionAssistantMessageParam, Message),
        (openai.types.chat.ChatCompletionToolMessageParam, Message),
        (openai.types.chat.ChatCompletionUserMessageParam, Message),
        (openai.types.chat.ChatCompletionStreamOptionsParam, StreamOptions),
        (MessageCreateParamsBase, MessagesRequest),
        (MessageCountTokensParams, CountTokensRequest),
    ],
)
def test_every_documented_parameter_is_known(documented: type, body: type[msgspec.Struct]):
    """Known means implemented, accepted for a reason, or refused by name; what is not known would be ignored."""
    names = set(get_type_hints(documented)) - IN_HEADERS

    assert names - set(body.__struct_encode_fields__) == set()


def validate(kind: Any, value: object) -> None:
    pydantic.TypeAdapter(kind).validate_python(value)


def events_of(answer: Answer) -> Iterator[dict[str, Any]]:
    for line in answer.body.decode().split("\n"):
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def house() -> House:
    return build_house(say("hé there"), max_total_tokens=4096)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (CHAT, {"messages": TALK}, openai.types.chat.ChatCompletion),
        (CHAT, {"messages": TALK, "n": 2, "service_tier": "auto", **LOGPROBS}, openai.types.chat.ChatCompletion),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "logprobs": 2}, openai.types.Completion),
        (RESPONSES, {"input": "Hi"}, openai.types.responses.Response),
        (RESPONSES, {"input": "Hi", "max_output_tokens": 3, **TEXT_LOGPROBS}, openai.types.responses.Response),
        (RESPONSES, {"input": "Hi", "background": True}, openai.types.responses.Response),
        (f"{RESPONSES}/input_tokens", {"input": "Hi"}, InputTokenCountResponse),
        (MESSAGES, MESSAGE, anthropic.types.Message),
        (MESSAGES, {**MESSAGE, "max_tokens": 2}, anthropic.types.Message),
        (f"{MESSAGES}/count_tokens", {"model": "tgi", "messages": TALK}, anthropic.types.MessageTokensCount),
    ],
)
async def test_whole_answers(path: str, body: dict[str, Any], kind: type):
    answer = await house().post(path, body)

    assert answer.status == 200
    validate(kind, answer.json)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (CHAT, {"messages": TALK, "n": 2, **USAGE, **LOGPROBS}, openai.types.chat.ChatCompletionChunk),
        (CHAT, {"messages": TALK, "stream": True}, openai.types.chat.ChatCompletionChunk),
        (RESPONSES, {"input": "Hi", "stream": True}, openai.types.responses.ResponseStreamEvent),
        (
            RESPONSES,
            {"input": "Hi", "stream": True, "max_output_tokens": 3, **TEXT_LOGPROBS},
            openai.types.responses.ResponseStreamEvent,
        ),
        (RESPONSES, {"input": "Hi", "stream": True, "background": True}, openai.types.responses.ResponseStreamEvent),
        (MESSAGES, {**MESSAGE, "stream": True}, anthropic.types.RawMessageStreamEvent),
    ],
)
async def test_events(path: str, body: dict[str, Any], kind: type):
    events = [event for event in events_of(await house().post(path, body)) if event.get("type") != "ping"]

    assert len(events) > 3
    for event in events:
        validate(kind, event)


async def test_what_is_listed():
    served = house()
    response = (await served.post(RESPONSES, {"input": "Hi"})).json

    items = (await served.get(f"{RESPONSES}/{response['id']}/input_items")).json

    validate(openai.types.responses.ResponseItemList, items)
    validate(list[openai.types.Model], (await served.get("/v1/models")).json["data"])
    validate(list[anthropic.types.ModelInfo], (await served.get("/v1/models", TO_ANTHROPIC)).json["data"])


async def test_a_stream_that_fails_ends_with_a_failed_response():
    served = build_house(say("abc", fail_after=2), max_total_tokens=4096)

    events = list(events_of(await served.post(RESPONSES, {"input": "Hi", "stream": True})))

    validate(list[openai.types.responses.ResponseStreamEvent], events)
    assert events[-1]["type"] == "response.failed"
