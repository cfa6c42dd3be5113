"""Each processor equals the definition that transformers (TGI's own source of them) has of it."""

from collections.abc import Callable

import pytest
import torch
from tests.numerics.sampling.driver import random_logits
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from weft.runner.sampling import processors

pytestmark = pytest.mark.numerics

Step = Callable[[torch.Tensor, torch.Tensor], None]

VALUES = {
    "top_k": (processors.keep_top_k, TopKLogitsWarper, [1, 2, 17, 300], torch.int64),
    "top_p": (processors.keep_top_p, TopPLogitsWarper, [1e-6, 0.1, 0.5, 0.9, 0.999], torch.float32),
    "typical_p": (processors.keep_typical, TypicalLogitsWarper, [1e-6, 0.2, 0.5, 0.9, 0.99], torch.float32),
    "min_p": (processors.keep_min_p, MinPLogitsWarper, [1e-6, 0.01, 0.3, 1.0], torch.float32),
}


@pytest.mark.parametrize("vocab_size", [300, 3000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("name", VALUES)
def test_a_truncation_keeps_what_transformers_keeps(name: str, scale: float, vocab_size: int) -> None:
    step, warper, values, dtype = VALUES[name]
    logits = random_logits(len(values), vocab_size, scale=scale)
    expected = torch.cat([warper(value)(None, logits[row : row + 1].clone()) for row, value in enumerate(values)])
    scores = logits.clone()

    step(scores, torch.tensor(values, dtype=dtype))

    assert torch.equal(scores, expected)


def test_truncations_compose_as_in_transformers() -> None:
    """Each one must judge the distribution that the one before it left."""
    logits = random_logits(64, 2000, scale=2.0)
    chain: list[LogitsProcessor] = [
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.8),
        TypicalLogitsWarper(0.7),
        MinPLogitsWarper(0.05),
    ]
    expected = logits.clone()
    for warper in chain:
        expected = warper(None, expected)
    scores = logits.clone()

    processors.keep_top_k(scores, torch.full((64,), 40))
    processors.keep_top_p(scores, torch.full((64,), 0.8))
    processors.keep_typical(scores, torch.full((64,), 0.7))
    processors.keep_min_p(scores, torch.full((64,), 0.05))

    assert torch.equal(scores, expected)


def test_temperature_gives_the_distribution_of_transformers() -> None:
    temperatures = [0.1, 0.5, 1.7, 30.0]
    logits = random_logits(4, 200)
    expected = [TemperatureLogitsWarper(t)(None, logits[row]).log_softmax(-1) for row, t in enumerate(temperatures)]

    processors.scale_by_temperature(logits, torch.tensor(temperatures))

    torch.testing.assert_close(logits.log_softmax(-1), torch.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-4])
def test_a_temperature_near_zero_leaves_the_best_token_alone(temperature: float) -> None:
    logits = random_logits(1, 100)
    best = int(logits.argmax())

    processors.scale_by_temperature(logits, torch.tensor([temperature]))

    assert logits.softmax(-1)[0, best] == 1.0


def test_a_huge_temperature_makes_all_tokens_alike() -> None:
    logits = random_logits(1, 100)

    processors.scale_by_temperature(logits, torch.tensor([3e38]))

    torch.testing.assert_close(logits.softmax(-1), torch.full((1, 100), 0.01))


def test_top_k_keeps_ties_at_the_last_place() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])

    processors.keep_top_k(scores, torch.tensor([2]))

    assert torch.isfinite(scores[0]).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("vocab_size", [8, 5000])
def test_top_p_takes_equal_tokens_in_order_of_their_ids(vocab_size: int) -> None:
    """A flat distribution is the worst case: every place of the nucleus is a tie."""
    scores = torch.zeros(1, vocab_size)

    processors.keep_top_p(scores, torch.tensor([0.4999]))

    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == list(range(vocab_size // 2))


def test_top_p_finds_a_nucleus_larger_than_its_first_candidates() -> None:
    scores = random_logits(2, 20_000, scale=0.01)
    expected = TopPLogitsWarper(0.75)(None, scores.clone())

    processors.keep_top_p(scores, torch.tensor([0.75, 0.75]))

    # transformers sums 20,000 float32 probabilities: the border may differ by a few tokens.
    num_kept, num_expected = torch.isfinite(scores).sum(-1), torch.isfinite(expected).sum(-1)
    assert (num_kept - num_expected).abs().max() <= 20
    assert (num_kept > 10_000).all()


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(1, 50)
    history = torch.tensor([3, 7, 7, 49])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(history[None], logits.clone())
    distinct = history.unique()

    processors.penalize_history(logits, distinct, torch.full((3,), 1.3), torch.zeros(3))

    assert torch.equal(logits, expected)


@pytest.mark.parametrize("repetition", [1e-38, 3e38])
def test_an_extreme_penalty_does_not_break_the_row(repetition: float) -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0]])

    processors.penalize_history(logits, torch.tensor([0, 1]), torch.full((2,), repetition), torch.zeros(2))

    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_penalty_does_not_repair_a_broken_row(broken: float) -> None:
    """The row must still be recognised as broken: better no token than an invented one."""
    logits = torch.tensor([[broken, -2.0, 0.0]])

    processors.penalize_history(logits, torch.tensor([0]), torch.tensor([1.2]), torch.tensor([0.5]))

    assert not torch.isfinite(logits[0, 0])


def test_forbidden_and_masked_tokens_become_impossible() -> None:
    scores = torch.zeros(2, 4)

    processors.forbid(scores, torch.tensor([1, 4 + 3]))
    processors.keep_allowed(scores[1:], torch.tensor([[True, False, True, True]]))

    assert torch.isfinite(scores).tolist() == [[True, False, True, True], [True, False, True, False]]


def test_a_bias_is_added_to_its_tokens_only() -> None:
    scores = torch.zeros(2, 3)

    processors.add_bias(scores, torch.tensor([1, 3]), torch.tensor([2.5, -1.0]))

    assert scores.tolist() == [[0.0, 2.5, 0.0], [-1.0, 0.0, 0.0]]


@pytest.mark.parametrize("name", VALUES)
def test_a_row_keeps_its_bits_whatever_stands_beside_it(name: str) -> None:
    step, _, values, dtype = VALUES[name]
    logits = random_logits(9, 5000, scale=1.0)
    parameters = torch.tensor([values[row % len(values)] for row in range(9)], dtype=dtype)
    together = logits.clone()
    step(together, parameters)

    for row in range(9):
        alone = logits[row : row + 1].clone()
        step(alone, parameters[row : row + 1])

        assert torch.equal(alone[0], together[row])
