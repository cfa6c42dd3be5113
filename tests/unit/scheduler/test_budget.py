import pytest
from tests.unit.scheduler.builders import make_config

from weft.scheduler.budget import PrefillBudget, PrefillCost, StepCostModel, attended_positions, fit_chunk

MS = 1_000_000


def tokens(budget: PrefillBudget, num_decode_rows: int) -> int:
    """The first chunk of a prompt beside decode rows."""
    return budget.for_step(num_decode_rows).tokens_at(0)


def teach(budget: PrefillBudget, num_decode_rows: int, num_tokens: int, elapsed_ns: int) -> None:
    """A step with the first chunk of a prompt, or none."""
    budget.costs.observe(num_decode_rows, num_tokens, attended_positions(0, num_tokens), elapsed_ns)


@pytest.mark.parametrize(
    ("position", "remaining", "limit", "expected"),
    [
        (0, 10, 100, 10),  # all that remains
        (0, 10, 10, 10),
        (0, 10, 9, 8),  # down to the border
        (0, 10, 4, 4),
        (0, 10, 3, 0),  # no border within reach
        (0, 10, 0, 0),
        (6, 10, 2, 2),  # up to the border at 8
        (6, 10, 5, 2),
        (6, 10, 6, 6),
        (6, 10, 1, 0),
        (6, 1, 1, 1),
        (0, 10, -5, 0),
    ],
)
def test_chunks_end_at_the_end_of_the_prompt_or_on_a_block_border(
    position: int, remaining: int, limit: int, expected: int
) -> None:
    assert fit_chunk(position, remaining, limit, 4) == expected


@pytest.mark.parametrize(("flag", "budget"), [(1, 4), (4, 4), (5, 8), (64, 64)])
def test_tgis_budget_is_rounded_up_to_whole_blocks(flag: int, budget: int) -> None:
    assert tokens(PrefillBudget(make_config(max_batch_prefill_tokens=flag)), 0) == budget


def test_decode_rows_come_out_of_the_budget_but_leave_a_block() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=8))

    assert [tokens(budget, rows) for rows in (0, 1, 4, 5, 100)] == [8, 7, 4, 4, 4]


def make_taught_budget(*, target_ms: float | None = 80, token_us: float = 100, decode_ms: float = 20) -> PrefillBudget:
    """A budget that has seen steps of 8 decode rows, and prompts."""
    target_ns = None if target_ms is None else int(target_ms * MS)
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=4096, inter_token_target_ns=target_ns))
    for _ in range(20):
        teach(budget, 8, 0, int(decode_ms * MS))
        teach(budget, 0, 2000, int(token_us * 1000 * 2000))
    return budget


def test_the_chunk_fills_what_the_target_leaves_beside_the_decode_rows() -> None:
    assert tokens(make_taught_budget(target_ms=80, token_us=100, decode_ms=20), 8) == pytest.approx(600, abs=2)


def test_without_running_streams_a_step_may_last_four_targets() -> None:
    """A newcomer, or the end of a request that nobody waits for any more, is noticed between steps only."""
    assert tokens(make_taught_budget(target_ms=80, token_us=100), 0) == pytest.approx(3200, abs=2)
    assert tokens(make_taught_budget(target_ms=80, token_us=10), 0) == 4096


def test_without_a_target_the_whole_budget_is_used() -> None:
    assert tokens(make_taught_budget(target_ms=None), 8) == 4096 - 8


def test_a_cheap_model_is_still_bound_by_tgis_budget() -> None:
    assert tokens(make_taught_budget(token_us=1), 8) == 4096 - 8


@pytest.mark.parametrize("target_ms", [0.001, 19, 20, 20.2])
def test_a_prompt_gets_a_block_even_when_the_target_is_missed_already(target_ms: float) -> None:
    assert tokens(make_taught_budget(target_ms=target_ms), 8) == 4


def test_before_anything_was_measured_the_chunk_is_modest() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=4096, inter_token_target_ns=80 * MS))

    assert tokens(budget, 1) == 256


def test_a_chunk_grows_by_measured_steps_when_few_tokens_cost_nothing() -> None:
    """A device whose first 512 tokens are free: extrapolating from 64 would promise a chunk without end."""
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=8192, inter_token_target_ns=30 * MS))
    teach(budget, 8, 0, 20 * MS)
    chunks = []
    for _ in range(40):
        chunk = tokens(budget, 8)
        chunks.append(chunk)
        teach(budget, 8, chunk, 20 * MS + max(chunk - 512, 0) * MS // 100)

    assert chunks[:2] == [256, 1024]
    assert max(chunks) < 2 * 1512  # the size that takes 30 ms
    assert chunks[-1] == pytest.approx(1512, rel=0.02)


def test_decode_cost_is_learnt_as_a_line() -> None:
    costs = StepCostModel()
    for rows in (1, 2, 4, 8, 16, 32) * 5:
        costs.observe(rows, 0, 0.0, 10 * MS + rows * MS // 2)

    assert costs.decode_ns(0) == 0
    assert costs.decode_ns(16) == pytest.approx(18 * MS, rel=0.01)
    assert costs.decode_ns(64) == pytest.approx(42 * MS, rel=0.01)


def test_noise_never_makes_more_rows_cheaper() -> None:
    costs = StepCostModel()
    for _ in range(10):
        costs.observe(1, 0, 0.0, 20 * MS)
        costs.observe(8, 0, 0.0, 10 * MS)

    assert costs.decode_ns(100) >= costs.decode_ns(1) > 0


def test_one_hiccup_is_soon_forgotten() -> None:
    budget = make_taught_budget()
    before = tokens(budget, 8)

    teach(budget, 8, 0, 5000 * MS)
    teach(budget, 8, 600, 5000 * MS)

    assert tokens(budget, 8) > before / 3
    for _ in range(60):
        teach(budget, 8, 0, 20 * MS)
        teach(budget, 8, 600, 80 * MS)
    assert tokens(budget, 8) == pytest.approx(before, rel=0.05)


def test_a_lasting_change_is_followed() -> None:
    budget = make_taught_budget(token_us=100)
    for _ in range(80):
        teach(budget, 8, 300, 20 * MS + 300 * MS // 5)

    assert tokens(budget, 8) == pytest.approx(300, rel=0.05)


def test_impossibly_fast_steps_do_not_divide_by_zero() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=64, inter_token_target_ns=MS))
    teach(budget, 1, 0, 0)
    teach(budget, 1, 8, 0)

    assert tokens(budget, 1) == 63


def test_a_token_attends_to_what_lies_before_it_whoever_computed_that() -> None:
    assert attended_positions(0, 4) == 4 * 2
    assert attended_positions(100, 4) == 4 * 102
    assert attended_positions(0, 4) + attended_positions(4, 6) == attended_positions(0, 10)


def true_ns(position: float, num_tokens: int, *, base_ns: float = 100_000, slope_ns: float = 50) -> float:
    """A chunk on a machine whose token costs twice as much at position 2000 as at 0."""
    return num_tokens * (base_ns + slope_ns * (position + num_tokens / 2))


def learn_prompt(cost: PrefillCost, num_tokens: int, *, chunk: int = 100, **machine: float) -> None:
    for position in range(0, num_tokens, chunk):
        cost.observe(chunk, position + chunk / 2, true_ns(position, chunk, **machine))


def test_base_and_slope_are_learnt_from_one_long_prompt() -> None:
    cost = PrefillCost()
    learn_prompt(cost, 4000)

    for position in (0, 1000, 4000, 8000):
        assert cost.token_ns(position) == pytest.approx(true_ns(position, 1), rel=0.01)
        assert cost.chunk_ns(position, 200) == pytest.approx(true_ns(position, 200), rel=0.01)


@pytest.mark.parametrize("position", [0, 1000, 3900])
@pytest.mark.parametrize("spare_ms", [1, 20, 320])
def test_the_affordable_chunk_lasts_as_long_as_there_is_time(position: int, spare_ms: int) -> None:
    cost = PrefillCost()
    learn_prompt(cost, 4000)

    num_tokens = cost.affordable_tokens(position, spare_ms * MS)

    assert true_ns(position, num_tokens) <= spare_ms * MS * 1.01
    assert true_ns(position, num_tokens + 1) >= spare_ms * MS * 0.99


@pytest.mark.parametrize("spare_ns", [0.0, -1.0, -80.0 * MS])
def test_nothing_is_affordable_when_no_time_is_left(spare_ns: float) -> None:
    cost = PrefillCost()
    learn_prompt(cost, 400)

    assert cost.affordable_tokens(0, spare_ns) == 0


def test_one_context_tells_nothing_about_another() -> None:
    """Noise over a few positions would be a slope without end."""
    cost = PrefillCost()
    for index in range(40):
        cost.observe(100, 3000.0 + index % 5, 100 * (200_000 + 50_000 * (index % 5)))

    assert cost.token_ns(0) == cost.token_ns(3000) == cost.token_ns(100_000)
    assert cost.token_ns(0) == pytest.approx(300_000, rel=0.1)


def test_until_a_long_prompt_was_measured_the_slope_is_assumed_from_the_shape() -> None:
    cost = PrefillCost(attention_cost=0.001)
    for _ in range(3):
        cost.observe(128, 500.0, 128 * 150_000.0)

    assert cost.token_ns(500) == pytest.approx(150_000)
    assert cost.token_ns(0) == pytest.approx(100_000)
    assert cost.token_ns(2000) == pytest.approx(300_000)


def test_what_was_measured_outweighs_what_was_assumed() -> None:
    cost = PrefillCost(attention_cost=0.001)
    for position in range(50, 4000, 100):
        cost.observe(100, float(position), 100 * (100_000.0 + 20 * position))

    assert cost.token_ns(0) == pytest.approx(100_000)
    assert cost.token_ns(4000) == pytest.approx(180_000)
    for _ in range(200):
        cost.observe(100, 50.0, 100 * 101_000.0)
    assert cost.token_ns(4000) - cost.token_ns(0) == pytest.approx(80_000, rel=0.01)


def test_costs_that_fall_with_the_position_are_taken_as_flat() -> None:
    cost = PrefillCost()
    for position in range(50, 4000, 100):
        cost.observe(100, position, 100 * (200_000 - 20 * position))

    assert cost.token_ns(0) == cost.token_ns(4000) > 100_000


def test_the_base_is_never_negative() -> None:
    """Quadratic costs fit best with a line that begins below zero."""
    cost = PrefillCost()
    for position in range(50, 4000, 100):
        cost.observe(100, position, 100 * position**2 / 50)

    assert cost.token_ns(0) <= 1.0
    assert cost.token_ns(3000) == pytest.approx(3000**2 / 50, rel=0.1)


def test_costs_are_not_extrapolated_without_end() -> None:
    cost = PrefillCost()
    learn_prompt(cost, 2000)

    assert cost.token_ns(7000) == pytest.approx(true_ns(7000, 1), rel=0.01)
    assert cost.token_ns(8000) == cost.token_ns(1_000_000)
    assert cost.affordable_tokens(1_000_000, 100 * MS) == int(100 * MS / cost.token_ns(1_000_000))


def test_the_slope_outlives_short_prompts_and_the_base_follows_the_machine() -> None:
    cost = PrefillCost()
    learn_prompt(cost, 4000)
    for _ in range(300):
        cost.observe(100, 50.0, true_ns(0, 100, base_ns=120_000))

    assert cost.token_ns(0) == pytest.approx(120_000, rel=0.01)
    assert cost.token_ns(4000) == pytest.approx(320_000, rel=0.1)


def test_a_machine_that_became_much_faster_keeps_no_slope_it_cannot_have() -> None:
    cost = PrefillCost()
    learn_prompt(cost, 4000)
    for _ in range(300):
        cost.observe(100, 50.0, 100_000)

    assert cost.token_ns(50) == pytest.approx(1000, rel=0.01)
    assert cost.token_ns(4000) == pytest.approx(80_000, rel=0.01)


def test_a_hiccup_at_the_end_of_a_long_prompt_is_clipped() -> None:
    cost = PrefillCost()
    learn_prompt(cost, 4000)
    before = cost.token_ns(4000)

    cost.observe(100, 4000.0, 100 * true_ns(4000, 100))

    assert before < cost.token_ns(4000) < 2.5 * before
    learn_prompt(cost, 4000)
    assert cost.token_ns(4000) == pytest.approx(before, rel=0.15)


def test_chunks_of_one_step_share_its_time() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=4096, inter_token_target_ns=80 * MS))
    learn_prompt(budget.costs.prefill, 4000, chunk=400)
    step = budget.for_step(1)
    spent_ns = 0.0
    for position, share in ((3900, 2), (0, 2), (1000, 1)):
        num_tokens = step.tokens_at(position) // share
        step.spend(position, num_tokens)
        spent_ns += true_ns(position, num_tokens)

    assert spent_ns == pytest.approx(80 * MS, rel=0.02)
    assert step.tokens_at(0) <= 1


def test_a_step_affords_one_block_and_not_one_for_each_prompt() -> None:
    budget = make_taught_budget(target_ms=19)
    step = budget.for_step(8)

    assert step.tokens_at(0) == step.tokens_at(4000) == 4
    step.spend(4000, 3)
    assert step.tokens_at(0) == 1
    step.spend(0, 1)
    assert step.tokens_at(0) == 0
