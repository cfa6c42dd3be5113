"""Requests for vectors: a prefill, one event, nothing else; and which of them may use the prefix cache."""

import pytest
from tests.unit.scheduler.builders import BLOCK, Crank, make_request, rows

from weft.core.events import EmbeddingEvent, FailureEvent
from weft.core.plan import StepResult
from weft.core.request import Pooling, Request
from weft.errors import InvariantBroken, NumericalError, ValidationError


def vector_request(request_id: int = 0, *, prompt: int | list[int] = 6, pooling: Pooling = Pooling.LAST) -> Request:
    return make_request(request_id, prompt=prompt, max_new_tokens=1, pooling=pooling)


def apply(crank: Crank, failures: dict[int, str] | None = None) -> list[object]:
    """Apply the oldest open plan; the vector of a row is the number of its slot."""
    plan = crank.open.popleft()
    sampling = [row for row, samples in enumerate(plan.samples) if samples]
    result = StepResult(
        step_id=plan.step_id,
        elapsed_ns=1000,
        token_ids=[0] * len(sampling),
        logprobs=[0.0] * len(sampling),
        embeddings={row: bytes([plan.slots[row]]) for row in sampling},
        failures=failures or {},
    )
    crank.now_ns += 1000
    events = crank.scheduler.apply(plan, result, crank.now_ns)
    crank._check()
    return list(events)


def run(crank: Crank) -> list[object]:
    events = []
    while crank.plan() is not None or crank.open:
        events += apply(crank)
    return events


def test_a_prompt_becomes_one_event_and_frees_everything() -> None:
    crank = Crank()
    crank.add(vector_request(1, prompt=6))

    plan = crank.must_plan()
    assert rows(plan) == [(0, 0, 6, True)]
    assert plan.starts[0].pooling is Pooling.LAST
    assert crank.plan() is None, "nothing follows a vector, also before it is there"
    [event] = apply(crank)

    assert isinstance(event, EmbeddingEvent)
    assert (event.request_id, event.values, event.prompt.num_cached_tokens) == (1, b"\0", 0)
    assert not crank.scheduler.has_work
    assert crank.scheduler.pool.num_used == 0


def test_a_long_prompt_is_computed_in_chunks() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(vector_request(prompt=20, pooling=Pooling.MEAN))

    events = run(crank)

    assert len(events) == 1
    assert crank.scheduler.stats().num_steps == 3


def test_a_prompt_whose_last_chunk_is_one_token_ends_like_any_other() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(vector_request(1, prompt=9), vector_request(2, prompt=17))

    assert {event.request_id for event in run(crank)} == {1, 2}


@pytest.mark.parametrize(("pooling", "num_cached"), [(Pooling.LAST, 8), (Pooling.MEAN, 0), (Pooling.CLS, 0)])
def test_only_the_last_token_can_do_without_the_others(pooling: Pooling, num_cached: int) -> None:
    prompt = list(range(100, 100 + 3 * BLOCK))
    crank = Crank()
    crank.add(vector_request(1, prompt=prompt, pooling=pooling))
    run(crank)

    crank.add(vector_request(2, prompt=prompt, pooling=pooling))
    [event] = run(crank)

    assert isinstance(event, EmbeddingEvent)
    assert event.prompt.num_cached_tokens == num_cached


def test_a_prompt_that_has_no_room_beside_another_waits_for_it() -> None:
    crank = Crank(num_blocks=5, max_batch_prefill_tokens=8)
    crank.add(vector_request(1, prompt=16, pooling=Pooling.MEAN))
    crank.plan()
    crank.add(vector_request(2, prompt=12, pooling=Pooling.MEAN))

    events = [*apply(crank), *run(crank)]

    assert {event.request_id for event in events if isinstance(event, EmbeddingEvent)} == {1, 2}


def test_an_abort_between_chunks_frees_the_blocks() -> None:
    crank = Crank(max_batch_prefill_tokens=8)
    crank.add(vector_request(1, prompt=20))
    crank.plan()

    assert crank.abort(1)

    assert apply(crank) == []
    assert crank.scheduler.pool.num_used == 0


def test_values_that_are_not_numbers_get_one_second_try() -> None:
    crank = Crank()
    crank.add(vector_request(1))
    crank.plan()
    assert apply(crank, {0: NumericalError.code}) == []
    crank.plan()

    [event] = apply(crank, {0: NumericalError.code})

    assert isinstance(event, FailureEvent)
    assert event.code == NumericalError.code


def test_a_step_that_raised_is_repeated_alone() -> None:
    crank = Crank()
    crank.add(vector_request(1), vector_request(2))
    crank.plan()
    assert crank.fail_step() == []

    assert {event.request_id for event in run(crank)} == {1, 2}


def test_a_finished_prompt_without_a_vector_is_a_bug() -> None:
    crank = Crank()
    crank.add(vector_request(1))
    crank.plan()

    with pytest.raises(InvariantBroken, match="no vector"):
        crank.apply()


def test_a_vector_takes_no_place_behind_its_prompt() -> None:
    crank = Crank(max_total_tokens=16)
    crank.add(vector_request(1, prompt=16))
    assert len(run(crank)) == 1

    with pytest.raises(ValidationError, match="prompt_token_ids"):
        crank.add(vector_request(2, prompt=17))
    with pytest.raises(ValidationError, match="max_new_tokens"):
        crank.add(make_request(3, prompt=4, max_new_tokens=2, pooling=Pooling.LAST))
