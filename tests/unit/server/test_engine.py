"""The engine loop against the real scheduler and an executor whose steps finish when the test says so."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pytest

from weft.core.events import Event, FailureEvent, TokenEvent
from weft.core.info import EngineStats
from weft.core.plan import StepPlan, StepResult
from weft.core.request import FinishReason, Request, RequestId, SamplingParams, StopConditions
from weft.errors import EngineFatal, OverloadedError
from weft.limits import LIMITS
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.scheduler import Scheduler
from weft.server.engine import Engine

PATIENCE_S = 10.0
EOS = 2


class SteppingClock:
    """Nanoseconds that pass only when asked."""

    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns


class ManualExecutor:
    """Keeps submitted plans until `finish` is called."""

    def __init__(self) -> None:
        self.submitted: queue.Queue[tuple[StepPlan, Future[StepResult]]] = queue.Queue()
        self.num_submitted = 0

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        result: Future[StepResult] = Future()
        self.num_submitted += 1
        self.submitted.put((plan, result))
        return result

    def close(self) -> None:
        return

    def next_step(self) -> tuple[StepPlan, Future[StepResult]]:
        return self.submitted.get(timeout=PATIENCE_S)

    def finish(self, token_id: int = 7) -> StepPlan:
        plan, result = self.next_step()
        num_samples = sum(plan.samples)
        result.set_result(
            StepResult(
                step_id=plan.step_id,
                elapsed_ns=1000,
                token_ids=[token_id] * num_samples,
                logprobs=[-0.5] * num_samples,
            )
        )
        return plan

    def fail(self, error: BaseException) -> StepPlan:
        plan, result = self.next_step()
        result.set_exception(error)
        return plan


class Harness:
    """An engine with everything it talks to."""

    def __init__(self, *, lookahead: bool = True) -> None:
        self.clock = SteppingClock()
        self.executor = ManualExecutor()
        self.events: queue.Queue[Event] = queue.Queue()
        self.stats = EngineStats()
        self.all_stats: list[EngineStats] = []
        self.fatal: queue.Queue[EngineFatal] = queue.Queue()
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_sequences=8,
                num_blocks=64,
                block_size_tokens=8,
                max_total_tokens=128,
                vocab_size=100,
                max_batch_prefill_tokens=64,
                prefix_key=b"k" * 32,
            )
        )
        self.engine = Engine(
            self.scheduler, self.executor, self.clock, self._publish, self.fatal.put, lookahead=lookahead
        )
        self.engine.start()

    def _publish(self, events: Sequence[Event], stats: EngineStats) -> None:
        self.stats = stats
        self.all_stats.append(stats)
        for event in events:
            self.events.put(event)

    def add(self, request_id: int = 1, *, max_new_tokens: int = 4, prompt: Sequence[int] = (3, 4, 5)) -> None:
        self.engine.add(
            Request(
                request_id=RequestId(request_id),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(),
                stop=StopConditions(max_new_tokens=max_new_tokens, eos_token_ids=(EOS,)),
            )
        )

    def next_event(self) -> Event:
        return self.events.get(timeout=PATIENCE_S)


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    stop(harness)


def stop(harness: Harness) -> None:
    """Stop an engine that may wait for steps nobody finished."""
    stopper = threading.Thread(target=harness.engine.stop)
    stopper.start()
    while stopper.is_alive():
        try:
            _, result = harness.executor.submitted.get(timeout=0.01)
        except queue.Empty:
            continue
        if not result.done():
            result.set_exception(RuntimeError("the test is over"))
    stopper.join()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.001)


def test_a_request_yields_its_tokens_in_order_and_ends_once(harness: Harness):
    harness.add(max_new_tokens=3)

    events = []
    for _ in range(3):
        harness.executor.finish()
        events.append(harness.next_event())

    assert [event.token_index for event in events] == [0, 1, 2]
    assert [event.finish_reason for event in events] == [None, None, FinishReason.LENGTH]
    assert harness.events.empty()


def test_a_step_says_what_it_took_and_who_waits():
    harness = Harness(lookahead=False)
    harness.add(max_new_tokens=2)
    harness.executor.finish()
    harness.executor.finish()
    harness.next_event()
    harness.next_event()
    stop(harness)

    first, second = (stats for stats in harness.all_stats if stats.step_tokens)
    assert (first.step_starts, first.step_prefill_rows, first.step_tokens) == (1, 1, 3)
    assert (second.step_starts, second.step_decode_rows, second.step_tokens) == (0, 1, 1)
    assert (first.step_elapsed_ns, first.num_steps, second.num_steps) == (1000, 1, 2)
    assert first.num_failed_steps == first.oldest_waiting_ns == 0


def test_a_step_that_raised_is_counted(harness: Harness):
    harness.add()

    harness.executor.fail(RuntimeError("boom"))

    wait_until(lambda: harness.stats.num_failed_steps == 1)


def test_the_next_step_is_planned_while_the_current_one_runs(harness: Harness):
    harness.add()

    first = harness.executor.next_step()
    second = harness.executor.next_step()

    assert not first[1].done()
    assert second[0].first_positions == [3]
    first[1].set_exception(RuntimeError("not needed any more"))
    second[1].set_exception(RuntimeError("not needed any more"))


def test_never_more_than_two_steps_are_open(harness: Harness):
    harness.add()
    first, second = harness.executor.next_step(), harness.executor.next_step()

    harness.engine.add(
        Request(
            request_id=RequestId(2),
            prompt_token_ids=(1,),
            sampling=SamplingParams(),
            stop=StopConditions(max_new_tokens=1),
        )
    )
    time.sleep(0.05)

    assert harness.executor.num_submitted == 2
    first[1].set_exception(RuntimeError("not needed any more"))
    second[1].set_exception(RuntimeError("not needed any more"))


def test_without_lookahead_a_step_waits_for_the_one_before():
    harness = Harness(lookahead=False)
    harness.add()
    first = harness.executor.next_step()

    time.sleep(0.05)

    assert harness.executor.num_submitted == 1
    first[1].set_exception(RuntimeError("not needed any more"))
    stop(harness)


def test_a_step_that_raises_ends_its_requests_and_no_other(harness: Harness):
    harness.add(1)
    harness.executor.fail(ValueError("a bug in a kernel"))
    failure = harness.next_event()
    harness.executor.fail(ValueError("the step planned meanwhile"))

    harness.add(2, max_new_tokens=1)
    harness.executor.finish()
    token = harness.next_event()

    assert isinstance(failure, FailureEvent)
    assert (failure.request_id, failure.code) == (1, "generation")
    assert "kernel" not in failure.message, "internal texts do not reach clients"
    assert isinstance(token, TokenEvent)
    assert token.request_id == 2
    assert harness.fatal.empty()


def test_a_fatal_error_stops_the_engine_and_is_reported(harness: Harness):
    harness.add()
    harness.executor.fail(EngineFatal("the device is lost"))

    assert harness.fatal.get(timeout=PATIENCE_S).message == "the device is lost"


def test_an_abort_frees_the_blocks_although_a_step_is_running(harness: Harness):
    harness.add(max_new_tokens=50, prompt=range(3, 40))
    harness.executor.finish()
    harness.next_event()

    harness.engine.abort(RequestId(1))
    harness.executor.finish()

    wait_until(lambda: harness.scheduler.stats().used_blocks == 0)
    harness.executor.finish()
    wait_until(lambda: harness.stats.num_running == 0)


def test_aborting_an_unknown_request_does_nothing(harness: Harness):
    harness.engine.abort(RequestId(99))
    harness.add(max_new_tokens=1)
    harness.executor.finish()

    assert isinstance(harness.next_event(), TokenEvent)


def test_a_request_the_scheduler_refuses_gets_a_failure(harness: Harness):
    harness.add(1, max_new_tokens=50)
    harness.add(1, max_new_tokens=50)
    harness.executor.finish()

    failure = next(event for event in iter(harness.next_event, None) if isinstance(event, FailureEvent))

    assert failure.code == "validation"


def test_a_full_inbox_refuses_at_once():
    harness = Harness()
    harness.engine.stop()

    for i in range(LIMITS.max_inbox_messages):
        harness.add(i + 1)
    with pytest.raises(OverloadedError):
        harness.add(0)


def test_waiting_for_the_device_counts_as_standing_still_and_idling_does_not(harness: Harness):
    harness.clock.ns = 5_000_000_000
    wait_until(lambda: harness.engine.stalled_ns == 0)

    harness.add()
    first, second = harness.executor.next_step(), harness.executor.next_step()
    time.sleep(0.02)
    harness.clock.ns += 7_000_000_000

    assert harness.engine.stalled_ns == 7_000_000_000
    first[1].set_exception(RuntimeError("not needed any more"))
    second[1].set_exception(RuntimeError("not needed any more"))


def test_clearing_the_cache_answers_with_the_number_of_blocks(harness: Harness):
    harness.add(max_new_tokens=1, prompt=range(3, 30))
    harness.executor.finish()
    harness.next_event()

    assert harness.engine.clear_cache().result(timeout=PATIENCE_S) == 3
    assert harness.engine.clear_cache().result(timeout=PATIENCE_S) == 0


def test_stopping_finishes_the_open_steps_first():
    harness = Harness()
    harness.add(max_new_tokens=2)
    stopper = threading.Thread(target=harness.engine.stop)
    plan_and_result = harness.executor.next_step()
    second = harness.executor.next_step()
    stopper.start()

    for plan, result in (plan_and_result, second):
        result.set_result(StepResult(step_id=plan.step_id, elapsed_ns=1, token_ids=[7], logprobs=[0.0]))
    stopper.join(PATIENCE_S)

    assert not stopper.is_alive()
    assert [harness.next_event().token_index for _ in range(2)] == [0, 1]
