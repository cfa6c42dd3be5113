"""Aborts, rows that are not numbers, steps that raise."""

import pytest
from tests.unit.scheduler.builders import Crank, make_request, started

from weft.core.request import RequestId

NAN = "numerical_error"


def test_aborting_a_waiting_request_takes_it_out_of_the_queue() -> None:
    crank = Crank()
    crank.add(make_request(0))

    assert crank.abort(0)

    assert crank.plan() is None
    assert not crank.scheduler.has_work


def test_aborting_a_prefill_frees_its_blocks() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(make_request(0, prompt=30))
    crank.must_plan()

    crank.abort(0)

    assert crank.scheduler.stats().used_blocks == 0
    assert crank.apply() == []


def test_aborting_between_chunks_leaves_only_cached_blocks() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(make_request(0, prompt=30))
    crank.step()

    crank.abort(0)

    stats = crank.scheduler.stats()
    assert (stats.used_blocks, stats.cached_blocks) == (0, 2)


def test_aborting_a_decode_frees_its_slot_at_once() -> None:
    crank = Crank(max_num_sequences=1)
    crank.add(make_request(0, max_new_tokens=50), make_request(1))
    crank.step()

    crank.abort(0)

    assert started(crank.must_plan()) == [1]


def test_aborting_a_preempted_sequence_drops_the_token_in_flight() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20)
    crank.add(make_request(0, prompt=7, max_new_tokens=5), make_request(1, prompt=7, max_new_tokens=5))
    crank.step()
    crank.must_plan()
    crank.must_plan()
    assert crank.scheduler.stats().num_preemptions == 1

    assert crank.abort(1)

    assert [event.request_id for event in crank.apply()] == [0]
    crank.run()
    assert len(crank.tokens_of(1)) == 1


@pytest.mark.parametrize("request_id", [0, 5])
def test_aborting_what_is_not_here_says_so(request_id: int) -> None:
    crank = Crank()
    crank.add(make_request(0, max_new_tokens=1))
    crank.run()

    assert not crank.abort(request_id)


def test_a_row_that_is_not_a_number_is_computed_again_from_scratch() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=9, max_new_tokens=3))
    crank.step()

    crank.must_plan()
    assert crank.apply(failures={0: NAN}) == []
    plan = crank.must_plan()

    assert started(plan) == [0]
    assert plan.first_positions[0] == 0
    assert plan.num_tokens[0] == 10
    crank.apply()
    crank.run()
    assert [event.token_index for event in crank.tokens_of(0)] == [0, 1, 2]
    assert crank.failures_of(0) == []


def test_the_second_time_the_request_fails() -> None:
    crank = Crank()
    crank.add(make_request(0, max_new_tokens=3))

    crank.must_plan()
    crank.apply(failures={0: NAN})
    crank.must_plan()
    crank.apply(failures={0: NAN})

    assert [failure.code for failure in crank.failures_of(0)] == [NAN]
    assert not crank.scheduler.has_work


def test_blocks_of_a_row_that_is_not_a_number_leave_the_prefix_index() -> None:
    crank = Crank()
    prompt = tuple(range(9))
    crank.add(make_request(0, prompt=prompt, max_new_tokens=3))
    crank.step()
    assert crank.scheduler.stats().used_blocks == 3

    crank.must_plan()
    crank.apply(failures={0: NAN})

    stats = crank.scheduler.stats()
    assert (stats.used_blocks, stats.cached_blocks) == (0, 0)
    assert len(crank.scheduler.index) == 0


def test_blocks_of_a_preempted_sequence_leave_the_index_when_its_open_row_was_not_a_number() -> None:
    crank = Crank(num_blocks=5, max_total_tokens=20)
    crank.add(make_request(0, prompt=7, max_new_tokens=5), make_request(1, prompt=7, max_new_tokens=5))
    crank.step()
    crank.must_plan()
    crank.must_plan()
    (preempted,) = crank.scheduler.queue
    assert crank.scheduler.index.match(preempted.block_digests)

    crank.apply(failures={1: NAN})

    assert not crank.scheduler.index.match(preempted.block_digests)
    crank.run()
    assert len(crank.tokens_of(1)) == 5


def test_the_row_planned_behind_a_failed_one_is_dropped() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=5, max_new_tokens=4))
    crank.must_plan()
    crank.must_plan()

    crank.apply(token=500, failures={0: NAN})
    assert crank.plan() is None  # its second row is still open
    assert crank.apply(token=501) == []
    crank.run()

    assert [event.token_id for event in crank.tokens_of(0)] == [7, 7, 7, 7]


def test_a_decode_row_planned_behind_a_failed_one_is_dropped_too() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=5, max_new_tokens=5))
    crank.step()
    crank.must_plan()
    crank.must_plan()

    crank.apply(failures={0: NAN})
    assert crank.apply(token=501) == []
    crank.run()

    assert [event.token_id for event in crank.tokens_of(0)] == [7, 7, 7, 7, 7]


def test_a_second_try_does_not_touch_the_prefix_index() -> None:
    crank = Crank(max_num_sequences=1)
    prompt = range(9)
    crank.add(make_request(0, prompt=prompt, max_new_tokens=2, priority=-1))
    crank.must_plan()
    crank.apply(failures={0: NAN})
    crank.add(make_request(1, prompt=prompt, max_new_tokens=1))
    crank.step()
    assert [event.request_id for event in crank.events] == [1]
    assert crank.scheduler.stats().cached_blocks == 2

    plan = crank.must_plan()

    assert started(plan) == [0]
    assert plan.first_positions[0] == 0


def test_prompt_logprobs_of_a_failed_try_are_not_kept() -> None:
    crank = Crank(max_batch_prefill_tokens=4)
    crank.add(make_request(0, prompt=6, max_new_tokens=1, prompt_logprobs=True))
    crank.must_plan()
    crank.apply(prompt_logprobs={0: (-9.0,) * 4})
    crank.must_plan()
    crank.apply(failures={0: NAN})

    crank.must_plan()
    crank.apply(prompt_logprobs={0: (-1.0,) * 4})
    crank.must_plan()
    crank.apply(prompt_logprobs={0: (-1.0,)})

    assert crank.tokens_of(0)[0].prompt.prompt_logprobs == (-1.0,) * 5


def test_another_error_of_a_row_ends_the_request_at_once() -> None:
    crank = Crank()
    crank.add(make_request(0), make_request(1))
    crank.must_plan()

    crank.apply(failures={1: "grammar_error"})
    crank.run()

    assert [failure.code for failure in crank.failures_of(1)] == ["grammar_error"]
    assert len(crank.tokens_of(0)) == 4


def test_a_failed_row_among_decodes_does_not_shift_the_tokens_of_others() -> None:
    crank = Crank()
    crank.add(*(make_request(i, max_new_tokens=3) for i in range(3)))
    crank.step()

    crank.must_plan()
    crank.apply(lambda slot: 300 + slot, failures={1: NAN})

    assert [crank.tokens_of(i)[-1].token_id for i in (0, 2)] == [300, 302]


def test_a_sequence_alone_in_a_step_that_raised_ends_and_the_scheduler_goes_on() -> None:
    crank = Crank()
    crank.add(make_request(0))
    crank.step()
    crank.must_plan()
    crank.add(make_request(2))

    events = crank.fail_step()

    assert [event.request_id for event in events] == [0]
    assert crank.scheduler.stats().used_blocks == 0
    crank.run()
    assert len(crank.tokens_of(2)) == 4


def test_several_sequences_of_a_step_that_raised_are_tried_one_by_one_and_lose_nothing() -> None:
    crank = Crank()
    crank.add(*(make_request(i) for i in range(3)))
    crank.step()
    crank.must_plan()

    assert crank.fail_step() == []

    rows = []
    while len(rows) < 3:
        plan = crank.must_plan()
        rows.append(plan.num_rows)
        crank.apply()
    assert rows == [1, 1, 1]
    assert crank.must_plan().num_rows == 3
    crank.apply()
    crank.run()
    assert [len(crank.tokens_of(i)) for i in range(3)] == [4, 4, 4]


def test_only_the_culprit_of_a_step_that_raised_ends() -> None:
    crank = Crank()
    crank.add(*(make_request(i) for i in range(3)))
    crank.step()
    crank.must_plan()
    crank.fail_step()

    crank.must_plan()
    crank.apply()
    crank.must_plan()
    events = crank.fail_step()
    crank.run()

    assert [event.request_id for event in events] == [1]
    assert [len(crank.tokens_of(i)) for i in (0, 2)] == [4, 4]


def test_a_suspect_that_is_aborted_is_forgotten() -> None:
    crank = Crank()
    crank.add(make_request(0), make_request(1))
    crank.must_plan()
    crank.fail_step()

    crank.scheduler.abort(RequestId(0))
    crank.run()

    assert len(crank.tokens_of(1)) == 4
