"""When blocks run out, the least important sequence gives way and loses nothing but time."""

import pytest
from tests.unit.scheduler.builders import Crank, make_request, rows, started


def test_the_latest_arrival_gives_way_and_finishes_later() -> None:
    crank = Crank(num_blocks=6, max_total_tokens=25, prefix_caching=False)
    crank.add(make_request(0, prompt=3, max_new_tokens=20), make_request(1, prompt=3, max_new_tokens=20))

    crank.run()

    assert crank.scheduler.stats().num_preemptions >= 1
    assert [event.token_index for event in crank.tokens_of(0)] == list(range(20))
    assert [event.token_index for event in crank.tokens_of(1)] == list(range(20))
    ended = [event.request_id for event in crank.events if event.finish_reason]
    assert ended == [0, 1]


def test_a_lower_priority_gives_way_even_if_it_came_first() -> None:
    crank = Crank(num_blocks=6, max_total_tokens=25)
    crank.add(make_request(0, prompt=3, max_new_tokens=20, priority=0))
    crank.step()
    crank.add(make_request(1, prompt=3, max_new_tokens=20, priority=1))

    crank.run()

    ended = [event.request_id for event in crank.events if event.finish_reason]
    assert ended == [1, 0]


def fill_up(crank: Crank) -> None:
    """Two sequences, one block short of going on: the next plan must preempt request 1."""
    crank.add(make_request(0, prompt=7, max_new_tokens=5), make_request(1, prompt=7, max_new_tokens=5))
    crank.step()
    assert crank.scheduler.pool.num_available == 1


def test_a_token_in_flight_survives_the_preemption_of_its_sequence() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20, prefix_caching=False)
    fill_up(crank)
    crank.must_plan()  # both write position 7

    plan = crank.must_plan()

    assert rows(plan) == [(0, 8, 1, True)]
    assert [event.request_id for event in crank.apply(token=55)] == [0, 1]
    assert crank.tokens_of(1)[-1].token_id == 55


def test_a_preempted_sequence_waits_until_its_open_row_is_applied_and_starts_with_every_token() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20, prefix_caching=False)
    fill_up(crank)
    crank.must_plan()
    crank.must_plan()
    crank.abort(0)  # memory is there again, but a token of request 1 is still in flight

    assert crank.plan() is None
    crank.apply(token=55)
    plan = crank.must_plan()

    assert started(plan) == [1]
    assert plan.starts[0].token_ids == (*make_request(1, prompt=7).prompt_token_ids, 7, 55)
    assert rows(plan) == [(plan.slots[0], 0, 9, True)]


def test_a_preempted_sequence_goes_before_those_that_never_ran() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20, prefix_caching=False)
    fill_up(crank)
    crank.add(make_request(2, prompt=3, max_new_tokens=9))
    restarted: list[int] = []

    while crank.scheduler.has_work:
        restarted += started(crank.must_plan())
        crank.apply()

    assert restarted[:2] == [1, 2]


def test_a_preempted_sequence_finds_its_blocks_in_the_prefix_index_again() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20)
    fill_up(crank)
    crank.step()
    crank.step()
    assert crank.scheduler.stats().num_preemptions == 1
    crank.abort(0)

    plan = crank.must_plan()

    assert started(plan) == [1]
    assert plan.first_positions[0] == 8


def test_a_preempted_sequence_keeps_its_place_past_its_deadline() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20)
    crank.add(make_request(0, prompt=7, max_new_tokens=5), make_request(1, prompt=7, max_new_tokens=5, deadline_ns=9))

    crank.run()

    assert crank.scheduler.stats().num_preemptions == 1
    assert len(crank.tokens_of(1)) == 5


def test_prompt_logprobs_come_once_and_complete_when_the_prefill_was_preempted() -> None:
    crank = Crank(num_blocks=7, max_total_tokens=28, max_batch_prefill_tokens=9, prefix_caching=False)
    crank.add(make_request(0, prompt=7, max_new_tokens=20))
    crank.step()
    crank.add(make_request(1, prompt=14, max_new_tokens=1, prompt_logprobs=True, priority=-1))
    true_logprobs = tuple(-float(i) for i in range(1, 14))

    while not crank.tokens_of(1):
        plan = crank.must_plan()
        report = {}
        for row, (slot, first, num, _) in enumerate(rows(plan)):
            running = next(s for s in crank.scheduler.running if s.slot == slot)
            if running.request.request_id == 1:
                report[row] = true_logprobs[first : first + num]
        crank.apply(prompt_logprobs=report)

    assert crank.tokens_of(1)[0].prompt.prompt_logprobs == true_logprobs


def test_a_sequence_whose_last_token_is_in_flight_needs_no_room_any_more() -> None:
    crank = Crank(num_blocks=4, max_total_tokens=17, growth_reserve_blocks=0)
    crank.add(make_request(0, prompt=8, max_new_tokens=1), make_request(1, prompt=7, max_new_tokens=3))
    crank.must_plan()  # request 0 ends at a block border, with its only token

    crank.must_plan()
    crank.apply()
    crank.run()

    assert crank.scheduler.stats().num_preemptions == 0


@pytest.mark.parametrize("lookahead", [False, True])
def test_eight_sequences_in_a_pool_for_two_all_finish(lookahead: bool) -> None:
    crank = Crank(num_blocks=10, max_total_tokens=24)
    for request_id in range(8):
        crank.add(make_request(request_id, prompt=4, max_new_tokens=16))

    if lookahead:
        crank.run()
    else:
        while crank.scheduler.has_work:
            crank.step()

    assert all(len(crank.tokens_of(request_id)) == 16 for request_id in range(8))
