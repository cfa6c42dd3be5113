"""Texts to vectors: OpenAI's /v1/embeddings, and /embed of Text Embeddings Inference.

Every input is a request of its own to the engine; an HTTP request keeps a window of them open, so that a long list
does not crowd out the others. A vector has the same bits whatever it was computed beside.

Source: OpenAI API reference, embeddings; text-embeddings-inference 1.8 `/embed`, as facts; vLLM's
`truncate_prompt_tokens`
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from weft.core.request import Request
from weft.errors import NotSupportedError, ValidationError
from weft.router.body import decode
from weft.router.context import RouterContext
from weft.router.conversation import compute_headers
from weft.router.embedding_inputs import (
    Cut,
    Input,
    check_text,
    checked_cut,
    checked_dimensions,
    fitted,
    naming,
    require_embedding,
    split_inputs,
    vector_request,
    with_end,
)
from weft.router.exchange import Exchange
from weft.router.model_names import answering_name
from weft.router.request_origin import origin_of
from weft.router.request_trace import note_requests
from weft.router.schemas_embeddings import (
    EmbeddingList,
    EmbeddingObject,
    EmbeddingsRequest,
    EmbeddingUsage,
    EmbedRequest,
)
from weft.router.served import ServedModel
from weft.router.stream import encode_json
from weft.router.vectors import base64_of, finished_vector

_FORMATS = ("float", "base64")
_DIRECTIONS = ("right", "left")

_Shown = TypeVar("_Shown")


async def embeddings(context: RouterContext, exchange: Exchange) -> None:
    """POST /v1/embeddings."""
    body = decode(exchange.body, EmbeddingsRequest)
    name = answering_name(body.model, context)
    model = context.require_model()
    require_embedding(model, context.settings)
    encoding = body.encoding_format or "float"
    if encoding not in _FORMATS:
        raise ValidationError(
            f"`encoding_format` must be float or base64. Given: {encoding[:80]}", field="encoding_format"
        )
    dimensions = checked_dimensions(body.dimensions, model)
    inputs = split_inputs(body.input, "input")
    cut = checked_cut(body.truncate_prompt_tokens, model)
    prompts = await _prompts(inputs, body.input, cut, exchange, model, field="input")

    def shown(values: bytes) -> list[float] | str:
        vector = finished_vector(values, dimensions, normalizes=model.info.normalizes)
        return base64_of(vector) if encoding == "base64" else vector

    vectors = await _run(context, exchange, prompts, model, shown)
    num_tokens = exchange.num_prompt_tokens
    answer = EmbeddingList(
        data=[EmbeddingObject(index=index, embedding=vector) for index, vector in enumerate(vectors)],
        model=name,
        usage=EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
    )
    await exchange.reply(200, encode_json(answer), headers=compute_headers(context, _num_chars(inputs)))


async def embed(context: RouterContext, exchange: Exchange) -> None:
    """POST /embed."""
    body = decode(exchange.body, EmbedRequest)
    model = context.require_model()
    require_embedding(model, context.settings)
    if body.prompt_name is not None:
        raise NotSupportedError(
            "`prompt_name` is not supported; put the prompt into the input and leave it out", field="prompt_name"
        )
    direction = (body.truncation_direction or "right").lower()
    if direction not in _DIRECTIONS:
        raise ValidationError(
            f"`truncation_direction` must be Right or Left. Given: {direction[:80]}", field="truncation_direction"
        )
    dimensions = checked_dimensions(body.dimensions, model)
    inputs = split_inputs(body.inputs, "inputs")
    cut = Cut(max_tokens=model.max_input_tokens, from_left=direction == "left") if body.truncate else None
    prompts = await _prompts(inputs, body.inputs, cut, exchange, model, field="inputs")

    def shown(values: bytes) -> list[float]:
        return finished_vector(values, dimensions, normalizes=body.normalize is not False)

    vectors = await _run(context, exchange, prompts, model, shown)
    await exchange.reply(200, encode_json(vectors), headers=compute_headers(context, _num_chars(inputs)))


async def _prompts(
    inputs: Sequence[Input],
    given: object,
    cut: Cut | None,
    exchange: Exchange,
    model: ServedModel,
    *,
    field: str,
) -> list[tuple[int, ...]]:
    """Token ids of every input, before anything is computed. Raises ValidationError naming the one that is wrong."""
    exchange.stage = "tokenize"
    has_places = isinstance(given, list) and (len(inputs) > 1 or not isinstance(given[0], int))
    prompts: list[tuple[int, ...]] = []
    for place, each in enumerate(inputs):
        with naming(f"{field}[{place}]" if has_places else field, field):
            ids = each
            if isinstance(ids, str):
                check_text(ids, cut, model)
                ids = await model.tokenizer.encode_async(ids, add_special_tokens=True)
                ids = with_end(ids, model)
            prompts.append(tuple(fitted(ids, cut, model)))
    exchange.num_prompt_tokens = sum(map(len, prompts))
    return prompts


def _num_chars(inputs: Sequence[Input]) -> int:
    return sum(len(each) for each in inputs if isinstance(each, str))


# --- running ------------------------------------------------------------------------------------------------------


async def _run(
    context: RouterContext,
    exchange: Exchange,
    prompts: Sequence[tuple[int, ...]],
    model: ServedModel,
    shown: Callable[[bytes], _Shown],
) -> list[_Shown]:
    """The vector of every prompt, in order and as it is shown. Raises RequestError: the first failure ends all."""
    context.lifecycle.require_ready()
    admission, timings = context.admission, exchange.timings
    exchange.counts_vectors = True
    # Half of the places at most, and what is free: a list goes through a window, however long it is.
    num_open = max(1, min(len(prompts), admission.capacity // 2, admission.capacity - admission.used))
    with admission.admit(num_open):
        context.lifecycle.generation_started()
        try:
            exchange.stage = "queue"
            note_requests(context, exchange, [vector_request(prompts[0], model, origin_of(context, exchange))])
            timings.queued_ns = context.clock.now_ns()
            # Made when they are sent: how long each may wait in the engine's queue counts from then.
            requests = (vector_request(prompt, model, origin_of(context, exchange)) for prompt in prompts)
            vectors = await _all_vectors(context, exchange, requests, num_open, shown)
        finally:
            timings.finished_ns = context.clock.now_ns()
            context.lifecycle.generation_ended()
    admission.observe_duration((timings.finished_ns - timings.queued_ns) / 1e9)
    return vectors


async def _all_vectors(
    context: RouterContext,
    exchange: Exchange,
    requests: Iterator[Request],
    num_open: int,
    shown: Callable[[bytes], _Shown],
) -> list[_Shown]:
    """As `_run`, with `num_open` requests in the engine at once; the next one is made when its turn has come."""
    vectors: dict[int, _Shown] = {}
    waiting = enumerate(requests)

    async def work() -> None:
        for index, request in waiting:
            event = await context.backend.embed(request)
            vectors[index] = shown(event.values)
            exchange.stage = "decode"
            exchange.timings.queue_ns = max(exchange.timings.queue_ns, event.prompt.queue_ns)
            exchange.num_cached_tokens += event.prompt.num_cached_tokens

    workers = [asyncio.create_task(work()) for _ in range(num_open)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [vectors[index] for index in sorted(vectors)]
