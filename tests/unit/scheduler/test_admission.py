"""Who may start when memory is short: nobody who would take what others have been promised."""

import pytest
from tests.unit.scheduler.builders import BLOCK, Crank, make_request, rows, started


def test_what_a_started_prompt_still_needs_is_not_given_to_a_newcomer() -> None:
    crank = Crank(num_blocks=10, max_batch_prefill_tokens=2 * BLOCK, max_total_tokens=41, growth_reserve_blocks=0)
    crank.add(make_request(0, prompt=24, max_new_tokens=1))
    crank.step()  # 2 of 6 blocks taken
    crank.add(make_request(1, prompt=20, max_new_tokens=1))

    assert started(crank.must_plan()) == []
    crank.apply()
    crank.run()
    assert crank.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize(("num_blocks", "expected"), [(8, [0]), (9, [0, 1])])
def test_newcomers_of_one_step_count_against_each_other(num_blocks: int, expected: list[int]) -> None:
    crank = Crank(
        num_blocks=num_blocks, max_batch_prefill_tokens=7 * BLOCK, max_total_tokens=33, growth_reserve_blocks=0
    )
    crank.add(make_request(0, prompt=17, max_new_tokens=1), make_request(1, prompt=16, max_new_tokens=1))

    assert started(crank.must_plan()) == expected


def test_a_newcomer_of_this_step_is_sure_of_the_rest_of_its_prompt() -> None:
    crank = Crank(num_blocks=8, max_batch_prefill_tokens=4 * BLOCK, max_total_tokens=33, growth_reserve_blocks=0)
    crank.add(make_request(0, prompt=3, max_new_tokens=20))
    crank.step()
    crank.add(make_request(1, prompt=18, max_new_tokens=1), make_request(2, prompt=9, max_new_tokens=1))

    plan = crank.must_plan()

    assert started(plan) == [1]
    assert rows(plan)[1:] == [(1, 0, 12, False)]


def test_blocks_that_a_hit_revives_are_not_free_for_others() -> None:
    crank = Crank(num_blocks=4, max_total_tokens=17, growth_reserve_blocks=0)
    crank.add(make_request(0, prompt=range(9), max_new_tokens=1))
    crank.run()
    crank.add(make_request(1, prompt=6, max_new_tokens=6))
    crank.step()  # 2 blocks in use; of the other 2, at least one is cached

    crank.add(make_request(2, prompt=range(9), max_new_tokens=1))

    assert started(crank.must_plan()) == []
    crank.apply()
    crank.run()
    assert len(crank.tokens_of(2)) == 1


@pytest.mark.parametrize(("reserve", "expected"), [(0, [1]), (1, [1]), (2, []), (9, [])])
def test_running_sequences_keep_blocks_to_grow_into(reserve: int, expected: list[int]) -> None:
    crank = Crank(num_blocks=4, max_total_tokens=17, growth_reserve_blocks=reserve)
    crank.add(make_request(0, prompt=7, max_new_tokens=9))
    crank.step()
    crank.add(make_request(1, prompt=3, max_new_tokens=1))

    assert started(crank.must_plan()) == expected


def test_no_block_is_kept_for_a_sequence_that_cannot_grow_any_more() -> None:
    crank = Crank(num_blocks=3, max_total_tokens=13, growth_reserve_blocks=9)
    crank.add(make_request(0, prompt=6, max_new_tokens=3))
    crank.step()
    crank.add(make_request(1, prompt=3, max_new_tokens=1))

    assert started(crank.must_plan()) == [1]
