"""How far one request has come: the scheduler's mutable record beside the immutable `Request`.

Three marks on one line of tokens say everything about progress:

    0 ──────── num_planned ──────── len(token_ids) ──── num_expected ──── max_tokens
               computed, or in an   ids known           ids known once the
               open plan            here                open plans are applied

A decode row is the case `num_expected - num_planned == 1`: only the newest token has not been through the model.
Whatever is further behind is a prompt (or a preempted history) that must be prefilled.
"""

from dataclasses import dataclass, field
from typing import Self

from weft.core.plan import SequenceStart, TopTokens
from weft.core.request import BlockId, FinishReason, Request, Slot

NO_SLOT = Slot(-1)


@dataclass(slots=True, eq=False)
class Sequence:
    """Progress of one request. Compared by identity; changed by the scheduler alone.

    A sequence waits while it has no slot, runs while it has one, and is over once `is_ended`.
    """

    request: Request
    arrival: int
    """Place in the order of arrival, over all priorities."""
    added_ns: int
    token_ids: list[int]
    """Prompt, then every completion token known so far."""
    num_prompt_tokens: int
    """P: tokens of the prompt proper, without completion tokens."""
    num_expected: int
    """len(token_ids) plus the tokens that open plans will sample."""
    max_tokens: int
    """Prompt plus `max_new_tokens`: at this length the sequence ends."""
    eos_token_ids: frozenset[int]
    """Empty when EOS tokens are ordinary tokens."""
    wants_prompt_logprobs: bool
    slot: Slot = NO_SLOT
    is_ended: bool = False
    num_planned: int = 0
    """Tokens whose keys and values are in the pool, or will be once the open plans have run."""
    block_ids: list[BlockId] = field(default_factory=list)
    """The block table: block i holds positions i·B … (i+1)·B - 1."""
    num_slots_held: int = 0
    """Positions that `block_ids` has room for."""
    block_digests: list[bytes] = field(default_factory=list)
    """Prefix digests of the leading full blocks, as far as somebody needed them."""
    num_indexed_blocks: int = 0
    """Leading blocks that were offered to (or came from) the prefix index."""
    num_announced_blocks: int = 0
    """Leading blocks that are in the index or announced as being computed."""
    num_open_rows: int = 0
    """Rows of open plans that belong to this sequence."""
    num_stale_rows: int = 0
    """Of those, the oldest ones whose result means nothing any more."""
    num_numerical_failures: int = 0
    is_suspect: bool = False
    """A step that raised had a row of it: it runs alone until one of its tokens is there."""
    has_started: bool = False
    """It got a row at least once."""
    queue_ns: int = 0
    """From its arrival to its first row."""
    awaited_digest: bytes = b""
    """The prefix block for which its start was put off."""
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix index at the first start."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of prompt tokens 1 … so far."""
    prompt_top_tokens: list[TopTokens] = field(default_factory=list)
    """Alternatives to prompt tokens 1 … so far."""
    has_reported_prompt: bool = False

    @classmethod
    def of(cls, request: Request, *, arrival: int, now_ns: int) -> Self:
        """The record of a request that just arrived; emitted tokens count as known completion tokens."""
        token_ids = [*request.prompt_token_ids, *request.emitted_token_ids]
        stop = request.stop
        return cls(
            request=request,
            arrival=arrival,
            added_ns=now_ns,
            token_ids=token_ids,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_expected=len(token_ids),
            max_tokens=len(request.prompt_token_ids) + stop.max_new_tokens,
            eos_token_ids=frozenset() if stop.ignore_eos else frozenset(stop.eos_token_ids),
            # A resumed request delivered them with its first token, before the restart.
            wants_prompt_logprobs=request.sampling.prompt_logprobs and not request.emitted_token_ids,
        )

    @property
    def num_completion_tokens(self) -> int:
        """Completion tokens known so far; also the index of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_unplanned(self) -> int:
        """Tokens still to go through the model; 1 means that the next row is a decode row."""
        return self.num_expected - self.num_planned

    @property
    def is_last_token_planned(self) -> bool:
        """An open plan samples the last token that the request may have."""
        return self.num_expected == self.max_tokens

    @property
    def is_running(self) -> bool:
        """It has a slot."""
        return self.slot != NO_SLOT

    @property
    def may_start(self) -> bool:
        """No open plan holds a row of it: every token is known and nothing writes on its behalf."""
        return self.num_open_rows == 0

    def start(self, slot: Slot, now_ns: int) -> SequenceStart:
        """Take a slot. The block table is empty until blocks are appended."""
        self.slot = slot
        if not self.has_started:
            self.has_started = True
            self.queue_ns = now_ns - self.added_ns
        return SequenceStart(
            slot=slot,
            request_id=self.request.request_id,
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.request.sampling,
            stop=self.request.stop,
            pooling=self.request.pooling,
        )

    def plan(self, num_tokens: int) -> bool:
        """Count a row of `num_tokens` more tokens as planned. Returns whether the row samples."""
        self.num_planned += num_tokens
        self.num_open_rows += 1
        samples = self.num_planned == self.num_expected
        if samples:
            self.num_expected += 1
        return samples

    def rewind(self) -> None:
        """Lose slot and blocks: everything must be computed again. Tokens in open plans still count."""
        self.slot = NO_SLOT
        self.num_planned = 0
        self.block_ids = []
        self.num_slots_held = 0
        self.num_indexed_blocks = 0
        self.num_announced_blocks = 0

    def distrust_open_rows(self) -> None:
        """Results of rows that are still open will be dropped, sampled tokens included."""
        self.num_stale_rows = self.num_open_rows
        self.num_expected = len(self.token_ids)

    def collect_prompt_logprobs(
        self, first_position: int, logprobs: tuple[float, ...], top_tokens: tuple[TopTokens, ...] = ()
    ) -> None:
        """Keep what is reported about the tokens behind `first_position`, once each.

        After a preemption the same positions come a second time with the same values; only new ones are kept.
        """
        num_known = max(len(self.prompt_logprobs) - first_position, 0)
        self.prompt_logprobs.extend(logprobs[num_known:])
        self.prompt_top_tokens.extend(top_tokens[num_known:])

    def forget_prompt_logprobs(self) -> None:
        """What was reported about the prompt is not to be trusted."""
        self.prompt_logprobs.clear()
        self.prompt_top_tokens.clear()

    def finish_reason(self, token_id: int) -> FinishReason | None:
        """Why the sequence ends with the token just appended, if it does. EOS wins over length."""
        if token_id in self.eos_token_ids:
            return FinishReason.EOS_TOKEN
        if len(self.token_ids) >= self.max_tokens:
            return FinishReason.LENGTH
        return None
