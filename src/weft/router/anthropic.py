"""Anthropic's messages: /v1/messages and /v1/messages/count_tokens.

A body becomes a chat request and takes the way of every conversation (`conversation.py`). A `max_tokens` beyond the
context is clamped, as clients send large ones by habit; the answer then ends with `model_context_window_exceeded`.

Source: Anthropic API reference, messages and their streaming, version 2023-06-01
"""

from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec

from weft.core.request import FinishReason
from weft.errors import NotSupportedError, RequestError, ValidationError
from weft.router.backend import TokenBatch
from weft.router.body import decode
from weft.router.choices import AnswerHead
from weft.router.context import RouterContext
from weft.router.conversation import Conversation, compute_headers, count_tokens, counted, in_words_of, prepare
from weft.router.error_replies import anthropic_end_frames
from weft.router.exchange import Exchange
from weft.router.generation import Generation, timing_headers
from weft.router.json_values import is_given
from weft.router.model_names import answer_head
from weft.router.openai_fields import check_choice
from weft.router.schemas_anthropic import (
    AnthropicAnswer,
    AnthropicMessage,
    Block,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    MessageDelta,
    MessageDeltaUsage,
    MessagePromptFields,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageTokensDetails,
    MessageUsage,
    Ping,
    StopDelta,
    TextBlock,
    TextDelta,
    TokensCount,
)
from weft.router.schemas_openai import ChatRequest, FunctionCall, Message, ToolCall
from weft.router.sequence_text import SequenceText
from weft.router.stream import EventStream, encode_json, named_frame

_FIELD_NAMES = {"stop": "stop_sequences"}
_ROLES = ("user", "assistant", "system")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_SPEEDS = ("standard", "fast")
_SERVICE_TIERS = ("auto", "standard_only")
_OPENING_PING = named_frame("ping", Ping())
_BLOCK_START = named_frame("content_block_start", ContentBlockStart(index=0, content_block=TextBlock(text="")))
_BLOCK_STOP = named_frame("content_block_stop", ContentBlockStop(index=0))
_MESSAGE_STOP = named_frame("message_stop", MessageStop())


@dataclass(slots=True)
class _Job:
    """One answer."""

    head: AnswerHead
    conversation: Conversation
    sequence: SequenceText

    def answer(self, exchange: Exchange, text: str | None) -> AnthropicAnswer:
        """The whole answer, or its begin (None) before there is text."""
        is_begin = text is None
        return AnthropicAnswer(
            id=self.head.id,
            role="assistant",
            model=self.head.model,
            content=[] if text is None else [TextBlock(text=text)],
            stop_reason=None if is_begin else self.stop_reason,
            stop_sequence=None if is_begin else self.sequence.matched_stop,
            usage=MessageUsage(**msgspec.structs.asdict(self.usage(exchange))),
        )

    @property
    def stop_reason(self) -> str:
        """Anthropic's word for how it ended."""
        match self.sequence.finish_reason:
            case FinishReason.LENGTH:
                return "model_context_window_exceeded" if self.conversation.is_clamped else "max_tokens"
            case FinishReason.STOP_SEQUENCE:
                return "stop_sequence"
            case _:
                return "end_turn"

    def usage(self, exchange: Exchange) -> MessageDeltaUsage:
        """The same numbers as on every route, under Anthropic's names."""
        usage = counted(exchange, self.conversation.num_prompt_tokens, self.sequence.num_tokens)
        num_cached = usage.prompt_tokens_details.cached_tokens
        return MessageDeltaUsage(
            input_tokens=usage.prompt_tokens - num_cached,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=num_cached,
            output_tokens=usage.completion_tokens,
            output_tokens_details=MessageTokensDetails(
                thinking_tokens=usage.completion_tokens_details.reasoning_tokens
            ),
        )


async def messages(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/messages."""
    body = decode(exchange.body, MessagesRequest)
    head = answer_head("msg_", body.model, context, context.require_model())
    _check(body)
    with in_words_of(_FIELD_NAMES):
        conversation = await prepare(context, exchange, _chat_body(body), clamps=True)
    request = conversation.requests[0]
    sequence = SequenceText(conversation.model, request.prompt_token_ids, conversation.checked.stop_strings)
    job = _Job(head, conversation, sequence)
    if body.stream:
        await _stream(context, exchange, job)
    else:
        await _answer(context, exchange, job)


async def count_message_tokens(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/messages/count_tokens."""
    body = decode(exchange.body, CountTokensRequest)
    answer_head("", body.model, context, context.require_model())
    _check_prompt_fields(body)
    count = await count_tokens(context, exchange, _chat_body(body))
    await exchange.reply(200, encode_json(TokensCount(input_tokens=count)))


# --- running ------------------------------------------------------------------------------------------------------


async def _answer(context: RouterContext, exchange: Exchange, job: _Job) -> None:
    text: list[str] = []
    with Generation(context, exchange, job.conversation.requests, [job.sequence]) as generation:
        async with aclosing(generation.progress()) as progress:
            async for _, batch in progress:
                text.append(_push(job.sequence, batch))
    headers = [*compute_headers(context, job.conversation.num_prompt_chars), *timing_headers(exchange)]
    await exchange.reply(200, encode_json(job.answer(exchange, "".join(text))), headers=headers)


async def _stream(context: RouterContext, exchange: Exchange, job: _Job) -> None:
    def end_frames(error: RequestError) -> bytes:
        return anthropic_end_frames(error, exchange.request_id)

    stream = EventStream(exchange, context.streams, end_frames)
    headers = compute_headers(context, job.conversation.num_prompt_chars)
    has_begun = False
    with stream, Generation(context, exchange, job.conversation.requests, [job.sequence]) as generation:
        stream.announce(headers)
        show = partial(stream.show, partial(_delta_frames, job.sequence))
        async with aclosing(generation.progress(show)) as progress:
            async for _, batch in progress:
                frames = b""
                if not has_begun:
                    has_begun = True
                    await stream.open(headers)
                    begin = named_frame("message_start", MessageStart(message=job.answer(exchange, None)))
                    frames = begin + _BLOCK_START + _OPENING_PING
                if frames := frames + _delta_frames(job.sequence, batch):
                    await stream.write(frames)
        stop = StopDelta(stop_reason=job.stop_reason, stop_sequence=job.sequence.matched_stop)
        last = named_frame("message_delta", MessageDelta(delta=stop, usage=job.usage(exchange)))
        await stream.close(_BLOCK_STOP + last + _MESSAGE_STOP)


def _delta_frames(sequence: SequenceText, batch: TokenBatch) -> bytes:
    text = _push(sequence, batch)
    return named_frame("content_block_delta", ContentBlockDelta(index=0, delta=TextDelta(text=text))) if text else b""


def _push(sequence: SequenceText, batch: TokenBatch) -> str:
    shown: list[str] = []
    for event in batch:
        shown.append(sequence.push(event))
        if sequence.finish_reason is not None:
            break
    return "".join(shown)


# --- from the body to a conversation ------------------------------------------------------------------------------


def _check(body: MessagesRequest) -> None:
    _check_prompt_fields(body)
    if body.temperature is not None and not 0 <= body.temperature <= 1:
        raise ValidationError(f"`temperature` must be >= 0 and <= 1. Given: {body.temperature}", field="temperature")
    refused = {
        "container": is_given(body.container),
        "mcp_servers": bool(body.mcp_servers),
        "context_management": is_given(body.context_management),
        "diagnostics": is_given(body.diagnostics),
    }
    for name, is_asked_for in refused.items():
        if is_asked_for:
            raise NotSupportedError(f"`{name}` is not supported; leave it out", field=name)
    check_choice("service_tier", body.service_tier, _SERVICE_TIERS)
    if body.inference_geo not in (None, "global"):
        raise NotSupportedError(
            "`inference_geo` other than global is not supported: the server is where it is. Leave it out",
            field="inference_geo",
        )


def _check_prompt_fields(body: MessagePromptFields) -> None:
    if body.tools:
        raise NotSupportedError("`tools` is not supported yet; leave it out", field="tools")
    if body.tool_choice is not None and body.tool_choice.type not in ("none", "auto"):
        raise NotSupportedError("`tool_choice` other than none or auto is not supported yet", field="tool_choice")
    if body.thinking is not None and body.thinking.type != "disabled":
        raise NotSupportedError(
            '`thinking` other than {"type": "disabled"} is not supported yet; leave it out', field="thinking"
        )
    if body.output_config is not None and is_given(body.output_config.format):
        raise NotSupportedError("`output_config.format` is not supported yet; leave it out", field="output_config")
    check_choice("output_config.effort", None if body.output_config is None else body.output_config.effort, _EFFORTS)
    check_choice("speed", body.speed, _SPEEDS)


def _chat_body(body: MessagePromptFields) -> ChatRequest:
    chat = ChatRequest(
        messages=_messages(body),
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=None if body.output_config is None else body.output_config.effort,
    )
    if not isinstance(body, MessagesRequest):
        return chat
    return msgspec.structs.replace(
        chat,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
    )


def _messages(body: MessagePromptFields) -> list[Message]:
    """Turns of one role in a row are one turn, and the system prompt stands in front."""
    messages: list[Message] = []
    if body.system is not None:
        blocks = [Block(type="text", text=body.system)] if isinstance(body.system, str) else body.system
        messages.append(Message(role="system", content="\n".join(_text(block, "system") for block in blocks)))
    for index, given in enumerate(body.messages):
        for message in _turn(given, f"messages[{index}]"):
            last = messages[-1] if messages else None
            if last is not None and last.role == message.role != "tool":
                last.content = "\n".join(filter(None, (str(last.content or ""), str(message.content or ""))))
                last.tool_calls = [*(last.tool_calls or ()), *(message.tool_calls or ())] or None
            else:
                messages.append(message)
    return messages


def _turn(given: AnthropicMessage, place: str) -> list[Message]:
    """A turn as the messages it holds: each result of a tool is a message of its own."""
    if given.role not in _ROLES:
        raise ValidationError(
            f"`{place}.role` must be one of {', '.join(_ROLES)}. Given: {given.role[:64]!r}", field="messages"
        )
    if isinstance(given.content, str):
        return [Message(role=given.role, content=given.content)]
    results: list[Message] = []
    said = Message(role=given.role, content=None if given.role == "assistant" else "")
    text: list[str] = []
    for index, block in enumerate(given.content):
        spot = f"{place}.content[{index}]"
        match block.type:
            case "thinking" | "redacted_thinking":
                said.reasoning_content = block.thinking
            case "tool_use":
                said.tool_calls = [*(said.tool_calls or ()), _tool_call(block, spot)]
            case "tool_result":
                results.append(_tool_result(block, spot))
            case _:
                text.append(_text(block, spot))
    if text:
        said.content = "\n".join(text)
    return [*results, said] if text or said.tool_calls or not results else results


def _text(block: Block, place: str) -> str:
    if block.type != "text":
        raise NotSupportedError(
            f"`{place}.type` {block.type[:64]!r} is not supported by this model; send text", field="messages"
        )
    if block.text is None:
        raise ValidationError(f"`{place}.text` is missing; add it", field="messages")
    return block.text


def _tool_call(block: Block, place: str) -> ToolCall:
    if block.name is None or block.id is None:
        raise ValidationError(f"`{place}` needs `id` and `name`; add them", field="messages")
    return ToolCall(id=block.id, type="function", function=FunctionCall(name=block.name, arguments=block.input))


def _tool_result(block: Block, place: str) -> Message:
    if block.tool_use_id is None:
        raise ValidationError(f"`{place}.tool_use_id` is missing; add it", field="messages")
    content: str | list[Block] = ""
    if is_given(block.content):
        try:
            content = msgspec.json.decode(block.content, type=str | list[Block])
        except msgspec.ValidationError:
            raise ValidationError(f"`{place}.content` must be a text or an array of blocks", field="messages") from None
    text = content if isinstance(content, str) else "\n".join(_text(part, f"{place}.content") for part in content)
    return Message(role="tool", tool_call_id=block.tool_use_id, content=text)
