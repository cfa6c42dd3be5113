"""TGI's own routes: / /generate /generate_stream /tokenize /chat_tokenize /info.

Source: TGI 3.3.7 `router/src/server.rs`, as facts; ranges and texts in `validate.py`
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from functools import partial

import msgspec

from weft.core.events import TokenEvent
from weft.core.request import Request, TokenId
from weft.router.body import decode
from weft.router.chat_prompt import render_chat
from weft.router.context import RouterContext
from weft.router.error_replies import native_end_frames
from weft.router.exchange import Exchange, RawHeaders
from weft.router.generation import Generation, timing_headers
from weft.router.json_values import logprob_bytes, shown_logprob
from weft.router.openai_fields import check_chat_fields
from weft.router.request_origin import origin_of
from weft.router.schemas_native import (
    BestOfSequence,
    ChatTokenizeResponse,
    CompatGenerateRequest,
    Details,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    Info,
    PrefillToken,
    Quality,
    StreamDetails,
    StreamResponse,
    Token,
    TokenizeToken,
)
from weft.router.schemas_openai import ChatRequest
from weft.router.sequence_text import SequenceText
from weft.router.served import ServedModel
from weft.router.stream import EventStream, encode_json, frame
from weft.router.validate import (
    Checked,
    build_requests,
    check_inputs,
    check_native,
    check_prompt_chars,
    check_truncate,
    fit_native,
    refuse_native_fields,
    truncated,
)

_DEFAULT_PARAMETERS = GenerateParameters()


@dataclass(slots=True)
class Prepared:
    """A native request, ready to run."""

    text_before: str
    """The prompt, where it is shown before the text."""
    parameters: GenerateParameters
    checked: Checked
    requests: list[Request]
    headers: RawHeaders
    """Known before the first token."""


@dataclass(slots=True)
class _Collected:
    """What one sequence has said."""

    sequence: SequenceText
    request: Request
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    top_tokens: list[list[Token]] = field(default_factory=list)
    prefill: list[PrefillToken] = field(default_factory=list)
    logprob_sum: float = 0.0

    @property
    def mean_logprob(self) -> float:
        """What `best_of` compares."""
        return self.logprob_sum / max(len(self.tokens), 1)

    @property
    def shown_seed(self) -> int | None:
        """The seed, where chance had a part."""
        return None if self.request.sampling.is_greedy else self.request.sampling.seed


async def generate(context: RouterContext, exchange: Exchange) -> None:
    """POST /generate."""
    await _answer(context, exchange, decode(exchange.body, GenerateRequest))


async def generate_stream(context: RouterContext, exchange: Exchange) -> None:
    """POST /generate_stream."""
    await _stream(context, exchange, decode(exchange.body, GenerateRequest))


async def compat_generate(context: RouterContext, exchange: Exchange) -> None:
    """POST /: `stream` in the body chooses; a whole answer is an array of one; the prompt is put before the text."""
    body = decode(exchange.body, CompatGenerateRequest)
    shows_prompt = context.require_model().pipeline_tag in (None, "text-generation")
    if body.stream:
        await _stream(context, exchange, body, shows_prompt=shows_prompt)
    else:
        await _answer(context, exchange, body, shows_prompt=shows_prompt, is_array=True)


async def tokenize(context: RouterContext, exchange: Exchange) -> None:
    """POST /tokenize."""
    body = decode(exchange.body, GenerateRequest)
    model = context.require_model()
    check_truncate(body.parameters, model)
    tokens = await _tokens_of(body.inputs, model, "inputs", add_special_tokens=True)
    if tokens and body.parameters is not None:
        keeps_first = model.tokenizer.is_special(tokens[0].id)
        tokens = truncated(tokens, body.parameters.truncate, keeps_first=keeps_first)
    await exchange.reply(200, encode_json(tokens))


async def chat_tokenize(context: RouterContext, exchange: Exchange) -> None:
    """POST /chat_tokenize."""
    body = decode(exchange.body, ChatRequest)
    model = context.require_model()
    check_chat_fields(body)
    text = await render_chat(body, model)
    tokens = await _tokens_of(text, model, "messages", add_special_tokens=False)
    await exchange.reply(200, encode_json(ChatTokenizeResponse(tokenize_response=tokens, templated_text=text)))


async def info(context: RouterContext, exchange: Exchange) -> None:
    """GET /info and /model_info."""
    model = context.known_model()
    settings, engine = context.settings, model.info
    body = Info(
        model_id=settings.shown_model_name,
        model_sha=settings.model_sha or settings.revision,
        model_pipeline_tag=model.pipeline_tag,
        max_concurrent_requests=settings.max_concurrent_requests,
        max_best_of=settings.max_best_of,
        max_stop_sequences=settings.max_stop_sequences,
        max_top_n_tokens=settings.max_top_n_tokens,
        max_input_tokens=model.max_input_tokens,
        max_total_tokens=model.max_total_tokens,
        validation_workers=settings.validation_workers,
        max_client_batch_size=settings.max_client_batch_size,
        router="text-generation-router",
        version=context.version,
        sha=None,
        docker_label=None,
        model_type=engine.model_type,
        model_dtype=engine.dtype,
        model_device_type=engine.device_type,
        model_device_name=engine.device_name,
        num_parameters=engine.num_parameters,
        quantization=engine.quantization,
        quality=None if engine.quality is None else Quality(**asdict(engine.quality)),
        kernel_set=engine.kernel_set,
        vocab_size=engine.vocab_size,
        max_batch_prefill_tokens=engine.max_batch_prefill_tokens,
        max_batch_total_tokens=engine.max_batch_total_tokens,
        max_num_sequences=engine.max_num_sequences,
        block_size_tokens=engine.block_size_tokens,
        num_blocks=engine.num_blocks,
        weights_bytes=engine.weights_bytes,
        kv_pool_bytes=engine.kv_pool_bytes,
        activation_bytes=engine.activation_bytes,
        prefix_caching=engine.prefix_caching,
        batch_invariant=engine.batch_invariant,
        num_shard=engine.world_size,
        fingerprint=engine.fingerprint,
        task=model.task,
        pooling=engine.pooling or None,
        embedding_size=engine.embedding_size if engine.pooling else None,
        startup_seconds=dict(engine.phases),
    )
    await exchange.reply(200, encode_json(body))


# --- from the body to requests ------------------------------------------------------------------------------------


async def prepare(
    context: RouterContext, exchange: Exchange, body: GenerateRequest, *, shows_prompt: bool, is_stream: bool
) -> tuple[Prepared, ServedModel]:
    """Check a body and tokenize its prompt. Raises RequestError."""
    model = context.require_model()
    parameters = body.parameters or _DEFAULT_PARAMETERS
    checked = check_native(body.parameters, context.settings, is_stream=is_stream)
    check_inputs(body.inputs, body.parameters, model)
    refuse_native_fields(parameters, context.settings)
    context.admission.check(checked.num_sequences)
    exchange.stage = "tokenize"
    ids = await model.tokenizer.encode_async(body.inputs, add_special_tokens=True)
    ids = truncated(ids, parameters.truncate, keeps_first=model.tokenizer.is_special(ids[0]) if ids else False)
    exchange.num_prompt_tokens += len(ids)
    max_new_tokens = fit_native(len(ids), checked.max_new_tokens, model)
    headers: RawHeaders = [
        (b"x-compute-type", context.compute_type.encode("latin-1")),
        (b"x-compute-characters", b"%d" % len(body.inputs)),
    ]
    if checked.max_new_tokens is not None and checked.max_new_tokens > max_new_tokens:
        headers.append((b"x-max-new-tokens-clamped", b"%d" % max_new_tokens))
    requests = build_requests(checked, ids, max_new_tokens, model, origin_of(context, exchange))
    if parameters.return_full_text is not None:
        shows_prompt = parameters.return_full_text
    text_before = body.inputs if shows_prompt else ""
    return Prepared(text_before, parameters, checked, requests, headers), model


def _sequences(prepared: Prepared, model: ServedModel, first_index: int = 0) -> list[SequenceText]:
    return [
        SequenceText(model, request.prompt_token_ids, prepared.checked.stop_strings, index=index, keeps_stop=True)
        for index, request in enumerate(prepared.requests, first_index)
    ]


# --- whole answers ------------------------------------------------------------------------------------------------


async def _answer(
    context: RouterContext,
    exchange: Exchange,
    body: GenerateRequest,
    *,
    shows_prompt: bool = False,
    is_array: bool = False,
) -> None:
    prepared, model = await prepare(context, exchange, body, shows_prompt=shows_prompt, is_stream=False)
    answer = WholeAnswer(prepared, model)
    with Generation(context, exchange, prepared.requests, answer.sequences) as generation:
        async with aclosing(generation.progress()) as progress:
            async for sequence, batch in progress:
                answer.collect(sequence, batch)
    response = answer.response()
    content = encode_json([response] if is_array else response)
    headers = [*prepared.headers, *timing_headers(exchange, answer.num_shown_tokens)]
    await exchange.reply(200, content, headers=headers)


class WholeAnswer:
    """The sequences of one prompt (several with `best_of`), and the answer that is made of them."""

    def __init__(self, prepared: Prepared, model: ServedModel, first_index: int = 0) -> None:
        """`first_index`: place of its first sequence among those of the HTTP request."""
        self._prepared = prepared
        self._model = model
        self._first_index = first_index
        self.sequences = _sequences(prepared, model, first_index)
        self._collected = [_Collected(*pair) for pair in zip(self.sequences, prepared.requests, strict=True)]

    @property
    def requests(self) -> list[Request]:
        """One per sequence."""
        return self._prepared.requests

    @property
    def num_shown_tokens(self) -> int:
        """Completion tokens of the likeliest sequence, which TGI's headers count."""
        return self._best.sequence.num_tokens

    @property
    def _best(self) -> _Collected:
        """The first of the likeliest."""
        return max(self._collected, key=lambda sequence: sequence.mean_logprob)

    def collect(self, sequence: SequenceText, batch: Sequence[TokenEvent]) -> None:
        """Take in events of one of the sequences."""
        _collect(self._collected[sequence.index - self._first_index], batch, self._model)

    def response(self) -> GenerateResponse:
        """The likeliest sequence; the others in the details, when those were asked for."""
        prepared = self._prepared
        parameters = prepared.parameters
        best = self._best
        text = _full_text(best, prepared)
        if not (parameters.details or parameters.decoder_input_details):
            return GenerateResponse(generated_text=text)
        has_top_tokens = prepared.checked.sampling.top_n_tokens > 0
        details = Details(
            finish_reason=_finish_reason(best),
            generated_tokens=best.sequence.num_tokens,
            seed=best.shown_seed,
            prefill=best.prefill,
            tokens=best.tokens,
        )
        if has_top_tokens:
            details.top_tokens = best.top_tokens
        losers = [sequence for sequence in self._collected if sequence is not best]
        if losers:
            details.best_of_sequences = [
                _loser(sequence, prepared, has_top_tokens=has_top_tokens) for sequence in losers
            ]
        return GenerateResponse(generated_text=text, details=details)


def _collect(into: _Collected, batch: Sequence[TokenEvent], model: ServedModel) -> None:
    sequence = into.sequence
    for event in batch:
        into.text.append(sequence.push(event))
        into.tokens.append(
            Token(event.token_id, sequence.token_text, shown_logprob(event.logprob), sequence.is_special)
        )
        into.logprob_sum += event.logprob
        if event.top_tokens is not None:
            into.top_tokens.append(_top_tokens(event, model))
        if event.prompt is not None and event.prompt.prompt_logprobs is not None:
            into.prefill = _prefill(into.request.prompt_token_ids, event.prompt.prompt_logprobs, model)
        if sequence.finish_reason is not None:
            return


def _loser(collected: _Collected, prepared: Prepared, *, has_top_tokens: bool) -> BestOfSequence:
    return BestOfSequence(
        generated_text=_full_text(collected, prepared),
        finish_reason=_finish_reason(collected),
        generated_tokens=collected.sequence.num_tokens,
        seed=collected.shown_seed,
        prefill=collected.prefill,
        tokens=collected.tokens,
        top_tokens=collected.top_tokens if has_top_tokens else msgspec.UNSET,
    )


def _full_text(collected: _Collected, prepared: Prepared) -> str:
    return prepared.text_before + "".join(collected.text)


def _finish_reason(collected: _Collected) -> str:
    return str(collected.sequence.finish_reason)


def _prefill(
    ids: Sequence[TokenId] | Sequence[int], logprobs: Sequence[float], model: ServedModel
) -> list[PrefillToken]:
    shown: list[float | None] = [None, *map(shown_logprob, logprobs)]
    return [
        PrefillToken(token_id, model.tokenizer.token_text(token_id), logprob)
        for token_id, logprob in zip(ids, shown, strict=True)
    ]


def _top_tokens(event: TokenEvent, model: ServedModel) -> list[Token]:
    if event.top_tokens is None:
        return []
    tokenizer = model.tokenizer
    return [
        Token(token_id, tokenizer.token_text(token_id), shown_logprob(logprob), tokenizer.is_special(token_id))
        for token_id, logprob in zip(event.top_tokens.token_ids, event.top_tokens.logprobs, strict=True)
    ]


# --- streams ------------------------------------------------------------------------------------------------------


async def _stream(
    context: RouterContext, exchange: Exchange, body: GenerateRequest, *, shows_prompt: bool = False
) -> None:
    prepared, model = await prepare(context, exchange, body, shows_prompt=shows_prompt, is_stream=True)
    sequences = _sequences(prepared, model)
    writer = _FrameWriter(sequences[0], prepared, model)
    stream = EventStream(exchange, context.streams, native_end_frames)
    with stream, Generation(context, exchange, prepared.requests, sequences) as generation:
        stream.announce(prepared.headers)
        async with aclosing(generation.progress(partial(stream.show, writer.frames))) as progress:
            async for _, batch in progress:
                if not stream.is_open:
                    await stream.open(prepared.headers)
                await stream.write(writer.frames(batch))
        await stream.close()


class _FrameWriter:
    """Token events → frames of one native stream. The usual event is a template with four holes."""

    def __init__(self, sequence: SequenceText, prepared: Prepared, model: ServedModel) -> None:
        self._sequence = sequence
        self._prepared = prepared
        self._model = model
        self._request = prepared.requests[0]
        self._text: list[str] = []

    def frames(self, batch: Sequence[TokenEvent]) -> bytes:
        """All frames of a batch, up to the sequence's end."""
        sequence = self._sequence
        frames: list[bytes] = []
        for event in batch:
            self._text.append(sequence.push(event))
            if sequence.finish_reason is not None:
                frames.append(self._whole(event))
                break
            if event.top_tokens is not None:
                frames.append(self._whole(event))
                continue
            frames.append(
                b'data: {"index":%d,"token":{"id":%d,"text":%b,"logprob":%b,"special":%b},'
                b'"generated_text":null,"details":null}\n\n'
                % (
                    sequence.num_tokens,
                    event.token_id,
                    encode_json(sequence.token_text),
                    logprob_bytes(event.logprob),
                    b"true" if sequence.is_special else b"false",
                )
            )
        return b"".join(frames)

    def _whole(self, event: TokenEvent) -> bytes:
        """An event with more than the usual fields."""
        sequence = self._sequence
        collected = _Collected(sequence, self._request, self._text)
        is_final = sequence.finish_reason is not None
        response = StreamResponse(
            index=sequence.num_tokens,
            token=Token(event.token_id, sequence.token_text, shown_logprob(event.logprob), sequence.is_special),
            generated_text=_full_text(collected, self._prepared) if is_final else None,
            details=self._details(collected) if is_final and self._prepared.parameters.details else None,
        )
        if event.top_tokens is not None:
            response.top_tokens = _top_tokens(event, self._model)
        return frame(response)

    def _details(self, collected: _Collected) -> StreamDetails:
        return StreamDetails(
            finish_reason=_finish_reason(collected),
            generated_tokens=self._sequence.num_tokens,
            seed=collected.shown_seed,
            input_length=len(self._request.prompt_token_ids),
        )


async def _tokens_of(text: str, model: ServedModel, field: str, *, add_special_tokens: bool) -> list[TokenizeToken]:
    check_prompt_chars(text, model, field)
    spans = await model.encode_with_offsets(text, add_special_tokens=add_special_tokens)
    return [TokenizeToken(span.id, span.text, span.start, span.stop) for span in spans]
