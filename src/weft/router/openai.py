"""OpenAI's routes: /v1/chat/completions /v1/completions.

Source: OpenAI API reference; ranges in `validate.py`, conversations in `chat_prompt.py`
"""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from weft.core.request import Request
from weft.errors import ValidationError
from weft.router.body import decode
from weft.router.choices import ChatChoiceText, CompletionChoiceText, StreamedChoice
from weft.router.context import RouterContext
from weft.router.conversation import compute_headers, counted, encode, prepare
from weft.router.error_replies import openai_end_frames
from weft.router.exchange import Exchange, RawHeaders
from weft.router.generation import Generation, timing_headers
from weft.router.model_names import answer_head
from weft.router.openai_fields import ONLY_TIER
from weft.router.request_origin import origin_of
from weft.router.schemas_openai import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    SamplingFields,
    Usage,
)
from weft.router.sequence_text import SequenceText
from weft.router.served import ServedModel
from weft.router.stream import DONE_FRAME, EventStream, encode_json
from weft.router.validate import build_requests, check_completion, fit_openai


@dataclass(slots=True)
class _Job:
    """A `/v1` request, ready to run."""

    requests: list[Request]
    choices: Sequence[StreamedChoice]
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
    head = answer_head("chatcmpl-", body.model, context, context.require_model())
    if body.service_tier is not None:
        head = replace(head, service_tier=ONLY_TIER)
    conversation = await prepare(context, exchange, body)
    with_usage = _wants_usage(body)
    job = _Job(
        conversation.requests,
        [
            ChatChoiceText(
                conversation.model,
                request,
                conversation.checked.stop_strings,
                index,
                head,
                has_logprobs=bool(body.logprobs),
                with_usage=with_usage,
            )
            for index, request in enumerate(conversation.requests)
        ],
        compute_headers(context, conversation.num_prompt_chars),
        num_prompt_tokens=conversation.num_prompt_tokens,
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
                service_tier=head.service_tier,
            )
        )

    await _run(context, exchange, job, whole, is_stream=bool(body.stream))


async def completions(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/completions."""
    body = decode(exchange.body, CompletionRequest)
    model = context.require_model()
    head = answer_head("cmpl-", body.model, context, model)
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
    job = _Job(requests, choices, compute_headers(context, num_chars), num_prompt_tokens, with_usage)

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
        return await encode(prompt, "prompt", exchange, model, add_special_tokens=True)
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


def _wants_usage(body: SamplingFields) -> bool:
    """A whole answer has its usage anyway, so the option is honoured there too."""
    return bool(body.stream_options is not None and body.stream_options.include_usage)


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
        stream.announce(job.headers)
        show = partial(stream.show, job.choices[0].frames)
        async with aclosing(generation.progress(show)) as progress:
            async for sequence, batch in progress:
                if not stream.is_open:
                    await stream.open(job.headers)
                frames = job.choices[sequence.index].frames(batch)
                if frames:
                    await stream.write(frames)
        last = job.choices[0].usage_frame(_usage(exchange, job)) if job.wants_usage else b""
        await stream.close(last + DONE_FRAME)


def _usage(exchange: Exchange, job: _Job) -> Usage:
    return counted(exchange, job.num_prompt_tokens, sum(choice.num_shown_tokens for choice in job.choices))
