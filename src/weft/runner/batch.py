"""StepPlan → ForwardBatch: host arithmetic in numpy, one buffer, one copy to the device.

Every integer of a step is laid out in one reused int32 buffer (pinned when the device is not the CPU), so that a
step costs a fixed handful of vectorised calls whatever the number of rows. On the CPU the tensors are views of that
buffer: a batch is valid until the next one is built.

Steady decoding asks for the last batch one token further, again and again. Then nothing is laid out: positions grow by
one in place, and only rows that begin a block get another entry. While this runs no core computes, and every cache is
cold, so what counts is how little is touched.

Shape letters: T tokens in the step · S rows of the plan · S' rows that sample · N' longest block table of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from weft.core.plan import StepPlan
from weft.errors import InvariantBroken
from weft.models.forward_batch import ForwardBatch, LayerKv
from weft.runner.slots import Int32Array, Int64Array, SlotTables

_FIRST_BUFFER_INTEGERS = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """A plan as arrays: the model's part on the device, the runner's part on the host."""

    forward: ForwardBatch
    is_decoding: bool
    """Every row is one token and chooses the next."""
    slots: Int64Array
    """[S]"""
    ends: Int32Array
    """[S], position behind each row's last token"""
    num_tokens: Int64Array
    """[S]"""
    query_starts: Int64Array
    """[S + 1], first packed row of each plan row"""
    sampling_rows: Int64Array
    """[S'], plan rows that choose a token"""
    sampling_slots: Int64Array
    """[S']"""
    sampling_positions: Int32Array
    """[S'], absolute position of the token to choose"""
    device_sampling_slots: torch.Tensor
    """[S'] int32, the same on the device"""
    device_sampling_positions: torch.Tensor
    """[S'] int32, the same on the device"""
    next_token_ids: Int32Array | None
    """[S'], where decoding on the host goes on from: what stands here is what a next step of the same rows reads"""

    @property
    def first_positions(self) -> Int64Array:
        """[S]"""
        return self.ends - self.num_tokens


@dataclass(slots=True, kw_only=True)
class _DecodeRun:
    """Decode rows that take one step after the other."""

    plan: StepPlan
    """The newest one."""
    batch: StepBatch
    rows_by_phase: list[list[int]]
    """Rows that begin a block i steps after the first, i modulo the block size."""
    num_steps: int = 0
    num_steps_left: int
    """Until one of the tables lacks a column."""

    def goes_on_with(self, plan: StepPlan) -> bool:
        """Whether the plan is the newest one a token further, with a block for each row that begins one."""
        last = self.plan
        return (
            self.num_steps_left > 0
            and not plan.starts
            and plan.slots == last.slots
            and plan.num_tokens == last.num_tokens
            and plan.samples == last.samples
            and list(plan.new_block_slots) == [last.slots[row] for row in self.rows_at_border()]
            and plan.first_positions == [position + 1 for position in last.first_positions]
        )

    def rows_at_border(self) -> list[int]:
        """Rows that begin a block in the next step."""
        return self.rows_by_phase[(self.num_steps + 1) % len(self.rows_by_phase)]


class BatchBuilder:
    """Builds the batch of one step at a time, in buffers that it keeps."""

    def __init__(self, tables: SlotTables, kv: Sequence[LayerKv], block_size_tokens: int, device: torch.device) -> None:
        self._tables = tables
        self._kv = kv
        self._block_size_tokens = block_size_tokens
        self._buffer = _StepBuffer(device)
        self._ramp: Int64Array = np.arange(_FIRST_BUFFER_INTEGERS, dtype=np.int64)
        self._run: _DecodeRun | None = None

    def build(self, plan: StepPlan) -> StepBatch:
        """The batch of a plan whose starts and new blocks the tables already hold; the last one if it only grew.

        Raises   InvariantBroken: a row that no sequence can have (slot, positions, or blocks it does not own)
        """
        run, self._run = self._run, None
        if run is None or not run.goes_on_with(plan):
            return self._lay_out(plan)
        self._advance(run, plan)
        self._run = run
        return run.batch

    def _advance(self, run: _DecodeRun, plan: StepPlan) -> None:
        """Make the batch of a run that of its next step."""
        host = self._buffer.host_pieces
        rows_at_border = run.rows_at_border()
        run.plan = plan
        run.num_steps += 1
        run.num_steps_left -= 1
        self._buffer.advancing += 1
        for row in rows_at_border:
            column = plan.first_positions[row] // self._block_size_tokens
            block_id = self._tables.block_ids[plan.slots[row], column]
            host["kv_slots"][row] = block_id * self._block_size_tokens
            host["block_tables"][row * self._buffer.num_columns + column] = block_id
        if run.batch.next_token_ids is None:
            device = self._buffer.upload()
            run.batch = _on_device(run.batch, self._token_ids(host, device), device)

    def _lay_out(self, plan: StepPlan) -> StepBatch:
        self._check_shape(plan)
        num_rows = len(plan.slots)
        slots = np.array(plan.slots, dtype=np.int64)
        counts = np.array(plan.num_tokens, dtype=np.int64)
        first = np.array(plan.first_positions, dtype=np.int64)
        ends = first + counts
        self._check_blocks(plan, slots, first, ends)
        num_tokens, max_context_len = sum(plan.num_tokens), int(ends.max())
        self._reserve_ramp(num_tokens + 1)
        starts = self._ramp[: num_rows + 1]
        if num_tokens > num_rows:
            starts = np.zeros(num_rows + 1, dtype=np.int64)
            np.cumsum(counts, out=starts[1:])
        sampling_rows = self._ramp[:num_rows]
        if not all(plan.samples):
            sampling_rows = np.flatnonzero(np.array(plan.samples, dtype=bool))
        self._tables.reserve_positions(max_context_len + 1)

        num_columns = -(-max_context_len // self._block_size_tokens)
        host = self._buffer.lay_out(num_tokens, num_rows, num_columns, len(sampling_rows))
        self._fill_tokens(host, slots, first, counts, starts)
        self._fill_block_tables(host["block_tables"].reshape(num_rows, num_columns), slots, ends)
        host["query_starts"][:] = starts
        host["context_lens"][:] = ends
        host["logit_rows"][:] = starts[1:][sampling_rows] - 1
        host["sampling_slots"][:] = slots[sampling_rows]
        host["sampling_positions"][:] = ends[sampling_rows]
        device = self._buffer.upload()
        forward = ForwardBatch(
            token_ids=self._token_ids(host, device),
            positions=device["positions"],
            kv_slots=device["kv_slots"],
            query_starts=device["query_starts"],
            context_lens=device["context_lens"],
            block_tables=device["block_tables"],
            logit_rows=device["logit_rows"],
            kv=self._kv,
            max_context_len=num_columns * self._block_size_tokens,
            max_query_len=max(plan.num_tokens),
        )
        is_decoding = num_tokens == num_rows == len(sampling_rows)
        batch = StepBatch(
            forward=forward,
            is_decoding=is_decoding,
            slots=slots,
            ends=host["context_lens"],
            num_tokens=counts,
            query_starts=starts,
            sampling_rows=sampling_rows,
            sampling_slots=slots[sampling_rows],
            sampling_positions=host["sampling_positions"],
            device_sampling_slots=device["sampling_slots"],
            device_sampling_positions=device["sampling_positions"],
            next_token_ids=host["token_ids"] if is_decoding and self._tables.host_token_ids is not None else None,
        )
        if is_decoding:
            self._run = self._begin_run(plan, batch)
        return batch

    def _begin_run(self, plan: StepPlan, batch: StepBatch) -> _DecodeRun:
        rows_by_phase: list[list[int]] = [[] for _ in range(self._block_size_tokens)]
        for row, position in enumerate(plan.first_positions):
            rows_by_phase[-position % self._block_size_tokens].append(row)
        num_columns = min(batch.forward.max_context_len, self._tables.num_token_columns - 1)
        return _DecodeRun(
            plan=plan,
            batch=batch,
            rows_by_phase=rows_by_phase,
            num_steps_left=num_columns - max(plan.first_positions) - 1,
        )

    def _token_ids(self, host: dict[str, Int32Array], device: dict[str, torch.Tensor]) -> torch.Tensor:
        """[T] int32, from the token table."""
        known = self._tables.host_token_ids
        if known is None:
            return self._tables.token_ids[device["token_slots"], device["positions"]]
        host["token_ids"][:] = known[host["token_slots"], host["positions"]]
        return device["token_ids"]

    def _fill_tokens(
        self, host: dict[str, Int32Array], slots: Int64Array, first: Int64Array, counts: Int64Array, starts: Int64Array
    ) -> None:
        """Slot, position and place in the KV pool of every token."""
        num_tokens = int(starts[-1])
        token_slots, positions = slots, first
        if num_tokens > len(slots):
            token_slots = np.repeat(slots, counts)
            positions = self._ramp[:num_tokens] + np.repeat(first - starts[:-1], counts)
        host["token_slots"][:] = token_slots
        host["positions"][:] = positions
        block_of_token, offset = np.divmod(positions, self._block_size_tokens)
        kv_slots = host["kv_slots"]
        np.multiply(self._tables.block_ids[token_slots, block_of_token], self._block_size_tokens, out=kv_slots)
        np.add(kv_slots, offset, out=kv_slots, casting="same_kind")

    def _fill_block_tables(self, rows: Int32Array, slots: Int64Array, ends: Int64Array) -> None:
        """Copy the block tables of the step's sequences; what lies past a sequence's length becomes 0."""
        num_columns = rows.shape[1]
        np.take(self._tables.block_ids[:, :num_columns], slots, axis=0, out=rows, mode="clip")
        lengths = -(-ends // self._block_size_tokens)
        rows[self._ramp[:num_columns] >= lengths[:, None]] = 0

    def _reserve_ramp(self, length: int) -> None:
        """Make the ascending numbers at least this many."""
        if length > len(self._ramp):
            self._ramp = np.arange(2 * length, dtype=np.int64)

    def _check_shape(self, plan: StepPlan) -> None:
        is_whole = len(plan.slots) == len(plan.first_positions) == len(plan.num_tokens) == len(plan.samples) > 0
        # The smallest of a list of a few dozen integers is found sooner than that of an array.
        if not (is_whole and min(plan.slots) >= 0 and max(plan.slots) < self._tables.max_num_sequences):
            raise InvariantBroken(f"step {plan.step_id}: rows are missing or outside the slot table")

    def _check_blocks(self, plan: StepPlan, slots: Int64Array, first: Int64Array, ends: Int64Array) -> None:
        owned_tokens = self._tables.num_blocks_of_slot[slots] * self._block_size_tokens
        is_outside = ends > owned_tokens
        if min(plan.first_positions) < 0 or min(plan.num_tokens) < 1 or is_outside.any():
            bad = int(np.argmax(is_outside | (first < 0) | (ends <= first)))
            raise InvariantBroken(
                f"step {plan.step_id}, row {bad}: {plan.num_tokens[bad]} tokens from position {first[bad]}, "
                f"blocks for {owned_tokens[bad]}"
            )


class _StepBuffer:
    """One reused run of int32 on the host, cut into named pieces, that reaches the device in one copy.

    A step of the same sizes as the last one finds the pieces cut.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sizes: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._pieces: dict[str, slice] = {}
        self._device_pieces: dict[str, torch.Tensor] = {}
        self._used = 0
        self.host_pieces: dict[str, Int32Array] = {}
        """Name → piece."""
        self.advancing: Int32Array = np.zeros(0, dtype=np.int32)
        """The pieces whose every entry is one more in the next step of the same decoding sequences."""
        self._grow(_FIRST_BUFFER_INTEGERS)

    @property
    def num_columns(self) -> int:
        """N', of the piece `block_tables`."""
        return self._sizes[2]

    def lay_out(self, num_tokens: int, num_rows: int, num_columns: int, num_sampling: int) -> dict[str, Int32Array]:
        """Name → piece to fill, uninitialised."""
        sizes = (num_tokens, num_rows, num_columns, num_sampling)
        if sizes == self._sizes:
            return self.host_pieces
        self._sizes = sizes
        lengths = {
            "token_ids": num_tokens,
            "token_slots": num_tokens,
            "query_starts": num_rows + 1,
            "block_tables": num_rows * num_columns,
            "logit_rows": num_sampling,
            "sampling_slots": num_sampling,
            "positions": num_tokens,
            "kv_slots": num_tokens,
            "context_lens": num_rows,
            "sampling_positions": num_sampling,
        }
        self._used = 0
        for name, length in lengths.items():
            self._pieces[name] = slice(self._used, self._used + length)
            self._used += length
        if self._used > len(self._host):
            self._grow(2 * self._used)
        self.host_pieces = {name: self._host[piece] for name, piece in self._pieces.items()}
        self.advancing = self._host[self._pieces["positions"].start : self._used]
        self._device_pieces = {}
        return self.host_pieces

    def upload(self) -> dict[str, torch.Tensor]:
        """Name → the same piece on the device; block tables are [S, N']."""
        if self._device.type != "cpu":
            return self._cut(self._tensor[: self._used].to(self._device, non_blocking=True))
        if not self._device_pieces:
            self._device_pieces = self._cut(self._tensor)
        return self._device_pieces

    def _cut(self, sent: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = {name: sent[piece] for name, piece in self._pieces.items()}
        _, num_rows, num_columns, _ = self._sizes
        pieces["block_tables"] = pieces["block_tables"].view(num_rows, num_columns)
        return pieces

    def _grow(self, num_integers: int) -> None:
        self._tensor = torch.empty(num_integers, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._host: Int32Array = self._tensor.numpy()


def _on_device(batch: StepBatch, token_ids: torch.Tensor, device: dict[str, torch.Tensor]) -> StepBatch:
    """The same batch with tensors that were sent anew."""
    forward = replace(
        batch.forward,
        token_ids=token_ids,
        positions=device["positions"],
        kv_slots=device["kv_slots"],
        query_starts=device["query_starts"],
        context_lens=device["context_lens"],
        block_tables=device["block_tables"],
        logit_rows=device["logit_rows"],
    )
    return replace(
        batch,
        forward=forward,
        device_sampling_slots=device["sampling_slots"],
        device_sampling_positions=device["sampling_positions"],
    )
