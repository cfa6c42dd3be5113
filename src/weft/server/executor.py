"""Where plans become work: in this process, or in this process and its sister ranks."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from weft.core.plan import StepPlan, StepResult
from weft.parallel.broadcast import PlanSender
from weft.runner.runner import ModelRunner


class Executor(Protocol):
    """Runs plans one after another, in the order of submission."""

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Queue a plan. The future holds its result, or what the step raised."""
        ...

    def close(self) -> None:
        """Finish what was submitted and let go of the device."""
        ...


class _StepThread:
    """A thread that calls one function per submitted plan."""

    def __init__(self, execute: Callable[[StepPlan], StepResult]) -> None:
        self._execute = execute
        self._steps: queue.SimpleQueue[tuple[StepPlan, Future[StepResult]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        result: Future[StepResult] = Future()
        self._steps.put((plan, result))
        return result

    def close(self) -> None:
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            plan, result = step
            try:
                result.set_result(self._execute(plan))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the result
                result.set_exception(error)


class LocalExecutor:
    """One rank: the runner of this process."""

    def __init__(self, runner: ModelRunner) -> None:
        self._thread = _StepThread(runner.execute)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """See `Executor.submit`."""
        return self._thread.submit(plan)

    def close(self) -> None:
        """See `Executor.close`."""
        self._thread.close()


class ShardExecutor:
    """Several ranks: every plan goes to the other ranks first, then runs here; the ranks meet in the collectives."""

    def __init__(self, runner: ModelRunner, sender: PlanSender) -> None:
        self._runner = runner
        self._sender = sender
        self._thread = _StepThread(self._execute)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """See `Executor.submit`."""
        return self._thread.submit(plan)

    def close(self) -> None:
        """See `Executor.close`; the other ranks end when the sender does."""
        self._thread.close()
        self._sender.close()

    def _execute(self, plan: StepPlan) -> StepResult:
        self._sender.send(plan)
        return self._runner.execute(plan)
