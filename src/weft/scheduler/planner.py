"""Which rows the next step has. The order of decisions is told in `scheduler.py`."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from weft.core.plan import SequenceStart, StepPlan
from weft.core.request import BlockId, Slot
from weft.core.sequence import Sequence
from weft.scheduler import policy
from weft.scheduler.budget import PrefillBudget, StepBudget, fit_chunk
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.roster import Roster

_MAX_WAITS_PER_STEP = 64  # bounds the search behind requests that wait for a block being computed


@dataclass(slots=True)
class Draft:
    """A plan being written, by columns, with the sequence of each row beside it."""

    sequences: list[Sequence] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    first_positions: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    starts: list[SequenceStart] = field(default_factory=list)
    new_block_slots: list[Slot] = field(default_factory=list)
    new_block_ids: list[BlockId] = field(default_factory=list)
    num_decode_rows: int = 0
    chunks: dict[Sequence, int] = field(default_factory=dict)
    """Length of the prefill row that each prompt is going to get."""

    def add_row(self, sequence: Sequence, num_tokens: int) -> None:
        """Write one row and count it as planned."""
        self.sequences.append(sequence)
        self.slots.append(sequence.slot)
        self.first_positions.append(sequence.num_planned)
        self.num_tokens.append(num_tokens)
        self.samples.append(sequence.plan(num_tokens))

    def add_blocks(self, slot: Slot, block_ids: list[BlockId]) -> None:
        """Append blocks to the table of a slot."""
        self.new_block_slots.extend([slot] * len(block_ids))
        self.new_block_ids.extend(block_ids)

    def finish(self, step_id: int) -> StepPlan:
        """The plan. The draft must not be written any more."""
        return StepPlan(
            step_id=step_id,
            starts=tuple(self.starts),
            slots=self.slots,
            first_positions=self.first_positions,
            num_tokens=self.num_tokens,
            samples=self.samples,
            new_block_slots=self.new_block_slots,
            new_block_ids=self.new_block_ids,
        )


class Planner:
    """Writes drafts; moves sequences between queue and slots as it does."""

    def __init__(self, config: SchedulerConfig, roster: Roster, budget: PrefillBudget) -> None:
        self._roster = roster
        self._budget = budget
        self._size = config.block_size_tokens
        self._max_running = config.max_running
        self._growth_reserve = config.growth_reserve_blocks

    def draft(self, now_ns: int) -> Draft:
        """Rows for everybody who can go on. No rows: nothing to do."""
        if self._roster.suspects:
            return self._draft_alone(self._roster.suspects[0], now_ns)
        self._make_room()
        draft = Draft()
        prefilling = self._add_decodes(draft)
        if prefilling or self._roster.queue:
            self._share_budget(draft, prefilling, now_ns)
            for sequence, num_tokens in draft.chunks.items():
                draft.add_row(sequence, num_tokens)
        return draft

    def _draft_alone(self, suspect: Sequence, now_ns: int) -> Draft:
        """A step of one suspect and nobody else. What the prefix index holds was computed by steps that worked."""
        draft = Draft()
        if suspect.is_last_token_planned or not (suspect.is_running or suspect.may_start):
            return draft
        self._vacate(self._blocks_for(suspect.num_expected) - len(suspect.block_ids), suspect)
        if not suspect.is_running:
            draft.starts.append(self._roster.start(suspect, [], now_ns))
        self._grow_chunk(draft, suspect, self._budget.for_step(0))
        for sequence, num_tokens in draft.chunks.items():
            draft.add_row(sequence, num_tokens)
        return draft

    def _vacate(self, num_blocks: int, newcomer: Sequence) -> None:
        """Preempt others until `num_blocks` and a slot are free."""
        running, pool = self._roster.running, self._roster.pool
        while pool.num_available < num_blocks or not (newcomer.is_running or len(running) < self._max_running):
            self._roster.preempt(policy.choose_victim([other for other in running if other is not newcomer]))

    def _make_room(self) -> None:
        """Preempt until every running sequence could take its next block, the most important ones first."""
        running, pool = self._roster.running, self._roster.pool
        if pool.num_available >= len(running):
            return
        num_needed = 0
        place = 0
        while place < len(running):
            sequence = running[place]
            if sequence.num_planned == sequence.num_slots_held and not sequence.is_last_token_planned:
                num_needed += 1
            while num_needed > pool.num_available:
                victim = policy.choose_victim(running)
                self._roster.preempt(victim)
                if victim is sequence:
                    return
            place += 1

    def _add_decodes(self, draft: Draft) -> list[Sequence]:
        """Write one row per decoding sequence. Returns the running sequences that still prefill, by rank."""
        prefilling: list[Sequence] = []
        sequences, slots, positions = draft.sequences, draft.slots, draft.first_positions
        for sequence in self._roster.running:
            position = sequence.num_planned
            if sequence.num_expected - position > 1:
                prefilling.append(sequence)
                continue
            if sequence.num_expected == sequence.max_tokens:
                continue
            if position == sequence.num_slots_held:
                self._take_block(draft, sequence)
            # Draft.add_row and Sequence.plan written out: this loop runs for every token.
            sequences.append(sequence)
            slots.append(sequence.slot)
            positions.append(position)
            sequence.num_planned = position + 1
            sequence.num_expected += 1
            sequence.num_open_rows += 1
        draft.num_decode_rows = len(slots)
        draft.num_tokens.extend([1] * len(slots))
        draft.samples.extend([True] * len(slots))
        return prefilling

    def _share_budget(self, draft: Draft, prefilling: list[Sequence], now_ns: int) -> None:
        """Chunks for prompts: the first one is sure of half the budget, newcomers and others share the rest.

        What they leave over goes to the first one too.
        """
        budget = self._budget.for_step(draft.num_decode_rows)
        if not prefilling:
            self._admit(draft, prefilling, budget, now_ns)
            return
        first, *others = policy.prefill_order(prefilling)
        share = policy.first_share_tokens(budget.tokens_at(first.num_planned), self._size)
        self._grow_chunk(draft, first, budget, share)
        self._admit(draft, prefilling, budget, now_ns)
        for sequence in others:
            self._grow_chunk(draft, sequence, budget)
        self._grow_chunk(draft, first, budget)

    def _grow_chunk(self, draft: Draft, sequence: Sequence, budget: StepBudget, share: int | None = None) -> None:
        """Lengthen a sequence's chunk by what the budget affords, at most `share` tokens, as far as blocks reach."""
        planned = draft.chunks.get(sequence, 0)
        position = sequence.num_planned + planned
        limit = budget.tokens_at(position) if share is None else share
        room = sequence.num_slots_held + self._roster.pool.num_available * self._size - position
        grown = fit_chunk(position, sequence.num_unplanned - planned, min(limit, room), self._size)
        if grown:
            budget.spend(position, grown)
            draft.chunks[sequence] = planned + grown
            while sequence.num_slots_held < position + grown:
                self._take_block(draft, sequence)

    def _take_block(self, draft: Draft, sequence: Sequence) -> None:
        draft.new_block_slots.append(sequence.slot)
        draft.new_block_ids.append(self._roster.take_block(sequence))

    def _admit(self, draft: Draft, prefilling: Seq[Sequence], budget: StepBudget, now_ns: int) -> None:
        """Start waiting sequences in order while slots, memory and budget last."""
        roster = self._roster
        num_promised = sum(self._blocks_short(sequence) for sequence in prefilling)
        num_waits = 0
        for sequence in roster.queue:
            if budget.tokens_at(0) <= 0 or len(roster.running) >= self._max_running or not sequence.may_start:
                break
            hits = self._match(sequence)
            if hits is None:
                num_waits += 1
                if num_waits == _MAX_WAITS_PER_STEP:
                    break
                continue
            num_cached = len(hits) * self._size
            limit = budget.tokens_at(num_cached)
            has_budget = fit_chunk(num_cached, sequence.num_expected - num_cached, limit, self._size) > 0
            if not has_budget or not self._fits(sequence, hits, num_promised):
                break
            draft.starts.append(roster.start(sequence, hits, now_ns))
            draft.add_blocks(sequence.slot, hits)
            self._grow_chunk(draft, sequence, budget)
            num_promised += self._blocks_short(sequence)

    def _match(self, sequence: Sequence) -> list[BlockId] | None:
        """Blocks of the prefix index that the sequence may start with; None: better wait for the next one.

        The last known token is always computed, even if its block is indexed: something must yield logits.
        """
        roster, index = self._roster, self._roster.index
        if not roster.may_reuse(sequence):
            return []
        if index.is_announced(sequence.awaited_digest):
            return None
        max_hits = (len(sequence.token_ids) - 1) // self._size
        digests = roster.digests(sequence, max_hits)[:max_hits]
        hits = index.match(digests)
        if len(hits) < max_hits and index.is_announced(digests[len(hits)]):
            sequence.awaited_digest = digests[len(hits)]
            return None
        return hits

    def _fits(self, sequence: Sequence, hits: list[BlockId], num_promised: int) -> bool:
        """Memory for every known token of a newcomer, beside what started prompts still need.

        Running sequences keep blocks to grow into, or the newcomer would soon be preempted again.
        """
        pool, index, running = self._roster.pool, self._roster.index, self._roster.running
        num_new = self._blocks_for(sequence.num_expected) - len(hits)
        num_revived = sum(index.is_evictable(block_id) for block_id in hits)
        num_spare = pool.num_available - num_new - num_revived - num_promised
        if num_spare < 0 or num_spare >= self._growth_reserve * len(running):
            return num_spare >= 0
        return num_spare >= sum(map(self._growth_blocks, running))

    def _growth_blocks(self, sequence: Sequence) -> int:
        """Blocks kept for a running sequence; none that it cannot use any more."""
        return min(self._blocks_for(sequence.max_tokens - 1) - len(sequence.block_ids), self._growth_reserve)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._size)

    def _blocks_short(self, sequence: Sequence) -> int:
        """Blocks that the rest of a started prompt will still take."""
        return max(self._blocks_for(sequence.num_expected) - len(sequence.block_ids), 0)
