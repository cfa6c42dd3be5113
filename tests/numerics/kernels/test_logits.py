"""Greedy choice, log-probabilities and the exponential race."""

import math

import pytest
import torch

from weft.errors import InvariantBroken
from weft.kernels import ops, reference, registry
from weft.kernels.philox import philox4x32, token_words

pytestmark = pytest.mark.numerics

SHAPES = ((1, 1), (3, 5), (2, 64), (7, 100), (1, 8192), (2, 8193), (3, 49152))
NAN, INFINITY = math.nan, math.inf


def random_logits(rows: int, width: int) -> torch.Tensor:
    return 4 * torch.randn(rows, width, generator=torch.Generator().manual_seed(width))


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_greedy_finds_the_best_id_and_its_logprob(kernel_set: str, rows: int, width: int) -> None:
    logits = random_logits(rows, width)

    ids, logprobs = ops.greedy(logits)

    exact = torch.log_softmax(logits.double(), dim=-1).amax(dim=-1)
    assert torch.equal(ids, logits.argmax(dim=-1))
    bound = ops.TOLERANCES["greedy"].bound(exact, 1 + exact.abs(), torch.float32)
    assert bool(((logprobs.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_token_logprobs_are_near_the_exact_log_softmax(kernel_set: str, rows: int, width: int) -> None:
    logits = random_logits(rows, width)
    ids = torch.randint(0, width, (rows,))

    logprobs = ops.token_logprobs(logits, ids)

    exact = torch.log_softmax(logits.double(), dim=-1).gather(1, ids[:, None])[:, 0]
    bound = ops.TOLERANCES["token_logprobs"].bound(exact, 1 + exact.abs(), torch.float32)
    assert bool(((logprobs.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("width", [1, 5, 64, 8193])
@pytest.mark.parametrize("lead", [0.5, 3.0, 30.0, 200.0])
def test_greedy_and_token_logprobs_agree_to_the_last_bit(kernel_set: str, width: int, lead: float) -> None:
    """Neighbours decide which of the two a step calls. A token so far ahead that it is certain has +0, not -0."""
    logits = random_logits(6, width)
    logits[:, width // 2] = logits.amax(dim=-1) + lead

    ids, logprobs = ops.greedy(logits)

    assert logprobs.view(torch.int32).tolist() == ops.token_logprobs(logits, ids).view(torch.int32).tolist()


@pytest.mark.parametrize("places", [(0, 1), (17, 18), (5, 8200), (8191, 8192), (15, 16, 20000)])
def test_the_smallest_id_wins_a_tie(kernel_set: str, places: tuple[int, ...]) -> None:
    logits = torch.zeros(2, 20001)
    logits[1, list(places)] = 3.0

    assert ops.greedy(logits)[0].tolist() == [0, places[0]]


@pytest.mark.parametrize("bad", [NAN, INFINITY])
@pytest.mark.parametrize("place", [0, 7, 8191, 8192, 9999])
def test_a_row_that_is_no_distribution_gives_no_id(kernel_set: str, bad: float, place: int) -> None:
    logits = random_logits(3, 10000)
    logits[1, place] = bad
    seeds = positions = torch.zeros(3, dtype=torch.int64)

    ids, logprobs = ops.greedy(logits)

    assert [int(i) == -1 for i in ids] == [False, True, False]
    assert logprobs.isnan().tolist() == [False, True, False]
    assert [int(i) == -1 for i in ops.race(logits, seeds, positions)] == [False, True, False]


def test_a_row_without_any_allowed_id_gives_none(kernel_set: str) -> None:
    logits = torch.full((1, 100), -INFINITY)
    zero = torch.zeros(1, dtype=torch.int64)

    assert ops.greedy(logits)[0].tolist() == [-1]
    assert ops.race(logits, zero, zero).tolist() == [-1]


def test_forbidden_ids_are_never_chosen(kernel_set: str) -> None:
    logits = torch.full((50, 300), -INFINITY)
    logits[:, 123] = -1e4
    seeds, positions = torch.arange(50), torch.arange(50)

    assert ops.greedy(logits)[0].unique().tolist() == [123]
    assert ops.race(logits, seeds, positions).unique().tolist() == [123]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_every_implementation_names_the_same_winner_of_the_race(
    compiled: str, rows: int, width: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    logits = random_logits(rows, width) / temperature
    logits[:, ::3] = -INFINITY if width > 1 else 0.0
    for _ in range(5):
        seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
        positions = torch.randint(0, 100_000, (rows,), generator=generator)
        assert torch.equal(ops.race(logits, seeds, positions), reference.race(logits, seeds, positions))


def test_the_race_draws_from_the_softmax(kernel_set: str) -> None:
    """Chi-squared test at 30,000 draws over 8 ids; 99.9 % of true samplers stay below 24.3."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -INFINITY, 0.0])
    draws = 30_000

    ids = ops.race(logits.expand(draws, -1).contiguous(), torch.full((draws,), 42), torch.arange(draws))

    expected = torch.softmax(logits.double(), dim=0) * draws
    counts = torch.bincount(ids, minlength=8).double()
    assert counts[6] == 0
    kept = expected > 0
    assert float(((counts - expected)[kept].square() / expected[kept]).sum()) < 24.3


def random_draws(rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Temperatures (a third of them 1), seeds, positions, whether log-probabilities are of the logits themselves."""
    generator = torch.Generator().manual_seed(seed)
    temperatures = torch.rand(rows, generator=generator) * 2 + 0.01
    temperatures[torch.rand(rows, generator=generator) < 0.33] = 1.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 100_000, (rows,), generator=generator)
    return temperatures, seeds, positions, torch.rand(rows, generator=generator) < 0.5


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_draw_has_the_bits_of_its_parts_one_after_the_other(compiled: str, rows: int, width: int) -> None:
    logits = random_logits(rows, width)
    logits[:, ::3] = -INFINITY if width > 1 else 0.0
    temperatures, seeds, positions, is_raw = random_draws(rows, width)
    ids, logprobs = ops.draw(logits, temperatures, seeds, positions, is_raw)

    tempered = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    scores = torch.where((temperatures == 1.0)[:, None], logits, tempered)
    assert torch.equal(ids, ops.race(scores, seeds, positions))
    reported = torch.where(is_raw[:, None], logits, scores)
    assert torch.equal(logprobs.view(torch.int32), ops.token_logprobs(reported, ids).view(torch.int32))


def test_a_draw_of_a_row_is_the_same_alone(compiled: str) -> None:
    logits, asked = random_logits(9, 20_000), random_draws(9)
    ids, logprobs = ops.draw(logits, *asked)

    for row in range(9):
        own = slice(row, row + 1)
        alone = ops.draw(logits[own], *(column[own] for column in asked))
        assert torch.equal(alone[0], ids[own])
        assert torch.equal(alone[1].view(torch.int32), logprobs[own].view(torch.int32))


@pytest.mark.parametrize("temperature", [torch.finfo(torch.float32).tiny, 0.5, 1.0])
def test_a_draw_from_a_row_without_meaning_names_no_token(kernel_set: str, temperature: float) -> None:
    logits = random_logits(5, 10_000)
    logits[1, 9_000], logits[2, 17], logits[3] = float("nan"), INFINITY, -INFINITY
    numbers = torch.arange(5)
    ids, logprobs = ops.draw(logits, torch.full((5,), temperature), numbers, numbers, numbers % 2 == 0)

    assert [int(token_id) == -1 for token_id in ids] == [False, True, True, True, False]
    assert logprobs.isnan().tolist() == [False, True, True, True, False]


def test_a_row_of_the_race_depends_on_its_own_seed_and_position_only(compiled: str) -> None:
    logits = random_logits(9, 5000)
    seeds, positions = torch.arange(9) * 7, torch.arange(9) * 13
    together = ops.race(logits, seeds, positions)

    for row in range(9):
        own = slice(row, row + 1)
        assert torch.equal(ops.race(logits[own], seeds[own], positions[own]), together[own])
    assert not torch.equal(ops.race(logits, seeds + 1, positions), together)
    assert not torch.equal(ops.race(logits, seeds, positions + 1), together)


def test_threads_and_batch_do_not_change_a_bit_of_a_logprob(compiled: str) -> None:
    logits = random_logits(5, 30_000)
    results = []
    for threads in (1, 2, 5):
        registry.set_threads(threads)
        results.append(torch.cat([*ops.greedy(logits), ops.token_logprobs(logits, torch.arange(5))]))

    assert all(torch.equal(result, results[0]) for result in results)
    assert torch.equal(torch.cat([ops.greedy(row[None])[1] for row in logits]), ops.greedy(logits)[1])


@pytest.mark.parametrize("bad", [-1, 100])
def test_an_id_outside_the_vocabulary_is_refused(compiled: str, bad: int) -> None:
    with pytest.raises(InvariantBroken, match=f"token id {bad} at row 1"):
        ops.token_logprobs(torch.zeros(2, 100), torch.tensor([0, bad]))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_agrees_with_its_authors_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)

    assert tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1))) == expected


def test_token_words_follow_the_documented_layout() -> None:
    seed, position, token = -5, 2**32 + 9, 1234

    words = token_words(torch.tensor([seed]), torch.tensor([position]), 2000)

    unsigned = seed % 2**64
    block = philox4x32(
        (torch.tensor([token // 4]), torch.tensor([9]), torch.tensor([1]), torch.tensor([0])),
        (torch.tensor([unsigned % 2**32]), torch.tensor([unsigned // 2**32])),
    )
    assert int(words[0, token]) == int(block[token % 4])
