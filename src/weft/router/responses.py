"""OpenAI's responses: /v1/responses and what hangs below it.

A response is a conversation with a memory: `previous_response_id` goes on behind a stored one. Its body becomes a chat
request and takes the way of every conversation (`conversation.py`).

Source: OpenAI API reference, responses
"""

import secrets
from dataclasses import replace

import msgspec

from weft.errors import NotFoundError, NotSupportedError, PreviousResponseNotFoundError, ValidationError
from weft.limits import LIMITS
from weft.router.body import decode, decode_query
from weft.router.context import RouterContext
from weft.router.conversation import Conversation, compute_headers, count_tokens, in_words_of, prepare
from weft.router.error_replies import openai_end_frames
from weft.router.exchange import Exchange
from weft.router.generation import timing_headers
from weft.router.json_values import is_given
from weft.router.model_names import answer_head
from weft.router.openai_fields import (
    REASONING_EFFORTS,
    SERVICE_TIERS,
    VERBOSITIES,
    check_cache_hints,
    check_choice,
    check_metadata,
    is_idle_choice,
)
from weft.router.request_origin import origin_of
from weft.router.response_events import (
    CANCELLED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    ResponseText,
    Transcript,
    restored,
)
from weft.router.response_input import is_reference, messages_of, normalized
from weft.router.response_runs import BackgroundRun, ResponseRun, answer, stream
from weft.router.schemas_openai import ChatRequest
from weft.router.schemas_responses import (
    InputItem,
    InputItemsQuery,
    InputTokens,
    InputTokensRequest,
    Item,
    ItemList,
    PromptFields,
    Response,
    ResponseDeleted,
    ResponseError,
    ResponseQuery,
    ResponsesRequest,
    ShownReasoning,
    ShownTextFormat,
    ShownTextOptions,
)
from weft.router.store import ResponseStore, StoredResponse, is_alive
from weft.router.stream import ClientWatch, EventStream, encode_json

_FIELD_NAMES = {"messages": "input", "max_tokens": "max_output_tokens"}
_LOGPROBS = "message.output_text.logprobs"
_RESPONSE_PREFIX = "resp_"
_MESSAGE_PREFIX = "msg_"
"""An answer's message has the id of its response behind this, so that a reference to it is found."""
_INCLUDABLE = (
    _LOGPROBS,
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
)
"""Only the first can have an effect; the others belong to items that no answer here has."""
_SUMMARIES = ("auto", "concise", "detailed")
_UNFINISHED = (QUEUED, IN_PROGRESS)
_MAX_PAGE_ITEMS = 100
_PAGE_ITEMS = 20


async def create(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/responses."""
    body = decode(exchange.body, ResponsesRequest)
    head = answer_head(_RESPONSE_PREFIX, body.model, context, context.require_model())
    _check(body, context)
    tenant = origin_of(context, exchange).tenant
    items = normalized(body.input, await _referenced(context, body.input, tenant))
    earlier = await _earlier_items(context, body.previous_response_id, tenant)
    with in_words_of(_FIELD_NAMES):
        conversation = await prepare(context, exchange, _chat_body(body, [*earlier, *items]))
    has_logprobs = _wants_logprobs(body)
    response = _begun(body, head.id, head.created, head.model, conversation, context)
    run_class = BackgroundRun if body.background else ResponseRun
    run = run_class(
        context,
        conversation,
        Transcript(response, _MESSAGE_PREFIX + head.id.removeprefix(_RESPONSE_PREFIX)),
        ResponseText(conversation, head, has_logprobs=has_logprobs),
        items=items,
        tenant=tenant,
        keeps_deltas=bool(body.background and body.stream),
    )
    if isinstance(run, BackgroundRun):
        await run.start(exchange)
        if body.stream:
            await run.follow(context, exchange, 0)
        else:
            await exchange.reply(200, encode_json(run.transcript.now()))
    elif body.stream:
        await stream(context, exchange, run)
    else:
        whole = await answer(exchange, run)
        headers = [*compute_headers(context, conversation.num_prompt_chars), *timing_headers(exchange)]
        await exchange.reply(200, encode_json(whole), headers=headers)


async def count_input_tokens(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/responses/input_tokens."""
    body = decode(exchange.body, InputTokensRequest)
    answer_head("", body.model, context, context.require_model())
    _check_prompt_fields(body, context)
    if body.personality is not None:
        raise NotSupportedError("`personality` is not supported; say it in `instructions`", field="personality")
    tenant = origin_of(context, exchange).tenant
    given = normalized(body.input, await _referenced(context, body.input, tenant))
    items = [*await _earlier_items(context, body.previous_response_id, tenant), *given]
    with in_words_of(_FIELD_NAMES):
        count = await count_tokens(context, exchange, _chat_body(body, items))
    await exchange.reply(200, encode_json(InputTokens(input_tokens=count)))


async def retrieve(context: RouterContext, exchange: Exchange) -> None:
    """GET /v1/responses/{response_id}, or its events."""
    query = decode_query(exchange, ResponseQuery)
    response_id, tenant = _asked_for(context, exchange)
    live = _live(context, response_id, tenant)
    if query.stream:
        await _stream_again(context, exchange, live, query.starting_after)
        return
    if live is not None:
        await exchange.reply(200, encode_json(live.transcript.now()))
        return
    record = await _recorded(context, response_id, tenant)
    await exchange.reply(200, record.response)


async def cancel(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/responses/{response_id}/cancel; cancelling twice is no error."""
    response_id, tenant = _asked_for(context, exchange)
    live = _live(context, response_id, tenant)
    if isinstance(live, BackgroundRun):
        live.cancel()
        await live.wait_over()
        await exchange.reply(200, encode_json(live.transcript.now()))
        return
    response = live.transcript.now() if live is not None else _decoded(await _recorded(context, response_id, tenant))
    if not response.background:
        raise ValidationError(
            "Only a response with `background` true can be cancelled; close the connection of another one",
            field="response_id",
        )
    if response.status != CANCELLED:
        raise ValidationError(
            f"The response has ended as {response.status} and cannot be cancelled any more", field="response_id"
        )
    await exchange.reply(200, encode_json(response))


async def delete(context: RouterContext, exchange: Exchange) -> None:
    """DELETE /v1/responses/{response_id}; one that runs in the background is stopped first."""
    response_id, tenant = _asked_for(context, exchange)
    live = _live(context, response_id, tenant)
    if live is not None:
        live.is_deleted = True
    if isinstance(live, BackgroundRun):
        live.cancel()
        await live.wait_over()
    was_stored = await _store(context).delete(response_id, tenant)
    if not was_stored and live is None:
        raise _unknown(response_id)
    await exchange.reply(200, encode_json(ResponseDeleted(id=response_id)))


async def input_items(context: RouterContext, exchange: Exchange) -> None:
    """GET /v1/responses/{response_id}/input_items: everything that stood before the answer, newest first."""
    query = decode_query(exchange, InputItemsQuery)
    limit = _PAGE_ITEMS if query.limit is None else query.limit
    if not 1 <= limit <= _MAX_PAGE_ITEMS:
        raise ValidationError(f"`limit` must be >= 1 and <= {_MAX_PAGE_ITEMS}. Given: {limit}", field="limit")
    if query.order not in (None, "asc", "desc"):
        raise ValidationError("`order` must be asc or desc", field="order")
    response_id, tenant = _asked_for(context, exchange)
    live = _live(context, response_id, tenant)
    record = live.stored() if live is not None else await _recorded(context, response_id, tenant)
    items = [*await _earlier_items(context, record.previous_id, tenant), *_decoded_items(record.items)]
    if query.order != "asc":
        items.reverse()
    if query.after is not None:
        place = next((index for index, item in enumerate(items) if item.id == query.after), None)
        if place is None:
            raise ValidationError("`after` must be the id of one of the items", field="after")
        items = items[place + 1 :]
    page = items[:limit]
    body = ItemList(
        data=page,
        first_id=page[0].id if page else None,
        last_id=page[-1].id if page else None,
        has_more=len(items) > len(page),
    )
    await exchange.reply(200, encode_json(body))


# --- from the body to a run ---------------------------------------------------------------------------------------


def _chat_body(body: PromptFields, items: list[Item]) -> ChatRequest:
    chat = ChatRequest(
        messages=messages_of(body.instructions, items),
        add_generation_prompt=True,
        chat_template_kwargs=body.chat_template_kwargs,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
    )
    if not isinstance(body, ResponsesRequest):
        return chat
    return msgspec.structs.replace(
        chat,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=_wants_logprobs(body),
        top_logprobs=body.top_logprobs,
        seed=body.seed,
        stop=body.stop,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=body.logit_bias,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
    )


def _begun(
    body: ResponsesRequest,
    response_id: str,
    created: int,
    name: str,
    conversation: Conversation,
    context: RouterContext,
) -> Response:
    defaults = conversation.model.sampling_defaults
    reasoning, text = body.reasoning, body.text
    return Response(
        id=response_id,
        created_at=created,
        status=QUEUED if body.background else IN_PROGRESS,
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        prompt_cache_retention=body.prompt_cache_retention,
        reasoning=ShownReasoning(
            effort=None if reasoning is None else reasoning.effort,
            summary=None if reasoning is None else reasoning.summary,
        ),
        safety_identifier=body.safety_identifier,
        store=context.responses is not None and body.store is not False,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        text=ShownTextOptions(
            format=ShownTextFormat(), verbosity="medium" if text is None or text.verbosity is None else text.verbosity
        ),
        tool_choice=msgspec.json.decode(body.tool_choice) if is_given(body.tool_choice) else "auto",
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        user=body.user,
    )


def _wants_logprobs(body: ResponsesRequest) -> bool:
    return bool(body.top_logprobs) or _LOGPROBS in (body.include or ())


async def _referenced(context: RouterContext, given: str | list[InputItem] | None, tenant: str) -> dict[str, Item]:
    """Items of stored answers that the input names by id. Raises NotFoundError."""
    found: dict[str, Item] = {}
    for item in given if isinstance(given, list) else ():
        if not is_reference(item) or item.id is None or item.id in found:
            continue
        response_id = _RESPONSE_PREFIX + item.id.removeprefix(_MESSAGE_PREFIX)
        record = None if context.responses is None else await context.responses.get(response_id, tenant)
        output = [] if record is None else _decoded(record).output
        found |= {answer.id: answer for answer in output}
        if item.id not in found:
            raise NotFoundError(
                f"Item with id {item.id[:80]!r} in `input` not found: of a response that was never stored, deleted, or "
                "dropped for age or space. Send the item itself",
                field="input",
            )
    return found


async def _earlier_items(context: RouterContext, previous_id: str | None, tenant: str) -> list[Item]:
    """The conversation up to a stored response, its answer included. Raises PreviousResponseNotFoundError."""
    if previous_id is None:
        return []
    if _live(context, previous_id, tenant) is not None:
        raise ValidationError(
            "`previous_response_id` names a response that is still being generated; wait until it has ended",
            field="previous_response_id",
        )
    found = await _store(context).chain(previous_id, tenant, LIMITS.max_messages)
    if isinstance(found, str):
        which = "it" if found == previous_id else f"`{found}`, an earlier response of that conversation,"
        raise PreviousResponseNotFoundError(
            f"`previous_response_id` must name a stored response. Given: {previous_id[:80]!r}, but {which} is not "
            "there: never stored, deleted, or dropped for age or space. Send the whole conversation in `input`",
            field="previous_response_id",
        )
    items: list[Item] = []
    for record in found:
        items += _decoded_items(record.items)
        items += _decoded(record).output
    return items


# --- checks -------------------------------------------------------------------------------------------------------


def _check(body: ResponsesRequest, context: RouterContext) -> None:
    _check_prompt_fields(body, context)
    if is_given(body.prompt):
        raise NotSupportedError("`prompt` is not supported; send the text in `input`", field="prompt")
    for name in ("moderation", "access_programs", "image"):
        if is_given(getattr(body, name)):
            raise NotSupportedError(f"`{name}` is not supported; leave it out", field=name)
    if body.context_management:
        raise NotSupportedError("`context_management` is not supported; leave it out", field="context_management")
    if body.background and body.store is False:
        raise ValidationError("`background` needs `store`: leave `store` out, or set it to true", field="background")
    if body.background and context.responses is None:
        raise NotSupportedError(
            "`background` needs stored responses, which the operator has switched off (--response-store)",
            field="background",
        )
    for value in body.include or ():
        check_choice("include", value, _INCLUDABLE)
    if body.max_tool_calls is not None and body.max_tool_calls < 1:
        raise ValidationError(f"`max_tool_calls` must be >= 1. Given: {body.max_tool_calls}", field="max_tool_calls")
    check_choice("service_tier", body.service_tier, SERVICE_TIERS)
    check_cache_hints(body.prompt_cache_retention, body.prompt_cache_options)
    check_metadata(body.metadata or {})


def _check_prompt_fields(body: PromptFields, context: RouterContext) -> None:
    if body.input is None:
        raise ValidationError("`input` is missing; send a text or a list of items", field="input")
    if body.previous_response_id is not None and context.responses is None:
        raise NotSupportedError(
            "`previous_response_id` needs stored responses, which the operator has switched off (--response-store)",
            field="previous_response_id",
        )
    if body.tools:
        raise NotSupportedError("`tools` is not supported yet; leave it out", field="tools")
    if not is_idle_choice(body.tool_choice):
        raise NotSupportedError('`tool_choice` other than "none" or "auto" is not supported yet', field="tool_choice")
    if is_given(body.conversation):
        raise NotSupportedError(
            "`conversation` is not supported; use `previous_response_id`, or send all items in `input`",
            field="conversation",
        )
    if body.truncation not in (None, "disabled"):
        raise NotSupportedError('`truncation` other than "disabled" is not supported', field="truncation")
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        raise NotSupportedError('`text.format` other than {"type": "text"} is not supported yet', field="text.format")
    if body.text is not None:
        check_choice("text.verbosity", body.text.verbosity, VERBOSITIES)
    if body.reasoning is not None:
        check_choice("reasoning.effort", body.reasoning.effort, REASONING_EFFORTS)
        check_choice("reasoning.summary", body.reasoning.summary, _SUMMARIES)


# --- what is stored -----------------------------------------------------------------------------------------------


def _asked_for(context: RouterContext, exchange: Exchange) -> tuple[str, str]:
    """Id and tenant."""
    return exchange.path_params["response_id"], origin_of(context, exchange).tenant


def _live(context: RouterContext, response_id: str, tenant: str) -> ResponseRun | None:
    run = context.live_responses.get(response_id)
    return run if isinstance(run, ResponseRun) and secrets.compare_digest(run.tenant, tenant) else None


def _store(context: RouterContext) -> ResponseStore:
    if context.responses is None:
        raise NotFoundError("This server stores no responses (--response-store off)")
    return context.responses


async def _recorded(context: RouterContext, response_id: str, tenant: str) -> StoredResponse:
    """A stored row; one whose server died over it is found failed. Raises NotFoundError."""
    record = await _store(context).get(response_id, tenant)
    if record is None:
        raise _unknown(response_id)
    if record.is_final or is_alive(record.owner):
        return record
    failed = msgspec.structs.replace(
        _decoded(record),
        status=FAILED,
        error=ResponseError(code="server_error", message="The server stopped while it generated this response"),
    )
    record = replace(record, is_final=True, response=encode_json(failed))
    await _store(context).put(record)
    return record


def _unknown(response_id: str) -> NotFoundError:
    return NotFoundError(
        f"Response with id {response_id[:80]!r} not found: never stored, deleted, or dropped for age or space",
        field="response_id",
    )


def _decoded(record: StoredResponse) -> Response:
    return msgspec.json.decode(record.response, type=Response)


def _decoded_items(items: bytes) -> list[Item]:
    return msgspec.json.decode(items, type=list[Item])


async def _stream_again(
    context: RouterContext, exchange: Exchange, live: ResponseRun | None, starting_after: int | None
) -> None:
    first = 0 if starting_after is None else starting_after + 1
    if first < 0:
        raise ValidationError(f"`starting_after` must be >= 0. Given: {starting_after}", field="starting_after")
    if isinstance(live, BackgroundRun) and live.keeps_deltas:
        async with ClientWatch(exchange):
            await live.follow(context, exchange, first)
        return
    response_id, tenant = _asked_for(context, exchange)
    record = None if live is not None else await _recorded(context, response_id, tenant)
    if record is None or record.delta_chars is None:
        raise ValidationError(
            "`stream` needs a response that was created with `background` and `stream` true; get it without `stream`",
            field="stream",
        )
    transcript = restored(_decoded(record), msgspec.json.decode(record.delta_chars, type=list[int]))
    events = EventStream(exchange, context.streams, openai_end_frames)
    with events:
        await events.open()
        await events.close(transcript.frames(first))
