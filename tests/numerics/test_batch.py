"""A plan as the arrays that a model reads, field by field."""

import numpy as np
import pytest
import torch

from weft.core.plan import SequenceStart, StepPlan
from weft.core.request import RequestId, SamplingParams, Slot, StopConditions
from weft.models.forward_batch import ForwardBatch
from weft.runner.batch import BatchBuilder
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
    assert (batch.forward.max_context_len, batch.forward.max_query_len) == (9, 6)
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
