"""A recorded decoder gives the bits of the decoder it was recorded from, whatever the step holds."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.numerics.checkpoints import random_model, save, served
from tests.numerics.families import FAMILIES, FamilyRow
from tests.numerics.paged_driver import SharedExchange, ThreadedGroup

from weft.errors import InvariantBroken
from weft.kernels import kv_layout, ops, registry
from weft.kernels.cpu import library
from weft.kernels.cpu.program import Arena, record
from weft.models.decoder import Decoder, load_decoder
from weft.models.forward_batch import ForwardBatch, LayerKv
from weft.models.quant.rounded import int8
from weft.models.quant.scheme import QuantScheme, Unquantized
from weft.models.registry import describe
from weft.parallel.groups import Group, SoloGroup
from weft.runner.graphs import NotExpressible, ReplayedDecoder, record_decoder

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.skipif(library.load().library is None, reason="programs need the compiled kernels"),
]

BLOCK_SIZE = 16
NUM_BLOCKS = 40
POOLS = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8))
"""Type of activations, and of keys and values."""
VOCAB_SIZE = 211


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[FamilyRow], Path]]:
    @cache
    def make(name: str) -> Path:
        row = next(row for row in FAMILIES if row.name == name)
        directory: Path = save(random_model(row), tmp_path_factory.mktemp(name))
        return directory

    yield lambda row: make(row.name)
    make.cache_clear()


def load(
    directory: Path,
    row: FamilyRow,
    dtype: torch.dtype,
    group: Group | None = None,
    scheme: QuantScheme | None = None,
) -> Decoder:
    description, device = served(describe(directory), row), torch.device("cpu")
    return load_decoder(directory, description, dtype=dtype, device=device, group=group or SoloGroup(), scheme=scheme)


def recorded(decoder: Decoder, kv_dtype: torch.dtype) -> ReplayedDecoder:
    return record_decoder(decoder, SoloGroup(), block_size_tokens=BLOCK_SIZE, dtype=kv_dtype)


@pytest.fixture
def llama(directory_of: Callable[[FamilyRow], Path]) -> Decoder:
    row = next(row for row in FAMILIES if row.name == "llama")
    return load(directory_of(row), row, torch.float32)


class Steps:
    """Three sequences that go through prefill, chunks, decode and mixtures, over a pool of their own."""

    PROMPT_TOKENS = (29, 11, 40)

    def __init__(self, decoder: Decoder, kv_dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(3)
        self.token_ids = torch.randint(0, VOCAB_SIZE, (3, 64), generator=draw, dtype=torch.int32)
        self.tables = torch.randperm(NUM_BLOCKS, generator=draw)[:24].view(3, 8).to(torch.int32)
        self.kv = [
            LayerKv(
                *(
                    torch.zeros(NUM_BLOCKS, heads, BLOCK_SIZE, kv_layout.pool_width(size, kv_dtype), dtype=kv_dtype)
                    for _ in range(2)
                )
            )
            for heads, size in decoder.kv_shapes
        ]
        self.computed = [0, 0, 0]

    def batch(self, rows: Sequence[tuple[int, int]], logit_rows: Sequence[int] | None = None) -> ForwardBatch:
        """The next tokens of each (sequence, number); logits of the last row of each unless told."""
        ids, positions, slots, starts, context = [], [], [], [0], []
        for sequence, number in rows:
            places = torch.arange(self.computed[sequence], self.computed[sequence] + number)
            blocks = self.tables[sequence][places // BLOCK_SIZE]
            ids.append(self.token_ids[sequence][places])
            positions.append(places)
            slots.append(blocks * BLOCK_SIZE + places % BLOCK_SIZE)
            starts.append(starts[-1] + number)
            self.computed[sequence] += number
            context.append(self.computed[sequence])
        wanted = [start - 1 for start in starts[1:]] if logit_rows is None else list(logit_rows)
        return ForwardBatch(
            token_ids=torch.cat(ids),
            positions=torch.cat(positions).to(torch.int32),
            kv_slots=torch.cat(slots).to(torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(context, dtype=torch.int32),
            block_tables=self.tables[[sequence for sequence, _ in rows]],
            logit_rows=torch.tensor(wanted, dtype=torch.int32),
            kv=self.kv,
            max_context_len=max(context),
            max_query_len=max(number for _, number in rows),
        )


STEPS: list[tuple[list[tuple[int, int]], list[int] | None]] = [
    ([(0, 29)], None),  # a whole prompt
    ([(0, 1), (1, 11)], [0, 5, 11]),  # decode beside a prompt; rows in the middle
    ([(0, 1), (1, 1), (2, 17)], [0, 1]),  # a chunk that samples nothing
    ([(2, 23)], []),  # nobody samples
    ([(1, 1), (0, 1), (2, 1)], None),  # decode alone
    ([(2, 1)], None),
]


def run(model: Decoder | ReplayedDecoder, decoder: Decoder, kv_dtype: torch.dtype) -> tuple[list[torch.Tensor], Steps]:
    steps = Steps(decoder, kv_dtype)
    return [model.forward(steps.batch(rows, logit_rows)).clone() for rows, logit_rows in STEPS], steps


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS, ids=str)
@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_every_step_has_the_bits_of_the_decoder(
    row: FamilyRow, dtype: torch.dtype, kv_dtype: torch.dtype, directory_of: Callable[[FamilyRow], Path]
) -> None:
    decoder = load(directory_of(row), row, dtype)

    logits, steps = run(recorded(decoder, kv_dtype), decoder, kv_dtype)

    expected, expected_steps = run(decoder, decoder, kv_dtype)
    for number, (got, wanted) in enumerate(zip(logits, expected, strict=True)):
        assert got.shape == wanted.shape
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted), f"step {number}"
    for got_kv, wanted_kv in zip(steps.kv, expected_steps.kv, strict=True):
        assert torch.equal(got_kv.keys, wanted_kv.keys)
        assert torch.equal(got_kv.values, wanted_kv.values)


@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS, ids=str)
def test_threads_change_no_bit(
    dtype: torch.dtype, kv_dtype: torch.dtype, directory_of: Callable[[FamilyRow], Path]
) -> None:
    row = next(row for row in FAMILIES if row.name == "gemma2")
    decoder = load(directory_of(row), row, dtype)
    replayed = recorded(decoder, kv_dtype)
    num_threads = library.load().library.weft_threads()  # type: ignore[union-attr]
    try:
        registry.set_threads(1)
        alone, _ = run(replayed, decoder, kv_dtype)
        registry.set_threads(2)
        together, _ = run(replayed, decoder, kv_dtype)
    finally:
        registry.set_threads(num_threads)

    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))


LONG = {"max_position_embeddings": 2048, "num_hidden_layers": 2, "tie_word_embeddings": True}
LONG_ROWS = [
    FamilyRow("llama-long", "LlamaConfig", LONG),
    FamilyRow("gemma2-long", "Gemma2Config", LONG | {"sliding_window": 700, "query_pre_attn_scalar": 24}),
]


def random_pool(num_blocks: int, heads: int, head_size: int, dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    pool = torch.zeros(num_blocks, heads, BLOCK_SIZE, kv_layout.pool_width(head_size, dtype), dtype=dtype)
    num_slots = num_blocks * BLOCK_SIZE
    kv_layout.write_keys(pool, torch.arange(num_slots), torch.randn(num_slots, heads, head_size, generator=draw))
    return pool


def shared_batch(kv: Sequence[LayerKv], histories: Sequence[tuple[list[int], int, int]]) -> ForwardBatch:
    """The last rows of each (blocks, context, rows)."""
    width = max(len(blocks) for blocks, _, _ in histories)
    tables = [blocks + [0] * (width - len(blocks)) for blocks, _, _ in histories]
    contexts = [context for _, context, _ in histories]
    starts = list(itertools.accumulate((rows for _, _, rows in histories), initial=0))
    places = [(blocks, at) for blocks, context, rows in histories for at in range(context - rows, context)]

    def integers(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return ForwardBatch(
        token_ids=integers([0] * len(places)),  # copies of a sequence write the same numbers to the same place
        positions=integers([at for _, at in places]),
        kv_slots=integers([blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for blocks, at in places]),
        query_starts=integers(starts),
        context_lens=integers(contexts),
        block_tables=integers(tables),
        logit_rows=integers(range(len(places))),
        kv=kv,
        max_context_len=max(contexts),
        max_query_len=max(rows for _, _, rows in histories),
    )


def shared_histories() -> tuple[list[tuple[list[int], int, int]], int]:
    """Sequences that share 3, 2, 1 and no whole parts of 512 positions, and some of the next, in no order; and how many
    blocks there are.
    """
    fresh = iter(range(10_000))

    def take(num_tokens: int) -> list[int]:
        return [next(fresh) for _ in range(-(-num_tokens // BLOCK_SIZE))]

    long, middle = take(1600), take(520)
    contexts = [(1601, 1600), (700, 512), (30, 0), (1700, 1536), (1029, 1024), (1537, 1536), (513, 512), (512, 504)]
    contexts += [(1500, 1408), (1480, 1440), (300, 240), (200, 64)]
    histories = [(long[: shared // BLOCK_SIZE] + take(context - shared), context, 1) for context, shared in contexts]
    histories += [
        (middle[: 512 // BLOCK_SIZE] + take(10), 522, 1),
        (take(900), 900, 1),
        (middle[: 512 // BLOCK_SIZE] + take(600), 1100, 1),
        (take(1), 1, 1),
        (long[: 1408 // BLOCK_SIZE] + take(60), 1468, 60),
    ]
    return histories, next(fresh)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize(("dtype", "kv_dtype"), POOLS, ids=str)
@pytest.mark.parametrize("row", LONG_ROWS, ids=lambda row: row.name)
def test_what_sequences_share_is_read_once_and_changes_no_bit(
    row: FamilyRow, dtype: torch.dtype, kv_dtype: torch.dtype, copies: int, num_threads: int, tmp_path: Path
) -> None:
    """Many copies of each: more than are computed at once."""
    decoder = load(save(random_model(row), tmp_path), row, dtype)
    replayed = recorded(decoder, kv_dtype)
    histories, num_blocks = shared_histories()
    draw = torch.Generator().manual_seed(11)
    pools = [
        LayerKv(*(random_pool(num_blocks, heads, size, kv_dtype, draw) for _ in range(2)))
        for heads, size in decoder.kv_shapes
    ]
    batch = shared_batch(pools, histories * copies)
    before = library.load().library.weft_threads()  # type: ignore[union-attr]
    try:
        registry.set_threads(num_threads)
        alone = [decoder.forward(shared_batch(pools, [history])) for history in histories]
        logits = replayed.forward(batch)
    finally:
        registry.set_threads(before)

    assert torch.equal(logits, torch.cat(alone * copies))


def test_hidden_states_and_logits_apart_are_the_forward(llama: Decoder) -> None:
    replayed = recorded(llama, torch.float32)
    rows = [(0, 29), (1, 11)]

    hidden = replayed.hidden_states(Steps(llama, torch.float32).batch(rows, [3, 28, 39])).clone()
    logits = replayed.logits(hidden)

    expected = llama.forward(Steps(llama, torch.float32).batch(rows, [3, 28, 39]))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("logit_rows", [[3, 28, 39], [39], []], ids=str)
def test_choosing_in_the_same_call_is_greedy_of_the_logits(llama: Decoder, logit_rows: list[int]) -> None:
    replayed = recorded(llama, torch.float32)
    rows = [(0, 29), (1, 11)]

    token_ids, logprobs = replayed.greedy(Steps(llama, torch.float32).batch(rows, logit_rows))

    expected = ops.greedy(llama.forward(Steps(llama, torch.float32).batch(rows, logit_rows)))
    assert token_ids.tolist() == expected[0].tolist()
    assert logprobs.tolist() == expected[1].tolist()


def test_a_batch_filled_anew_in_the_same_tensors_is_read_anew(llama: Decoder) -> None:
    """Steady decoding brings the same tensors at every step."""
    replayed = recorded(llama, torch.float32)
    steps, expected_steps = Steps(llama, torch.float32), Steps(llama, torch.float32)
    kept = steps.batch([(0, 1)])
    replayed.forward(kept)
    llama.forward(expected_steps.batch([(0, 1)]))

    for _ in range(3):
        fresh = steps.batch([(0, 1)])
        for name in ("token_ids", "positions", "kv_slots", "context_lens"):
            getattr(kept, name).copy_(getattr(fresh, name))

        assert torch.equal(replayed.forward(kept), llama.forward(expected_steps.batch([(0, 1)])))


def test_a_later_and_larger_step_may_move_the_memory(llama: Decoder) -> None:
    replayed = recorded(llama, torch.float32)
    steps, expected_steps = Steps(llama, torch.float32), Steps(llama, torch.float32)

    replayed.forward(steps.batch([(0, 2)]))
    logits = replayed.forward(steps.batch([(0, 20), (1, 11), (2, 40)]))

    llama.forward(expected_steps.batch([(0, 2)]))
    assert torch.equal(logits, llama.forward(expected_steps.batch([(0, 20), (1, 11), (2, 40)])))


def test_another_pool_may_be_used_at_every_step(llama: Decoder) -> None:
    replayed = recorded(llama, torch.float32)

    first = replayed.forward(Steps(llama, torch.float32).batch([(0, 9)])).clone()
    second = replayed.forward(Steps(llama, torch.float32).batch([(0, 9)]))

    assert torch.equal(first, second)


def test_the_time_of_each_kind_of_operation_is_told(llama: Decoder) -> None:
    spent = recorded(llama, torch.float32).time_operations(Steps(llama, torch.float32).batch([(0, 29)]))

    assert {"embedding", "norm", "attention", "activation", "linear 48 → 211"} <= set(spent)
    assert all(nanoseconds > 0 for nanoseconds in spent.values())


@pytest.mark.parametrize(
    ("field", "index", "value", "named"),
    [
        ("token_ids", 3, VOCAB_SIZE, "token_ids 211"),
        ("token_ids", 0, -1, "token_ids -1"),
        ("positions", 28, 256, "positions 256"),
        ("kv_slots", 5, NUM_BLOCKS * BLOCK_SIZE, "kv_slots 640"),
        ("query_starts", 1, 30, "sequence 0"),
        ("context_lens", 0, 28, "sequence 0"),
        ("context_lens", 0, 8 * BLOCK_SIZE + 1, "sequence 0"),
        ("logit_rows", 0, 29, "row 29"),
    ],
)
def test_a_batch_that_points_outside_is_refused_before_anything_runs(
    llama: Decoder, field: str, index: int, value: int, named: str
) -> None:
    replayed = recorded(llama, torch.float32)
    steps = Steps(llama, torch.float32)
    batch = steps.batch([(0, 29)])
    getattr(batch, field)[index] = value

    with pytest.raises(InvariantBroken, match=named):
        replayed.forward(batch)

    assert not any(layer.keys.any() for layer in steps.kv)


def test_a_batch_of_another_integer_type_is_refused(llama: Decoder) -> None:
    batch = Steps(llama, torch.float32).batch([(0, 5)])

    with pytest.raises(InvariantBroken, match="int64"):
        recorded(llama, torch.float32).forward(replace(batch, positions=batch.positions.long()))


def test_without_compiled_kernels_operations_run_one_by_one(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library._Process, "loaded", library.Loaded(None, "no compiler found"))

    with pytest.raises(NotExpressible, match="no compiler found"):
        recorded(llama, torch.float32)


def test_with_the_reference_kernels_operations_run_one_by_one(directory_of: Callable[[FamilyRow], Path]) -> None:
    row = next(row for row in FAMILIES if row.name == "llama")
    with registry.force("reference"):
        decoder = load(directory_of(row), row, torch.float32)

        with pytest.raises(NotExpressible, match="reference kernels"):
            recorded(decoder, torch.float32)


def test_blocks_that_the_compiled_kernels_cannot_read_are_the_reason_given(llama: Decoder) -> None:
    with pytest.raises(NotExpressible, match="blocks of at least 16 tokens"):
        record_decoder(llama, SoloGroup(), block_size_tokens=8, dtype=torch.float32)


@pytest.mark.parametrize("scheme", [Unquantized(), int8()], ids=["unquantized", "int8"])
def test_float16_runs_one_by_one(directory_of: Callable[[FamilyRow], Path], scheme: QuantScheme) -> None:
    row = next(row for row in FAMILIES if row.name == "llama")
    decoder = load(directory_of(row), row, torch.float16, scheme=scheme)

    with pytest.raises(NotExpressible, match="float16 has no compiled kernels"):
        recorded(decoder, torch.float16)


def test_several_ranks_run_one_by_one(directory_of: Callable[[FamilyRow], Path]) -> None:
    row = next(row for row in FAMILIES if row.name == "llama")
    group = ThreadedGroup(0, SharedExchange(2))
    decoder = load(directory_of(row), row, torch.float32, group)

    with pytest.raises(NotExpressible, match="several ranks"):
        record_decoder(decoder, group, block_size_tokens=BLOCK_SIZE, dtype=torch.float32)


def test_an_operation_behind_the_recorders_back_is_found_out(llama: Decoder) -> None:
    """Arithmetic outside of `ops` would be missing from the program."""

    def outside(batch: ForwardBatch) -> torch.Tensor:
        return ops.take_rows(llama.forward(batch) * 2.0, torch.tensor([0], dtype=torch.int32))

    with pytest.raises(NotExpressible, match="own rows"):
        record(outside, Steps(llama, torch.float32).batch([(0, 29), (1, 3)]), Arena())


def test_arithmetic_in_place_is_found_out_by_the_proof(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda self, batch: original(self, batch).mul_(2.0))

    with torch.inference_mode(), pytest.raises(NotExpressible, match="other numbers"):
        recorded(llama, torch.float32)


def test_a_program_keeps_its_weights(directory_of: Callable[[FamilyRow], Path], tmp_path: Path) -> None:
    """It holds addresses: the tensors behind them must live as long."""
    row = next(row for row in FAMILIES if row.name == "llama")
    shutil.copytree(directory_of(row), tmp_path, dirs_exist_ok=True)
    decoder = load(tmp_path, row, torch.float32)
    program = record(decoder.forward, Steps(decoder, torch.float32).batch([(0, 29), (1, 3)]), Arena())
    expected = decoder.forward(Steps(decoder, torch.float32).batch([(0, 29)]))
    steps = Steps(decoder, torch.float32)
    del decoder

    (logits,) = program.run(steps.batch([(0, 29)]))
    assert torch.equal(logits, expected)
