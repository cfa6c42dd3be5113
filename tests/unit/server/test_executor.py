"""Plans run in order on one thread; a result waits until the model of the step after it runs."""

import threading
from collections.abc import Callable

import pytest

from weft.core.plan import StepPlan, StepResult
from weft.server.executor import LocalExecutor

TIMEOUT_S = 10.0


def plan(step_id: int) -> StepPlan:
    return StepPlan(step_id=step_id, slots=[0], first_positions=[0], num_tokens=[1], samples=[True])


class SlowRunner:
    """Each step stops before its model and inside it until it is told to go on."""

    def __init__(self) -> None:
        self.may_launch = [threading.Event() for _ in range(3)]
        self.may_end = [threading.Event() for _ in range(3)]
        self.is_inside = [threading.Event() for _ in range(3)]
        self.fails: set[int] = set()
        self.order: list[int] = []

    def execute(self, plan: StepPlan, on_launch: Callable[[], None]) -> StepResult:
        step = plan.step_id
        self.order.append(step)
        assert self.may_launch[step].wait(TIMEOUT_S)
        if step in self.fails:
            raise RuntimeError("before the model")
        on_launch()
        self.is_inside[step].set()
        assert self.may_end[step].wait(TIMEOUT_S)
        return StepResult(step_id=step, elapsed_ns=1, token_ids=[], logprobs=[])

    def release(self, *steps: int) -> None:
        for step in steps:
            self.may_launch[step].set()
            self.may_end[step].set()


@pytest.fixture
def runner() -> SlowRunner:
    return SlowRunner()


@pytest.fixture
def executor(runner: SlowRunner) -> LocalExecutor:
    return LocalExecutor(runner)  # type: ignore[arg-type]


def test_a_result_nobody_follows_is_there_at_once(runner: SlowRunner, executor: LocalExecutor) -> None:
    runner.release(0)

    assert executor.submit(plan(0)).result(TIMEOUT_S).step_id == 0
    executor.close()


def test_a_result_is_held_until_the_next_model_runs(runner: SlowRunner, executor: LocalExecutor) -> None:
    first, second = executor.submit(plan(0)), executor.submit(plan(1))

    runner.release(0)
    runner.may_launch[1].set()

    assert runner.is_inside[1].wait(TIMEOUT_S)
    assert first.done()
    assert not second.done()
    runner.release(1)
    assert second.result(TIMEOUT_S).step_id == 1
    executor.close()


def test_while_the_next_step_prepares_nothing_is_published(runner: SlowRunner, executor: LocalExecutor) -> None:
    first = executor.submit(plan(0))
    executor.submit(plan(1))
    runner.release(0)
    while runner.order != [0, 1]:
        threading.Event().wait(0.001)

    assert not first.done()
    runner.release(1)
    assert first.result(TIMEOUT_S).step_id == 0
    executor.close()


def test_a_step_that_fails_before_its_model_publishes_the_one_before(
    runner: SlowRunner, executor: LocalExecutor
) -> None:
    runner.fails = {1}
    first, second, third = (executor.submit(plan(step)) for step in range(3))

    runner.release(0, 1, 2)

    assert first.result(TIMEOUT_S).step_id == 0
    with pytest.raises(RuntimeError, match="before the model"):
        second.result(TIMEOUT_S)
    assert third.result(TIMEOUT_S).step_id == 2
    executor.close()


def test_closing_publishes_what_was_submitted(runner: SlowRunner, executor: LocalExecutor) -> None:
    futures = [executor.submit(plan(step)) for step in range(3)]
    runner.release(0, 1, 2)

    executor.close()

    assert [future.result(0).step_id for future in futures] == [0, 1, 2]
    assert runner.order == [0, 1, 2]
