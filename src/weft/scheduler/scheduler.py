"""Who runs next, on which blocks, and what became of it. Pure: no I/O, no clock, no chance.

Theory of operation
    `plan_step` makes one plan in this order:

    1. requests whose deadline passed in the queue fail;
    2. room is made: while the running sequences could not each take a next block, the least important one is
       preempted (it loses slot and blocks and is computed again later, prefix hits helping);
    3. every running sequence whose newest token alone is uncomputed gets a decode row;
    4. the prefill budget, sized so that those rows keep their inter-token time, goes to running prompts, then to
       requests from the queue, strictly in order: when the head does not fit into memory nobody overtakes it. A
       prompt of which a running sequence is computing the next block waits for that block instead of repeating it.

    Memory is never reserved for completion tokens; blocks are taken when a row needs them.

Lookahead
    Up to two plans are open. `Sequence.num_expected` counts tokens that open plans will sample, so the second plan
    continues every sequence as if the first had yielded one token each. What the first really yielded is settled in
    `apply`: rows of a sequence that ended are dropped when their plan is applied, rows of a preempted one still
    bring their token, and it starts again only when none of its rows is open.

    Because steps run in plan order, whatever is freed while plan N is open may be handed out by any later plan.
    Blocks become shareable in `apply`, never earlier: a step that fails leaves nothing behind.

Rules
    * `apply` and `fail_rows` are called in plan order, once per plan.
    * A request ends with exactly one final event, or with `abort` and none.

See docs/adr/0002-scheduler-beside-the-engine.md.
"""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from weft.core.events import Event, FailureEvent, PromptReport, TokenEvent
from weft.core.plan import SequenceStart, StepPlan, StepResult, TopTokens
from weft.core.request import BlockId, Request, RequestId, Slot
from weft.core.sequence import Sequence
from weft.errors import (
    ContextLengthError,
    DeadlineError,
    GenerationError,
    InvariantBroken,
    NumericalError,
    OverloadedError,
    ValidationError,
)
from weft.scheduler import policy
from weft.scheduler.blocks import BlockPool
from weft.scheduler.budget import PrefillBudget, fit_chunk
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.prefix import PrefixIndex, PrefixMiss
from weft.scheduler.queue import WaitingQueue
from weft.scheduler.stats import SchedulerStats

MAX_OPEN_PLANS = 2

_MAX_NUMERICAL_RETRIES = 1
_MAX_WAITS_PER_STEP = 64  # bounds the search behind requests that wait for a block being computed
_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0
_NS_PER_S = 1_000_000_000

_DEADLINE_MESSAGE = "The request waited longer than its deadline allows. Try again, or allow it to wait longer."
_NUMERICAL_MESSAGE = "The model produced values that are not numbers for this request, and again on a second try."
_FAILURE_MESSAGE = "The engine could not go on with this request."
_TOKEN_RANGE_MESSAGE = "The sampler chose a token outside the vocabulary."  # noqa: S105 - not a password


@dataclass(slots=True)
class _Draft:
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


@dataclass(slots=True)
class _OpenPlan:
    plan: StepPlan
    sequences: list[Sequence]
    num_decode_rows: int
    num_prefill_tokens: int


class Scheduler:
    """The one owner of sequences and blocks. Not thread-safe: the engine loop alone calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.index = PrefixIndex(config.prefix_key, config.block_size_tokens)
        self.pool = BlockPool(config.usable_blocks, self.index)
        self.queue = WaitingQueue(config.max_queue_requests)
        self.budget = PrefillBudget(config)
        self._block_size = config.block_size_tokens
        self._running: list[Sequence] = []  # sorted by policy.rank
        self._live: dict[RequestId, Sequence] = {}
        self._free_slots = [Slot(slot) for slot in range(config.max_num_sequences - 1, -1, -1)]
        self._open: deque[_OpenPlan] = deque()
        self._events: list[Event] = []
        self._num_arrivals = 0
        self._next_step_id = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._prefix_hit_tokens = 0
        self._prefix_query_tokens = 0
        self._last_step = (0, 0, 0, 0)
        self._last_end_ns: int | None = None
        self._mean_gap_ns = 0.0

    # -- requests come and go -----------------------------------------------------------------------------------

    def add(self, request: Request, now_ns: int) -> None:
        """Queue a request.

        Raises
            ValidationError     a field is out of range, or the id is in use
            ContextLengthError  the request could never fit the pool, however empty
            OverloadedError     the queue is full; carries `retry_after_s`
        """
        request.check(vocab_size=self.config.vocab_size, max_total_tokens=self.config.max_total_tokens)
        if request.request_id in self._live:
            raise ValidationError("`request_id` is in use by a request that has not ended", field="request_id")
        # The last token is sampled but never computed, so it needs no place in the pool.
        num_computed = len(request.prompt_token_ids) + request.stop.max_new_tokens - 1
        pool_tokens = self.pool.num_blocks * self._block_size
        if num_computed > pool_tokens:
            raise ContextLengthError(
                f"Prompt tokens + `max_new_tokens` must be <= {pool_tokens + 1}, the size of the KV pool."
                f" Given: {num_computed + 1}. Ask for fewer tokens, or start the server with a larger pool.",
                field="max_new_tokens",
            )
        if self.queue.is_full:
            retry_after_s = self._retry_after_s()
            raise OverloadedError(
                f"All {self.config.max_queue_requests} places of the queue are taken."
                f" Try again in {retry_after_s:.0f} s.",
                retry_after_s=retry_after_s,
            )
        sequence = Sequence.of(request, arrival=self._num_arrivals, now_ns=now_ns)
        self._num_arrivals += 1
        self._live[request.request_id] = sequence
        self.queue.append(sequence)

    def abort(self, request_id: RequestId) -> bool:
        """End a request at any stage; its blocks are free at once. No event follows. False: it is not here."""
        sequence = self._live.get(request_id)
        if sequence is None:
            return False
        was_running = sequence.is_running
        self._end(sequence)
        if was_running:
            self._running.remove(sequence)
        return True

    def take_events(self) -> list[Event]:
        """Events that arose while planning (deadlines), once each."""
        events, self._events = self._events, []
        return events

    # -- planning -----------------------------------------------------------------------------------------------

    def plan_step(self, now_ns: int) -> StepPlan | None:
        """The next step, or None: nothing to run now, or two plans are open already."""
        if len(self._open) >= MAX_OPEN_PLANS:
            return None
        for sequence in self.queue.take_expired(now_ns):
            self._fail(sequence, DeadlineError.code, _DEADLINE_MESSAGE, self._events)
        self._make_room()
        draft = _Draft()
        prefilling = self._plan_decodes(draft)
        self._plan_prefills(draft, prefilling, now_ns)
        if not draft.slots:
            return None
        plan = StepPlan(
            step_id=self._next_step_id,
            starts=tuple(draft.starts),
            slots=draft.slots,
            first_positions=draft.first_positions,
            num_tokens=draft.num_tokens,
            samples=draft.samples,
            new_block_slots=draft.new_block_slots,
            new_block_ids=draft.new_block_ids,
        )
        self._next_step_id += 1
        num_prefill_tokens = plan.total_tokens - draft.num_decode_rows
        self._open.append(_OpenPlan(plan, draft.sequences, draft.num_decode_rows, num_prefill_tokens))
        return plan

    def _make_room(self) -> None:
        """Preempt until every running sequence could take its next block, the most important ones first."""
        running = self._running
        if self.pool.num_available >= len(running):
            return
        num_needed = 0
        place = 0
        while place < len(running):
            sequence = running[place]
            if sequence.num_planned == sequence.num_slots_held and not sequence.is_last_token_planned:
                num_needed += 1
            while num_needed > self.pool.num_available:
                victim = policy.choose_victim(running)
                self._preempt(victim)
                if victim is sequence:
                    return
            place += 1

    def _preempt(self, sequence: Sequence) -> None:
        self._num_preemptions += 1
        self._running.remove(sequence)
        self._leave_slot(sequence)
        self.queue.push_front(sequence)

    def _plan_decodes(self, draft: _Draft) -> list[Sequence]:
        """Write one row per decoding sequence. Returns the running sequences that still prefill, by rank."""
        prefilling: list[Sequence] = []
        sequences, slots, positions = draft.sequences, draft.slots, draft.first_positions
        for sequence in self._running:
            position = sequence.num_planned
            if sequence.num_expected - position > 1:
                prefilling.append(sequence)
                continue
            if sequence.num_expected == sequence.max_tokens:
                continue
            slot = sequence.slot
            if position == sequence.num_slots_held:
                self._take_block(draft, sequence, slot)
            sequences.append(sequence)
            slots.append(slot)
            positions.append(position)
            # Sequence.plan(1), written out: this loop runs for every token.
            sequence.num_planned = position + 1
            sequence.num_expected += 1
            sequence.num_open_rows += 1
        draft.num_decode_rows = len(slots)
        draft.num_tokens.extend([1] * len(slots))
        draft.samples.extend([True] * len(slots))
        return prefilling

    def _plan_prefills(self, draft: _Draft, prefilling: list[Sequence], now_ns: int) -> None:
        """Share the prefill budget: the first prompt is sure of half, what others leave over goes to it too."""
        if not prefilling and not self.queue:
            return
        budget = self.budget.tokens(draft.num_decode_rows)
        chunks: dict[Sequence, int] = {}
        first: Sequence | None = None
        if prefilling:
            first, *others = policy.prefill_order(prefilling)
            self._grow_chunk(draft, chunks, first, policy.first_share_tokens(budget, self._block_size))
            left = budget - chunks.get(first, 0)
            left = self._admit(draft, chunks, prefilling, left, now_ns)
            for sequence in others:
                left -= self._grow_chunk(draft, chunks, sequence, left)
            self._grow_chunk(draft, chunks, first, left)
        else:
            self._admit(draft, chunks, prefilling, budget, now_ns)
        for sequence, num_tokens in chunks.items():
            self._add_row(draft, sequence, num_tokens)

    def _grow_chunk(self, draft: _Draft, chunks: dict[Sequence, int], sequence: Sequence, limit: int) -> int:
        """Lengthen a sequence's chunk by at most `limit` tokens, as far as blocks reach. Returns by how many."""
        planned = chunks.get(sequence, 0)
        position = sequence.num_planned + planned
        room = sequence.num_slots_held + self.pool.num_available * self._block_size - position
        grown = fit_chunk(position, sequence.num_unplanned - planned, min(limit, room), self._block_size)
        if grown:
            chunks[sequence] = planned + grown
            while sequence.num_slots_held < position + grown:
                self._take_block(draft, sequence, sequence.slot)
        return grown

    def _take_block(self, draft: _Draft, sequence: Sequence, slot: Slot) -> None:
        block_id = self.pool.allocate()
        sequence.block_ids.append(block_id)
        sequence.num_slots_held += self._block_size
        draft.new_block_slots.append(slot)
        draft.new_block_ids.append(block_id)

    @staticmethod
    def _add_row(draft: _Draft, sequence: Sequence, num_tokens: int) -> None:
        draft.sequences.append(sequence)
        draft.slots.append(sequence.slot)
        draft.first_positions.append(sequence.num_planned)
        draft.num_tokens.append(num_tokens)
        draft.samples.append(sequence.plan(num_tokens))

    # -- admission ----------------------------------------------------------------------------------------------

    def _admit(
        self, draft: _Draft, chunks: dict[Sequence, int], prefilling: Seq[Sequence], left: int, now_ns: int
    ) -> int:
        """Start waiting sequences in order while slots, memory and budget last. Returns the budget left over."""
        num_promised = sum(self._blocks_short(sequence) for sequence in prefilling)
        num_waits = 0
        for sequence in self.queue:
            if left <= 0 or len(self._running) >= self.config.max_running or not sequence.may_start:
                break
            hits = self._match(sequence)
            if hits is None:
                num_waits += 1
                if num_waits == _MAX_WAITS_PER_STEP:
                    break
                continue
            num_cached = len(hits) * self._block_size
            if not fit_chunk(num_cached, sequence.num_expected - num_cached, left, self._block_size):
                break
            num_new = self._blocks_for(sequence.num_expected) - len(hits)
            num_revived = sum(self.index.is_evictable(block_id) for block_id in hits)
            # Running sequences keep a block each to grow into, or the newcomer would soon be preempted again.
            if num_new + num_revived + num_promised + len(self._running) > self.pool.num_available:
                break
            self._start(draft, sequence, hits, now_ns)
            left -= self._grow_chunk(draft, chunks, sequence, left)
            num_promised += self._blocks_short(sequence)
        return left

    def _match(self, sequence: Sequence) -> list[BlockId] | None:
        """Blocks of the prefix index that the sequence may start with; None: better wait for the next one.

        The last known token is always computed, even if its block is indexed: something must yield logits.
        """
        if not self._uses_index(sequence):
            return []
        if self.index.is_announced(sequence.awaited_digest):
            return None
        digests = self._digests(sequence, len(sequence.token_ids) // self._block_size)
        max_hits = (len(sequence.token_ids) - 1) // self._block_size
        hits = self.index.match(digests[:max_hits])
        if len(hits) < max_hits and self.index.is_announced(digests[len(hits)]):
            sequence.awaited_digest = digests[len(hits)]
            return None
        return hits

    def _uses_index(self, sequence: Sequence) -> bool:
        """Prompt log-probabilities need every position computed; a retry after NaN trusts nothing cached."""
        if not self.config.prefix_caching or sequence.num_numerical_failures:
            return False
        lacks_logprobs = len(sequence.prompt_logprobs) < sequence.num_prompt_tokens - 1
        return not (sequence.wants_prompt_logprobs and lacks_logprobs)

    def _start(self, draft: _Draft, sequence: Sequence, hits: list[BlockId], now_ns: int) -> None:
        self.queue.remove(sequence)
        slot = self._free_slots.pop()
        num_cached = len(hits) * self._block_size
        if not sequence.has_started and self._uses_index(sequence):
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self._prefix_query_tokens += len(sequence.token_ids)
            self._prefix_hit_tokens += num_cached
        draft.starts.append(sequence.start(slot, now_ns))
        self.pool.share(hits)
        sequence.block_ids = list(hits)
        sequence.num_slots_held = sequence.num_planned = num_cached
        sequence.num_indexed_blocks = len(hits)
        draft.new_block_slots.extend([slot] * len(hits))
        draft.new_block_ids.extend(hits)
        if self.config.prefix_caching:
            num_full = len(sequence.token_ids) // self._block_size
            self.index.announce(self._digests(sequence, num_full)[len(hits) : num_full], sequence.arrival)
            sequence.num_announced_blocks = num_full
        insort(self._running, sequence, key=policy.rank)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _blocks_short(self, sequence: Sequence) -> int:
        """Blocks that the rest of a running prompt will still take."""
        return max(self._blocks_for(sequence.num_expected) - len(sequence.block_ids), 0)

    def _digests(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Prefix digests of the leading full blocks, at least `num_blocks` of them."""
        self.index.extend_digests(sequence.block_digests, sequence.request.tenant, sequence.token_ids, num_blocks)
        return sequence.block_digests

    # -- results ------------------------------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult, now_ns: int) -> list[Event]:
        """Turn the result of the oldest open plan into events; free what ended.

        Raises InvariantBroken when the result does not belong to that plan.
        """
        opened = self._close(plan, result)
        self.budget.costs.observe(opened.num_decode_rows, opened.num_prefill_tokens, result.elapsed_ns)
        events: list[Event] = []
        num_sampled = self._apply_decodes(opened, result, events)
        for row in range(opened.num_decode_rows, len(opened.sequences)):
            place = num_sampled if plan.samples[row] else None
            num_sampled += plan.samples[row]
            self._apply_row(opened, row, result, place, events)
        self._settle(events, now_ns)
        return events

    def _apply_decodes(self, opened: _OpenPlan, result: StepResult, events: list[Event]) -> int:
        """The leading rows, one token each: `_apply_row` written out for the case that nothing special happens.

        This loop runs for every token. Returns the number of tokens taken.
        """
        positions, size, vocab_size = opened.plan.first_positions, self._block_size, self.config.vocab_size
        token_ids, logprobs = result.token_ids, result.logprobs
        is_special = result.failures.keys() | result.prompt_logprobs.keys() | result.top_tokens.keys()
        for row in range(opened.num_decode_rows):
            sequence = opened.sequences[row]
            token_id = token_ids[row]
            known = sequence.token_ids
            if (
                row in is_special
                or sequence.is_ended
                or sequence.num_stale_rows
                or not sequence.has_reported_prompt
                or token_id in sequence.eos_token_ids
                or len(known) + 1 >= sequence.max_tokens
                or not 0 <= token_id < vocab_size
            ):
                self._apply_row(opened, row, result, row, events)
                continue
            sequence.num_open_rows -= 1
            if (positions[row] + 1) % size == 0:
                self._advance(sequence, positions[row] + 1)
            events.append(
                TokenEvent(
                    request_id=sequence.request.request_id,
                    token_index=len(known) - sequence.num_prompt_tokens,
                    token_id=token_id,
                    logprob=logprobs[row],
                )
            )
            known.append(token_id)
        return opened.num_decode_rows

    def _apply_row(
        self, opened: _OpenPlan, row: int, result: StepResult, place: int | None, events: list[Event]
    ) -> None:
        """One row in full. `place` is where its token stands in the result, None for a row that samples nothing."""
        sequence, plan = opened.sequences[row], opened.plan
        sequence.num_open_rows -= 1
        if sequence.num_stale_rows:
            sequence.num_stale_rows -= 1
            return
        if sequence.is_ended:
            return
        if row in result.failures:
            self._fail_row(sequence, result.failures[row], events)
            return
        first_position = plan.first_positions[row]
        self._advance(sequence, first_position + plan.num_tokens[row])
        if row in result.prompt_logprobs and sequence.wants_prompt_logprobs:
            sequence.collect_prompt_logprobs(first_position, result.prompt_logprobs[row])
        if place is not None:
            top = result.top_tokens.get(row)
            self._emit(sequence, result.token_ids[place], result.logprobs[place], top, events)

    def fail_rows(self, plan: StepPlan, code: str, message: str) -> list[Event]:
        """The oldest open plan raised instead of yielding a result: its sequences end, everything else goes on."""
        opened = self._close(plan, None)
        events: list[Event] = []
        for sequence in opened.sequences:
            sequence.num_open_rows -= 1
            if sequence.num_stale_rows:
                sequence.num_stale_rows -= 1
            elif not sequence.is_ended:
                self._fail(sequence, code, message, events)
        self._settle(events, None)
        return events

    def _close(self, plan: StepPlan, result: StepResult | None) -> _OpenPlan:
        if not self._open or self._open[0].plan.step_id != plan.step_id:
            expected = self._open[0].plan.step_id if self._open else None
            raise InvariantBroken(f"step {plan.step_id} is applied, but the oldest open plan is {expected}")
        if result is not None:
            num_sampled = sum(plan.samples)
            if result.step_id != plan.step_id or not len(result.token_ids) == len(result.logprobs) == num_sampled:
                raise InvariantBroken(
                    f"result of step {result.step_id} with {len(result.token_ids)} tokens and"
                    f" {len(result.logprobs)} log-probabilities is applied to step {plan.step_id},"
                    f" which samples {num_sampled}"
                )
        opened = self._open.popleft()
        self._num_steps += 1
        num_prefill_rows = len(opened.sequences) - opened.num_decode_rows
        num_tokens = opened.num_decode_rows + opened.num_prefill_tokens
        elapsed_ns = result.elapsed_ns if result is not None else 0
        self._last_step = (opened.num_decode_rows, num_prefill_rows, num_tokens, elapsed_ns)
        return opened

    def _advance(self, sequence: Sequence, num_computed: int) -> None:
        """The first `num_computed` tokens are in the pool: blocks that they fill become shareable."""
        if not sequence.is_running or not self.config.prefix_caching:
            return
        num_full = num_computed // self._block_size
        if num_full <= sequence.num_indexed_blocks:
            return
        digests = self._digests(sequence, num_full)
        for i in range(sequence.num_indexed_blocks, num_full):
            parent = digests[i - 1] if i else self.index.root(sequence.request.tenant)
            self.index.insert(digests[i], parent, sequence.block_ids[i])
        sequence.num_indexed_blocks = num_full

    def _emit(
        self, sequence: Sequence, token_id: int, logprob: float, top: TopTokens | None, events: list[Event]
    ) -> None:
        if not 0 <= token_id < self.config.vocab_size:
            self._fail(sequence, GenerationError.code, _TOKEN_RANGE_MESSAGE, events)
            return
        token_index = sequence.num_completion_tokens
        sequence.token_ids.append(token_id)
        reason = sequence.finish_reason(token_id)
        report = None if sequence.has_reported_prompt else self._report_prompt(sequence)
        events.append(
            TokenEvent(
                request_id=sequence.request.request_id,
                token_index=token_index,
                token_id=token_id,
                logprob=logprob,
                finish_reason=reason,
                top_tokens=top,
                prompt=report,
            )
        )
        if reason is not None:
            self._end(sequence)

    @staticmethod
    def _report_prompt(sequence: Sequence) -> PromptReport:
        sequence.has_reported_prompt = True
        logprobs = None
        if sequence.wants_prompt_logprobs:
            if len(sequence.prompt_logprobs) != sequence.num_prompt_tokens - 1:
                raise InvariantBroken(
                    f"{len(sequence.prompt_logprobs)} prompt log-probabilities came back for"
                    f" {sequence.num_prompt_tokens} prompt tokens"
                )
            logprobs = tuple(sequence.prompt_logprobs)
        return PromptReport(
            num_cached_tokens=sequence.num_cached_tokens,
            queue_ns=sequence.queue_ns,
            prompt_logprobs=logprobs,
        )

    def _fail_row(self, sequence: Sequence, code: str, events: list[Event]) -> None:
        """One row went wrong. Not-a-number gets a second try from scratch, everything else ends the request."""
        if code != NumericalError.code:
            self._fail(sequence, code, _FAILURE_MESSAGE, events)
            return
        # The cause may sit in any block it read, also in shared ones: none of them may be found again.
        self.pool.forget(sequence.block_digests)
        sequence.num_numerical_failures += 1
        if sequence.num_numerical_failures > _MAX_NUMERICAL_RETRIES:
            self._fail(sequence, code, _NUMERICAL_MESSAGE, events)
            return
        sequence.distrust_open_rows()
        sequence.prompt_logprobs.clear()
        if sequence.is_running:
            self._running.remove(sequence)
            self._leave_slot(sequence)
            self.queue.push_front(sequence)

    def _fail(self, sequence: Sequence, code: str, message: str, events: list[Event]) -> None:
        self._end(sequence)
        events.append(FailureEvent(request_id=sequence.request.request_id, code=code, message=message))

    def _end(self, sequence: Sequence) -> None:
        """Give back everything. A running sequence stays in `_running` until the caller sweeps it out."""
        sequence.is_ended = True
        del self._live[sequence.request.request_id]
        if sequence.is_running:
            self._leave_slot(sequence)
        elif sequence in self.queue:
            self.queue.remove(sequence)

    def _leave_slot(self, sequence: Sequence) -> None:
        self._free_slots.append(sequence.slot)
        if sequence.num_announced_blocks > sequence.num_indexed_blocks:
            announced = sequence.block_digests[sequence.num_indexed_blocks : sequence.num_announced_blocks]
            self.index.withdraw(announced, sequence.arrival)
        self.pool.release(sequence.block_ids)
        sequence.rewind()

    def _settle(self, events: list[Event], now_ns: int | None) -> None:
        """Sweep ended sequences out of `_running` and learn how often requests end."""
        num_ended = sum(1 for event in events if isinstance(event, FailureEvent) or event.finish_reason is not None)
        if not num_ended:
            return
        self._running = [sequence for sequence in self._running if not sequence.is_ended]
        if now_ns is None or not self._live:
            self._last_end_ns = None
            return
        if self._last_end_ns is not None:
            gap_ns = (now_ns - self._last_end_ns) / num_ended
            self._mean_gap_ns = 0.9 * self._mean_gap_ns + 0.1 * gap_ns if self._mean_gap_ns else gap_ns
        self._last_end_ns = now_ns

    def _retry_after_s(self) -> float:
        """When half of the queue should have gone, at the rate at which requests ended lately."""
        seconds = len(self.queue) / 2 * self._mean_gap_ns / _NS_PER_S
        return min(max(seconds, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)

    # -- questions ----------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A request has not ended, or a plan is open."""
        return bool(self._live or self._open)

    @property
    def num_open_plans(self) -> int:
        """Plans that were made and not applied yet."""
        return len(self._open)

    @property
    def running(self) -> Seq[Sequence]:
        """Sequences with a slot, most important first."""
        return self._running

    @property
    def free_slots(self) -> Seq[Slot]:
        """Slots that no sequence has."""
        return self._free_slots

    def open_rows(self) -> Iterator[tuple[StepPlan, list[Sequence]]]:
        """Open plans with the sequence of each row, oldest first; for checks."""
        for opened in self._open:
            yield opened.plan, opened.sequences

    def live_request_ids(self) -> list[RequestId]:
        """Requests that have not ended, in order of arrival."""
        return list(self._live)

    def explain_miss(self, request: Request) -> PrefixMiss | None:
        """Which block of a prompt would not come from the prefix index, and why; None: all full blocks would."""
        return self.index.explain_miss(request.tenant, request.prompt_token_ids)

    def clear_cache(self) -> int:
        """Forget every prefix block that no sequence uses. Returns how many."""
        return self.pool.clear_cached()

    def stats(self) -> SchedulerStats:
        """The state after the last call."""
        decode_rows, prefill_rows, tokens, elapsed_ns = self._last_step
        return SchedulerStats(
            num_steps=self._num_steps,
            num_running=len(self._running),
            num_waiting=len(self.queue),
            used_blocks=self.pool.num_used,
            cached_blocks=self.pool.num_cached,
            total_blocks=self.pool.num_blocks,
            num_preemptions=self._num_preemptions,
            prefix_hit_tokens=self._prefix_hit_tokens,
            prefix_query_tokens=self._prefix_query_tokens,
            step_decode_rows=decode_rows,
            step_prefill_rows=prefill_rows,
            step_tokens=tokens,
            step_elapsed_ns=elapsed_ns,
        )
