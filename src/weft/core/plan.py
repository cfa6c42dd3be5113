"""The two values that cross between deciding and doing.

`StepPlan` is all that a rank needs to run one forward pass; `StepResult` is all that comes back. Both are plain
data, written by columns (parallel lists) because a plan for 256 running sequences is built every few milliseconds.
Prefill, chunk and decode are rows of one plan, never separate modes. They are structs, which are made in a tenth of the
time of a frozen dataclass.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec

from weft.core.request import Pooling, RequestId, SamplingParams, Slot, StopConditions


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """A sequence takes a slot. Everything about it that does not change until it leaves.

    The slot's block table becomes empty; `StepPlan.new_block_ids` fills it (prefix hits included).
    """

    slot: Slot
    request_id: RequestId
    token_ids: tuple[int, ...]
    """Every token known so far: prompt, then tokens emitted before a restart or preemption."""
    num_prompt_tokens: int
    sampling: SamplingParams
    stop: StopConditions
    pooling: Pooling | None = None
    """Not None: the row that samples yields the prompt's vector instead of a token."""


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One forward pass over packed rows `[T]`.

    Row r computes tokens `first_positions[r] … + num_tokens[r] - 1` of the sequence in `slots[r]`. Their ids stand
    in the runner's token table: known prompt tokens since the sequence started, sampled ones because the previous
    step wrote them there, so step N+1 may be planned while step N still runs. A row with `samples[r]` ends at the
    newest known position and chooses the next token, which the runner writes at position first + num.

    Order   decode rows first, then prefill chunks
    Blocks  `new_block_ids[i]` is appended to the block table of slot `new_block_slots[i]`, in list order, before
            the rows run and after `starts` emptied the tables of the slots they take
    """

    step_id: int
    starts: tuple[SequenceStart, ...] = ()
    slots: Seq[int]
    first_positions: Seq[int]
    num_tokens: Seq[int]
    samples: Seq[bool]
    new_block_slots: Seq[int] = ()
    new_block_ids: Seq[int] = ()

    @property
    def num_rows(self) -> int:
        """S: sequences taking part in the step."""
        return len(self.slots)

    @property
    def total_tokens(self) -> int:
        """T: tokens computed in the step."""
        return sum(self.num_tokens)


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The likeliest tokens of one position, best first; ties at the last place are kept."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one step produced. `token_ids` and `logprobs` have one entry per sampling row, in plan order."""

    step_id: int
    elapsed_ns: int
    """Duration of the forward and the sampling, for a scheduler without a clock."""
    token_ids: Seq[int]
    logprobs: Seq[float]
    top_tokens: dict[int, TopTokens] = {}
    """Row index → alternatives, for rows whose sampling asks for them."""
    prompt_logprobs: dict[int, tuple[float, ...]] = {}
    """Row index → log-probability of the tokens at positions first+1 … first+num that are prompt tokens."""
    prompt_top_tokens: dict[int, tuple[TopTokens, ...]] = {}
    """Row index → alternatives to those tokens, for rows whose sampling asks for them."""
    embeddings: dict[int, bytes] = {}
    """Row index → vector `[E]` float32 little-endian, for sampling rows of sequences with pooling. Their entries in
    the two lists above mean nothing."""
    failures: dict[int, str] = {}
    """Row index → stable error code (for example `numerical_error`); such a row's token is meaningless."""
