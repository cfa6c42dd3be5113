"""Where plans become work: in this process, or in this process and its sister ranks."""

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from weft.core.plan import StepPlan, StepResult
from weft.errors import InvariantBroken
from weft.parallel.broadcast import PlanSender
from weft.runner.worker import Runner


class PendingResult(Protocol):
    """What a submitted plan will have brought."""

    def result(self) -> StepResult:
        """Wait for it. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs plans one after another, in the order of submission."""

    def submit(self, plan: StepPlan) -> PendingResult:
        """Queue a plan."""
        ...

    def close(self) -> None:
        """Finish what was submitted and let go of the device."""
        ...


Execute = Callable[[StepPlan, Callable[[], None]], StepResult]
"""Runs a plan and calls the function when the model is about to run: see `ModelRunner.execute`."""


class _SubmittedStep:
    """A plan and its outcome; a lock is what one thread waits at. A `Future` costs thirty times as much."""

    __slots__ = ("_is_open", "_outcome", "plan")

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self._outcome: StepResult | BaseException | None = None
        self._is_open = threading.Lock()
        self._is_open.acquire()

    def keep(self, outcome: StepResult | BaseException) -> None:
        """Take what came of the plan, for whoever will be told."""
        self._outcome = outcome

    def publish(self) -> None:
        """Let `result` return."""
        self._is_open.release()

    def done(self) -> bool:
        """Whether it was published."""
        return not self._is_open.locked()

    def result(self, timeout_s: float = -1) -> StepResult:
        """See `PendingResult.result`. Raises TimeoutError, too; -1 waits for ever."""
        if not self._is_open.acquire(timeout=timeout_s):
            raise TimeoutError
        self._is_open.release()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        if self._outcome is None:
            raise InvariantBroken(f"step {self.plan.step_id} was published before it ran")
        return self._outcome


class _StepThread:
    """A thread that calls one function per submitted plan.

    A result whose successor waits already is held back until that one's model runs. Whoever waits for the result has
    Python to run, and so has this thread between two models; were both to start now, they would take the interpreter
    lock from each other while the cores stand still. A tenth of a millisecond later nobody is in the way.
    """

    def __init__(self, execute: Execute) -> None:
        self._execute = execute
        self._steps: queue.SimpleQueue[_SubmittedStep | None] = queue.SimpleQueue()
        self._held: _SubmittedStep | None = None
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> _SubmittedStep:
        step = _SubmittedStep(plan)
        self._steps.put(step)
        return step

    def close(self) -> None:
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            if self._steps.empty():
                self._publish()
            step = self._steps.get()
            if step is None:
                self._publish()
                return
            try:
                step.keep(self._execute(step.plan, self._publish))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the result
                step.keep(error)
            self._publish()
            self._held = step

    def _publish(self) -> None:
        """Let go of what is held back."""
        step, self._held = self._held, None
        if step is not None:
            step.publish()


class LocalExecutor:
    """One rank: the runner of this process."""

    def __init__(self, runner: Runner) -> None:
        self._thread = _StepThread(runner.execute)

    def submit(self, plan: StepPlan) -> PendingResult:
        """See `Executor.submit`."""
        return self._thread.submit(plan)

    def close(self) -> None:
        """See `Executor.close`."""
        self._thread.close()


class ShardExecutor:
    """Several ranks: every plan goes to the other ranks first, then runs here; the ranks meet in the collectives."""

    def __init__(self, runner: Runner, sender: PlanSender) -> None:
        self._runner = runner
        self._sender = sender
        self._thread = _StepThread(self._execute)

    def submit(self, plan: StepPlan) -> PendingResult:
        """See `Executor.submit`."""
        return self._thread.submit(plan)

    def close(self) -> None:
        """See `Executor.close`; the other ranks end when the sender does."""
        self._thread.close()
        self._sender.close()

    def _execute(self, plan: StepPlan, on_launch: Callable[[], None]) -> StepResult:
        self._sender.send(plan)
        return self._runner.execute(plan, on_launch)
