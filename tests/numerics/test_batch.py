"""A plan as the arrays that a model reads, field by field."""

import numpy as np
import pytest
import torch

from weft.core.plan import SequenceStart, StepPlan
from weft.core.request import RequestId, SamplingParams, Slot, StopConditions
from weft.errors import InvariantBroken
from weft.models.forward_batch import ForwardBatch
from weft.runner.batch import BatchBuilder, StepBatch
from weft.runner.slots import SlotTables

pytestmark = pytest.mark.numerics

BLOCK = 4
CPU = torch.device("cpu")


def start(slot: int, num_tokens: int) -> SequenceStart:
    return SequenceStart(
        slot=Slot(slot),
        request_id=RequestId(slot),
        token_ids=tuple(100 * slot + position for position in range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=SamplingParams(),
        stop=StopConditions(max_new_tokens=5),
    )


def new_builder() -> tuple[SlotTables, BatchBuilder]:
    tables = SlotTables(
        max_num_sequences=8, max_total_tokens=50_000, num_blocks=64, block_size_tokens=BLOCK, device=CPU
    )
    return tables, BatchBuilder(tables, [], BLOCK, CPU)


def as_lists(forward: ForwardBatch) -> dict[str, object]:
    names = ("token_ids", "positions", "kv_slots", "query_starts", "context_lens", "block_tables", "logit_rows")
    assert all(getattr(forward, name).dtype == torch.int32 for name in names)
    assert all(getattr(forward, name).is_contiguous() for name in names)
    return {name: getattr(forward, name).tolist() for name in names}


def test_decode_rows_and_a_chunk_are_packed_one_after_the_other() -> None:
    tables, builder = new_builder()
    for sequence in (start(2, 6), start(5, 3), start(7, 11)):
        tables.start(sequence)
    plan = StepPlan(
        step_id=1,
        slots=[5, 2, 7],
        first_positions=[2, 5, 3],
        num_tokens=[1, 1, 6],
        samples=[True, True, False],
        new_block_slots=[7, 2, 7, 5, 2, 7],
        new_block_ids=[40, 20, 41, 50, 21, 42],
    )
    tables.append_blocks(plan)

    batch = builder.build(plan)

    assert as_lists(batch.forward) == {
        "token_ids": [502, 205, 703, 704, 705, 706, 707, 708],
        "positions": [2, 5, 3, 4, 5, 6, 7, 8],
        "kv_slots": [50 * 4 + 2, 21 * 4 + 1, 40 * 4 + 3, 41 * 4, 41 * 4 + 1, 41 * 4 + 2, 41 * 4 + 3, 42 * 4],
        "query_starts": [0, 1, 2, 8],
        "context_lens": [3, 6, 9],
        "block_tables": [[50, 0, 0], [20, 21, 0], [40, 41, 42]],
        "logit_rows": [0, 1],
    }
    assert (batch.forward.max_context_len, batch.forward.max_query_len) == (3 * BLOCK, 6)
    assert batch.sampling_rows.tolist() == [0, 1]
    assert batch.sampling_slots.tolist() == batch.device_sampling_slots.tolist() == [5, 2]
    assert batch.sampling_positions.tolist() == batch.device_sampling_positions.tolist() == [3, 6]


def test_blocks_past_a_sequence_read_as_zero_even_when_it_owns_them() -> None:
    """The scheduler may hand out blocks ahead; a table's tail means nothing to this step."""
    tables, builder = new_builder()
    tables.start(start(0, 20))
    tables.start(start(1, 2))
    plan = StepPlan(
        step_id=1,
        slots=[0, 1],
        first_positions=[0, 0],
        num_tokens=[20, 2],
        samples=[True, True],
        new_block_slots=[0] * 5 + [1] * 3,
        new_block_ids=[9, 8, 7, 6, 5, 33, 34, 35],
    )
    tables.append_blocks(plan)

    tables_of_step = builder.build(plan).forward.block_tables.tolist()

    assert tables_of_step == [[9, 8, 7, 6, 5], [33, 0, 0, 0, 0]]


def test_a_step_larger_than_the_first_buffer_is_laid_out_whole() -> None:
    tables = SlotTables(max_num_sequences=2, max_total_tokens=40_000, num_blocks=9000, block_size_tokens=4, device=CPU)
    builder = BatchBuilder(tables, [], 4, CPU)
    length = 33_000
    tables.start(start(1, length))
    blocks = np.random.default_rng(0).permutation(9000)[: -(-length // 4)]
    plan = StepPlan(
        step_id=1, slots=[1], first_positions=[0], num_tokens=[length], samples=[True],
        new_block_slots=[1] * len(blocks), new_block_ids=blocks.tolist(),
    )  # fmt: skip
    tables.append_blocks(plan)

    forward = builder.build(plan).forward

    positions = np.arange(length)
    assert forward.positions.tolist() == positions.tolist()
    assert forward.token_ids.tolist() == (100 + positions).tolist()
    assert forward.kv_slots.tolist() == (blocks[positions // 4] * 4 + positions % 4).tolist()
    assert forward.block_tables[0].tolist() == blocks.tolist()


# Decoding that goes on


class Decoding:
    """Sequences that decode step by step, each step laid out twice: by a builder that goes on, and by a new one."""

    def __init__(self, max_total_tokens: int = 4000) -> None:
        self.tables = SlotTables(
            max_num_sequences=8, max_total_tokens=max_total_tokens, num_blocks=2000, block_size_tokens=BLOCK, device=CPU
        )
        self.builder = BatchBuilder(self.tables, [], BLOCK, CPU)
        self.free_blocks = np.random.default_rng(3).permutation(2000).tolist()
        self.positions: dict[int, int] = {}
        """Slot → position of the next row, in plan order."""
        self.num_blocks: dict[int, int] = {}
        self.batches: list[StepBatch] = []
        self.token_ids: list[list[int]] = []
        """What each step read; its own tokens are written over it."""

    def start(self, slot: int, num_tokens: int) -> SequenceStart:
        """A sequence whose last token alone is uncomputed takes a slot."""
        self.positions[slot], self.num_blocks[slot] = num_tokens - 1, 0
        return start(slot, num_tokens)

    def step(self, *starts: SequenceStart) -> StepBatch:
        for sequence in starts:
            self.tables.start(sequence)
        needed = {slot: position // BLOCK + 1 - self.num_blocks[slot] for slot, position in self.positions.items()}
        new_slots = [slot for slot, count in needed.items() for _ in range(count)]
        self.num_blocks |= {slot: self.num_blocks[slot] + count for slot, count in needed.items()}
        plan = StepPlan(
            step_id=len(self.batches),
            starts=starts,
            slots=list(self.positions),
            first_positions=list(self.positions.values()),
            num_tokens=[1] * len(self.positions),
            samples=[True] * len(self.positions),
            new_block_slots=new_slots,
            new_block_ids=[self.free_blocks.pop() for _ in new_slots],
        )
        self.tables.append_blocks(plan)
        batch = self.builder.build(plan)
        self._compare(batch, BatchBuilder(self.tables, [], BLOCK, CPU).build(plan))
        self.token_ids.append(batch.forward.token_ids.tolist())
        self._choose(batch)
        self.positions = {slot: position + 1 for slot, position in self.positions.items()}
        self.batches.append(batch)
        return batch

    def _choose(self, batch: StepBatch) -> None:
        chosen = np.array([1000 * slot + position for slot, position in self.positions.items()])
        self.tables.write_on_host(batch.sampling_slots, batch.sampling_positions, chosen)
        assert batch.next_token_ids is not None
        batch.next_token_ids[:] = chosen

    @staticmethod
    def _compare(batch: StepBatch, anew: StepBatch) -> None:
        assert as_lists(batch.forward) == as_lists(anew.forward)
        assert batch.forward.max_context_len == anew.forward.max_context_len >= batch.ends.max()
        names = ("slots", "ends", "first_positions", "num_tokens", "query_starts", "sampling_rows")
        names += ("sampling_slots", "sampling_positions", "device_sampling_slots", "device_sampling_positions")
        for name in names:
            assert getattr(batch, name).tolist() == getattr(anew, name).tolist(), name


def test_a_batch_that_goes_on_is_the_same_object_until_a_table_needs_a_column() -> None:
    decoding = Decoding()
    decoding.step(decoding.start(3, 2 * BLOCK + 1), decoding.start(1, 2))

    for _ in range(2 * BLOCK):
        decoding.step()

    # The longer sequence begins a block in each fourth step; the shorter one does in others, which changes no size.
    numbers = [sum(batch is not before for before in decoding.batches[:i]) for i, batch in enumerate(decoding.batches)]
    assert numbers == [0] * 4 + [4] * 4 + [8]


def test_rows_at_any_place_of_their_blocks_go_on_as_if_laid_out_anew() -> None:
    decoding = Decoding()
    decoding.step(*(decoding.start(slot, length) for slot, length in ((5, 9), (0, 1), (2, 4), (7, 16), (4, 6))))

    for _ in range(5 * BLOCK):
        decoding.step()


def test_rows_that_leave_and_join_are_laid_out_anew() -> None:
    decoding = Decoding()
    decoding.step(*(decoding.start(slot, 5 + slot) for slot in (6, 2, 0)))
    decoding.step()
    del decoding.positions[2]
    decoding.step()
    decoding.step()

    decoding.step(decoding.start(1, 40))
    decoding.step()

    assert [len(batch.slots) for batch in decoding.batches] == [3, 3, 2, 2, 3, 3]


def test_a_sequence_that_takes_over_a_slot_shares_nothing_with_the_one_before() -> None:
    """Same slots in the same order, and even the position that would have come next."""
    decoding = Decoding()
    decoding.step(decoding.start(6, 7), decoding.start(2, 5))
    decoding.step()

    decoding.step(decoding.start(6, 9))

    assert decoding.token_ids == [[606, 204], [6006, 2004], [608, 2005]]


def test_a_sequence_computed_again_in_its_own_slot_gets_its_new_blocks() -> None:
    """Preempted and back at once: same slot, same position, other blocks."""
    decoding = Decoding()
    decoding.step(decoding.start(6, 7))
    before = decoding.step().forward.block_tables.tolist()

    again = decoding.step(decoding.start(6, 9)).forward.block_tables.tolist()

    assert not set(before[0]) & set(again[0])


def test_rows_in_another_order_are_laid_out_anew() -> None:
    decoding = Decoding()
    decoding.step(decoding.start(6, 7), decoding.start(2, 7))
    decoding.positions = dict(reversed(decoding.positions.items()))

    assert decoding.step().slots.tolist() == [2, 6]


def test_a_row_that_stands_still_is_laid_out_anew() -> None:
    decoding = Decoding()
    decoding.step(decoding.start(6, 7), decoding.start(2, 7))
    decoding.positions[2] -= 1

    assert decoding.step().ends.tolist() == [8, 7]


def test_decoding_goes_on_past_the_width_of_the_token_table() -> None:
    decoding = Decoding()
    decoding.step(decoding.start(0, 1021))

    for _ in range(8):
        decoding.step()


def test_a_row_without_a_block_for_its_token_is_refused_although_it_goes_on() -> None:
    decoding = Decoding()
    decoding.step(decoding.start(0, BLOCK))
    plan = StepPlan(step_id=1, slots=[0], first_positions=[BLOCK], num_tokens=[1], samples=[True])

    with pytest.raises(InvariantBroken, match="row 0"):
        decoding.builder.build(plan)


def test_a_block_handed_out_ahead_is_used_when_its_position_comes() -> None:
    decoding = Decoding()
    decoding.step(decoding.start(0, 2))
    ahead = StepPlan(
        step_id=1, slots=[0], first_positions=[2], num_tokens=[1], samples=[True],
        new_block_slots=[0], new_block_ids=[decoding.free_blocks.pop()],
    )  # fmt: skip
    decoding.tables.append_blocks(ahead)
    decoding._choose(decoding.builder.build(ahead))
    decoding.positions[0], decoding.num_blocks[0] = 3, 2

    for _ in range(2 * BLOCK):
        decoding.step()


def test_another_device_gets_every_step_sent_and_reads_tokens_from_its_own_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Played on the CPU: what arrives there are copies."""
    decoding = Decoding()
    monkeypatch.setattr(decoding.tables, "host_token_ids", None)
    buffer = decoding.builder._buffer
    monkeypatch.setattr(buffer, "upload", lambda: buffer._cut(buffer._tensor.clone()))
    steps = []
    for step in range(2 * BLOCK):
        plan = StepPlan(
            step_id=step,
            starts=(start(3, 6),) if step == 0 else (),
            slots=[3],
            first_positions=[5 + step],
            num_tokens=[1],
            samples=[True],
            new_block_slots=[3, 3] if step == 0 else [3] * ((5 + step) % BLOCK == 0),
            new_block_ids=[40, 41] if step == 0 else [42 + step] * ((5 + step) % BLOCK == 0),
        )
        for sequence in plan.starts:
            decoding.tables.start(sequence)
        decoding.tables.append_blocks(plan)

        batch = decoding.builder.build(plan)

        assert as_lists(batch.forward) == as_lists(BatchBuilder(decoding.tables, [], BLOCK, CPU).build(plan).forward)
        decoding.tables.token_ids[batch.device_sampling_slots, batch.device_sampling_positions] = 7000 + step
        steps.append(batch)

    assert [batch.forward.token_ids.tolist() for batch in steps[:3]] == [[305], [7000], [7001]]
    assert len({id(batch.forward.positions) for batch in steps}) == len(steps)
