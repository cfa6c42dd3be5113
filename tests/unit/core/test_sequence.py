"""Progress marks of one request: planned, known, expected."""

import pytest

from weft.core.plan import TopTokens
from weft.core.request import FinishReason, Request, RequestId, SamplingParams, Slot, StopConditions
from weft.core.sequence import NO_SLOT, Sequence


def make_sequence(
    *,
    prompt: int = 6,
    max_new_tokens: int = 3,
    emitted: tuple[int, ...] = (),
    ignore_eos: bool = False,
    prompt_logprobs: bool = False,
) -> Sequence:
    request = Request(
        request_id=RequestId(1),
        prompt_token_ids=tuple(range(10, 10 + prompt)),
        sampling=SamplingParams(prompt_logprobs=prompt_logprobs),
        stop=StopConditions(max_new_tokens=max_new_tokens, eos_token_ids=(2,), ignore_eos=ignore_eos),
        emitted_token_ids=emitted,
    )
    return Sequence.of(request, arrival=0, now_ns=100)


def test_a_new_sequence_has_everything_before_it() -> None:
    sequence = make_sequence()

    assert (sequence.num_planned, sequence.num_unplanned, sequence.num_completion_tokens) == (0, 6, 0)
    assert sequence.slot == NO_SLOT
    assert not sequence.is_running
    assert sequence.may_start


def test_a_chunk_that_stops_short_of_the_end_samples_nothing() -> None:
    sequence = make_sequence()

    assert sequence.plan(4) is False
    assert (sequence.num_unplanned, sequence.num_expected) == (2, 6)


def test_the_chunk_that_reaches_the_end_samples_and_makes_the_next_row_a_decode_row() -> None:
    sequence = make_sequence()
    sequence.plan(4)

    assert sequence.plan(2) is True
    assert (sequence.num_unplanned, sequence.num_expected) == (1, 7)


def test_the_last_token_is_known_to_be_planned_before_it_is_known() -> None:
    sequence = make_sequence(max_new_tokens=2)

    sequence.plan(6)
    assert not sequence.is_last_token_planned
    sequence.plan(1)

    assert sequence.is_last_token_planned


def test_emitted_tokens_count_as_completion() -> None:
    sequence = make_sequence(emitted=(7, 8), max_new_tokens=3)

    assert sequence.token_ids[-2:] == [7, 8]
    assert sequence.num_completion_tokens == 2
    assert sequence.num_unplanned == 8
    sequence.plan(8)
    assert sequence.is_last_token_planned


def test_starting_tells_the_runner_every_known_token_and_counts_the_wait_once() -> None:
    sequence = make_sequence(emitted=(7,))

    start = sequence.start(Slot(3), now_ns=150)
    sequence.rewind()
    sequence.start(Slot(4), now_ns=900)

    assert start.slot == 3
    assert start.token_ids == (10, 11, 12, 13, 14, 15, 7)
    assert start.num_prompt_tokens == 6
    assert sequence.queue_ns == 50


def test_rewinding_forgets_what_was_computed_but_not_what_is_coming() -> None:
    sequence = make_sequence()
    sequence.start(Slot(0), now_ns=0)
    sequence.plan(6)

    sequence.rewind()

    assert (sequence.num_planned, sequence.num_expected, sequence.num_open_rows) == (0, 7, 1)
    assert not sequence.may_start


def test_distrust_drops_what_is_coming() -> None:
    sequence = make_sequence()
    sequence.plan(6)
    sequence.plan(1)

    sequence.distrust_open_rows()

    assert (sequence.num_expected, sequence.num_stale_rows) == (6, 2)


@pytest.mark.parametrize(
    ("num_tokens", "token", "ignore_eos", "reason"),
    [
        (1, 5, False, None),
        (2, 5, False, None),
        (3, 5, False, FinishReason.LENGTH),
        (1, 2, False, FinishReason.EOS_TOKEN),
        (3, 2, False, FinishReason.EOS_TOKEN),
        (1, 2, True, None),
        (3, 2, True, FinishReason.LENGTH),
    ],
)
def test_eos_wins_over_length(num_tokens: int, token: int, ignore_eos: bool, reason: FinishReason | None) -> None:
    sequence = make_sequence(max_new_tokens=3, ignore_eos=ignore_eos)
    sequence.token_ids.extend([5] * (num_tokens - 1) + [token])

    assert sequence.finish_reason(token) == reason


def test_prompt_logprobs_are_kept_once_when_chunks_come_again() -> None:
    sequence = make_sequence(prompt_logprobs=True)

    sequence.collect_prompt_logprobs(0, (-1.0, -2.0, -3.0))
    sequence.collect_prompt_logprobs(0, (-1.0, -2.0))
    sequence.collect_prompt_logprobs(2, (-3.0, -4.0, -5.0))
    sequence.collect_prompt_logprobs(5, ())

    assert sequence.prompt_logprobs == [-1.0, -2.0, -3.0, -4.0, -5.0]


def test_alternatives_to_prompt_tokens_are_kept_once_when_chunks_come_again() -> None:
    sequence = make_sequence(prompt_logprobs=True)
    tops = tuple(TopTokens((i,), (-0.5,)) for i in range(4))

    sequence.collect_prompt_logprobs(0, (-1.0, -2.0), tops[:2])
    sequence.collect_prompt_logprobs(0, (-1.0, -2.0, -3.0), tops[:3])
    sequence.collect_prompt_logprobs(2, (-3.0, -4.0), tops[2:])

    assert sequence.prompt_top_tokens == list(tops)
    sequence.forget_prompt_logprobs()
    assert (sequence.prompt_logprobs, sequence.prompt_top_tokens) == ([], [])


@pytest.mark.parametrize(("emitted", "wanted"), [((), True), ((7,), False)])
def test_a_resumed_request_delivered_its_prompt_logprobs_already(emitted: tuple[int, ...], wanted: bool) -> None:
    assert make_sequence(emitted=emitted, prompt_logprobs=True).wants_prompt_logprobs is wanted
