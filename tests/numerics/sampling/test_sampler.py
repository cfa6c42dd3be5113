"""The sampler as a whole: distributions, order of the steps, independence of the batch, what is reported."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.numerics.sampling.driver import Row, new_sampler, random_logits, sample, start
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from weft.core.request import MAX_SEED, LogprobStyle, PenaltyStyle, SamplingParams, StopConditions
from weft.runner.sampling.watermark import WatermarkSettings, green_list

pytestmark = pytest.mark.numerics

VOCAB = 61


def expected_distribution(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """[V] probabilities by transformers' processors in TGI's order."""
    sampling = row.sampling
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1.0:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.typical_p < 1.0:
        chain.append(TypicalLogitsWarper(sampling.typical_p))
    if sampling.min_p > 0.0:
        chain.append(MinPLogitsWarper(sampling.min_p))
    history = torch.tensor([row.token_ids])
    return chain(history, logits[None].clone())[0].double().softmax(-1)


def chi_square_bound(degrees: int) -> float:
    """Exceeded by chance once in ten thousand: Wilson and Hilferty's approximation at z = 3.72."""
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(do_sample=True),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=2.5),
        SamplingParams(top_k=7),
        SamplingParams(do_sample=True, top_k=10 * VOCAB),
        SamplingParams(top_p=0.7),
        SamplingParams(typical_p=0.6),
        SamplingParams(min_p=0.1),
        SamplingParams(do_sample=True, repetition_penalty=1.8),
        SamplingParams(temperature=1.4, top_k=20, top_p=0.9, typical_p=0.95, min_p=0.02, repetition_penalty=1.2),
    ],
    ids=lambda sampling: "-".join(
        f"{name}={getattr(sampling, name)}"
        for name in sampling.__dataclass_fields__
        if getattr(sampling, name) != getattr(SamplingParams(), name)
    ),
)
def test_tokens_are_drawn_from_the_distribution_of_transformers(sampling: SamplingParams) -> None:
    draws = 6000
    logits = random_logits(1, VOCAB, seed=3, scale=1.5)
    rows = [Row(replace(sampling, seed=seed)) for seed in range(draws)]
    expected = expected_distribution(logits[0], rows[0]) * draws

    ids = sample(logits.expand(draws, -1).contiguous(), rows).token_ids

    counts = torch.bincount(ids, minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0
    # Rare tokens are counted together: the statistic wants a handful of each kind.
    rare = (expected > 0) & (expected < 5)
    observed = torch.cat([counts[expected >= 5], counts[rare].sum()[None]])
    wanted = torch.cat([expected[expected >= 5], expected[rare].sum()[None]])
    statistic = float(((observed - wanted) ** 2 / wanted.clamp(min=1.0)).sum())
    assert statistic < chi_square_bound(max(1, len(wanted) - 1))


def random_row(draw: random.Random) -> Row:
    """Any mixture of parameters, neutral ones included."""
    length = draw.randint(2, 40)
    pick = draw.choice
    sampling = SamplingParams(
        do_sample=pick([True, False]),
        seed=draw.getrandbits(64),
        temperature=pick([1.0, 1.0, 0.3, 1.9]),
        top_k=pick([0, 0, 5, 10_000]),
        top_p=pick([1.0, 1.0, 0.5, 0.95]),
        min_p=pick([0.0, 0.0, 0.05]),
        typical_p=pick([1.0, 1.0, 0.8]),
        repetition_penalty=pick([1.0, 1.0, 1.3]),
        frequency_penalty=pick([0.0, 0.0, 0.7]),
        presence_penalty=pick([0.0, 0.0, -0.4]),
        penalty_style=pick(list(PenaltyStyle)),
        logit_bias=pick([(), (), ((3, 4.0), (11, -100.0))]),
        watermark=pick([False, False, True]),
        logprob_style=pick(list(LogprobStyle)),
        top_n_tokens=pick([0, 0, 4]),
    )
    stop = StopConditions(
        max_new_tokens=50, min_new_tokens=pick([0, 0, 45]), eos_token_ids=(5, 6), ignore_eos=pick([True, False])
    )
    return Row(sampling, tuple(draw.randrange(VOCAB) for _ in range(length)), draw.randint(1, length), stop)


@pytest.mark.parametrize("vocab_size", [VOCAB, 4099])
@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_the_same_to_the_bit_alone_and_among_any_neighbours(seed: int, vocab_size: int) -> None:
    draw = random.Random(seed)
    rows = [random_row(draw) for _ in range(24)]
    logits = random_logits(len(rows), vocab_size, seed=seed)
    order = draw.sample(range(len(rows)), len(rows))
    together = sample(logits, rows)
    shuffled = sample(logits[order], [rows[row] for row in order], slots=draw.sample(range(200), len(rows)))

    for row in range(len(rows)):
        alone = sample(logits[row : row + 1], rows[row : row + 1])
        for batch, place in ((together, row), (shuffled, order.index(row))):
            assert int(batch.token_ids[place]) == int(alone.token_ids[0])
            assert torch.equal(batch.logprobs[place], alone.logprobs[0])
            assert batch.top_tokens.get(place) == alone.top_tokens.get(0)


def test_sampling_leaves_the_logits_as_they_were() -> None:
    draw = random.Random(9)
    logits = random_logits(16, VOCAB)
    before = logits.clone()

    sample(logits, [random_row(draw) for _ in range(16)])

    assert torch.equal(logits, before)


def test_a_seed_repeats_its_tokens_and_another_seed_does_not() -> None:
    logits = random_logits(1, 5000, scale=0.5).expand(8, -1).contiguous()

    def drawn(seed: int) -> list[int]:
        rows = [Row(SamplingParams(do_sample=True, seed=seed), tuple(range(1, 3 + place))) for place in range(8)]
        return sample(logits, rows).token_ids.tolist()

    assert drawn(MAX_SEED) == drawn(MAX_SEED)
    assert drawn(MAX_SEED) != drawn(MAX_SEED - 1)
    assert len(set(drawn(7))) > 4, "each position draws anew"


def test_the_noise_belongs_to_the_absolute_position() -> None:
    """A request continued after a restart has more prompt and fewer new tokens: its next token must not care."""
    logits = random_logits(1, 5000, scale=0.5)
    sampling = SamplingParams(do_sample=True, seed=11)
    fresh = Row(sampling, token_ids=(4, 5, 6, 7), num_prompt_tokens=2)
    continued = Row(sampling, token_ids=(4, 5, 6, 7), num_prompt_tokens=4)

    assert torch.equal(sample(logits, [fresh]).token_ids, sample(logits, [continued]).token_ids)


def test_a_plain_row_takes_the_first_of_the_best_tokens() -> None:
    logits = torch.tensor([[0.0, 4.0, 1.0, 4.0]])

    result = sample(logits, [Row()])

    assert result.token_ids.tolist() == [1]
    torch.testing.assert_close(result.logprobs, logits.log_softmax(-1)[:, 1])


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0), SamplingParams(temperature=1e-9)],
    ids=["top_k", "top_p", "min_p", "temperature"],
)
def test_the_narrowest_truncation_leaves_the_best_token(sampling: SamplingParams) -> None:
    logits = random_logits(50, VOCAB)

    assert torch.equal(sample(logits, [Row(sampling)] * 50).token_ids, logits.argmax(-1))


# Penalties


def processed(logits: torch.Tensor, row: Row, **kwargs: object) -> torch.Tensor:
    """[V] log-probabilities after processing, read back through the reported alternatives."""
    sampling = replace(row.sampling, top_n_tokens=logits.shape[1])
    tops = sample(logits, [replace(row, sampling=sampling)], **kwargs).top_tokens[0]
    found = torch.full((logits.shape[1],), -torch.inf)
    found[list(tops.token_ids)] = torch.tensor(tops.logprobs)
    return found


def test_the_tgi_frequency_penalty_is_relative_to_the_whole_history() -> None:
    logits = random_logits(1, 7)
    row = Row(SamplingParams(frequency_penalty=1.5), token_ids=(2, 2, 4, 2, 0), num_prompt_tokens=3)
    expected = logits[0].clone()
    for token, count in ((2, 3), (4, 1), (0, 1)):
        expected[token] -= 1.5 * count / 5

    torch.testing.assert_close(processed(logits, row), expected.log_softmax(-1))


def test_openai_penalties_count_the_completion_alone() -> None:
    logits = random_logits(1, 7)
    sampling = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, penalty_style=PenaltyStyle.OPENAI)
    row = Row(sampling, token_ids=(2, 2, 4, 3, 3, 6), num_prompt_tokens=3)
    expected = logits[0].clone()
    expected[3] -= 2 * 0.5 + 0.25
    expected[6] -= 0.5 + 0.25

    torch.testing.assert_close(processed(logits, row), expected.log_softmax(-1))


def test_repetition_comes_before_frequency() -> None:
    logits = torch.tensor([[-1.0, 3.0, 0.5]])
    row = Row(SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0), token_ids=(0, 1), num_prompt_tokens=1)
    expected = torch.tensor([-2.0 - 0.5, 1.5 - 0.5, 0.5])

    torch.testing.assert_close(processed(logits, row), expected.log_softmax(-1))


def test_a_short_history_beside_a_long_one_is_not_padded() -> None:
    """TGI pads with id 0 and then penalises it (known gap C3)."""
    logits = random_logits(1, VOCAB).expand(2, -1).contiguous()
    sampling = SamplingParams(repetition_penalty=5.0, frequency_penalty=2.0, top_n_tokens=20)
    short, long = Row(sampling, (7, 8), 1), Row(sampling, tuple(range(1, 50)), 20)

    beside = sample(logits, [short, long])
    alone = sample(logits[:1], [short])

    assert beside.top_tokens[0] == alone.top_tokens[0]


@pytest.mark.parametrize("style", PenaltyStyle)
def test_tokens_appended_one_by_one_count_as_those_known_from_the_start(style: PenaltyStyle) -> None:
    logits = random_logits(1, VOCAB)
    sampling = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.8, top_n_tokens=20, penalty_style=style)
    draw = random.Random(0)
    known = tuple(draw.randrange(VOCAB) for _ in range(30))
    later = tuple(draw.randrange(VOCAB) for _ in range(600))
    sampler = new_sampler(VOCAB, 4)
    start(sampler, 3, Row(sampling, known, 20))
    for token in later:
        sampler.append(np.array([3]), [token])

    result = sampler.sample(logits, np.array([3]), np.array([630]), torch.tensor([later[-1]]))

    assert result.top_tokens[0] == sample(logits, [Row(sampling, known + later, 20)]).top_tokens[0]


def test_a_slot_forgets_the_sequence_that_had_it() -> None:
    logits = random_logits(1, VOCAB)
    sampler = new_sampler(VOCAB, 1)
    start(
        sampler,
        0,
        Row(SamplingParams(repetition_penalty=9.0, top_k=3, logit_bias=((1, 50.0),)), (int(logits.argmax()), 1)),
    )
    start(sampler, 0, Row())

    result = sampler.sample(logits, np.array([0]), np.array([3]), torch.tensor([1]))

    assert result.token_ids.tolist() == logits.argmax(-1).tolist()


# Bias, masks, end of text


def test_a_bias_acts_before_the_mask() -> None:
    logits = torch.zeros(1, 4)
    mask = torch.tensor([True, False, True, True])
    row = Row(SamplingParams(logit_bias=((1, 100.0), (3, 2.0))))

    assert sample(logits, [row], token_masks={0: mask}).token_ids.tolist() == [3]


def test_a_mask_leaves_the_other_rows_alone() -> None:
    logits = random_logits(2, VOCAB)
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[17] = True

    assert sample(logits, [Row(), Row()], token_masks={1: mask}).token_ids.tolist() == [int(logits[0].argmax()), 17]


@pytest.mark.parametrize(
    ("num_new", "ignore_eos", "expected"), [(0, False, 2), (2, False, 2), (3, False, 1), (0, True, 1)]
)
def test_eos_waits_for_min_new_tokens_unless_it_is_an_ordinary_token(
    num_new: int, ignore_eos: bool, expected: int
) -> None:
    logits = torch.tensor([[0.0, 9.0, 5.0, 8.0]])
    stop = StopConditions(max_new_tokens=9, min_new_tokens=3, eos_token_ids=(1, 3), ignore_eos=ignore_eos)
    row = Row(token_ids=(0,) * (4 + num_new), num_prompt_tokens=4, stop=stop)

    assert sample(logits, [row]).token_ids.tolist() == [expected]


# What is reported


def test_processed_and_raw_logprobs_differ_as_documented() -> None:
    logits = random_logits(2, VOCAB)
    sampling = SamplingParams(temperature=0.5, top_k=5, seed=4, top_n_tokens=8)
    rows = [Row(sampling), Row(replace(sampling, logprob_style=LogprobStyle.RAW))]
    logits[1] = logits[0]
    warped = expected_distribution(logits[0], rows[0]).log().float()
    raw = logits[0].log_softmax(-1)

    result = sample(logits, rows)

    token = int(result.token_ids[0])
    assert int(result.token_ids[1]) == token
    torch.testing.assert_close(result.logprobs, torch.stack([warped[token], raw[token]]))
    assert len(result.top_tokens[0].token_ids) == 5, "tokens that cannot be chosen are left out"
    assert list(result.top_tokens[1].token_ids) == raw.topk(8).indices.tolist()
    torch.testing.assert_close(torch.tensor(result.top_tokens[1].logprobs), raw.topk(8).values)


def test_top_tokens_keep_ties_at_the_last_place_best_first_then_by_id() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 7.0, 3.0, 3.0]])

    tops = sample(logits, [Row(SamplingParams(top_n_tokens=3))]).top_tokens[0]

    assert tops.token_ids == (3, 1, 2, 4, 5)
    torch.testing.assert_close(torch.tensor(tops.logprobs), logits.log_softmax(-1)[0, list(tops.token_ids)])


def test_top_tokens_of_a_flat_distribution_stay_bounded() -> None:
    tops = sample(torch.zeros(1, 9000), [Row(SamplingParams(top_n_tokens=20))]).top_tokens[0]

    assert len(tops.token_ids) == 40


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(do_sample=True),
        SamplingParams(temperature=0.5, top_k=3, top_p=0.9, typical_p=0.9, min_p=0.1, repetition_penalty=1.2),
        SamplingParams(top_n_tokens=3, logprob_style=LogprobStyle.RAW, frequency_penalty=1.0),
    ],
)
def test_a_broken_row_is_recognised_and_its_neighbours_do_not_notice(sampling: SamplingParams, broken: float) -> None:
    logits = random_logits(3, VOCAB)
    healthy = sample(logits, [Row(sampling)] * 3)
    logits[1, 2] = broken  # id 2 is in the history: penalties touch it

    result = sample(logits, [Row(sampling)] * 3)

    assert not (result.token_ids[1] >= 0 and torch.isfinite(result.logprobs[1]))
    assert torch.equal(result.token_ids[[0, 2]], healthy.token_ids[[0, 2]])
    assert torch.equal(result.logprobs[[0, 2]], healthy.logprobs[[0, 2]])


# Watermark


def test_the_watermark_raises_the_green_tokens_of_the_last_token() -> None:
    logits = random_logits(1, VOCAB)
    settings = WatermarkSettings(gamma=0.3, delta=1.25)
    row = Row(SamplingParams(watermark=True), token_ids=(9, 33))
    expected = logits[0] + 1.25 * green_list(torch.tensor([33]), VOCAB, 0.3)[0]

    torch.testing.assert_close(processed(logits, row, watermark=settings), expected.log_softmax(-1))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.5, 1.0])
def test_the_green_list_has_its_share_of_the_vocabulary_and_changes_with_the_token(gamma: float) -> None:
    lists = green_list(torch.arange(50), 20_000, gamma)

    assert abs(float(lists.float().mean()) - gamma) < 0.005
    agreement = float((lists[:-1] == lists[1:]).float().mean())
    assert abs(agreement - (gamma**2 + (1 - gamma) ** 2)) < 0.01


def hash32(x: int) -> int:
    """lowbias32, in Python's own integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("last", [0, 1234, 262_143])
def test_a_detector_without_torch_finds_the_same_green_list(last: int) -> None:
    """The hash is an interface: 32-bit arithmetic that any language can repeat."""
    key = hash32(last * 15485863 % 2**32)
    expected = [hash32(hash32(token) ^ key) < 0.25 * 2**32 for token in range(500)]

    assert green_list(torch.tensor([last]), 500, 0.25)[0].tolist() == expected
