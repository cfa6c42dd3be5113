"""Slot tables: what the runner remembers of every sequence between steps, except its sampling parameters.

A slot is a row given to a sequence while it runs. Token ids live on the device, because the next step reads the
sampled ones from there; block tables live on the host, where the addresses of a step's rows are computed.
"""

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import SequenceStart, StepPlan
from weft.errors import InvariantBroken
from weft.runner.pages import lazy_zeros

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_FIRST_TOKEN_COLUMNS = 1024
_FIRST_BLOCK_COLUMNS = 32


class SlotTables:
    """Token ids `[slots, positions]` on the device and block ids `[slots, blocks]` on the host.

    Both tables start narrow and double their width on demand: what a long context may need is not paid for before
    one comes. `max_total_tokens` bounds the width.
    """

    def __init__(
        self,
        *,
        max_num_sequences: int,
        max_total_tokens: int,
        num_blocks: int,
        block_size_tokens: int,
        device: torch.device,
    ) -> None:
        self.max_num_sequences = max_num_sequences
        self._num_blocks = num_blocks
        self._block_size_tokens = block_size_tokens
        # A lookahead row of a sequence that turned out to be finished still has a place for its token.
        self._max_columns = max_total_tokens + 2
        num_columns = min(_FIRST_TOKEN_COLUMNS, self._max_columns)
        self._set_token_ids(lazy_zeros((max_num_sequences, num_columns), torch.int32, device))
        self.block_ids: Int32Array = np.zeros((max_num_sequences, _FIRST_BLOCK_COLUMNS), dtype=np.int32)
        self.num_blocks_of_slot: Int32Array = np.zeros(max_num_sequences, dtype=np.int32)
        self.num_prompt_tokens: Int32Array = np.zeros(max_num_sequences, dtype=np.int32)

    def start(self, start: SequenceStart) -> None:
        """Give a slot to a sequence: its known tokens replace what the slot held, its block table becomes empty."""
        slot, num_tokens = start.slot, len(start.token_ids)
        if not 0 <= slot < self.max_num_sequences:
            raise InvariantBroken(f"slot {slot} of a plan is outside 0 … {self.max_num_sequences - 1}")
        self.reserve_positions(num_tokens)
        known = torch.from_numpy(np.array(start.token_ids, dtype=np.int32))
        self.token_ids[slot, :num_tokens] = known.to(self.token_ids.device)
        self.num_blocks_of_slot[slot] = 0
        self.num_prompt_tokens[slot] = start.num_prompt_tokens

    def append_blocks(self, plan: StepPlan) -> None:
        """Append the plan's new blocks to the tables of their slots, in list order."""
        if not len(plan.new_block_slots):
            return
        slots = np.array(plan.new_block_slots, dtype=np.int64)
        blocks = np.array(plan.new_block_ids, dtype=np.int32)
        if len(slots) != len(blocks) or blocks.min() < 0 or blocks.max() >= self._num_blocks:
            raise InvariantBroken(f"step {plan.step_id} hands out blocks outside 0 … {self._num_blocks - 1}")
        columns = self.num_blocks_of_slot[slots] + _rank_among_equals(slots)
        self._reserve_block_columns(int(columns.max()) + 1)
        self.block_ids[slots, columns] = blocks
        self.num_blocks_of_slot += np.bincount(slots, minlength=self.max_num_sequences).astype(np.int32)

    def tokens_at(self, slots: torch.Tensor, positions: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Token ids of some places, in `room` where device and host are one. Shapes: all [n] int32 on the device."""
        if self._host_token_ids is None:
            return self.token_ids[slots, positions]
        room.numpy()[:] = self._host_token_ids[slots.numpy(), positions.numpy()]
        return room

    def write_tokens(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Put token ids at their places. Shapes: all [n] on the device."""
        if self._host_token_ids is None:
            self.token_ids[slots, positions] = token_ids.int()
        else:
            self._host_token_ids[slots.numpy(), positions.numpy()] = token_ids.numpy()

    def _set_token_ids(self, token_ids: torch.Tensor) -> None:
        self.token_ids = token_ids
        # Where device and host are one, numpy indexes a handful of places in a tenth of torch's time.
        self._host_token_ids: Int32Array | None = token_ids.numpy() if token_ids.device.type == "cpu" else None

    def reserve_positions(self, num_positions: int) -> None:
        """Make the token table at least `num_positions` wide."""
        num_columns = self.token_ids.shape[1]
        if num_positions <= num_columns:
            return
        if num_positions > self._max_columns:
            raise InvariantBroken(
                f"a sequence of {num_positions} tokens, the longest allowed is {self._max_columns - 2}"
            )
        width = min(max(num_positions, 2 * num_columns), self._max_columns)
        wider = lazy_zeros((self.max_num_sequences, width), torch.int32, self.token_ids.device)
        wider[:, :num_columns] = self.token_ids
        self._set_token_ids(wider)

    def _reserve_block_columns(self, num_columns: int) -> None:
        old = self.block_ids
        if num_columns <= old.shape[1]:
            return
        self.block_ids = np.zeros((old.shape[0], max(num_columns, 2 * old.shape[1])), dtype=np.int32)
        self.block_ids[:, : old.shape[1]] = old


def _rank_among_equals(values: Int64Array) -> Int64Array:
    """For each entry, how many equal entries stand before it: [4, 7, 4, 4] → [0, 0, 1, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.empty(len(values), dtype=bool)
    is_first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=is_first[1:])
    starts = np.flatnonzero(is_first)
    ranks = np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))
    result = np.empty(len(values), dtype=np.int64)
    result[order] = ranks
    return result
