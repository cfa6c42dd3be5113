import pytest
from tests.unit.scheduler.builders import make_config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_sequences", 0),
        ("num_blocks", 0),
        ("block_size_tokens", 0),
        ("vocab_size", 0),
        ("max_batch_prefill_tokens", 0),
        ("max_total_tokens", 1),
        ("max_queue_requests", -1),
        ("growth_reserve_blocks", -1),
        ("max_batch_size", 0),
        ("max_batch_total_tokens", 3),
        ("inter_token_target_ns", 0),
        ("prefix_key", bytes(15)),
        ("prefix_key", bytes(65)),
    ],
)
def test_a_number_that_cannot_be_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        make_config(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_queue_requests", 0), ("max_batch_total_tokens", 4), ("max_total_tokens", 2), ("prefix_key", bytes(64))],
)
def test_the_bounds_themselves_are_allowed(field: str, value: object) -> None:
    make_config(**{field: value})


@pytest.mark.parametrize(("cap", "blocks"), [(None, 64), (4, 1), (9, 2), (256, 64), (10_000, 64)])
def test_max_batch_total_tokens_is_rounded_down_to_blocks_and_never_grows_the_pool(
    cap: int | None, blocks: int
) -> None:
    assert make_config(max_batch_total_tokens=cap).usable_blocks == blocks


@pytest.mark.parametrize(("max_batch_size", "running"), [(None, 8), (3, 3), (100, 8)])
def test_the_smaller_of_slots_and_max_batch_size_counts(max_batch_size: int | None, running: int) -> None:
    assert make_config(max_batch_size=max_batch_size).max_running == running


@pytest.mark.parametrize(("prefill", "step"), [(64, 64), (8, 12), (13, 16)])
def test_the_largest_step_is_known_beforehand(prefill: int, step: int) -> None:
    assert make_config(max_batch_prefill_tokens=prefill).max_step_tokens == step
