"""The life of a rank other than 0."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from weft.core.plan import StepPlan
from weft.errors import InvariantBroken
from weft.parallel.broadcast import PlanReceiver, PlanSender
from weft.runner.worker import run_plans


class FakeRunner:
    def __init__(self, failing_step: int | None = None) -> None:
        self.steps: list[int] = []
        self._failing_step = failing_step

    def execute(self, plan: StepPlan) -> None:
        if plan.step_id == self._failing_step:
            raise InvariantBroken("a plan that contradicts the tables")
        self.steps.append(plan.step_id)


def step(step_id: int) -> StepPlan:
    return StepPlan(step_id=step_id, slots=[0], first_positions=[0], num_tokens=[1], samples=[True])


def run(runner: FakeRunner, run_dir: Path, num_plans: int) -> int:
    with closing(PlanSender(run_dir, 1)) as sender, ThreadPoolExecutor(1) as threads:

        def worker() -> int:
            with closing(PlanReceiver(run_dir)) as receiver:
                return run_plans(runner, receiver)

        ended = threads.submit(worker)
        for step_id in range(num_plans):
            sender.send(step(step_id))
        sender.close()
        return ended.result(20)


def test_every_plan_is_run_in_order_until_rank_0_takes_leave(tmp_path: Path) -> None:
    runner = FakeRunner()

    assert run(runner, tmp_path, 5) == 5
    assert runner.steps == [0, 1, 2, 3, 4]


def test_an_error_ends_the_rank(tmp_path: Path) -> None:
    runner = FakeRunner(failing_step=0)

    with pytest.raises(InvariantBroken):
        run(runner, tmp_path, 1)
    assert runner.steps == []
