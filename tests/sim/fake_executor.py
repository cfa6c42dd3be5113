"""A runner without a model: slot tables, a paged pool, and "attention" that notices every wrong byte.

The key-value entry of a position is a hash of all tokens up to it, so it depends on the whole history as real ones
do. A row reads every earlier entry through its block table and compares it with the hash of the tokens it believes
to come before; the next token is a function of the last entry and the request. Any block that was shared, freed,
overwritten or skipped wrongly is therefore either noticed at once or changes the tokens.
"""

from dataclasses import dataclass, field

from weft.core.plan import SequenceStart, StepPlan, StepResult, TopTokens
from weft.core.request import Pooling, Request, RequestId, Slot

NAN = -1
"""A key-value entry that is not a number."""

VOCAB_SIZE = 64


class WrongRead(AssertionError):
    """A row read keys and values that are not those of its own history."""


class StepRaised(Exception):
    """The device refused the whole step."""


def mix(state: int, value: int) -> int:
    """One round of a 64-bit mixing function (constants of splitmix64)."""
    z = (state * 0x9E3779B97F4A7C15 + value + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 27)


def choose_token(entry: int, num_completion: int, start: SequenceStart | Request) -> tuple[int, float]:
    """The next token after a history, and its log-probability. EOS is masked before `min_new_tokens`."""
    stop = start.stop
    draw = mix(entry, start.sampling.seed)
    token_id = draw % VOCAB_SIZE
    while not stop.ignore_eos and num_completion < stop.min_new_tokens and token_id in stop.eos_token_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id, -(draw % 1000) / 100


def prompt_logprob(entry: int) -> float:
    """Log-probability of the prompt token whose history ends with `entry`."""
    return -(entry % 997) / 100


def top_tokens(entry: int, count: int) -> TopTokens:
    """Alternatives for the token after `entry`."""
    return TopTokens(tuple((entry + i) % VOCAB_SIZE for i in range(count)), tuple(-float(i) for i in range(count)))


def vector_of(entry: int) -> bytes:
    """The vector of a prompt whose history ends with `entry`."""
    return entry.to_bytes(8, "little")


@dataclass(slots=True)
class _SlotTable:
    start: SequenceStart
    incarnation: int
    token_ids: list[int]
    entries: list[int] = field(default_factory=list)
    """Right entries of the tokens so far, extended when asked."""
    block_ids: list[int] = field(default_factory=list)
    first_computed: int | None = None
    """The first position that a row computed since the start."""
    is_lost: bool = False
    """A step that raised left it undefined: whatever a row of it yields until the next start means nothing."""

    def entry(self, position: int) -> int:
        while len(self.entries) <= position:
            previous = self.entries[-1] if self.entries else 0
            self.entries.append(mix(previous, self.token_ids[len(self.entries)]))
        return self.entries[position]


class FakeExecutor:
    """Runs plans in order. `nan_rows`, `raises` and `poison` inject faults."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._size = block_size
        self._pool: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self._slots: dict[Slot, _SlotTable] = {}
        self._num_incarnations = 0
        self.nan_incarnations: dict[RequestId, set[int]] = {}
        """Per request: the starts during which a row of it was not a number."""
        self._condemned_since: dict[int, int] = {}
        """Block → first step id that must not find it in the prefix index."""
        self.num_tokens_computed = 0

    def poison(self, block_id: int) -> None:
        """Flip bits of a block, so that whoever reads it gets values that are not numbers."""
        self._pool[block_id] = [NAN if entry is not None else None for entry in self._pool[block_id]]

    def condemn(self, plan: StepPlan, rows: list[int], next_step_id: int) -> None:
        """The scheduler was told that these rows are not numbers: their blocks must not be shared from now on."""
        for row in rows:
            for block_id in self._slots[plan.slots[row]].block_ids:
                self._condemned_since.setdefault(block_id, next_step_id)

    def execute(self, plan: StepPlan, *, elapsed_ns: int, nan_rows: frozenset[int], raises: bool) -> StepResult:
        """One forward pass. Raises StepRaised after having written rubbish when told to."""
        self._open_slots(plan)
        if raises:
            self._write_rubbish(plan)
            raise StepRaised
        token_ids: list[int] = []
        logprobs: list[float] = []
        result = StepResult(step_id=plan.step_id, elapsed_ns=elapsed_ns, token_ids=token_ids, logprobs=logprobs)
        for row in range(plan.num_rows):
            token = self._run_row(plan, row, result, is_nan=row in nan_rows)
            if plan.samples[row]:
                token_ids.append(token[0])
                logprobs.append(token[1])
        return result

    def _open_slots(self, plan: StepPlan) -> None:
        for start in plan.starts:
            self._num_incarnations += 1
            self._slots[start.slot] = _SlotTable(start, self._num_incarnations, list(start.token_ids))
        for slot, block_id in zip(plan.new_block_slots, plan.new_block_ids, strict=True):
            self._slots[slot].block_ids.append(block_id)
        for start in plan.starts:
            table = self._slots[start.slot]
            first = plan.first_positions[plan.slots.index(start.slot)]
            if first % self._size:
                raise WrongRead(f"a prefix hit ends inside a block, at {first}")
            for block_id in table.block_ids[: first // self._size]:
                if self._condemned_since.get(block_id, plan.step_id + 1) <= plan.step_id:
                    raise WrongRead(f"block {block_id} is shared although its content is condemned")

    def _run_row(self, plan: StepPlan, row: int, result: StepResult, *, is_nan: bool) -> tuple[int, float]:
        table = self._slots[plan.slots[row]]
        first, num = plan.first_positions[row], plan.num_tokens[row]
        end = first + num
        self.num_tokens_computed += num
        if table.first_computed is None:
            table.first_computed = first
        if table.is_lost:
            self._write(table, first, [NAN] * num)
            return 0, 0.0
        is_nan = self._reads_nan(table, first) or is_nan
        if plan.samples[row] != (end == len(table.token_ids)) or end > len(table.token_ids):
            raise WrongRead(f"a row ends at {end} of {len(table.token_ids)} tokens, samples={plan.samples[row]}")
        self._write(table, first, [NAN] * num if is_nan else [table.entry(i) for i in range(first, end)])
        if is_nan:
            result.failures[row] = "numerical_error"
            self.nan_incarnations.setdefault(table.start.request_id, set()).add(table.incarnation)
            if plan.samples[row]:
                table.token_ids.append(0)
            return 0, 0.0
        start = table.start
        if start.sampling.prompt_logprobs:
            stop = min(end, start.num_prompt_tokens - 1)
            entries = [table.entry(i) for i in range(first, stop)]
            result.prompt_logprobs[row] = tuple(map(prompt_logprob, entries))
            if count := start.sampling.prompt_top_n_tokens:
                result.prompt_top_tokens[row] = tuple(top_tokens(entry, count) for entry in entries)
        if not plan.samples[row]:
            return 0, 0.0
        entry = table.entry(end - 1)
        if start.pooling is not None:
            result.embeddings[row] = self._vector(table, entry)
            table.token_ids.append(0)
            return 0, 0.0
        token = choose_token(entry, end - start.num_prompt_tokens, start)
        if start.sampling.top_n_tokens:
            result.top_tokens[row] = top_tokens(entry, start.sampling.top_n_tokens)
        table.token_ids.append(token[0])
        return token

    def _vector(self, table: _SlotTable, entry: int) -> bytes:
        if table.start.pooling is not Pooling.LAST and table.first_computed != 0:
            raise WrongRead(f"a {table.start.pooling} over a prompt begins at position {table.first_computed}")
        return vector_of(entry)

    def _reads_nan(self, table: _SlotTable, num_positions: int) -> bool:
        """Attend to everything before; complain unless it is the sequence's own history."""
        is_nan = False
        for position in range(num_positions):
            found = self._pool[table.block_ids[position // self._size]][position % self._size]
            if found == NAN:
                is_nan = True
            elif found != table.entry(position):
                raise WrongRead(f"request {table.start.request_id} reads foreign values at position {position}")
        return is_nan

    def _write(self, table: _SlotTable, first: int, entries: list[int]) -> None:
        for position, entry in enumerate(entries, first):
            block_id = table.block_ids[position // self._size]
            if position % self._size == 0:
                self._pool[block_id] = [None] * self._size
                self._condemned_since.pop(block_id, None)
            self._pool[block_id][position % self._size] = entry

    def _write_rubbish(self, plan: StepPlan) -> None:
        for row in range(plan.num_rows):
            table = self._slots[plan.slots[row]]
            table.is_lost = True
            self._write(table, plan.first_positions[row], [NAN] * plan.num_tokens[row])
