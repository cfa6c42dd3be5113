"""A conversation on its way to the engine: the one path that chat completions, responses and messages share.

Each dialect turns its body into a `ChatRequest`; from there on everything is the same: check, render, tokenize, fit.
Errors name the fields of chat completions; `in_words_of` gives them the names that the client used.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from weft.core.request import Request
from weft.errors import RequestError, ValidationError
from weft.router.chat_prompt import render_chat
from weft.router.context import RouterContext
from weft.router.exchange import Exchange, RawHeaders
from weft.router.request_origin import origin_of
from weft.router.schemas_openai import ChatRequest, CompletionTokensDetails, PromptTokensDetails, Usage
from weft.router.served import ServedModel
from weft.router.validate import Checked, build_requests, check_chat, check_prompt_chars, fit_openai


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Checked and tokenized: all that is left is to run it."""

    model: ServedModel
    checked: Checked
    requests: list[Request]
    num_prompt_chars: int
    num_prompt_tokens: int
    is_clamped: bool = False
    """The context has less room than the client asked for."""


async def prepare(
    context: RouterContext, exchange: Exchange, body: ChatRequest, *, clamps: bool = False
) -> Conversation:
    """From the body to requests. `clamps`: asking for more tokens than fit is no error. Raises RequestError."""
    model = context.require_model()
    checked = check_chat(body, context.settings, model)
    context.admission.check(checked.num_sequences)
    prompt = await prompt_of(exchange, body, model)
    ids = await encode(prompt, "messages", exchange, model, add_special_tokens=False)
    room = model.max_total_tokens - len(ids)
    is_clamped = clamps and checked.max_new_tokens is not None and 0 < room < checked.max_new_tokens
    if is_clamped:
        checked = replace(checked, max_new_tokens=room)
    max_new_tokens = fit_openai(len(ids), checked, model, "messages")
    return Conversation(
        model=model,
        checked=checked,
        requests=build_requests(checked, ids, max_new_tokens, model, origin_of(context, exchange)),
        num_prompt_chars=len(prompt),
        num_prompt_tokens=len(ids),
        is_clamped=is_clamped,
    )


async def count_tokens(context: RouterContext, exchange: Exchange, body: ChatRequest) -> int:
    """Tokens of the prompt that `prepare` would make, however many they are."""
    model = context.require_model()
    prompt = await prompt_of(exchange, body, model)
    return len(await encode(prompt, "messages", exchange, model, add_special_tokens=False))


async def prompt_of(exchange: Exchange, body: ChatRequest, model: ServedModel) -> str:
    """The conversation as the model's template writes it. Raises TemplateError."""
    exchange.stage = "template"
    return await render_chat(body, model)


async def encode(
    text: str, field: str, exchange: Exchange, model: ServedModel, *, add_special_tokens: bool
) -> list[int]:
    """Text → ids, counted for the request's metrics. Raises ValidationError."""
    check_prompt_chars(text, model, field)
    exchange.stage = "tokenize"
    ids = await model.tokenizer.encode_async(text, add_special_tokens=add_special_tokens)
    if not ids:
        raise ValidationError(f"`{field}` must give at least one token. Given: none", field=field)
    exchange.num_prompt_tokens += len(ids)
    return ids


def compute_headers(context: RouterContext, num_chars: int) -> RawHeaders:
    """TGI's headers about what was computed."""
    return [
        (b"x-compute-type", context.compute_type.encode("latin-1")),
        (b"x-compute-characters", b"%d" % num_chars),
    ]


def counted(exchange: Exchange, num_prompt_tokens: int, num_completion_tokens: int) -> Usage:
    """What every dialect reports, streamed or not. Models that reason apart do not exist here yet."""
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=min(exchange.num_cached_tokens, num_prompt_tokens)),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Inside this block errors that name a field of chat completions name the client's field instead.

    Units    names: field of `ChatRequest` → field of the client's dialect
    """
    try:
        yield
    except RequestError as error:
        message = error.message
        for ours, theirs in names.items():
            message = message.replace(f"`{ours}`", f"`{theirs}`").replace(f"`{ours}.", f"`{theirs}.")
        field = error.field if error.field is None else names.get(error.field, error.field)
        raise type(error)(message, field=field, retry_after_s=error.retry_after_s) from None
