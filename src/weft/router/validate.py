"""User input → `core.Request`, or one clear error that names the field.

Parameters are checked before the prompt is tokenized (cheap first), lengths afterwards. The native half keeps TGI's
order of checks and its sentences, behind which stand the value and a way out; the `/v1` half follows OpenAI's ranges.
Source: TGI 3.3.7 `router/src/validation.rs`, as facts; OpenAI API reference
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from weft.config import Settings
from weft.core.request import (
    MAX_SEED,
    LogprobStyle,
    PenaltyStyle,
    Request,
    RequestId,
    SamplingParams,
    StopConditions,
)
from weft.core.seeds import derive_seed
from weft.errors import ContextLengthError, NotSupportedError, ValidationError
from weft.limits import LIMITS
from weft.router.json_values import is_given, shortened
from weft.router.openai_fields import check_chat_fields, refuse_unknown_masks
from weft.router.schemas_native import GenerateParameters
from weft.router.schemas_openai import ChatRequest, CompletionRequest, SamplingFields
from weft.router.served import ServedModel

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Parameters that were found good; what depends on the prompt is still open."""

    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    num_sequences: int = 1
    max_new_tokens: int | None = None
    """None: as many as the context leaves."""
    max_new_tokens_field: str = "max_new_tokens"
    """What the client calls it."""
    min_new_tokens: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a request carries besides its parameters."""

    deadline_ns: int
    tenant: str = ""
    trace_parent: str = ""


def build_requests(
    checked: Checked, prompt_ids: Sequence[int], max_new_tokens: int, model: ServedModel, origin: Origin
) -> list[Request]:
    """One request per sequence; they differ in id and seed and share the prompt's blocks."""
    stop = StopConditions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(checked.min_new_tokens, max_new_tokens),
        eos_token_ids=model.eos_token_ids,
        ignore_eos=checked.ignore_eos,
    )
    prompt = tuple(prompt_ids)
    return [
        Request(
            request_id=RequestId(secrets.randbits(64) or 1),
            prompt_token_ids=prompt,
            sampling=replace(checked.sampling, seed=derive_seed(checked.sampling.seed, index)),
            stop=stop,
            deadline_ns=origin.deadline_ns,
            tenant=origin.tenant,
            trace_parent=origin.trace_parent,
        )
        for index in range(checked.num_sequences)
    ]


def check_prompt_chars(text: str, model: ServedModel, field: str) -> None:
    """Raises ContextLengthError for a text that cannot fit, before time is spent on tokenizing it."""
    if len(text) > model.max_prompt_chars:
        raise ContextLengthError(
            f"`{field}` must have no more than {model.max_input_tokens} tokens, hence at most "
            f"{model.max_prompt_chars} characters. Given: {len(text)} characters. Shorten it",
            field=field,
        )


# --- native -------------------------------------------------------------------------------------------------------


def check_native(parameters: GenerateParameters | None, settings: Settings, *, is_stream: bool) -> Checked:
    """Check TGI parameters in TGI's order. Raises ValidationError: TGI's sentence, the value, and a way out."""
    if parameters is None:
        return Checked(sampling=SamplingParams(do_sample=True, seed=random_seed()))
    p = parameters
    if is_stream:
        _check_streamable(p)
    best_of = max(p.best_of or 1, 1)
    if best_of > 1:
        _check_best_of(p, best_of, settings.max_best_of)
    _check_native_ranges(p)
    stop_strings = check_stop_strings(p.stop, settings.max_stop_sequences)
    _demand(
        p.seed is None or 0 <= p.seed <= MAX_SEED,
        "seed",
        f"`seed` must be >= 0 and <= {MAX_SEED}",
        p.seed,
        "leave it out for a random one",
    )
    top_n = p.top_n_tokens or 0
    _demand(
        top_n <= settings.max_top_n_tokens,
        "top_n_tokens",
        f"`top_n_tokens` must be >= 0 and <= {settings.max_top_n_tokens}",
        top_n,
        "ask for less (--max-top-n-tokens)",
    )
    sampling = SamplingParams(
        do_sample=bool(p.do_sample),
        seed=random_seed() if p.seed is None else p.seed,
        temperature=_or_neutral(p.temperature, 1.0),
        top_k=p.top_k or 0,
        top_p=_or_neutral(p.top_p, 1.0),
        typical_p=_or_neutral(p.typical_p, 1.0),
        repetition_penalty=_or_neutral(p.repetition_penalty, 1.0),
        frequency_penalty=_or_neutral(p.frequency_penalty, 0.0),
        penalty_style=PenaltyStyle.TGI,
        watermark=bool(p.watermark),
        logprob_style=LogprobStyle.PROCESSED,
        top_n_tokens=top_n,
        prompt_logprobs=bool(p.decoder_input_details),
    )
    return Checked(sampling=sampling, stop_strings=stop_strings, num_sequences=best_of, max_new_tokens=p.max_new_tokens)


def _check_streamable(p: GenerateParameters) -> None:
    _demand(
        p.best_of in (None, 1),
        "best_of",
        "`best_of` != 1 is not supported when streaming tokens",
        p.best_of,
        "leave it out, or do not stream",
    )
    _demand(
        not p.decoder_input_details,
        "decoder_input_details",
        "`decoder_input_details` == true is not supported when streaming tokens",
        p.decoder_input_details,
        "leave it out, or do not stream",
    )


def _check_best_of(p: GenerateParameters, best_of: int, max_best_of: int) -> None:
    if max_best_of == 1:
        rule = "`best_of` != 1 is not allowed for this endpoint"
    else:
        rule = f"`best_of` must be > 0 and <= {max_best_of}"
    _demand(best_of <= max_best_of, "best_of", rule, best_of, "ask for less (--max-best-of)")
    warpers = (p.temperature, p.top_k, p.top_p, p.typical_p)
    is_sampling = p.do_sample or any(warper is not None for warper in warpers)
    rule = "you must use sampling when `best_of` is > 1"
    _demand(bool(is_sampling), "best_of", rule, best_of, "set `do_sample` to true, or leave `best_of` out")


def _check_native_ranges(p: GenerateParameters) -> None:
    """What does not depend on the server. TGI's sentences about `*_p` leave out 1.0, which is off and accepted here."""
    is_positive, off = "strictly positive", "leave it out to turn it off"
    share_off = "leave it out, or send 1.0, to turn it off"
    checks = (
        (
            "temperature",
            p.temperature is None or p.temperature > 0,
            is_positive,
            "leave it out for the likeliest token",
        ),
        ("repetition_penalty", p.repetition_penalty is None or p.repetition_penalty > 0, is_positive, off),
        ("frequency_penalty", p.frequency_penalty is None or -2 <= p.frequency_penalty <= 2, ">= -2.0 and <= 2.0", off),
        ("top_p", p.top_p is None or 0 < p.top_p <= 1, "> 0.0 and < 1.0", share_off),
        ("typical_p", p.typical_p is None or 0 < p.typical_p <= 1, "> 0.0 and < 1.0", share_off),
        ("top_k", p.top_k is None or p.top_k > 0, is_positive, off),
        ("max_new_tokens", p.max_new_tokens != 0, is_positive, "leave it out for all that the context holds"),
    )
    for name, is_fine, allowed, remedy in checks:
        _demand(is_fine, name, f"`{name}` must be {allowed}", getattr(p, name), remedy)


def refuse_native_fields(p: GenerateParameters, settings: Settings) -> None:
    """Refuse what does not exist yet, where TGI looks at grammars: last. Raises NotSupportedError."""
    if is_given(p.grammar):
        text = "`grammar` is not supported yet; leave it out"
        if settings.disable_grammar_support:
            text = "grammar is not supported here (--disable-grammar-support); leave `grammar` out"
        raise NotSupportedError(text, field="grammar")
    if p.adapter_id:
        raise NotSupportedError("`adapter_id` is not supported yet; leave it out", field="adapter_id")


def check_inputs(inputs: str, parameters: GenerateParameters | None, model: ServedModel) -> None:
    """Check the prompt itself and `truncate`, as TGI does after the parameters."""
    _require(bool(inputs), "inputs", "`inputs` cannot be empty; send a text")
    check_truncate(parameters, model)
    if parameters is None or parameters.truncate is None:
        check_prompt_chars(inputs, model, "inputs")


def check_truncate(parameters: GenerateParameters | None, model: ServedModel) -> None:
    """Raises ValidationError."""
    truncate = None if parameters is None else parameters.truncate
    most = model.max_input_tokens
    _demand(
        truncate is None or 1 <= truncate <= most,
        "truncate",
        f"`truncate` must be strictly positive and less than {most}",
        truncate,
        f"{most} is the most that is kept (--max-input-tokens)",
    )


_Token = TypeVar("_Token")


def truncated(tokens: list[_Token], truncate: int | None, *, keeps_first: bool) -> list[_Token]:
    """The last `truncate` tokens; a BOS token in front stays there, or the model would see a text without one."""
    if truncate is None or len(tokens) <= truncate:
        return tokens
    if keeps_first and truncate > 1:
        return [tokens[0], *tokens[-(truncate - 1) :]]
    return tokens[-truncate:]


def fit_native(num_prompt_tokens: int, max_new_tokens: int | None, model: ServedModel) -> int:
    """Completion tokens that fit: what was asked for, clamped to the context. Raises ContextLengthError."""
    _require(num_prompt_tokens > 0, "inputs", "`inputs` must give at least one token. Given: none; send another text")
    most = model.max_input_tokens
    remedy = "shorten it, or set `truncate`"
    room = model.max_total_tokens - num_prompt_tokens
    if max_new_tokens is not None and room < 1:
        raise ContextLengthError(
            f"`inputs` tokens + `max_new_tokens` must be <= {model.max_total_tokens}. Given: {num_prompt_tokens} "
            f"`inputs` tokens and {max_new_tokens} `max_new_tokens`; `inputs` may have {most} (--max-input-tokens): "
            f"{remedy}",
            field="inputs",
        )
    if num_prompt_tokens > most or room < 1:
        raise ContextLengthError(
            f"`inputs` must have less than {most} tokens. Given: {num_prompt_tokens}; {most} is the most that is read "
            f"(--max-input-tokens): {remedy}",
            field="inputs",
        )
    return room if max_new_tokens is None else min(max_new_tokens, room)


# --- /v1 ----------------------------------------------------------------------------------------------------------


def check_chat(body: ChatRequest, settings: Settings, model: ServedModel) -> Checked:
    """Check the parameters of a chat request."""
    check_chat_fields(body)
    _require(0 < len(body.messages) <= LIMITS.max_messages, "messages", _count_text("messages", body.messages))
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    _check_least(name, max_tokens, 1)
    top_logprobs = body.top_logprobs or 0
    _check_range("top_logprobs", top_logprobs, 0, LIMITS.max_top_n_tokens_cap)
    _require(
        bool(body.logprobs) or top_logprobs == 0,
        "top_logprobs",
        "`top_logprobs` needs `logprobs`: true. Set it, or leave `top_logprobs` out",
    )
    checked = _check_sampling(body, settings, model, max_tokens=max_tokens, top_n_tokens=top_logprobs)
    return replace(checked, max_new_tokens_field=name)


def check_completion(body: CompletionRequest, settings: Settings, model: ServedModel) -> Checked:
    """Check the parameters of a completion request; `max_tokens` 0 scores the prompt of an `echo`."""
    if body.suffix is not None:
        raise NotSupportedError(
            "`suffix` is not supported; put the whole text into `prompt` as your model expects it", field="suffix"
        )
    refuse_unknown_masks(body)
    n = 1 if body.n is None else body.n
    if body.best_of not in (None, 1, n):
        raise NotSupportedError(
            f"`best_of` other than `n` is not supported. Given: {body.best_of}; leave it out", field="best_of"
        )
    _check_least("max_tokens", body.max_tokens, 0)
    logprobs = 0 if body.logprobs is None else body.logprobs
    _check_range("logprobs", logprobs, 0, LIMITS.max_top_n_tokens_cap)
    max_tokens = 16 if body.max_tokens is None else max(body.max_tokens, 1)
    checked = _check_sampling(body, settings, model, max_tokens=max_tokens, top_n_tokens=logprobs)
    if not body.echo or body.logprobs is None:
        return checked
    return replace(checked, sampling=replace(checked.sampling, prompt_logprobs=True, prompt_top_n_tokens=body.logprobs))


def fit_openai(num_prompt_tokens: int, checked: Checked, model: ServedModel, field: str) -> int:
    """Completion tokens that fit; more than the context has is an error here. Raises ContextLengthError."""
    room = model.max_total_tokens - num_prompt_tokens
    if num_prompt_tokens > model.max_input_tokens or room < 1:
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_total_tokens} tokens, of which `{field}` may have "
            f"{model.max_input_tokens}. Given: {num_prompt_tokens} tokens in `{field}`. Shorten it",
            field=field,
        )
    if checked.max_new_tokens is not None and checked.max_new_tokens > room:
        raise ContextLengthError(
            f"This model's maximum context length is {model.max_total_tokens} tokens. Given: {num_prompt_tokens} in "
            f"`{field}` and `{checked.max_new_tokens_field}` {checked.max_new_tokens}. Ask for at most {room}, or "
            f"shorten `{field}`",
            field=checked.max_new_tokens_field,
        )
    return room if checked.max_new_tokens is None else checked.max_new_tokens


def _check_sampling(
    body: SamplingFields, settings: Settings, model: ServedModel, *, max_tokens: int | None, top_n_tokens: int
) -> Checked:
    _check_range("temperature", body.temperature, 0, 2)
    _check_range("top_p", body.top_p, 0, 1)
    _check_range("min_p", body.min_p, 0, 1)
    _check_range("presence_penalty", body.presence_penalty, -2, 2)
    _check_range("frequency_penalty", body.frequency_penalty, -2, 2)
    _check_range("n", body.n, 1, LIMITS.max_n)
    _check_range("top_k", body.top_k, -1, 2**31 - 1)
    _check_range("seed", body.seed, -(2**63), MAX_SEED)
    _check_least("min_tokens", body.min_tokens, 0)
    _require(
        body.typical_p is None or 0 < body.typical_p <= 1,
        "typical_p",
        f"`typical_p` must be > 0 and <= 1. Given: {body.typical_p}",
    )
    _require(
        body.repetition_penalty is None or (body.repetition_penalty > 0 and math.isfinite(body.repetition_penalty)),
        "repetition_penalty",
        f"`repetition_penalty` must be > 0. Given: {body.repetition_penalty}",
    )
    if body.min_tokens and max_tokens is not None:
        _require(
            body.min_tokens <= max_tokens,
            "min_tokens",
            f"`min_tokens` must not be greater than `max_tokens`, {max_tokens}. Given: {body.min_tokens}",
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    defaults = model.sampling_defaults
    temperature = _or_neutral(body.temperature, defaults.temperature)
    # Both zeros mean the likeliest token.
    is_greedy = temperature == 0 or body.top_p == 0
    sampling = SamplingParams(
        do_sample=not is_greedy,
        seed=random_seed() if body.seed is None else body.seed % 2**64,
        temperature=1.0 if is_greedy else temperature,
        top_k=0 if is_greedy else max(defaults.top_k if body.top_k is None else body.top_k, 0),
        top_p=1.0 if is_greedy else _or_neutral(body.top_p, defaults.top_p),
        min_p=0.0 if is_greedy else _or_neutral(body.min_p, defaults.min_p),
        typical_p=1.0 if is_greedy else _or_neutral(body.typical_p, 1.0),
        repetition_penalty=_or_neutral(body.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=_or_neutral(body.frequency_penalty, 0.0),
        presence_penalty=_or_neutral(body.presence_penalty, 0.0),
        penalty_style=PenaltyStyle.OPENAI,
        logit_bias=_logit_bias(body.logit_bias, model.info.vocab_size),
        logprob_style=LogprobStyle.RAW,
        top_n_tokens=top_n_tokens,
    )
    return Checked(
        sampling=sampling,
        stop_strings=check_stop_strings(stop, settings.max_stop_sequences),
        num_sequences=body.n or 1,
        max_new_tokens=max_tokens,
        max_new_tokens_field="max_tokens",
        min_new_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
    )


def _logit_bias(biases: dict[str, float] | list[float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not biases:
        return ()
    if isinstance(biases, list):
        raise ValidationError("`logit_bias` must be an object of token id → bias. Given: an array", field="logit_bias")
    if len(biases) > LIMITS.max_logit_bias_entries:
        raise ValidationError(
            f"`logit_bias` must have at most {LIMITS.max_logit_bias_entries} entries. Given: {len(biases)}",
            field="logit_bias",
        )
    checked: dict[int, float] = {}
    for key, bias in biases.items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size
        _require(is_id, "logit_bias", f"`logit_bias` must have token ids from 0 to {vocab_size - 1} as keys")
        _require(
            -100 <= bias <= 100,
            "logit_bias",
            f"`logit_bias` values must be >= -100 and <= 100. Given: {bias} for token {int(key)}",
        )
        checked[int(key)] = bias
    return tuple(sorted(checked.items()))


# --- shared -------------------------------------------------------------------------------------------------------


def random_seed() -> int:
    """64 random bits, for whoever brings no seed."""
    return secrets.randbits(64)


def check_stop_strings(stop: Sequence[str] | None, max_stop_sequences: int) -> tuple[str, ...]:
    """Raises ValidationError for too many, too long or empty ones."""
    stops = tuple(stop or ())
    _require(
        len(stops) <= max_stop_sequences,
        "stop",
        f"`stop` supports up to {max_stop_sequences} stop sequences. Given: {len(stops)}; leave some out "
        "(--max-stop-sequences)",
    )
    for text in stops:
        _require(bool(text), "stop", "`stop` must not hold an empty text; leave it out")
        _require(
            len(text) <= LIMITS.max_stop_sequence_chars,
            "stop",
            f"`stop` texts must have at most {LIMITS.max_stop_sequence_chars} characters. Given: {len(text)}",
        )
    return stops


def _require(condition: bool, field: str, text: str) -> None:  # noqa: FBT001 - reads as the check it is
    if not condition:
        raise ValidationError(text, field=field)


def _demand(is_fine: bool, field: str, rule: str, value: float | None, remedy: str) -> None:  # noqa: FBT001 - as above
    """Raises ValidationError with TGI's sentence, then the value and what to do."""
    if not is_fine:
        shown = str(value).lower() if isinstance(value, bool) else shortened(str(value))
        raise ValidationError(f"{rule}. Given: {shown}; {remedy}", field=field)


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ValidationError(f"`{name}` must be >= {low} and <= {high}. Given: {value}", field=name)


def _check_least(name: str, value: int | None, low: int) -> None:
    if value is not None and value < low:
        raise ValidationError(f"`{name}` must be >= {low}. Given: {value}", field=name)


def _or_neutral(value: float | None, neutral: float) -> float:
    return neutral if value is None else float(value)


def _count_text(name: str, values: Sequence[object]) -> str:
    return f"`{name}` must hold 1 to {LIMITS.max_messages} entries. Given: {len(values)}"
