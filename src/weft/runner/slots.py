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
        self.host_token_ids: Int32Array | None = None
        """The same memory as `token_ids` where device and host are one: numpy reaches a handful of places in a tenth
        of torch's time."""
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
        known = np.array(start.token_ids, dtype=np.int32)
        if self.host_token_ids is not None:
            self.host_token_ids[slot, :num_tokens] = known
        else:
            self.token_ids[slot, :num_tokens] = torch.from_numpy(known).to(self.token_ids.device)
        self.num_blocks_of_slot[slot] = 0
        self.num_prompt_tokens[slot] = start.num_prompt_tokens

    def append_blocks(self, plan: StepPlan) -> None:
        """Append the plan's new blocks to the tables of their slots, in list order."""
        if len(plan.new_block_slots) != len(plan.new_block_ids):
            raise InvariantBroken(f"step {plan.step_id} names other numbers of slots and of new blocks")
        # One by one: decoding takes a block or two per step, and a prompt's are few beside its tokens.
        for slot, block_id in zip(plan.new_block_slots, plan.new_block_ids, strict=True):
            if not (0 <= slot < self.max_num_sequences and 0 <= block_id < self._num_blocks):
                raise InvariantBroken(
                    f"step {plan.step_id} gives block {block_id} of 0 … {self._num_blocks - 1} to slot {slot}"
                )
            column = int(self.num_blocks_of_slot[slot])
            self._reserve_block_columns(column + 1)
            self.block_ids[slot, column] = block_id
            self.num_blocks_of_slot[slot] = column + 1

    def write_on_host(self, slots: Int64Array, positions: Int32Array, token_ids: Int64Array) -> None:
        """Put token ids at their places, where device and host are one. Shapes: all [n]."""
        if self.host_token_ids is None:
            raise InvariantBroken("the token table is not on the host")
        self.host_token_ids[slots, positions] = token_ids

    def _set_token_ids(self, token_ids: torch.Tensor) -> None:
        self.token_ids = token_ids
        self.host_token_ids = token_ids.numpy() if token_ids.device.type == "cpu" else None

    @property
    def num_token_columns(self) -> int:
        """Positions that the token table has room for now."""
        return int(self.token_ids.shape[1])

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
