"""OpenAI's routes: /v1/chat/completions /v1/completions /v1/models /v1/models/{id}.

Source: OpenAI API reference; ranges in `validate.py`, conversations in `chat_prompt.py`
"""

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from weft.core.request import Request
from weft.errors import ModelNotServedError, ValidationError
from weft.router.body import decode
from weft.router.chat_prompt import render_chat
from weft.router.choices import AnswerHead, ChatChoiceText, ChoiceText, CompletionChoiceText
from weft.router.context import RouterContext
from weft.router.error_replies import openai_end_frames
from weft.router.exchange import Exchange, RawHeaders, new_request_id
from weft.router.generation import Generation, timing_headers
from weft.router.request_origin import origin_of
from weft.router.schemas_openai import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    PromptTokensDetails,
    SamplingFields,
    Usage,
)
from weft.router.sequence_text import SequenceText
from weft.router.served import ServedModel
from weft.router.stream import DONE_FRAME, EventStream, encode_json
from weft.router.validate import (
    build_requests,
    check_chat,
    check_completion,
    check_prompt_chars,
    fit_openai,
)

PLACEHOLDER_NAMES = ("", "tgi", "dummy")
"""What clients of TGI call whatever is served: `tgi` by its documentation, `dummy` by huggingface_hub."""


@dataclass(slots=True)
class _Job:
    """A `/v1` request, ready to run."""

    requests: list[Request]
    choices: Sequence[ChoiceText]
    headers: RawHeaders
    num_prompt_tokens: int
    wants_usage: bool

    @property
    def sequences(self) -> list[SequenceText]:
        """The text of each request."""
        return [choice.sequence for choice in self.choices]


async def chat_completions(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/chat/completions."""
    body = decode(exchange.body, ChatRequest)
    model = context.require_model()
    head = _head("chatcmpl", context, body, model)
    checked = check_chat(body, context.settings, model)
    context.admission.check(checked.num_sequences)
    exchange.stage = "template"
    prompt = await render_chat(body, model)
    ids = await _encode(prompt, "messages", exchange, model, add_special_tokens=False)
    max_new_tokens = fit_openai(len(ids), checked, model, "messages")
    requests = build_requests(checked, ids, max_new_tokens, model, origin_of(context, exchange))
    with_usage = _wants_usage(body)
    job = _Job(
        requests,
        [
            ChatChoiceText(
                model,
                request,
                checked.stop_strings,
                index,
                head,
                has_logprobs=bool(body.logprobs),
                with_usage=with_usage,
            )
            for index, request in enumerate(requests)
        ],
        _headers(context, len(prompt)),
        num_prompt_tokens=len(ids),
        wants_usage=with_usage,
    )

    def whole(usage: Usage) -> bytes:
        return encode_json(
            ChatCompletion(
                id=head.id,
                created=head.created,
                model=head.model,
                system_fingerprint=head.system_fingerprint,
                choices=[choice.whole() for choice in job.choices if isinstance(choice, ChatChoiceText)],
                usage=usage,
            )
        )

    await _run(context, exchange, job, whole, is_stream=bool(body.stream))


async def completions(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/completions."""
    body = decode(exchange.body, CompletionRequest)
    model = context.require_model()
    head = _head("cmpl", context, body, model)
    prompts = split_prompts(body.prompt, context.settings.max_client_batch_size)
    checked = check_completion(body, context.settings, model)
    context.admission.check(checked.num_sequences * len(prompts))
    with_usage = _wants_usage(body)
    origin = origin_of(context, exchange)
    requests: list[Request] = []
    choices: list[CompletionChoiceText] = []
    num_prompt_tokens = num_chars = 0
    for prompt in prompts:
        ids = await _prompt_ids(prompt, exchange, model)
        num_prompt_tokens += len(ids)
        num_chars += len(prompt) if isinstance(prompt, str) else 0
        echo_text = _echo_text(prompt, model) if body.echo else ""
        max_new_tokens = fit_openai(len(ids), checked, model, "prompt")
        for request in build_requests(checked, ids, max_new_tokens, model, origin):
            choices.append(
                CompletionChoiceText(
                    model,
                    request,
                    checked.stop_strings,
                    len(requests),
                    head,
                    body=body,
                    echo_text=echo_text,
                    with_usage=with_usage,
                )
            )
            requests.append(request)
    job = _Job(requests, choices, _headers(context, num_chars), num_prompt_tokens, with_usage)

    def whole(usage: Usage) -> bytes:
        return encode_json(
            Completion(
                id=head.id,
                created=head.created,
                model=head.model,
                system_fingerprint=head.system_fingerprint,
                choices=[choice.whole() for choice in choices],
                usage=usage,
            )
        )

    await _run(context, exchange, job, whole, is_stream=bool(body.stream))


async def models(context: RouterContext, exchange: Exchange) -> None:
    """GET /v1/models."""
    model = context.known_model()
    await exchange.reply(200, encode_json(ModelList(data=[_model(name, context, model) for name in _names(context)])))


async def model_by_id(context: RouterContext, exchange: Exchange) -> None:
    """GET /v1/models/{id}; an id may hold slashes."""
    model = context.known_model()
    name = exchange.path_params["model_id"]
    if not _is_known(name, context):
        raise _unknown_model(name, context)
    await exchange.reply(200, encode_json(_model(name, context, model)))


# --- from the body to requests ------------------------------------------------------------------------------------


def split_prompts(prompt: str | list[str | int | list[int]], max_prompts: int) -> list[str | list[int]]:
    """The four forms of `prompt` as a list of texts and id lists."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise ValidationError("`prompt` must not be an empty list; give a text, token ids, or a list", field="prompt")
    ids = [part for part in prompt if isinstance(part, int)]
    if len(ids) == len(prompt):
        return [ids]
    if ids:
        raise ValidationError("`prompt` must not mix token ids with texts or lists", field="prompt")
    if len(prompt) > max_prompts:
        raise ValidationError(
            f"Number of prompts exceeds the maximum allowed batch size of {max_prompts}. Given: {len(prompt)}; send "
            "several requests, or raise --max-client-batch-size",
            field="prompt",
        )
    return [part for part in prompt if not isinstance(part, int)]


async def _prompt_ids(prompt: str | list[int], exchange: Exchange, model: ServedModel) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValidationError("`prompt` must not be empty", field="prompt")
        return await _encode(prompt, "prompt", exchange, model, add_special_tokens=True)
    if not prompt:
        raise ValidationError("`prompt` must hold at least one token id", field="prompt")
    last_id = model.info.vocab_size - 1
    bad = next((token_id for token_id in prompt if not 0 <= token_id <= last_id), None)
    if bad is not None:
        raise ValidationError(f"`prompt` token ids must be >= 0 and <= {last_id}. Given: {bad}", field="prompt")
    exchange.num_prompt_tokens += len(prompt)
    return prompt


def _echo_text(prompt: str | list[int], model: ServedModel) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt, skip_special_tokens=False)


async def _encode(
    text: str, field: str, exchange: Exchange, model: ServedModel, *, add_special_tokens: bool
) -> list[int]:
    check_prompt_chars(text, model, field)
    exchange.stage = "tokenize"
    ids = await model.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise ValidationError(f"`{field}` must give at least one token. Given: none", field=field)
    exchange.num_prompt_tokens += len(ids)
    return ids


def _head(prefix: str, context: RouterContext, body: SamplingFields, model: ServedModel) -> AnswerHead:
    """Checks the model's name, too. Raises ModelNotServedError."""
    asked = body.model
    names = _names(context)
    is_any = asked is None or asked in PLACEHOLDER_NAMES or context.settings.any_model_name
    if asked is not None and not is_any and not _is_known(asked, context):
        raise _unknown_model(asked, context)
    return AnswerHead(
        id=f"{prefix}-{new_request_id()}",
        created=int(time.time()),
        model=asked if asked is not None and asked in names else names[0],
        system_fingerprint=f"fp_{model.info.fingerprint[:12] or context.version}",
    )


def _names(context: RouterContext) -> list[str]:
    """Names of the model that are shown, the preferred one first. The reference it was loaded by may be a path."""
    settings = context.settings
    return list(dict.fromkeys((settings.shown_model_name, *settings.served_model_name)))


def _is_known(name: str, context: RouterContext) -> bool:
    return name in _names(context) or name == context.settings.model_id


def _model(name: str, context: RouterContext, model: ServedModel) -> Model:
    return Model(
        id=name,
        created=model.created_s,
        owned_by=context.settings.shown_model_name,
        root=context.settings.shown_model_name,
        max_model_len=model.max_total_tokens,
    )


def _unknown_model(name: str, context: RouterContext) -> ModelNotServedError:
    return ModelNotServedError(
        f"The model `{name[:128]}` does not exist here. This server has `{_names(context)[0]}` (GET /v1/models)",
        field="model",
    )


def _wants_usage(body: SamplingFields) -> bool:
    """A whole answer has its usage anyway, so the option is honoured there too."""
    return bool(body.stream_options is not None and body.stream_options.include_usage)


def _headers(context: RouterContext, num_chars: int) -> RawHeaders:
    return [
        (b"x-compute-type", context.compute_type.encode("latin-1")),
        (b"x-compute-characters", b"%d" % num_chars),
    ]


# --- running ------------------------------------------------------------------------------------------------------


async def _run(
    context: RouterContext,
    exchange: Exchange,
    job: _Job,
    whole: Callable[[Usage], bytes],
    *,
    is_stream: bool,
) -> None:
    if is_stream:
        await _stream(context, exchange, job)
        return
    with Generation(context, exchange, job.requests, job.sequences) as generation:
        async with aclosing(generation.progress()) as progress:
            async for sequence, batch in progress:
                job.choices[sequence.index].collect(batch)
    headers = [*job.headers, *timing_headers(exchange)]
    await exchange.reply(200, whole(_usage(exchange, job)), headers=headers)


async def _stream(context: RouterContext, exchange: Exchange, job: _Job) -> None:
    stream = EventStream(exchange, context.streams, openai_end_frames)
    with stream, Generation(context, exchange, job.requests, job.sequences) as generation:
        async with aclosing(generation.progress()) as progress:
            async for sequence, batch in progress:
                if not exchange.is_answering:
                    await stream.open(job.headers)
                frames = job.choices[sequence.index].frames(batch)
                if frames:
                    await stream.write(frames)
        last = job.choices[0].usage_frame(_usage(exchange, job)) if job.wants_usage else b""
        await stream.close(last + DONE_FRAME)


def _usage(exchange: Exchange, job: _Job) -> Usage:
    num_completion_tokens = sum(choice.num_shown_tokens for choice in job.choices)
    return Usage(
        prompt_tokens=job.num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=job.num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=min(exchange.num_cached_tokens, job.num_prompt_tokens)),
    )
