"""The life of a rank other than 0: run every plan that comes, report nothing.

Its results are dropped: what it computes reaches rank 0 through the model's collectives. It never decides that a
request failed; whatever goes wrong here ends the process, and with it the group.
"""

from collections.abc import Callable
from typing import Protocol

from weft.core.plan import StepPlan, StepResult
from weft.parallel.broadcast import PlanReceiver


class Runner(Protocol):
    """What runs plans: `runner.ModelRunner` for tokens, `pooling.EmbeddingRunner` for vectors."""

    def execute(self, plan: StepPlan, on_launch: Callable[[], None] | None = None) -> StepResult:
        """See `ModelRunner.execute`."""
        ...


def run_plans(runner: Runner, receiver: PlanReceiver) -> int:
    """Run plans until rank 0 takes leave; returns how many there were.

    Raises   EngineFatal: rank 0 is gone, or a plan contradicts this rank's tables
    """
    num_plans = 0
    while (plan := receiver.receive()) is not None:
        runner.execute(plan)
        num_plans += 1
    return num_plans
