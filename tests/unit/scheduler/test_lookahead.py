"""Two plans open at once: the second assumes that the first yields one token per sequence."""

from tests.unit.scheduler.builders import EOS, Crank, make_request, rows, started

from weft.core.request import FinishReason


def test_the_next_token_is_planned_before_the_last_one_is_known() -> None:
    crank = Crank()
    crank.add(make_request(prompt=6))

    crank.must_plan()

    assert rows(crank.must_plan()) == [(0, 6, 1, True)]


def test_a_third_plan_is_never_opened() -> None:
    crank = Crank()
    crank.add(make_request(max_new_tokens=50))
    crank.must_plan()
    crank.must_plan()

    assert crank.plan() is None
    crank.apply()
    assert crank.plan() is not None


def test_a_chunk_may_follow_a_chunk_that_has_not_run_yet() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(make_request(prompt=20))

    assert rows(crank.must_plan()) == [(0, 0, 8, False)]
    assert rows(crank.must_plan()) == [(0, 8, 8, False)]
    crank.apply()
    assert rows(crank.must_plan()) == [(0, 16, 4, True)]


def test_nothing_is_planned_beyond_max_new_tokens() -> None:
    crank = Crank()
    crank.add(make_request(max_new_tokens=2))

    crank.must_plan()
    crank.must_plan()
    crank.apply()

    assert crank.plan() is None
    (last,) = crank.apply()
    assert last.finish_reason == FinishReason.LENGTH


def test_a_sequence_found_finished_wastes_one_row_whose_result_is_dropped() -> None:
    crank = Crank()
    crank.add(make_request(max_new_tokens=50))
    crank.must_plan()
    crank.must_plan()

    (last,) = crank.apply(EOS)

    assert last.finish_reason == FinishReason.EOS_TOKEN
    assert crank.scheduler.stats().used_blocks == 0
    assert crank.apply() == []
    assert not crank.scheduler.has_work


def test_slot_and_blocks_of_a_finished_sequence_are_reused_while_its_last_row_is_open() -> None:
    crank = Crank(max_num_sequences=1, num_blocks=2, max_total_tokens=9)
    crank.add(make_request(0, prompt=4, max_new_tokens=5), make_request(1, prompt=8, max_new_tokens=1))
    crank.must_plan()
    crank.must_plan()
    crank.apply(EOS)

    plan = crank.must_plan()

    assert started(plan) == [1]
    assert rows(plan) == [(0, 0, 8, True)]
    assert sorted(plan.new_block_ids) == [0, 1]
    assert crank.apply() == []
    (event,) = crank.apply()
    assert event.request_id == 1


def test_an_aborted_sequence_is_silent_though_its_row_is_open() -> None:
    crank = Crank()
    crank.add(make_request(0), make_request(1))
    crank.must_plan()

    assert crank.abort(0)

    assert [event.request_id for event in crank.apply()] == [1]


def test_an_id_may_be_used_again_while_the_old_row_is_open() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=5))
    crank.must_plan()
    crank.abort(0)
    crank.add(make_request(0, prompt=6, max_new_tokens=2))
    crank.must_plan()

    assert crank.apply() == []
    crank.run()
    assert [event.token_index for event in crank.tokens_of(0)] == [0, 1]


def test_a_step_that_raises_fails_its_sequences_also_in_the_plan_behind_it() -> None:
    crank = Crank(max_num_sequences=2)
    crank.add(make_request(0, max_new_tokens=9))
    crank.must_plan()
    crank.add(make_request(1, max_new_tokens=9))
    crank.must_plan()

    events = crank.fail_step()

    assert [event.request_id for event in events] == [0]
    assert [event.request_id for event in crank.apply()] == [1]
    crank.run()
    assert len(crank.tokens_of(1)) == 9
