"""Paged attention: near the exact result, and the same bits however the same rows are computed."""

import math

import pytest
import torch
from tests.numerics.kernels.paged_cases import PagedCase, make_case, with_common_blocks

from weft.errors import InvariantBroken
from weft.kernels import ops, registry

pytestmark = pytest.mark.numerics

DTYPES = (torch.float32, torch.bfloat16)
POOLS = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8))
"""Queries, keys and values."""
MIXED = ((1, 1), (1, 200), (37, 37), (20, 130), (1, 33), (0, 0), (1, 64))


def assert_near_exact(case: PagedCase) -> None:
    exact, magnitude = case.exact()
    # Beside codes of 8 bits queries have 15, which moves a weight no more than rounding it to bfloat16 does.
    arithmetic = torch.bfloat16 if case.keys.dtype == torch.int8 else case.q.dtype
    tolerance = ops.TOLERANCES["paged_attention"]
    bound = torch.maximum(
        tolerance.bound(exact, magnitude, case.q.dtype),
        tolerance.narrow * torch.finfo(arithmetic).eps * magnitude * (arithmetic == torch.bfloat16),
    )
    error = (case.run().double() - exact).abs()
    assert bool((error <= bound).all()), f"worst error {float((error / bound).max())} of what is allowed"


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
@pytest.mark.parametrize(
    ("head_size", "block_size", "heads"),
    [
        (64, 32, (9, 3)),
        (80, 16, (4, 4)),
        (96, 32, (8, 2)),
        (128, 16, (8, 1)),
        (256, 64, (4, 2)),
        (8, 48, (2, 1)),
        (72, 32, (3, 1)),
        (100, 32, (6, 2)),
        (34, 16, (3, 3)),
        (64, 32, (71, 1)),
    ],
)
def test_attention_is_near_the_exact_result(
    kernel_set: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    head_size: int,
    block_size: int,
    heads: tuple[int, int],
) -> None:
    assert_near_exact(
        make_case(MIXED, heads=heads, head_size=head_size, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype)
    )


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
@pytest.mark.parametrize(
    ("softcap", "window"), [(0.0, 1), (0.0, 7), (0.0, 32), (0.0, 33), (0.0, 100), (0.0, 1000), (5.0, 0), (30.0, 50)]
)
def test_window_and_soft_cap_are_near_the_exact_result(
    kernel_set: str, dtype: torch.dtype, kv_dtype: torch.dtype, softcap: float, window: int
) -> None:
    assert_near_exact(make_case(MIXED, dtype=dtype, kv_dtype=kv_dtype, softcap=softcap, window=window))


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
@pytest.mark.parametrize("window", [0, 300])
def test_contexts_of_many_parts_are_near_the_exact_result(
    kernel_set: str, dtype: torch.dtype, kv_dtype: torch.dtype, window: int
) -> None:
    lengths = ((1, 511), (1, 512), (1, 513), (100, 1100), (1, 1537))
    assert_near_exact(make_case(lengths, heads=(3, 1), head_size=16, dtype=dtype, kv_dtype=kv_dtype, window=window))


def test_queries_of_one_type_read_a_pool_of_another(compiled: str) -> None:
    for dtype, kv_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int8),
    ):
        assert_near_exact(make_case(MIXED, dtype=dtype, kv_dtype=kv_dtype))


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
@pytest.mark.parametrize("window", [0, 40, 600])
def test_a_row_has_the_same_bits_as_prefill_chunk_and_decode(
    compiled: str, dtype: torch.dtype, kv_dtype: torch.dtype, window: int
) -> None:
    """A preempted sequence recomputes as prefill what it had computed as decode, and its text must not change."""
    case = make_case([(700, 700)], heads=(6, 2), head_size=32, dtype=dtype, kv_dtype=kv_dtype, window=window)
    whole = case.run()

    for chunk in (1, 7, 33, 256):
        ends = range(chunk, 700 + chunk, chunk)
        if chunk == 1:
            ends = range(1, 701, 23)
        for end in ends:
            part = case.part(0, end - chunk, min(end, 700)).run()
            assert torch.equal(part, whole[end - chunk : min(end, 700)]), f"chunk of {chunk} ending at {end}"


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(
    compiled: str, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    lengths = ((1, 700), (5, 40), (1, 1), (64, 90), (1, 513))
    case = make_case(lengths, dtype=dtype, kv_dtype=kv_dtype)
    together = case.run()

    first = 0
    for sequence, (rows, context) in enumerate(lengths):
        alone = case.part(sequence, context - rows, context).run()
        assert torch.equal(alone, together[first : first + rows])
        first += rows


COMMON = (
    # rows and context of a sequence, whose blocks it begins with, and for how many positions
    ((1, 1700), (0, 0)),
    ((1, 1600), (0, 1600)),
    ((1, 1699), (0, 1300)),  # leaves the others within a part
    ((72, 1310), (0, 1238)),  # a prompt's last rows beside those that decode
    ((1, 1537), (0, 1536)),
    ((1, 700), (0, 512)),
    ((1, 640), (5, 600)),  # two go on together after a third has left
    ((1, 300), (0, 160)),
    ((1, 300), (0, 96)),  # too little to be worth it
    ((5, 200), (0, 128)),
    ((1, 129), (0, 128)),
    ((1, 900), (11, 0)),
    ((1, 900), (11, 850)),
    ((130, 890), (11, 760)),
    ((0, 0), (0, 0)),
    ((1, 1), (0, 0)),
)


@pytest.mark.parametrize("copies", [1, 7])
@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
@pytest.mark.parametrize(
    ("heads", "head_size", "block_size", "softcap", "window"),
    [
        ((9, 3), 64, 32, 0.0, 0),
        ((2, 2), 80, 16, 0.0, 0),
        ((8, 1), 72, 48, 5.0, 0),
        ((5, 1), 10, 64, 0.0, 0),
        ((4, 2), 16, 32, 0.0, 400),
    ],
)
def test_sequences_that_begin_alike_have_the_same_bits_alone_and_together(
    compiled: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    heads: tuple[int, int],
    head_size: int,
    block_size: int,
    softcap: float,
    window: int,
    copies: int,
) -> None:
    """Decoding rows read what they have in common once, chunks of prompts stand beside them."""
    lengths = tuple(length for length, _ in COMMON) * copies
    apart = make_case(
        lengths,
        heads=heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
        softcap=softcap,
        window=window,
    )
    case = with_common_blocks(apart, [shared for _, shared in COMMON] * copies)
    alone = [
        case.part(sequence, context - rows, context).run() for sequence, (rows, context) in enumerate(lengths) if rows
    ]

    for threads in (1, 3):
        registry.set_threads(threads)
        assert torch.equal(case.run(), torch.cat(alone))


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
def test_what_sequences_have_in_common_is_near_the_exact_result(
    kernel_set: str, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    lengths = [length for length, _ in COMMON]
    case = make_case(lengths, heads=(3, 1), head_size=16, dtype=dtype, kv_dtype=kv_dtype)
    assert_near_exact(with_common_blocks(case, [shared for _, shared in COMMON]))


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
def test_threads_do_not_change_a_bit(compiled: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """With few sequences the parts of a context are shared out among threads, with many they are not."""
    for lengths in (((1, 2000),), ((130, 1200),), ((1, 600),) * 9):
        case = make_case(lengths, heads=(3, 1), head_size=16, dtype=dtype, kv_dtype=kv_dtype)
        results = []
        for threads in (1, 2, 5):
            registry.set_threads(threads)
            results.append(case.run())
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS)
def test_the_block_size_does_not_change_a_bit(compiled: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Tiles are aligned to positions, not to blocks."""
    results = [
        make_case([(90, 600)], block_size=size, dtype=dtype, kv_dtype=kv_dtype, window=70).run()
        for size in (16, 48, 32, 64, 128)
    ]

    assert all(torch.equal(result, results[0]) for result in results)


def test_queries_may_be_a_view_into_a_wider_tensor(kernel_set: str) -> None:
    case = make_case([(3, 40)], heads=(4, 2), head_size=16)
    wide = torch.randn(3, 8 * 16)
    wide[:, : 4 * 16] = case.q.flatten(1)
    view = PagedCase(**{**vars(case), "q": wide[:, : 4 * 16].view(3, 4, 16)})

    assert torch.equal(view.run(), case.run())


def test_blocks_left_behind_by_the_window_are_never_read(compiled: str) -> None:
    """The engine may hand them to another sequence; here they hold NaN, and their table entries point nowhere."""
    case = make_case([(1, 200)], block_size=16, window=20)
    expected = case.run()

    case.keys[case.block_tables[0, : 180 // 16].long()] = torch.nan
    case.values[case.block_tables[0, : 180 // 16].long()] = torch.nan
    case.block_tables[0, : 180 // 16] = -1

    assert torch.equal(case.run(), expected)


def test_an_empty_step_gives_an_empty_result(kernel_set: str) -> None:
    assert make_case([]).run().shape == (0, 4, 64)


@pytest.mark.parametrize(("block", "lengths"), [(99, ((1, 40),)), (-1, ((1, 40),)), (0, ((1, 4000),)), (0, ((5, 3),))])
def test_blocks_and_lengths_out_of_range_are_refused(
    compiled: str, block: int, lengths: tuple[tuple[int, int], ...]
) -> None:
    """Better no tokens than a read of foreign memory."""
    case = make_case([(5, 40)])
    case.block_tables[0, 1] = block

    with pytest.raises(InvariantBroken, match="sequence 0"):
        PagedCase(**{**vars(case), "lengths": lengths}).run()


def test_a_shape_that_does_not_fit_is_named() -> None:
    case = make_case([(1, 10)])

    with pytest.raises(ValueError, match=r"`keys` must be 32 wide for the head size 32 of q"):
        PagedCase(**{**vars(case), "q": torch.randn(1, 4, 32)}).run()
    with pytest.raises(ValueError, match=r"`block_tables` must be contiguous int32"):
        PagedCase(**{**vars(case), "block_tables": case.block_tables.long()}).run()


@pytest.mark.parametrize(
    ("option", "number"), [("scale", 0.0), ("scale", -1.0), ("scale", math.nan), ("softcap", -1.0), ("window", -1)]
)
def test_numbers_that_attention_cannot_do_are_refused(option: str, number: float) -> None:
    """A negative scale would make the largest score the smallest weight's."""
    case = make_case([(1, 10)])
    tensors = (case.q, case.keys, case.values, case.block_tables)
    starts, context = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    numbers = {"scale": 0.125, option: number}

    with pytest.raises(ValueError, match=f"`{option}` must be"):
        ops.paged_attention(*tensors, starts, context, **numbers, max_query_len=1, max_context_len=10)
