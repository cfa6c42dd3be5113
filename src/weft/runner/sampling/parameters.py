"""Sampling parameters of every slot as columns, so that a batch gathers its own with one index per parameter."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weft.core.plan import SequenceStart
from weft.core.request import LogprobStyle, PenaltyStyle, SamplingParams, StopConditions
from weft.errors import InvariantBroken
from weft.runner.sampling.history import TokenCounts

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


class Uses:
    """What a sequence asks of the sampler, one bit each. No bit: the best token and its log-probability.

    Plain integers: every step puts some of them against a column, which an enumeration makes ten times slower.
    """

    WATERMARK = 1
    HISTORY = 2
    BIAS = 4
    MIN_NEW_TOKENS = 8
    TEMPERATURE = 16
    TOP_K = 32
    TOP_P = 64
    TYPICAL_P = 128
    MIN_P = 256
    CHANCE = 512
    RAW_LOGPROB = 1024
    TOP_TOKENS = 2048


CHANGES_SCORES = Uses.CHANCE - 1
"""The bits of everything that happens between the logits and the choice."""

MORE_THAN_A_DRAW = CHANGES_SCORES & ~Uses.TEMPERATURE | Uses.TOP_TOKENS
"""The bits of everything that a temperature, a draw and its log-probability do not answer."""

NEEDS_SAMPLER = ~Uses.RAW_LOGPROB
"""The bits of everything that the best token and its log-probability do not answer."""


@dataclass(frozen=True, slots=True)
class _TokenTerms:
    """What concerns single tokens of one sequence."""

    history: TokenCounts | None
    bias_token_ids: Int64Array
    biases: Float32Array
    eos_token_ids: Int64Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """History tokens of several rows, one row after the other: U entries in all."""

    lengths: Int64Array
    """[R] entries of each row"""
    token_ids: Int64Array
    """[U] distinct within a row"""
    repetition: Float32Array
    """[U] repetition penalty θ"""
    subtracted: Float32Array
    """[U] what frequency and presence penalties take away"""


class ParameterTable:
    """One row per slot; a slot's row is replaced when a sequence takes the slot."""

    def __init__(self, max_num_sequences: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.uses: Int64Array = np.zeros(max_num_sequences, dtype=np.int64)
        self.seeds: Int64Array = np.zeros(max_num_sequences, dtype=np.int64)
        self.top_k: Int64Array = np.zeros(max_num_sequences, dtype=np.int64)
        self.top_n_tokens: Int64Array = np.zeros(max_num_sequences, dtype=np.int64)
        self.first_eos_position: Int64Array = np.zeros(max_num_sequences, dtype=np.int64)
        """Position from which on an EOS token may be chosen."""
        self.temperature: Float32Array = np.ones(max_num_sequences, dtype=np.float32)
        self.top_p: Float32Array = np.ones(max_num_sequences, dtype=np.float32)
        self.typical_p: Float32Array = np.ones(max_num_sequences, dtype=np.float32)
        self.min_p: Float32Array = np.zeros(max_num_sequences, dtype=np.float32)
        self.repetition_penalty: Float32Array = np.ones(max_num_sequences, dtype=np.float32)
        self.frequency_penalty: Float32Array = np.zeros(max_num_sequences, dtype=np.float32)
        self.presence_penalty: Float32Array = np.zeros(max_num_sequences, dtype=np.float32)
        self.counts_completion: BoolArray = np.zeros(max_num_sequences, dtype=np.bool_)
        """Penalties count the completion alone (PenaltyStyle.OPENAI)."""
        self.wants_prompt_logprobs: BoolArray = np.zeros(max_num_sequences, dtype=np.bool_)
        self.prompt_top_n_tokens: Int64Array = np.zeros(max_num_sequences, dtype=np.int64)
        self._token_terms: list[_TokenTerms | None] = [None] * max_num_sequences

    def start(self, start: SequenceStart) -> None:
        """Take the parameters and the known tokens of the sequence that a slot now belongs to."""
        slot, sampling = start.slot, start.sampling
        uses = _uses_of(sampling, start.stop, self._vocab_size)
        self.uses[slot] = uses
        self.seeds[slot] = np.uint64(sampling.seed).astype(np.int64)
        self.top_k[slot] = sampling.top_k
        self.top_n_tokens[slot] = sampling.top_n_tokens
        self.first_eos_position[slot] = start.num_prompt_tokens + start.stop.min_new_tokens
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.typical_p[slot] = sampling.typical_p
        self.min_p[slot] = sampling.min_p
        self.repetition_penalty[slot] = sampling.repetition_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.presence_penalty[slot] = sampling.presence_penalty
        self.counts_completion[slot] = sampling.penalty_style is PenaltyStyle.OPENAI
        self.wants_prompt_logprobs[slot] = sampling.prompt_logprobs
        self.prompt_top_n_tokens[slot] = sampling.prompt_top_n_tokens
        has_terms = uses & (Uses.HISTORY | Uses.BIAS | Uses.MIN_NEW_TOKENS)
        self._token_terms[slot] = _token_terms_of(start, uses) if has_terms else None

    def append(self, slot: int, token_id: int) -> None:
        """Count a token just chosen by a sequence that uses HISTORY."""
        self._history(slot).append(token_id)

    def penalties(self, slots: Int64Array) -> Penalties:
        """What the sequences in `slots`, which all use HISTORY, do to the tokens they have.

        TGI      frequency · count / length, over prompt and completion: bounded by the penalty itself
        OPENAI   frequency · count, over the completion alone
        Both     presence is subtracted once per token of the same history; repetition sees prompt and completion
        """
        histories = [self._history(slot) for slot in slots.tolist()]
        lengths = np.array([history.num_distinct for history in histories])
        is_openai = self.counts_completion[slots]
        styles = zip(histories, is_openai.tolist(), strict=True)
        counts = np.concatenate([h.completion_counts if openai else h.total_counts for h, openai in styles])
        num_tokens = np.array([history.num_tokens for history in histories], dtype=np.float32)
        frequency = self.frequency_penalty[slots] / np.where(is_openai, np.float32(1.0), num_tokens)
        subtracted = counts * np.repeat(frequency, lengths)
        subtracted += (counts > 0) * np.repeat(self.presence_penalty[slots], lengths)
        return Penalties(
            lengths=lengths,
            token_ids=np.concatenate([history.token_ids for history in histories]),
            repetition=np.repeat(self.repetition_penalty[slots], lengths),
            subtracted=subtracted.astype(np.float32),
        )

    def biases(self, slot: int) -> tuple[Int64Array, Float32Array]:
        """Token ids and biases of a sequence that uses BIAS, each [U]."""
        terms = self._terms(slot)
        return terms.bias_token_ids, terms.biases

    def eos_token_ids(self, slot: int) -> Int64Array:
        """EOS tokens of a sequence that uses MIN_NEW_TOKENS, [U]."""
        return self._terms(slot).eos_token_ids

    def _history(self, slot: int) -> TokenCounts:
        history = self._terms(slot).history
        if history is None:
            raise InvariantBroken(f"slot {slot} has no history, but its row asks for penalties")
        return history

    def _terms(self, slot: int) -> _TokenTerms:
        terms = self._token_terms[slot]
        if terms is None:
            raise InvariantBroken(f"slot {slot} has no token terms, but its row asks for some")
        return terms


def _uses_of(sampling: SamplingParams, stop: StopConditions, vocab_size: int) -> int:
    penalizes = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty
    asked = {
        Uses.WATERMARK: sampling.watermark,
        Uses.HISTORY: penalizes,
        Uses.BIAS: sampling.logit_bias,
        Uses.MIN_NEW_TOKENS: stop.min_new_tokens and stop.eos_token_ids and not stop.ignore_eos,
        Uses.TEMPERATURE: sampling.temperature != 1.0,
        Uses.TOP_K: 0 < sampling.top_k < vocab_size,
        Uses.TOP_P: sampling.top_p < 1.0,
        Uses.TYPICAL_P: sampling.typical_p < 1.0,
        Uses.MIN_P: sampling.min_p > 0.0,
        Uses.CHANCE: not sampling.is_greedy,
        Uses.RAW_LOGPROB: sampling.logprob_style is LogprobStyle.RAW,
        Uses.TOP_TOKENS: sampling.top_n_tokens,
    }
    uses = 0
    for use, is_asked in asked.items():
        if is_asked:
            uses |= use
    return uses


def _token_terms_of(start: SequenceStart, uses: int) -> _TokenTerms:
    bias = start.sampling.logit_bias if uses & Uses.BIAS else ()
    return _TokenTerms(
        history=TokenCounts(start.token_ids, start.num_prompt_tokens) if uses & Uses.HISTORY else None,
        bias_token_ids=np.array([token for token, _ in bias], dtype=np.int64),
        biases=np.array([value for _, value in bias], dtype=np.float32),
        eos_token_ids=np.array(start.stop.eos_token_ids, dtype=np.int64),
    )
