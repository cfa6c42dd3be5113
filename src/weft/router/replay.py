"""What `weft verify` asks: token ids in, token ids and every bit of their log-probabilities out; and ids as text.

`POST /replay` knows no text, no defaults and no stop strings: a request is exactly what the engine gets, and what a
recording holds.
"""

import asyncio
from contextlib import aclosing
from secrets import randbits

import msgspec

from weft.core.events import TokenEvent
from weft.core.request import FinishReason, Request, RequestId, SamplingParams, StopConditions
from weft.errors import ContextLengthError, NotSupportedError, ValidationError
from weft.router.body import decode
from weft.router.context import RouterContext
from weft.router.exchange import Exchange
from weft.router.generation import Generation, timing_headers
from weft.router.recording import system_fingerprint
from weft.router.request_origin import origin_of
from weft.router.sequence_text import SequenceText
from weft.router.served import ServedModel
from weft.router.stream import encode_json


class ReplayRequest(msgspec.Struct, kw_only=True):
    """What the engine gets."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: StopConditions


class ReplayAnswer(msgspec.Struct, kw_only=True):
    """What the engine gave."""

    token_ids: list[int]
    logprobs: list[str]
    """Hexadecimal, as Python's `float.hex` writes it: every bit."""
    finish_reason: FinishReason
    system_fingerprint: str


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """vLLM's."""

    tokens: list[int]


class DetokenizeAnswer(msgspec.Struct, kw_only=True):
    """vLLM's: the text is called prompt."""

    prompt: str


async def replay(context: RouterContext, exchange: Exchange) -> None:
    """POST /replay."""
    body = decode(exchange.body, ReplayRequest)
    model = context.require_model()
    request = _request(context, exchange, body, model)
    exchange.num_prompt_tokens = len(request.prompt_token_ids)
    sequence = SequenceText(model, request.prompt_token_ids, ())
    events: list[TokenEvent] = []
    with Generation(context, exchange, [request], [sequence]) as generation:
        async with aclosing(generation.progress()) as progress:
            async for _, batch in progress:
                for event in batch:
                    sequence.push(event)
                    events.append(event)
    answer = ReplayAnswer(
        token_ids=[event.token_id for event in events],
        logprobs=[event.logprob.hex() for event in events],
        finish_reason=sequence.finish_reason or FinishReason.ABORT,
        system_fingerprint=system_fingerprint(model.info, context.version),
    )
    await exchange.reply(200, encode_json(answer), headers=timing_headers(exchange))


async def detokenize(context: RouterContext, exchange: Exchange) -> None:
    """POST /detokenize: the text of token ids, special ones included."""
    body = decode(exchange.body, DetokenizeRequest)
    model = context.require_model()
    bad = next((token_id for token_id in body.tokens if not 0 <= token_id < model.info.vocab_size), None)
    if bad is not None:
        raise ValidationError(
            f"`tokens` must hold ids from 0 to {model.info.vocab_size - 1}. Given: {bad}", field="tokens"
        )
    text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, False)
    await exchange.reply(200, encode_json(DetokenizeAnswer(prompt=text)))


def _request(context: RouterContext, exchange: Exchange, body: ReplayRequest, model: ServedModel) -> Request:
    """Raises ValidationError, and ContextLengthError for a prompt longer than this server takes."""
    num_prompt = len(body.prompt_token_ids)
    if num_prompt > model.max_input_tokens:
        raise ContextLengthError(
            f"`prompt_token_ids` must hold at most {model.max_input_tokens} ids (--max-input-tokens). "
            f"Given: {num_prompt}",
            field="prompt_token_ids",
        )
    if body.sampling.prompt_logprobs or body.sampling.top_n_tokens:
        raise NotSupportedError(
            "`sampling` must leave out `prompt_logprobs` and `top_n_tokens`: the answer has no place for them",
            field="sampling",
        )
    origin = origin_of(context, exchange)
    request = Request(
        request_id=RequestId(randbits(64) or 1),
        prompt_token_ids=tuple(body.prompt_token_ids),
        sampling=body.sampling,
        stop=body.stop,
        deadline_ns=origin.deadline_ns,
        tenant=origin.tenant,
        trace_parent=origin.trace_parent,
    )
    request.check(vocab_size=model.info.vocab_size, max_total_tokens=model.max_total_tokens)
    return request
