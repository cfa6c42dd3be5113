"""What one request, and several, get from plan_step and apply."""

import pytest
from tests.unit.scheduler.builders import EOS, Crank, make_request, rows, started

from weft.core.plan import StepResult, TopTokens
from weft.core.request import FinishReason
from weft.errors import ContextLengthError, InvariantBroken, OverloadedError, ValidationError


def test_an_idle_scheduler_plans_nothing() -> None:
    crank = Crank()

    assert crank.plan() is None
    assert not crank.scheduler.has_work


def test_a_prompt_is_computed_in_one_step_and_then_decoded_token_by_token() -> None:
    crank = Crank()
    crank.add(make_request(prompt=6, max_new_tokens=3))

    plan = crank.must_plan()

    assert rows(plan) == [(0, 0, 6, True)]
    assert list(plan.new_block_slots) == [0, 0]
    assert plan.starts[0].token_ids == make_request(prompt=6).prompt_token_ids
    crank.apply()
    assert rows(crank.must_plan()) == [(0, 6, 1, True)]
    crank.apply()
    assert rows(crank.must_plan()) == [(0, 7, 1, True)]
    crank.apply()
    assert [event.token_index for event in crank.tokens_of(0)] == [0, 1, 2]
    assert [event.finish_reason for event in crank.tokens_of(0)] == [None, None, FinishReason.LENGTH]
    assert not crank.scheduler.has_work


def test_a_block_is_taken_only_when_a_row_needs_it() -> None:
    crank = Crank()
    crank.add(make_request(prompt=7, max_new_tokens=4))

    crank.step()
    assert crank.scheduler.stats().used_blocks == 2
    crank.step()
    assert crank.scheduler.stats().used_blocks == 2
    plan = crank.must_plan()

    assert list(plan.new_block_ids) == [2]
    assert crank.scheduler.stats().used_blocks == 3


def test_a_long_prompt_is_cut_at_block_borders() -> None:
    crank = Crank(max_batch_prefill_tokens=10)
    crank.add(make_request(prompt=26, max_new_tokens=1))

    planned = []
    while (plan := crank.plan()) is not None:
        planned += rows(plan)
        crank.apply()

    assert planned == [(0, 0, 12, False), (0, 12, 12, False), (0, 24, 2, True)]


def test_decode_rows_stand_before_prefill_chunks() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(make_request(0, prompt=3, max_new_tokens=9))
    crank.step()
    crank.add(make_request(1, prompt=30))

    assert rows(crank.must_plan()) == [(0, 3, 1, True), (1, 0, 4, False)]


def test_the_first_token_carries_the_report_about_the_prompt_and_no_other_does() -> None:
    crank = Crank()
    crank.now_ns = 500
    crank.add(make_request(max_new_tokens=2))
    crank.now_ns = 2000
    crank.run()

    first, second = crank.tokens_of(0)
    assert first.prompt is not None
    assert first.prompt.queue_ns == 1500
    assert first.prompt.num_cached_tokens == 0
    assert first.prompt.prompt_logprobs is None
    assert second.prompt is None


@pytest.mark.parametrize(
    ("max_new_tokens", "token", "ignore_eos", "reason"),
    [
        (5, EOS, False, FinishReason.EOS_TOKEN),
        (1, EOS, False, FinishReason.EOS_TOKEN),  # both hit: EOS wins
        (1, 7, False, FinishReason.LENGTH),
        (1, EOS, True, FinishReason.LENGTH),
        (2, 7, False, None),
        (2, EOS, True, None),
    ],
)
def test_why_a_sequence_ends(max_new_tokens: int, token: int, ignore_eos: bool, reason: FinishReason | None) -> None:
    crank = Crank()
    crank.add(make_request(max_new_tokens=max_new_tokens, ignore_eos=ignore_eos))

    (event,) = crank.step(token)

    assert event.finish_reason == reason
    assert crank.scheduler.has_work == (reason is None)


def test_a_finished_sequence_gives_everything_back() -> None:
    crank = Crank(prefix_caching=False)
    crank.add(make_request())

    crank.run()

    assert crank.scheduler.pool.num_free == 64
    assert len(crank.scheduler.free_slots) == 8


@pytest.mark.parametrize("prompt", [1, 4, 5])
def test_prompts_around_a_block_border_finish(prompt: int) -> None:
    crank = Crank()
    crank.add(make_request(prompt=prompt, max_new_tokens=9))

    crank.run()

    assert len(crank.tokens_of(0)) == 9


def test_max_new_tokens_is_never_reserved() -> None:
    crank = Crank(num_blocks=12, max_total_tokens=40)  # 32 blocks for the whole of four lives
    for request_id in range(4):
        crank.add(make_request(request_id, prompt=3, max_new_tokens=29))

    assert started(crank.must_plan()) == [0, 1, 2, 3]


def test_higher_priorities_start_first_and_equals_in_order_of_arrival() -> None:
    crank = Crank(max_num_sequences=1)
    for request_id, priority in enumerate((0, 3, -1, 3)):
        crank.add(make_request(request_id, priority=priority, max_new_tokens=1))

    crank.run()

    assert [event.request_id for event in crank.events] == [1, 3, 0, 2]


def test_max_batch_size_bounds_the_running_sequences() -> None:
    crank = Crank(max_batch_size=2)
    for request_id in range(3):
        crank.add(make_request(request_id))

    assert started(crank.must_plan()) == [0, 1]
    crank.run()
    assert len(crank.tokens_of(2)) == 4


def test_max_batch_total_tokens_caps_the_pool() -> None:
    crank = Crank(max_batch_total_tokens=23)

    assert crank.scheduler.stats().total_blocks == 5


def test_the_queue_takes_its_bound_and_refuses_one_more() -> None:
    crank = Crank(max_queue_requests=2)
    crank.add(make_request(0), make_request(1))

    with pytest.raises(OverloadedError, match="All 2 places") as caught:
        crank.add(make_request(2))

    assert caught.value.retry_after_s == 1.0
    crank.run()
    crank.add(make_request(2))


def test_a_refused_client_is_told_how_long_half_of_the_queue_takes_at_the_present_rate() -> None:
    crank = Crank(max_num_sequences=1, max_queue_requests=8)
    crank.add(*(make_request(i, max_new_tokens=1) for i in range(8)))
    for i in range(3):
        crank.must_plan()
        crank.apply(elapsed_ns=5_000_000_000)
        crank.add(make_request(10 + i, max_new_tokens=1))

    with pytest.raises(OverloadedError) as caught:
        crank.add(make_request(20))

    assert caught.value.retry_after_s == pytest.approx(8 / 2 * 5.0)


def test_a_request_that_just_fits_the_pool_runs_and_one_token_more_is_refused() -> None:
    crank = Crank(num_blocks=3)
    crank.add(make_request(0, prompt=6, max_new_tokens=7))  # 12 tokens are computed, the 13th only sampled

    with pytest.raises(ContextLengthError, match=r"must be <= 13.*Given: 14") as caught:
        crank.add(make_request(1, prompt=6, max_new_tokens=8))

    assert caught.value.field == "max_new_tokens"
    crank.run()
    assert len(crank.tokens_of(0)) == 7


def test_the_scheduler_looks_at_every_request_again() -> None:
    crank = Crank(max_total_tokens=10)
    crank.add(make_request(0, prompt=6, max_new_tokens=4))

    with pytest.raises(ValidationError, match="max_new_tokens"):
        crank.add(make_request(1, prompt=6, max_new_tokens=5))
    with pytest.raises(ValidationError, match="prompt_token_ids"):
        crank.add(make_request(1, prompt=()))
    with pytest.raises(ValidationError, match="prompt_token_ids"):
        crank.add(make_request(1, prompt=(1000,)))


def test_two_live_requests_cannot_have_one_id() -> None:
    crank = Crank()
    crank.add(make_request(0))

    with pytest.raises(ValidationError, match="in use"):
        crank.add(make_request(0))

    crank.run()
    crank.add(make_request(0))


def test_a_request_that_waits_past_its_deadline_fails() -> None:
    crank = Crank(max_num_sequences=1)
    crank.add(make_request(0, max_new_tokens=5), make_request(1, deadline_ns=1500))

    crank.run()

    assert [failure.code for failure in crank.failures_of(1)] == ["deadline_exceeded"]
    assert crank.tokens_of(1) == []
    assert len(crank.tokens_of(0)) == 5


def test_a_request_that_started_in_time_may_run_past_its_deadline() -> None:
    crank = Crank()
    crank.add(make_request(0, max_new_tokens=5, deadline_ns=1))

    crank.run()

    assert len(crank.tokens_of(0)) == 5


def test_a_resumed_request_goes_on_behind_its_emitted_tokens() -> None:
    crank = Crank()
    crank.add(make_request(prompt=5, max_new_tokens=4, emitted_token_ids=(8, 9)))

    plan = crank.must_plan()

    assert plan.starts[0].token_ids == (*make_request(prompt=5).prompt_token_ids, 8, 9)
    assert plan.starts[0].num_prompt_tokens == 5
    assert rows(plan) == [(0, 0, 7, True)]
    crank.apply()
    crank.run()
    assert [event.token_index for event in crank.tokens_of(0)] == [2, 3]
    assert crank.tokens_of(0)[0].prompt is not None


def test_prompt_logprobs_are_collected_over_chunks_and_come_with_the_first_token() -> None:
    crank = Crank(max_batch_prefill_tokens=4)
    crank.add(make_request(prompt=10, max_new_tokens=2, prompt_logprobs=True))

    crank.must_plan()
    crank.apply(prompt_logprobs={0: (-1.0, -2.0, -3.0, -4.0)})
    crank.must_plan()
    crank.apply(prompt_logprobs={0: (-5.0, -6.0, -7.0, -8.0)})
    crank.must_plan()
    (event,) = crank.apply(prompt_logprobs={0: (-9.0,)})

    assert event.prompt.prompt_logprobs == tuple(-float(i) for i in range(1, 10))


def test_alternatives_to_prompt_tokens_are_collected_with_their_logprobs() -> None:
    crank = Crank(max_batch_prefill_tokens=4)
    crank.add(make_request(prompt=6, max_new_tokens=2, prompt_logprobs=True, prompt_top_n_tokens=1))
    tops = tuple(TopTokens((i,), (-0.5,)) for i in range(5))

    crank.must_plan()
    crank.apply(prompt_logprobs={0: (-1.0,) * 4}, prompt_top_tokens={0: tops[:4]})
    crank.must_plan()
    (event,) = crank.apply(prompt_logprobs={0: (-1.0,)}, prompt_top_tokens={0: tops[4:]})

    assert event.prompt.prompt_top_tokens == tops
    (running,) = crank.scheduler.running
    assert running.prompt_top_tokens == []


def test_missing_alternatives_to_prompt_tokens_are_a_bug_and_not_a_shorter_list() -> None:
    crank = Crank()
    crank.add(make_request(prompt=3, prompt_logprobs=True, prompt_top_n_tokens=1))
    crank.must_plan()

    with pytest.raises(InvariantBroken):
        crank.apply(prompt_logprobs={0: (-1.0, -2.0)})


def test_a_lone_prompt_token_has_no_prompt_logprobs_but_says_so() -> None:
    crank = Crank()
    crank.add(make_request(prompt=1, prompt_logprobs=True))

    (event,) = crank.step()

    assert event.prompt.prompt_logprobs == ()


def test_missing_prompt_logprobs_are_a_bug_and_not_a_shorter_list() -> None:
    crank = Crank()
    crank.add(make_request(prompt=3, prompt_logprobs=True))
    crank.must_plan()

    with pytest.raises(InvariantBroken, match="0 prompt log-probabilities"):
        crank.apply()


def test_a_token_outside_the_vocabulary_fails_that_request_alone() -> None:
    crank = Crank()
    crank.add(make_request(0, max_new_tokens=3), make_request(1, max_new_tokens=3))
    crank.step()

    crank.step(lambda slot: 1000 if slot == 0 else 7)
    crank.run()

    assert [failure.code for failure in crank.failures_of(0)] == ["generation"]
    assert len(crank.tokens_of(1)) == 3


def test_results_must_come_in_plan_order() -> None:
    crank = Crank()
    crank.add(make_request())
    crank.must_plan()
    crank.must_plan()
    crank.open.rotate()

    with pytest.raises(InvariantBroken, match="oldest open plan is 0"):
        crank.apply()


def test_a_result_with_too_few_tokens_is_refused() -> None:
    crank = Crank()
    crank.add(make_request())
    plan = crank.must_plan()
    result = StepResult(step_id=plan.step_id, elapsed_ns=1, token_ids=[], logprobs=[])

    with pytest.raises(InvariantBroken, match=r"has 0 tokens .* samples 1"):
        crank.scheduler.apply(plan, result, 1)


def test_stats_tell_the_state_and_the_last_step() -> None:
    crank = Crank(max_num_sequences=1)
    crank.add(make_request(0, prompt=6, max_new_tokens=9), make_request(1))

    crank.step()
    stats = crank.scheduler.stats()

    assert (stats.num_steps, stats.num_running, stats.num_waiting) == (1, 1, 1)
    assert (stats.used_blocks, stats.cached_blocks, stats.total_blocks) == (2, 0, 64)
    assert (stats.step_decode_rows, stats.step_prefill_rows, stats.step_tokens) == (0, 1, 6)
    assert stats.step_elapsed_ns == 1000


class TestFairness:
    """A long prompt neither blocks the others nor starves."""

    def test_a_short_prompt_overtakes_a_long_one_within_two_steps(self) -> None:
        crank = Crank(max_batch_prefill_tokens=16, num_blocks=100, max_total_tokens=400)
        crank.add(make_request(0, prompt=300))
        crank.step()
        crank.add(make_request(1, prompt=8))

        plan = crank.must_plan()

        assert rows(plan) == [(0, 16, 8, False), (1, 0, 8, True)]

    def test_a_long_prompt_gets_half_of_every_step_while_short_ones_keep_coming(self) -> None:
        crank = Crank(max_batch_prefill_tokens=16, num_blocks=200, max_total_tokens=400, max_num_sequences=4)
        crank.add(make_request(0, prompt=100))
        num_steps = 0
        while not crank.tokens_of(0):
            crank.add(make_request(1 + num_steps, prompt=16, max_new_tokens=1))
            crank.step()
            num_steps += 1

        assert num_steps <= 100 // 8 + 1

    def test_what_others_leave_over_goes_to_the_first_prompt(self) -> None:
        crank = Crank(max_batch_prefill_tokens=16, num_blocks=100, max_total_tokens=400)
        crank.add(make_request(0, prompt=300))
        crank.step()
        crank.add(make_request(1, prompt=3))

        assert rows(crank.must_plan()) == [(0, 16, 12, False), (1, 0, 3, True)]

    def test_nobody_overtakes_a_head_that_does_not_fit_into_memory(self) -> None:
        crank = Crank(num_blocks=10, max_total_tokens=40)
        crank.add(make_request(0, prompt=20, max_new_tokens=12))
        crank.step()
        crank.add(make_request(1, prompt=30, max_new_tokens=1), make_request(2, prompt=2, max_new_tokens=1))

        assert started(crank.must_plan()) == []
        crank.apply()
        crank.run()
        ended = [event.request_id for event in crank.events if event.finish_reason]
        assert ended == [0, 1, 2]

    def test_running_streams_keep_their_time_while_a_long_prompt_is_computed(self) -> None:
        target_ns = 80_000_000
        crank = Crank(
            max_batch_prefill_tokens=4096,
            num_blocks=4000,
            max_total_tokens=16_000,
            inter_token_target_ns=target_ns,
        )
        crank.add(make_request(0, prompt=8, max_new_tokens=300))
        for _ in range(3):
            crank.must_plan()
            crank.apply(elapsed_ns=10_000_000)
        crank.add(make_request(1, prompt=5000, max_new_tokens=1))
        durations = []
        while not crank.tokens_of(1):
            plan = crank.must_plan()
            elapsed_ns = 10_000_000 + 100_000 * plan.total_tokens
            crank.apply(elapsed_ns=elapsed_ns)
            if plan.num_rows == 2:
                durations.append(elapsed_ns)

        assert max(durations) < 1.1 * target_ns
        assert sorted(durations)[len(durations) // 2] > 0.7 * target_ns
