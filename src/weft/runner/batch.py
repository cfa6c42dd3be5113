"""StepPlan → ForwardBatch: host arithmetic in numpy, one buffer, one copy to the device.

Every integer of a step is laid out in one reused int32 buffer (pinned when the device is not the CPU), so that a
step costs a fixed handful of vectorised calls whatever the number of rows. On the CPU the tensors are views of that
buffer: a batch is valid until the next one is built.

Shape letters: T tokens in the step · S rows of the plan · S' rows that sample · N' longest block table of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    slots: Int64Array
    """[S]"""
    first_positions: Int64Array
    """[S]"""
    num_tokens: Int64Array
    """[S]"""
    query_starts: Int64Array
    """[S + 1], first packed row of each plan row"""
    sampling_rows: Int64Array
    """[S'], plan rows that choose a token"""
    sampling_slots: Int64Array
    """[S']"""
    sampling_positions: Int64Array
    """[S'], absolute position of the token to choose"""
    device_sampling_slots: torch.Tensor
    """[S'] int32, the same on the device"""
    device_sampling_positions: torch.Tensor
    """[S'] int32, the same on the device"""


class BatchBuilder:
    """Builds the batch of one step at a time, in buffers that it keeps."""

    def __init__(self, tables: SlotTables, kv: Sequence[LayerKv], block_size_tokens: int, device: torch.device) -> None:
        self._tables = tables
        self._kv = kv
        self._block_size_tokens = block_size_tokens
        self._buffer = _StepBuffer(device)
        self._ramp: Int64Array = np.arange(_FIRST_BUFFER_INTEGERS, dtype=np.int64)

    def build(self, plan: StepPlan) -> StepBatch:
        """Lay out a plan whose starts and new blocks the tables already hold.

        Raises   InvariantBroken: a row that no sequence can have (slot, positions, or blocks it does not own)
        """
        slots = np.array(plan.slots, dtype=np.int64)
        first = np.array(plan.first_positions, dtype=np.int64)
        counts = np.array(plan.num_tokens, dtype=np.int64)
        ends = first + counts
        self._check_rows(plan, slots, first, ends)
        num_rows, num_tokens, max_context_len = len(slots), sum(plan.num_tokens), int(ends.max())
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
            token_ids=self._tables.tokens_at(device["token_slots"], device["positions"], device["token_ids"]),
            positions=device["positions"],
            kv_slots=device["kv_slots"],
            query_starts=device["query_starts"],
            context_lens=device["context_lens"],
            block_tables=device["block_tables"],
            logit_rows=device["logit_rows"],
            kv=self._kv,
            max_context_len=max_context_len,
            max_query_len=max(plan.num_tokens),
        )
        return StepBatch(
            forward=forward,
            slots=slots,
            first_positions=first,
            num_tokens=counts,
            query_starts=starts,
            sampling_rows=sampling_rows,
            sampling_slots=slots[sampling_rows],
            sampling_positions=ends[sampling_rows],
            device_sampling_slots=device["sampling_slots"],
            device_sampling_positions=device["sampling_positions"],
        )

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

    def _check_rows(self, plan: StepPlan, slots: Int64Array, first: Int64Array, ends: Int64Array) -> None:
        tables, num_rows = self._tables, len(plan.slots)
        is_whole = num_rows == len(plan.first_positions) == len(plan.num_tokens) == len(plan.samples) > 0
        # The smallest of a list of a few dozen integers is found sooner than that of an array.
        if not (is_whole and min(plan.slots) >= 0 and max(plan.slots) < tables.max_num_sequences):
            raise InvariantBroken(f"step {plan.step_id}: rows are missing or outside the slot table")
        owned_tokens = tables.num_blocks_of_slot[slots] * self._block_size_tokens
        is_outside = ends > owned_tokens
        if min(plan.first_positions) < 0 or min(plan.num_tokens) < 1 or is_outside.any():
            bad = int(np.argmax(is_outside | (first < 0) | (ends <= first)))
            raise InvariantBroken(
                f"step {plan.step_id}, row {bad}: {plan.num_tokens[bad]} tokens from position {first[bad]}, "
                f"blocks for {owned_tokens[bad]}"
            )


class _StepBuffer:
    """One reused run of int32 on the host, cut into named pieces, that reaches the device in one copy.

    A step of the same sizes as the last one, which is every step of steady decoding, finds the pieces cut.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sizes: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._pieces: dict[str, slice] = {}
        self._host_pieces: dict[str, Int32Array] = {}
        self._device_pieces: dict[str, torch.Tensor] = {}
        self._used = 0
        self._grow(_FIRST_BUFFER_INTEGERS)

    def lay_out(self, num_tokens: int, num_rows: int, num_columns: int, num_sampling: int) -> dict[str, Int32Array]:
        """Name → piece to fill, uninitialised."""
        sizes = (num_tokens, num_rows, num_columns, num_sampling)
        if sizes == self._sizes:
            return self._host_pieces
        self._sizes = sizes
        lengths = {
            "token_ids": num_tokens,
            "token_slots": num_tokens,
            "positions": num_tokens,
            "kv_slots": num_tokens,
            "query_starts": num_rows + 1,
            "context_lens": num_rows,
            "block_tables": num_rows * num_columns,
            "logit_rows": num_sampling,
            "sampling_slots": num_sampling,
            "sampling_positions": num_sampling,
        }
        self._used = 0
        for name, length in lengths.items():
            self._pieces[name] = slice(self._used, self._used + length)
            self._used += length
        if self._used > len(self._host):
            self._grow(2 * self._used)
        self._host_pieces = {name: self._host[piece] for name, piece in self._pieces.items()}
        self._device_pieces = {}
        return self._host_pieces

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
