"""Where plans become work: in this process, or in this process and its sister ranks."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from weft.core.plan import StepPlan, StepResult
from weft.parallel.broadcast import PlanSender
from weft.runner.worker import Runner


class Executor(Protocol):
    """Runs plans one after another, in the order of submission."""

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """Queue a plan. The future holds its result, or what the step raised."""
        ...

    def close(self) -> None:
        """Finish what was submitted and let go of the device."""
        ...


Execute = Callable[[StepPlan, Callable[[], None]], StepResult]
"""Runs a plan and calls the function when the model is about to run: see `ModelRunner.execute`."""


def _do_nothing() -> None:
    """No result waits to be published."""


class _StepThread:
    """A thread that calls one function per submitted plan.

    A result whose successor waits already is held back until that one's model runs. Whoever waits for the result has
    Python to run, and so has this thread between two models; were both to start now, they would take the interpreter
    lock from each other while the cores stand still. A fifth of a millisecond later nobody is in the way.
    """

    def __init__(self, execute: Execute) -> None:
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
        publish: Callable[[], None] = _do_nothing
        while True:
            if self._steps.empty():
                publish()
                publish = _do_nothing
            step = self._steps.get()
            if step is None:
                publish()
                return
            plan, result = step
            publish_once = _Once(publish)
            try:
                publish = partial(result.set_result, self._execute(plan, publish_once))
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the result
                publish = partial(result.set_exception, error)
            publish_once()


class _Once:
    """Calls a function the first time only."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def __call__(self) -> None:
        function, self._function = self._function, _do_nothing
        function()


class LocalExecutor:
    """One rank: the runner of this process."""

    def __init__(self, runner: Runner) -> None:
        self._thread = _StepThread(runner.execute)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
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

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        """See `Executor.submit`."""
        return self._thread.submit(plan)

    def close(self) -> None:
        """See `Executor.close`; the other ranks end when the sender does."""
        self._thread.close()
        self._sender.close()

    def _execute(self, plan: StepPlan, on_launch: Callable[[], None]) -> StepResult:
        self._sender.send(plan)
        return self._runner.execute(plan, on_launch)
