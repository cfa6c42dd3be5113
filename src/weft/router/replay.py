"""`POST /replay`: token ids in, token ids and every bit of their log-probabilities out. What `weft verify` asks.

No text, no defaults and no stop strings: a request is exactly what the engine gets, and what a recording holds.
"""

from contextlib import aclosing
from secrets import randbits

import msgspec

from weft.core.events import TokenEvent
from weft.core.request import FinishReason, Request, RequestId, SamplingParams, StopConditions
from weft.errors import ContextLengthError, NotSupportedError
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
