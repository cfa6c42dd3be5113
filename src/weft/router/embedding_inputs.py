"""Inputs of embedding requests → token ids, or one clear error that names the field. For HTTP and `LLM.embed` alike."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from weft.config import Settings
from weft.core.request import Pooling, Request, RequestId, SamplingParams, StopConditions
from weft.errors import ContextLengthError, NotSupportedError, ValidationError
from weft.limits import LIMITS
from weft.router.served import ServedModel
from weft.router.validate import Origin, check_prompt_chars, truncated

Input = str | list[int]
"""A text, or token ids that are used as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How inputs that are too long are made to fit. Without one they are refused."""

    max_tokens: int
    from_left: bool
    """The beginning goes, and not the end."""


def require_embedding(model: ServedModel, settings: Settings) -> None:
    """Raises NotSupportedError for a model that generates text."""
    if not model.info.pooling:
        raise NotSupportedError(
            f"`model` must be an embedding model. Given: `{settings.shown_model_name}`, which generates text. "
            "Start a server with --task embed, or generate with /v1/chat/completions",
            field="model",
        )


def require_generation(model: ServedModel, settings: Settings) -> None:
    """Raises NotSupportedError for a model that makes vectors instead of text."""
    if model.info.pooling:
        raise NotSupportedError(
            f"`model` must generate text. Given: `{settings.shown_model_name}`, which turns texts into vectors. "
            "Use /v1/embeddings, or start a server with --task generate",
            field="model",
        )


def split_inputs(given: str | list[str | int | list[int]], field: str) -> list[Input]:
    """The four forms of an input as a list of texts and id lists. Raises ValidationError."""
    if isinstance(given, str):
        return [given]
    ids = [part for part in given if isinstance(part, int)]
    if ids and len(ids) == len(given):
        return [ids]
    if ids:
        raise ValidationError(f"`{field}` must not mix token ids with texts or lists", field=field)
    if not 1 <= len(given) <= LIMITS.max_embedding_inputs:
        raise ValidationError(
            f"`{field}` must hold 1 to {LIMITS.max_embedding_inputs} entries. Given: {len(given)}; send several "
            "requests",
            field=field,
        )
    return [part for part in given if not isinstance(part, int)]


def checked_dimensions(dimensions: int | None, model: ServedModel) -> int | None:
    """How many numbers of a vector are kept; None: all. Raises ValidationError."""
    if dimensions is None:
        return None
    listed, size = model.info.embedding_dimensions, model.info.embedding_size
    is_allowed = dimensions in listed if listed else 1 <= dimensions <= size
    if not is_allowed and dimensions != size:
        allowed = f"one of {', '.join(map(str, listed))} and {size}" if listed else f">= 1 and <= {size}"
        raise ValidationError(f"`dimensions` must be {allowed}. Given: {dimensions}", field="dimensions")
    return dimensions


def checked_cut(truncate: int | None, model: ServedModel) -> Cut | None:
    """What `truncate_prompt_tokens` asks for. Raises ValidationError."""
    if truncate is None:
        return None
    if truncate != -1 and not 1 <= truncate <= model.max_input_tokens:
        raise ValidationError(
            f"`truncate_prompt_tokens` must be -1, or >= 1 and <= {model.max_input_tokens}. Given: {truncate}",
            field="truncate_prompt_tokens",
        )
    return Cut(max_tokens=model.max_input_tokens if truncate == -1 else truncate, from_left=True)


@contextmanager
def naming(name: str, field: str) -> Iterator[None]:
    """Inside, errors about `input` are about the input with this name."""
    try:
        yield
    except ValidationError as error:
        raise type(error)(error.message.replace("`input`", f"`{name}`"), field=field) from None


def check_text(text: str, cut: Cut | None, model: ServedModel) -> None:
    """Raises ValidationError for a text that need not be tokenized to be refused."""
    if not text:
        raise ValidationError("`input` must not be empty", field="input")
    if cut is None:
        check_prompt_chars(text, model, "input")


def with_end(ids: list[int], model: ServedModel) -> list[int]:
    """The ids of a text, behind them the end-of-text token that the model was trained to sum it up in."""
    last = model.appended_token_id
    return [*ids, last] if last is not None and ids[-1:] != [last] else ids


def fitted(ids: list[int], cut: Cut | None, model: ServedModel) -> list[int]:
    """The ids, checked, and cut where that is wanted; a special token at the end that is cut off stays."""
    if not ids:
        raise ValidationError("`input` must hold at least one token. Given: none", field="input")
    last_id = model.info.vocab_size - 1
    bad = next((token_id for token_id in ids if not 0 <= token_id <= last_id), None)
    if bad is not None:
        raise ValidationError(f"`input` token ids must be >= 0 and <= {last_id}. Given: {bad}", field="input")
    if cut is None:
        if len(ids) > model.max_input_tokens:
            raise ContextLengthError(
                f"`input` must have at most {model.max_input_tokens} tokens. Given: {len(ids)}. Shorten it",
                field="input",
            )
        return ids
    is_special = model.tokenizer.is_special
    if cut.from_left:
        return truncated(ids, cut.max_tokens, keeps_first=is_special(ids[0]))
    if len(ids) > cut.max_tokens > 1 and is_special(ids[-1]):
        return [*ids[: cut.max_tokens - 1], ids[-1]]
    return ids[: cut.max_tokens]


def vector_request(prompt_ids: Sequence[int], model: ServedModel, origin: Origin) -> Request:
    """What the engine is asked for."""
    return Request(
        request_id=RequestId(secrets.randbits(64) or 1),
        prompt_token_ids=tuple(prompt_ids),
        sampling=SamplingParams(),
        stop=StopConditions(max_new_tokens=1),
        pooling=Pooling(model.info.pooling),
        deadline_ns=origin.deadline_ns,
        tenant=origin.tenant,
        trace_parent=origin.trace_parent,
    )
