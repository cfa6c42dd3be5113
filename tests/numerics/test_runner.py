"""The runner's promises, on a model small enough to be computed by hand: what it stores, writes back and reports."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from msgspec.structs import replace
from tests.numerics.paged_driver import SharedExchange, ThreadedGroup
from tests.numerics.runner_driver import RunnerDriver
from tests.numerics.tiny_model import TinyModel

from weft.core.plan import StepPlan
from weft.core.request import SamplingParams
from weft.errors import InvariantBroken
from weft.kernels import ops
from weft.models.forward_batch import ForwardBatch
from weft.runner import runner as runner_module
from weft.runner.sampling.parameters import Float32Array
from weft.runner.sampling.sampler import SampledTokens
from weft.runner.slots import Int64Array

pytestmark = pytest.mark.numerics

PROMPT = [5, 17, 80, 3, 3, 41, 96, 0, 22, 60, 11]
VOCAB = 97


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel(VOCAB)


def new_driver(model: TinyModel, **settings: int) -> RunnerDriver:
    return RunnerDriver(model, vocab_size=VOCAB, kv_shape=(model.num_layers, 1, model.head_dim), **settings)


def greedy_by_hand(model: TinyModel, prompt: list[int], num_tokens: int) -> list[int]:
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(model.logits_of(token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def test_greedy_tokens_are_those_of_the_model(model: TinyModel) -> None:
    driver = new_driver(model)

    completion = driver.generate(driver.start(PROMPT), 8)

    assert completion == greedy_by_hand(model, PROMPT, 8)


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 10])
def test_chunks_change_nothing(model: TinyModel, chunk: int) -> None:
    sampling = SamplingParams(temperature=1.3, top_p=0.9, repetition_penalty=1.2, seed=3)
    whole, chunked = new_driver(model), new_driver(model)
    first, second = whole.start(PROMPT, sampling), chunked.start(PROMPT, sampling)

    assert chunked.generate(second, 6, chunk=chunk) == whole.generate(first, 6)
    assert second.logprobs == first.logprobs


def test_a_step_may_be_planned_before_the_last_one_is_known(model: TinyModel) -> None:
    """The sampled token is read from the table on the device, not from the plan."""
    driver = new_driver(model)
    sequence = driver.start(PROMPT)
    plans = [driver.plan([(sequence, len(PROMPT))])]
    plans += [driver.plan([(sequence, 1)], known=[len(PROMPT) + ahead]) for ahead in range(1, 6)]

    results = [driver.runner.execute(plan) for plan in plans]

    assert [result.token_ids[0] for result in results] == greedy_by_hand(model, PROMPT, 6)


def test_rows_of_one_step_mix_decode_and_chunks(model: TinyModel) -> None:
    driver = new_driver(model)
    old = driver.start(PROMPT[:5])
    driver.generate(old, 2)
    new = driver.start(PROMPT)

    driver.step([(old, 1), (new, 4)])
    driver.step([(old, 1), (new, 7)])
    driver.step([(old, 1), (new, 1)])

    assert old.completion == greedy_by_hand(model, PROMPT[:5], 5)
    assert new.completion == greedy_by_hand(model, PROMPT, 2)


def test_tokens_do_not_depend_on_neighbours(model: TinyModel) -> None:
    sampling = SamplingParams(temperature=1.5, top_k=30, seed=2**64 - 1, frequency_penalty=0.4)
    alone = new_driver(model)
    expected = alone.start(PROMPT, sampling)
    alone.generate(expected, 5)
    driver = new_driver(model)
    others = [driver.start([seed] * (seed + 2), SamplingParams(do_sample=True, seed=seed)) for seed in range(5)]
    sequence = driver.start(PROMPT, sampling)

    driver.step([*((other, len(other.token_ids)) for other in others[:3]), (sequence, len(PROMPT))])
    driver.step([(sequence, 1), *((other, 1) for other in others[:3])])
    driver.step([(sequence, 1), *((other, len(other.token_ids)) for other in others[3:])])
    driver.step([(others[3], 1), (sequence, 1)])
    driver.step([(sequence, 1)])

    assert sequence.completion == expected.completion
    assert sequence.logprobs == expected.logprobs


def test_a_slot_taken_over_remembers_nothing(model: TinyModel) -> None:
    driver = new_driver(model, max_num_sequences=1)
    first = driver.start(PROMPT * 3, SamplingParams(repetition_penalty=4.0, top_n_tokens=2, prompt_logprobs=True))
    driver.generate(first, 3)
    driver.finish(first)
    second = driver.start(PROMPT[:3])

    result = driver.step([(second, 3)])

    assert second.slot == first.slot
    assert second.completion == greedy_by_hand(model, PROMPT[:3], 1)
    assert result.top_tokens == {}
    assert result.prompt_logprobs == {}


def test_a_preempted_sequence_goes_on_with_the_same_tokens(model: TinyModel) -> None:
    sampling = SamplingParams(temperature=1.4, seed=8, repetition_penalty=1.3, frequency_penalty=0.3)
    driver = new_driver(model)
    whole = driver.start(PROMPT, sampling)
    driver.generate(whole, 9)
    cut = driver.start(PROMPT, sampling)
    driver.generate(cut, 4)
    driver.finish(cut)

    resumed = driver.start(cut.token_ids, sampling, num_prompt_tokens=len(PROMPT))
    driver.generate(resumed, 5)

    assert cut.completion + resumed.completion == whole.completion


def test_prefix_blocks_of_another_sequence_are_read(model: TinyModel) -> None:
    driver = new_driver(model)
    first = driver.start(PROMPT)
    driver.generate(first, 1)
    second = driver.start(PROMPT)
    shared = first.blocks[:2]
    second.blocks, second.num_computed = list(shared), 2 * driver.block_size
    plan = driver.plan([(second, len(PROMPT) - second.num_computed)])
    plan = replace(
        plan,
        new_block_slots=[second.slot] * 2 + list(plan.new_block_slots),
        new_block_ids=shared + list(plan.new_block_ids),
    )

    result = driver.runner.execute(plan)

    assert list(result.token_ids) == first.completion


def test_tables_grow_with_a_long_sequence(model: TinyModel) -> None:
    """Both tables start narrow: a context beyond their first width must move nothing."""
    driver = new_driver(model, num_blocks=700, block_size=2, max_total_tokens=1300)
    short = driver.start(PROMPT)
    driver.generate(short, 2)
    long = driver.start([token % VOCAB for token in range(1100)])

    driver.step([(long, 4)])
    driver.step([(short, 1), (long, 1)])

    assert short.completion == greedy_by_hand(model, PROMPT, 3)
    assert driver.runner._tables.token_ids.shape[1] > 1100
    assert driver.runner._tables.token_ids[long.slot, :1100].tolist() == long.token_ids


class OtherRounding(TinyModel):
    """A rank whose logits differ from those of rank 0, as rounding may make them."""

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return -super().logits(hidden_states)


def test_every_rank_goes_on_with_the_tokens_of_rank_0(model: TinyModel) -> None:
    exchange = SharedExchange(2)
    groups = [ThreadedGroup(rank, exchange) for rank in range(2)]
    shape = (model.num_layers, 1, model.head_dim)
    drivers = [
        RunnerDriver(rank_model, vocab_size=VOCAB, kv_shape=shape, group=group)
        for rank_model, group in zip((model, OtherRounding(VOCAB)), groups, strict=True)
    ]
    sampling = SamplingParams(temperature=1.2, seed=5, repetition_penalty=1.1)

    with ThreadPoolExecutor(2) as threads:
        completions = list(threads.map(lambda driver: driver.generate(driver.start(PROMPT, sampling), 5), drivers))

    alone = new_driver(model)
    assert completions == [alone.generate(alone.start(PROMPT, sampling), 5)] * 2


# What is reported


@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_prompt_logprobs_are_the_models_own(model: TinyModel, chunk: int) -> None:
    driver = new_driver(model)
    sequence = driver.start(PROMPT, SamplingParams(prompt_logprobs=True, temperature=0.3))
    driver.generate(sequence, 2, chunk=chunk)
    expected = model.logits_of(PROMPT).log_softmax(-1)[range(len(PROMPT) - 1), PROMPT[1:]]

    torch.testing.assert_close(torch.tensor(sequence.prompt_logprobs), expected, rtol=1e-5, atol=1e-5)


def test_prompt_logprobs_never_hold_many_rows_of_logits(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "PROMPT_LOGPROB_BYTES", 4 * VOCAB * 3)
    driver = new_driver(model)
    sequence = driver.start(PROMPT * 3, SamplingParams(prompt_logprobs=True))
    model.largest_logits_rows = 0

    driver.generate(sequence, 1)

    assert model.largest_logits_rows == 3
    assert len(sequence.prompt_logprobs) == 3 * len(PROMPT) - 1


def test_prompt_logprobs_belong_to_their_rows(model: TinyModel) -> None:
    driver = new_driver(model)
    wanted = SamplingParams(prompt_logprobs=True)
    first, plain, second = driver.start(PROMPT, wanted), driver.start(PROMPT), driver.start(PROMPT[::-1], wanted)

    result = driver.step([(sequence, len(PROMPT)) for sequence in (first, plain, second)])

    assert sorted(result.prompt_logprobs) == [0, 2]
    for row, prompt in ((0, PROMPT), (2, PROMPT[::-1])):
        expected = model.logits_of(prompt).log_softmax(-1)[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(torch.tensor(result.prompt_logprobs[row]), expected, rtol=1e-5, atol=1e-5)


def test_top_tokens_are_keyed_by_plan_row(model: TinyModel) -> None:
    driver = new_driver(model)
    chunked, asking = driver.start(PROMPT), driver.start(PROMPT, SamplingParams(top_n_tokens=3))

    result = driver.step([(chunked, 4), (asking, len(PROMPT))])

    assert list(result.top_tokens) == [1]
    assert result.top_tokens[1].token_ids[0] == result.token_ids[0]


def test_a_step_without_sampling_rows_has_no_tokens(model: TinyModel) -> None:
    driver = new_driver(model)

    result = driver.step([(driver.start(PROMPT), 4)])

    assert (list(result.token_ids), list(result.logprobs), result.failures) == ([], [], {})


# Faults


class Breaking(TinyModel):
    """Damages the logits of one sampling row when told to."""

    damage: tuple[int, float] | None = None

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden_states)
        if self.damage is not None and len(logits):
            row, value = self.damage
            logits[row, 4] = value
        return logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_fail_their_own_row_only(value: float) -> None:
    model = Breaking(VOCAB)
    driver = new_driver(model)
    sequences = [driver.start(PROMPT[:length]) for length in (3, 4, 5)]
    model.damage = (1, value)

    result = driver.step([(sequence, len(sequence.token_ids)) for sequence in sequences])
    model.damage = None
    driver.step([(sequences[0], 1), (sequences[1], 1), (sequences[2], 1)])

    assert result.failures == {1: "numerical_error"}
    for sequence in (sequences[0], sequences[2]):
        assert sequence.completion == greedy_by_hand(model, list(sequence.start.token_ids), 2)


@pytest.mark.parametrize(
    ("bad", "code"),
    [(-1, "numerical_error"), (-2, "generation"), (VOCAB, "generation"), (2**31, "generation")],
)
def test_an_id_outside_the_vocabulary_fails_its_row_and_is_never_looked_up(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, bad: int, code: str
) -> None:
    driver = new_driver(model)
    first, second = driver.start(PROMPT), driver.start(PROMPT)
    sample = driver.runner._sampler.sample

    def faulty(*arguments: torch.Tensor) -> SampledTokens:
        sampled = sample(*arguments)
        sampled.token_ids[0] = bad
        return sampled

    monkeypatch.setattr(driver.runner._sampler, "sample", faulty)
    result = driver.step([(first, len(PROMPT)), (second, len(PROMPT))])
    monkeypatch.undo()
    driver.step([(first, 1), (second, 1)])

    assert result.failures == {0: code}
    assert second.completion == greedy_by_hand(model, PROMPT, 2)


class Choosing(Breaking):
    """A model that also chooses, and can be told to raise."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.num_choices = 0
        self.raises = False

    def greedy(self, batch: ForwardBatch) -> tuple[Int64Array, Float32Array]:
        if self.raises:
            raise RuntimeError("the device is unwell")
        self.num_choices += 1
        token_ids, logprobs = ops.greedy(self.forward(batch))
        return token_ids.numpy(), logprobs.numpy()


def test_a_model_that_chooses_is_asked_as_long_as_all_are_greedy() -> None:
    model = Choosing(VOCAB)
    driver = new_driver(model)
    greedy, drawn = driver.start(PROMPT[:5]), driver.start(PROMPT, SamplingParams(do_sample=True, seed=3))

    driver.generate(greedy, 7)
    driver.step([(greedy, 1), (drawn, len(PROMPT))])
    driver.step([(greedy, 1), (drawn, 1)])
    driver.generate(greedy, 12)

    assert model.num_choices == 7 + 3
    assert greedy.completion == greedy_by_hand(model, PROMPT[:5], 12)
    alone = new_driver(model)
    assert drawn.completion == alone.generate(alone.start(PROMPT, SamplingParams(do_sample=True, seed=3)), 2)


def test_broken_logits_of_a_model_that_chooses_fail_their_own_row_only() -> None:
    """The row that failed goes on with some token until the scheduler has heard of it: no look-up may fail."""
    model = Choosing(VOCAB)
    driver = new_driver(model)
    sequences = [driver.start(PROMPT[:length]) for length in (3, 4, 5)]
    driver.step([(sequence, len(sequence.token_ids)) for sequence in sequences])
    rows = [(sequence, 1) for sequence in sequences]
    model.damage = (1, float("nan"))

    result = driver.step(rows)
    model.damage = None
    driver.step(rows)

    assert result.failures == {1: "numerical_error"}
    for sequence in (sequences[0], sequences[2]):
        assert sequence.completion == greedy_by_hand(model, list(sequence.start.token_ids), 3)


def test_a_sequence_starts_anew_after_a_step_that_raised_and_one_planned_behind_it() -> None:
    model = Choosing(VOCAB)
    driver = new_driver(model, max_num_sequences=1)
    sequence = driver.start(PROMPT)
    driver.generate(sequence, 4)
    failing = driver.plan([(sequence, 1)])
    behind = driver.plan([(sequence, 1)], known=[len(sequence.token_ids) + 1])
    model.raises = True
    with pytest.raises(RuntimeError):
        driver.runner.execute(failing)
    model.raises = False
    driver.runner.execute(behind)
    driver.finish(sequence)

    again = driver.start(sequence.token_ids, num_prompt_tokens=len(PROMPT))
    driver.generate(again, 5)

    assert sequence.completion + again.completion == greedy_by_hand(model, PROMPT, 9)


def test_broken_prompt_logits_fail_the_row() -> None:
    model = Breaking(VOCAB)
    driver = new_driver(model)
    sequence = driver.start(PROMPT, SamplingParams(prompt_logprobs=True))
    model.damage = (0, float("nan"))

    assert driver.step([(sequence, 4)]).failures == {0: "numerical_error"}


@pytest.mark.parametrize(
    "change",
    [
        {"slots": [99]},
        {"slots": [-1]},
        {"slots": []},
        {"num_tokens": [0]},
        {"num_tokens": [13]},
        {"first_positions": [-1]},
        {"first_positions": [9]},
        {"samples": [True, True]},
        {"new_block_ids": [0, 1, 4096]},
        {"new_block_ids": [0, -1, 2]},
        {"new_block_ids": [0]},
    ],
    ids=str,
)
def test_a_plan_that_contradicts_the_tables_is_refused(model: TinyModel, change: dict[str, list[int]]) -> None:
    driver = new_driver(model)
    plan = driver.plan([(driver.start(PROMPT), len(PROMPT))])

    with pytest.raises(InvariantBroken):
        driver.runner.execute(replace(plan, **change))


def test_logits_of_another_shape_are_refused(model: TinyModel) -> None:
    driver = RunnerDriver(model, vocab_size=VOCAB + 1, kv_shape=(model.num_layers, 1, model.head_dim))

    with pytest.raises(InvariantBroken, match="logits"):
        driver.step([(driver.start(PROMPT), len(PROMPT))])


def test_a_sequence_longer_than_allowed_is_refused(model: TinyModel) -> None:
    driver = new_driver(model, max_total_tokens=16)
    start = driver.start(range(19)).start
    plan = StepPlan(
        step_id=0, starts=(start,), slots=[start.slot], first_positions=[0], num_tokens=[1], samples=[False],
        new_block_slots=[start.slot], new_block_ids=[0],
    )  # fmt: skip

    with pytest.raises(InvariantBroken, match="19 tokens"):
        driver.runner.execute(plan)
