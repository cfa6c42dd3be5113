"""Who runs next, on which blocks, and what became of it. Pure: no I/O, no clock, no chance.

Theory of operation
    `plan_step` makes one plan in this order:

    1. requests whose deadline passed in the queue fail; if a step raised, the sequences it had now run alone, one
       after another, until the culprit is found (see `fail_rows`), and the rest of this list waits;
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

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from weft.core.events import Event
from weft.core.plan import StepPlan, StepResult
from weft.core.request import Request, RequestId, Slot
from weft.core.sequence import Sequence
from weft.errors import ContextLengthError, DeadlineError, InvariantBroken, OverloadedError, ValidationError
from weft.scheduler.blocks import BlockPool
from weft.scheduler.budget import PrefillBudget
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.planner import Planner
from weft.scheduler.prefix import PrefixIndex, PrefixMiss
from weft.scheduler.queue import DepartureRate, WaitingQueue
from weft.scheduler.results import OpenPlan, ResultApplier
from weft.scheduler.roster import Roster
from weft.scheduler.stats import SchedulerStats

MAX_OPEN_PLANS = 2

_DEADLINE_MESSAGE = "The request waited longer than its deadline allows. Try again, or allow it to wait longer."


class Scheduler:
    """The one owner of sequences and blocks. Not thread-safe: the engine loop alone calls it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.budget = PrefillBudget(config)
        self._roster = Roster(config)
        self._planner = Planner(config, self._roster, self.budget)
        self._results = ResultApplier(config, self._roster)
        self._departures = DepartureRate()
        self._open: deque[OpenPlan] = deque()
        self._events: list[Event] = []
        self._num_arrivals = 0
        self._next_step_id = 0
        self._num_steps = 0
        self._last_step: OpenPlan | None = None
        self._last_elapsed_ns = 0

    def add(self, request: Request, now_ns: int) -> None:
        """Queue a request.

        Raises
            ValidationError     a field is out of range, or the id is in use
            ContextLengthError  the request could never fit the pool, however empty
            OverloadedError     the queue is full; carries `retry_after_s`
        """
        request.check(vocab_size=self.config.vocab_size, max_total_tokens=self.config.max_total_tokens)
        if request.request_id in self._roster.live:
            raise ValidationError("`request_id` is in use by a request that has not ended", field="request_id")
        self._demand_fit(request)
        if self.queue.is_full:
            retry_after_s = self._departures.retry_after_s(len(self.queue))
            raise OverloadedError(
                f"All {self.config.max_queue_requests} places of the queue are taken."
                f" Try again in {retry_after_s:.0f} s.",
                retry_after_s=retry_after_s,
            )
        self._roster.enter(Sequence.of(request, arrival=self._num_arrivals, now_ns=now_ns))
        self._num_arrivals += 1

    def abort(self, request_id: RequestId) -> bool:
        """End a request at any stage; its blocks are free at once. No event follows. False: it is not here."""
        sequence = self._roster.live.get(request_id)
        if sequence is None:
            return False
        self._roster.end(sequence)
        self._roster.sweep()
        return True

    def plan_step(self, now_ns: int) -> StepPlan | None:
        """The next step, or None: nothing to run now, or two plans are open already."""
        if len(self._open) >= MAX_OPEN_PLANS:
            return None
        for sequence in self.queue.take_expired(now_ns):
            self._results.fail(sequence, DeadlineError.code, _DEADLINE_MESSAGE, self._events)
        draft = self._planner.draft(now_ns)
        if not draft.slots:
            return None
        plan = draft.finish(self._next_step_id)
        self._next_step_id += 1
        num_prefill_tokens = plan.total_tokens - draft.num_decode_rows
        self._open.append(OpenPlan(plan, draft.sequences, draft.num_decode_rows, num_prefill_tokens))
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now_ns: int) -> list[Event]:
        """Turn the result of the oldest open plan into events; free what ended.

        Raises InvariantBroken when the result does not belong to that plan.
        """
        opened = self._oldest(plan)
        opened.demand_match(result)
        self._close(opened, result.elapsed_ns)
        self.budget.costs.observe(
            opened.num_decode_rows, opened.num_prefill_tokens, opened.num_attended, result.elapsed_ns
        )
        events: list[Event] = []
        num_live = len(self._roster.live)
        self._results.apply(opened, result, events)
        num_ended = num_live - len(self._roster.live)
        if num_ended:
            self._roster.sweep()
            self._departures.observe(num_ended, now_ns, is_idle=not self._roster.live)
        return events

    def fail_rows(self, plan: StepPlan, code: str, message: str) -> list[Event]:
        """The oldest open plan raised instead of yielding a result.

        A sequence that was alone in it ends with a failure. Several are computed again from their beginning, one at
        a time, until the culprit is alone in a step that raises: nobody pays for another's request but with time.
        """
        opened = self._oldest(plan)
        self._close(opened, 0)
        events: list[Event] = []
        self._results.fail_all(opened, code, message, events)
        self._roster.sweep()
        return events

    def take_events(self) -> list[Event]:
        """Events that arose while planning (deadlines), once each."""
        events, self._events = self._events, []
        return events

    def clear_cache(self) -> int:
        """Forget every prefix block that no sequence uses. Returns how many."""
        return self.pool.clear_cached()

    def explain_miss(self, request: Request) -> PrefixMiss | None:
        """Which block of a prompt would not come from the prefix index, and why; None: all full blocks would."""
        return self.index.explain_miss(request.tenant, request.prompt_token_ids)

    @property
    def has_work(self) -> bool:
        """A request has not ended, or a plan is open."""
        return bool(self._roster.live or self._open)

    @property
    def num_open_plans(self) -> int:
        """Plans that were made and not applied yet."""
        return len(self._open)

    @property
    def queue(self) -> WaitingQueue:
        """Sequences without a slot."""
        return self._roster.queue

    @property
    def pool(self) -> BlockPool:
        """Who holds which block."""
        return self._roster.pool

    @property
    def index(self) -> PrefixIndex:
        """Which blocks can be reused."""
        return self._roster.index

    @property
    def running(self) -> Seq[Sequence]:
        """Sequences with a slot, most important first."""
        return self._roster.running

    @property
    def suspects(self) -> Seq[Sequence]:
        """Sequences that must run alone, because a step that had a row of them raised."""
        return self._roster.suspects

    @property
    def free_slots(self) -> Seq[Slot]:
        """Slots that no sequence has."""
        return self._roster.free_slots

    def open_rows(self) -> Iterator[tuple[StepPlan, list[Sequence]]]:
        """Open plans with the sequence of each row, oldest first; for checks."""
        for opened in self._open:
            yield opened.plan, opened.sequences

    def live_request_ids(self) -> list[RequestId]:
        """Requests that have not ended, in order of arrival."""
        return list(self._roster.live)

    def stats(self) -> SchedulerStats:
        """The state after the last call."""
        roster, last = self._roster, self._last_step
        num_decodes = last.num_decode_rows if last else 0
        return SchedulerStats(
            num_steps=self._num_steps,
            num_running=len(roster.running),
            num_waiting=len(roster.queue),
            used_blocks=roster.pool.num_used,
            cached_blocks=roster.pool.num_cached,
            total_blocks=roster.pool.num_blocks,
            num_preemptions=roster.num_preemptions,
            prefix_hit_tokens=roster.prefix_hit_tokens,
            prefix_query_tokens=roster.prefix_query_tokens,
            step_decode_rows=num_decodes,
            step_prefill_rows=len(last.sequences) - num_decodes if last else 0,
            step_tokens=num_decodes + last.num_prefill_tokens if last else 0,
            step_elapsed_ns=self._last_elapsed_ns,
        )

    def _demand_fit(self, request: Request) -> None:
        # The last token is sampled but never computed, so it needs no place in the pool.
        max_tokens = self.pool.num_blocks * self.config.block_size_tokens + 1
        num_tokens = len(request.prompt_token_ids) + request.stop.max_new_tokens
        if num_tokens > max_tokens:
            raise ContextLengthError(
                f"Prompt tokens + `max_new_tokens` must be <= {max_tokens}, the size of the KV pool."
                f" Given: {num_tokens}. Ask for fewer tokens, or start the server with a larger pool.",
                field="max_new_tokens",
            )

    def _oldest(self, plan: StepPlan) -> OpenPlan:
        if not self._open or self._open[0].plan.step_id != plan.step_id:
            oldest = self._open[0].plan.step_id if self._open else None
            raise InvariantBroken(f"step {plan.step_id} is applied, but the oldest open plan is {oldest}")
        return self._open[0]

    def _close(self, opened: OpenPlan, elapsed_ns: int) -> None:
        self._open.popleft()
        self._num_steps += 1
        self._last_step = opened
        self._last_elapsed_ns = elapsed_ns
