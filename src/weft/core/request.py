"""What a client asked for, after validation: immutable, and free of strings except names.

Every HTTP dialect ends in one `Request`; the engine checks it again (`Request.check`) because the wire is a
second door. Stop strings are not here: they are matched in the router, where text exists.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from weft.errors import ValidationError
from weft.limits import LIMITS

RequestId = NewType("RequestId", int)
"""64 random bits made by the router. A client's own id is echoed in a header and never used as a key."""

TokenId = NewType("TokenId", int)
"""Row of the embedding table, 0 ≤ id < vocabulary size."""

BlockId = NewType("BlockId", int)
"""Index of a block in the KV pool."""

Slot = NewType("Slot", int)
"""Row of the runner's sequence tables, 0 ≤ slot < max_num_sequences."""

Rank = NewType("Rank", int)
"""Index of a shard process in its tensor-parallel group."""

MAX_SEED = 2**64 - 1


class FinishReason(StrEnum):
    """Why a sequence ended; the first three are the values TGI's native API shows."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"  # noqa: S105 - a reason, not a secret
    STOP_SEQUENCE = "stop_sequence"
    ABORT = "abort"


class Pooling(StrEnum):
    """Which rows of a prompt's normed hidden states become its one vector."""

    LAST = "last"
    """The row of the last token: the only one that has seen the whole prompt."""
    MEAN = "mean"
    """The mean of all rows."""
    CLS = "cls"
    """The row of the first token."""


class PenaltyStyle(StrEnum):
    """How repetition counts become a frequency penalty.

    TGI subtracts φ·count/len(history) over prompt and completion (spec: TGI 3.3.7 `logits_process.py`).
    OPENAI subtracts φ·count over the completion alone (API reference, `frequency_penalty`).
    """

    TGI = "tgi"
    OPENAI = "openai"


class LogprobStyle(StrEnum):
    """Which distribution a reported log-probability belongs to.

    PROCESSED: after penalties, mask, temperature and truncation (TGI's native API).
    RAW: log-softmax of the model's own logits in float32 (OpenAI's API).
    """

    PROCESSED = "processed"
    RAW = "raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one token is chosen from logits. Neutral values switch a step off; see `runner/sampling`."""

    do_sample: bool = False
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    """Keep the k best, ties kept; 0 = off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the best one; 0 = off."""
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_style: PenaltyStyle = PenaltyStyle.TGI
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit) pairs; ids are unique."""
    watermark: bool = False
    logprob_style: LogprobStyle = LogprobStyle.PROCESSED
    top_n_tokens: int = 0
    """How many alternatives to report per generated token."""
    prompt_logprobs: bool = False
    """Report the log-probability of every prompt token but the first. Skips the prefix cache lookup."""
    prompt_top_n_tokens: int = 0
    """How many alternatives to report per prompt token but the first; needs `prompt_logprobs`."""

    @property
    def is_greedy(self) -> bool:
        """True when the best token is taken: TGI samples as soon as any warper is not neutral."""
        return not (
            self.do_sample
            or self.temperature != 1.0
            or self.top_k != 0
            or self.top_p < 1.0
            or self.typical_p < 1.0
            or self.min_p > 0.0
        )

    def check(self, vocab_size: int) -> None:
        """Refuse values the sampler has no meaning for. Raises ValidationError naming the field."""
        _check_range("seed", self.seed, 0, MAX_SEED)
        _check_positive("temperature", self.temperature)
        _check_range("top_k", self.top_k, 0, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("typical_p", self.typical_p, 0.0, 1.0, open_low=True)
        _check_positive("repetition_penalty", self.repetition_penalty)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("top_n_tokens", self.top_n_tokens, 0, LIMITS.max_top_n_tokens_cap)
        highest = LIMITS.max_top_n_tokens_cap if self.prompt_logprobs else 0
        _check_range("prompt_top_n_tokens", self.prompt_top_n_tokens, 0, highest)
        _check_range("logit_bias length", len(self.logit_bias), 0, LIMITS.max_logit_bias_entries)
        for token_id, bias in self.logit_bias:
            _check_range("logit_bias token id", token_id, 0, vocab_size - 1)
            _check_range("logit_bias value", bias, -100.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopConditions:
    """When the engine ends a sequence. EOS wins when both hit on the same token."""

    max_new_tokens: int
    min_new_tokens: int = 0
    """EOS tokens cannot be chosen before this many tokens exist."""
    eos_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """EOS tokens are ordinary tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. `n` and `best_of` become several requests that share prompt blocks."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopConditions
    emitted_token_ids: tuple[int, ...] = ()
    """Completion tokens the client already has: a request re-added after a shard restart goes on behind them."""
    priority: int = 0
    """Larger goes first; equal priorities are served in order of arrival."""
    deadline_ns: int | None = None
    """Engine-clock time after which a request still waiting is failed instead of started; None = never."""
    tenant: str = ""
    """Prefix blocks are shared within a tenant only."""
    pooling: Pooling | None = None
    """Not None: nothing is generated; the prompt's vector is asked for (`stop.max_new_tokens` is 1, its place)."""
    trace_parent: str = field(default="", compare=False)
    """W3C traceparent of the HTTP request; empty = not traced."""

    def check(self, *, vocab_size: int, max_total_tokens: int) -> None:
        """The engine's second look at a request from the wire. Raises ValidationError naming the field."""
        num_prompt = len(self.prompt_token_ids)
        # A vector takes no place behind its prompt.
        most_prompt_tokens = max_total_tokens - (self.pooling is None)
        _check_range("prompt_token_ids length", num_prompt, 1, most_prompt_tokens)
        most_new_tokens = max_total_tokens - num_prompt if self.pooling is None else 1
        _check_range("max_new_tokens", self.stop.max_new_tokens, 1, most_new_tokens)
        _check_range("min_new_tokens", self.stop.min_new_tokens, 0, self.stop.max_new_tokens)
        _check_range("emitted_token_ids length", len(self.emitted_token_ids), 0, self.stop.max_new_tokens - 1)
        for name, ids in (
            ("prompt_token_ids", self.prompt_token_ids),
            ("emitted_token_ids", self.emitted_token_ids),
            ("eos_token_ids", self.stop.eos_token_ids),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                bad = next(i for i in ids if not 0 <= i < vocab_size)
                raise ValidationError(f"`{name}` must hold ids from 0 to {vocab_size - 1}. Given: {bad}", field=name)
        self.sampling.check(vocab_size)


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if math.isnan(value) or value > high or value < low or (open_low and value == low):
        bracket = ">" if open_low else ">="
        raise ValidationError(f"`{name}` must be {bracket} {low} and <= {high}. Given: {value}", field=name)


def _check_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValidationError(f"`{name}` must be strictly positive and finite. Given: {value}", field=name)
