"""What must hold after every call of the scheduler, whatever came before.

`check` looks at the whole state and is O(blocks + sequences): for the simulator, tests, and debugging sessions, not
for the serving loop. `EventLedger` watches the stream of events. Both raise InvariantBroken with the facts.
"""

from collections import Counter

from weft.core.events import Event, TokenEvent
from weft.core.plan import StepPlan
from weft.core.request import BlockId, Request, RequestId
from weft.core.sequence import Sequence
from weft.errors import InvariantBroken
from weft.scheduler import policy
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.scheduler import MAX_OPEN_PLANS, Scheduler


def check(scheduler: Scheduler) -> None:
    """Raise InvariantBroken when the state contradicts itself."""
    _check_blocks(scheduler)
    _check_places(scheduler)
    _check_suspects(scheduler)
    for sequence in scheduler.running:
        _check_table(scheduler, sequence)
    _check_marks(scheduler)


def check_plan(plan: StepPlan, config: SchedulerConfig) -> None:
    """Raise InvariantBroken when a plan is not what `StepPlan` promises."""
    rows = list(zip(plan.slots, plan.first_positions, plan.num_tokens, plan.samples, strict=True))
    slots = set(plan.slots)
    _demand(bool(rows), "a plan has no rows")
    _demand(len(slots) == len(rows), f"a slot has two rows: {plan.slots}")
    _demand(all(0 <= slot < config.max_num_sequences for slot in slots), f"slots out of range: {plan.slots}")
    _demand(all(num >= 1 and first >= 0 for _, first, num, _ in rows), f"an empty row: {rows}")
    _demand(plan.total_tokens <= config.max_step_tokens, f"{plan.total_tokens} tokens in one step")
    started = [start.slot for start in plan.starts]
    _demand(len(set(started)) == len(started), f"a slot is taken twice: {started}")
    _demand(slots.issuperset(started), f"a start has no row: {started} of {plan.slots}")
    _demand(len(plan.new_block_slots) == len(plan.new_block_ids), "columns of new blocks differ in length")
    _demand(slots.issuperset(plan.new_block_slots), f"a slot without a row gets a block: {plan.new_block_slots}")
    _demand(all(0 <= block < config.usable_blocks for block in plan.new_block_ids), "a block out of range")
    num_leading_ones = next((row for row, num in enumerate(plan.num_tokens) if num > 1), len(rows))
    started_slots = set(started)
    is_decode = [
        num == 1 and samples and slot not in started_slots for slot, _, num, samples in rows[num_leading_ones:]
    ]
    _demand(not any(is_decode), f"decode rows do not come first: {plan.num_tokens}")


def _check_blocks(scheduler: Scheduler) -> None:
    """Every block is free, used or cached, and its reference count is the number of tables it stands in."""
    pool, index = scheduler.pool, scheduler.index
    tables = Counter(block for sequence in scheduler.running for block in sequence.block_ids)
    free = pool.free_block_ids()
    _demand(len(set(free)) == len(free), f"a block is free twice: {sorted(free)}")
    _demand(not tables.keys() & set(free), f"free blocks in a table: {sorted(tables.keys() & set(free))}")
    for block in map(BlockId, range(pool.num_blocks)):
        num_tables = tables[block]
        _demand(pool.ref_count(block) == num_tables, f"block {block} counts {pool.ref_count(block)}, has {num_tables}")
        _demand(index.is_evictable(block) == (index.holds(block) and num_tables == 0), f"block {block} misplaced")
    _demand(not any(index.holds(block) for block in free), "a free block is indexed")
    counts = (pool.num_free, pool.num_used, pool.num_cached)
    _demand(pool.num_used == len(tables), f"{pool.num_used} blocks count as used, {len(tables)} are in tables")
    _demand(sum(counts) == pool.num_blocks, f"free + used + cached = {counts} do not make {pool.num_blocks}")


def _check_places(scheduler: Scheduler) -> None:
    """Every live request waits or runs, each running one in its own slot, in order of importance."""
    config, running, waiting = scheduler.config, scheduler.running, list(scheduler.queue)
    slots = [sequence.slot for sequence in running] + list(scheduler.free_slots)
    _demand(sorted(slots) == list(range(config.max_num_sequences)), f"slots are lost or doubled: {slots}")
    _demand(len(running) <= config.max_running, f"{len(running)} sequences run")
    _demand(sorted(running, key=policy.rank) == list(running), "running sequences are out of order")
    _demand(not any(sequence.is_running for sequence in waiting), "a waiting sequence has a slot")
    _demand(not any(sequence.block_ids for sequence in waiting), "a waiting sequence has blocks")
    _demand(not any(sequence.is_ended for sequence in (*running, *waiting)), "an ended sequence is still here")
    ids = sorted(sequence.request.request_id for sequence in (*running, *waiting))
    _demand(ids == sorted(scheduler.live_request_ids()), f"requests are lost or doubled: {ids}")
    _demand(len(waiting) == len(scheduler.queue), "the queue miscounts itself")
    num_fresh = sum(not sequence.has_started for sequence in waiting)
    _demand(num_fresh <= config.max_queue_requests, f"{num_fresh} requests in the queue")


def _check_suspects(scheduler: Scheduler) -> None:
    """Suspects are live and listed once; a plan with a suspect has no other row but stale ones."""
    marked = [sequence for sequence in (*scheduler.running, *scheduler.queue) if sequence.is_suspect]
    listed = list(scheduler.suspects)
    _demand(len(listed) == len(marked) == len(set(listed)), "suspects are lost or doubled")
    _demand(set(listed) == set(marked), "somebody is a suspect in one place only")
    for plan, sequences in scheduler.open_rows():
        is_alone = len(sequences) == 1
        fresh = [s for s in sequences if s.is_suspect and s.num_open_rows > s.num_stale_rows and s.num_stale_rows == 0]
        _demand(is_alone or not fresh, f"step {plan.step_id} has a suspect among {len(sequences)} rows")


def _check_table(scheduler: Scheduler, sequence: Sequence) -> None:
    """A block table covers what is planned and no more; blocks still to be written belong to nobody else."""
    size = scheduler.config.block_size_tokens
    num_blocks = len(sequence.block_ids)
    _demand(sequence.num_slots_held == num_blocks * size, "a table and its length disagree")
    _demand(num_blocks == -(-sequence.num_planned // size), f"{num_blocks} blocks for {sequence.num_planned} tokens")
    first_write = sequence.num_planned
    for plan, sequences in scheduler.open_rows():
        if sequence in sequences and not sequence.num_stale_rows:
            first_write = min(first_write, plan.first_positions[sequences.index(sequence)])
    for block in sequence.block_ids[first_write // size :]:
        _demand(scheduler.pool.ref_count(block) == 1, f"block {block} is written and shared")
        _demand(not scheduler.index.holds(block), f"block {block} is written and indexed")


def _check_marks(scheduler: Scheduler) -> None:
    """Progress marks are in order, and say what the open plans say."""
    num_rows: Counter[Sequence] = Counter()
    num_sampling: Counter[Sequence] = Counter()
    num_plans = 0
    for plan, sequences in scheduler.open_rows():
        num_plans += 1
        for row, sequence in enumerate(sequences):
            num_rows[sequence] += 1
            is_stale = num_rows[sequence] <= sequence.num_stale_rows
            num_sampling[sequence] += plan.samples[row] and not is_stale
    _demand(num_plans <= MAX_OPEN_PLANS, f"{num_plans} plans are open")
    for sequence in (*scheduler.running, *scheduler.queue):
        marks = (sequence.num_planned, len(sequence.token_ids), sequence.num_expected, sequence.max_tokens)
        _demand(0 <= marks[0] < marks[2] <= marks[3] and marks[1] <= marks[2], f"marks out of order: {marks}")
        _demand(sequence.num_open_rows == num_rows[sequence], "open rows are miscounted")
        _demand(marks[2] - marks[1] == num_sampling[sequence], f"tokens to come are miscounted: {marks}")


class EventLedger:
    """What a client may see of each request: indices without gap or repeat, one final event, silence afterwards."""

    def __init__(self) -> None:
        self._next_index: dict[RequestId, int] = {}

    def open(self, request: Request) -> None:
        """A request was accepted."""
        _demand(request.request_id not in self._next_index, f"request {request.request_id} is accepted twice")
        self._next_index[request.request_id] = len(request.emitted_token_ids)

    def close(self, request_id: RequestId) -> None:
        """A request was aborted: nothing may follow."""
        del self._next_index[request_id]

    def record(self, event: Event) -> None:
        """An event came out."""
        request_id = event.request_id
        _demand(request_id in self._next_index, f"an event for request {request_id}, which has ended or never began")
        if not isinstance(event, TokenEvent):
            del self._next_index[request_id]
            return
        self._record_token(event)

    def is_open(self, request_id: RequestId) -> bool:
        """The request still owes its final event."""
        return request_id in self._next_index

    def _record_token(self, event: TokenEvent) -> None:
        expected = self._next_index[event.request_id]
        _demand(event.token_index == expected, f"token {event.token_index} came where {expected} was due")
        if event.finish_reason is None:
            self._next_index[event.request_id] = expected + 1
        else:
            del self._next_index[event.request_id]


def _demand(condition: bool, complaint: str) -> None:  # noqa: FBT001 - it is the check itself
    if not condition:
        raise InvariantBroken(complaint)
