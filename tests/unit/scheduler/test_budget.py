import pytest
from tests.unit.scheduler.builders import make_config

from weft.scheduler.budget import PrefillBudget, StepCostModel, fit_chunk

MS = 1_000_000


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
    assert PrefillBudget(make_config(max_batch_prefill_tokens=flag)).tokens(0) == budget


def test_decode_rows_come_out_of_the_budget_but_leave_a_block() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=8))

    assert [budget.tokens(rows) for rows in (0, 1, 4, 5, 100)] == [8, 7, 4, 4, 4]


def make_taught_budget(*, target_ms: float | None = 80, token_us: float = 100, decode_ms: float = 20) -> PrefillBudget:
    """A budget that has seen steps of 8 decode rows, and prompts."""
    target_ns = None if target_ms is None else int(target_ms * MS)
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=4096, inter_token_target_ns=target_ns))
    for _ in range(20):
        budget.costs.observe(8, 0, int(decode_ms * MS))
        budget.costs.observe(0, 2000, int(token_us * 1000 * 2000))
    return budget


def test_the_chunk_fills_what_the_target_leaves_beside_the_decode_rows() -> None:
    assert make_taught_budget(target_ms=80, token_us=100, decode_ms=20).tokens(8) == pytest.approx(600, abs=2)


def test_without_running_streams_a_step_may_last_four_targets() -> None:
    """A newcomer, or the end of a request that nobody waits for any more, is noticed between steps only."""
    assert make_taught_budget(target_ms=80, token_us=100).tokens(0) == pytest.approx(3200, abs=2)
    assert make_taught_budget(target_ms=80, token_us=10).tokens(0) == 4096


def test_without_a_target_the_whole_budget_is_used() -> None:
    assert make_taught_budget(target_ms=None).tokens(8) == 4096 - 8


def test_a_cheap_model_is_still_bound_by_tgis_budget() -> None:
    assert make_taught_budget(token_us=1).tokens(8) == 4096 - 8


@pytest.mark.parametrize("target_ms", [0.001, 19, 20, 20.2])
def test_a_prompt_gets_a_block_even_when_the_target_is_missed_already(target_ms: float) -> None:
    assert make_taught_budget(target_ms=target_ms).tokens(8) == 4


def test_before_anything_was_measured_the_chunk_is_modest() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=4096, inter_token_target_ns=80 * MS))

    assert budget.tokens(1) == 256


def test_a_chunk_grows_by_measured_steps_when_few_tokens_cost_nothing() -> None:
    """A device whose first 512 tokens are free: extrapolating from 64 would promise a chunk without end."""
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=8192, inter_token_target_ns=30 * MS))
    budget.costs.observe(8, 0, 20 * MS)
    chunks = []
    for _ in range(40):
        chunk = budget.tokens(8)
        chunks.append(chunk)
        budget.costs.observe(8, chunk, 20 * MS + max(chunk - 512, 0) * MS // 100)

    assert chunks[:2] == [256, 1024]
    assert max(chunks) < 2 * 1512  # the size that takes 30 ms
    assert chunks[-1] == pytest.approx(1512, rel=0.02)


def test_decode_cost_is_learnt_as_a_line() -> None:
    costs = StepCostModel()
    for rows in (1, 2, 4, 8, 16, 32) * 5:
        costs.observe(rows, 0, 10 * MS + rows * MS // 2)

    assert costs.decode_ns(0) == 0
    assert costs.decode_ns(16) == pytest.approx(18 * MS, rel=0.01)
    assert costs.decode_ns(64) == pytest.approx(42 * MS, rel=0.01)


def test_noise_never_makes_more_rows_cheaper() -> None:
    costs = StepCostModel()
    for _ in range(10):
        costs.observe(1, 0, 20 * MS)
        costs.observe(8, 0, 10 * MS)

    assert costs.decode_ns(100) >= costs.decode_ns(1) > 0


def test_one_hiccup_is_soon_forgotten() -> None:
    budget = make_taught_budget()
    before = budget.tokens(8)

    budget.costs.observe(8, 0, 5000 * MS)
    budget.costs.observe(8, 600, 5000 * MS)

    assert budget.tokens(8) > before / 3
    for _ in range(60):
        budget.costs.observe(8, 0, 20 * MS)
        budget.costs.observe(8, 600, 80 * MS)
    assert budget.tokens(8) == pytest.approx(before, rel=0.05)


def test_a_lasting_change_is_followed() -> None:
    budget = make_taught_budget(token_us=100)
    for _ in range(80):
        budget.costs.observe(8, 300, 20 * MS + 300 * MS // 5)

    assert budget.tokens(8) == pytest.approx(300, rel=0.05)


def test_impossibly_fast_steps_do_not_divide_by_zero() -> None:
    budget = PrefillBudget(make_config(max_batch_prefill_tokens=64, inter_token_target_ns=MS))
    budget.costs.observe(1, 0, 0)
    budget.costs.observe(1, 8, 0)

    assert budget.tokens(1) == 63
