"""The engine loop: plan, execute, apply.

One thread owns the scheduler. It keeps up to two steps open: while step N runs on the executor's thread, step N+1 is
planned, so the device never waits for Python. Requests and aborts come in through a bounded inbox; what happened goes
out through `publish`, which must not block.

Errors have three ways out and no other: a `RequestError` while adding ends that request; an exception of a step ends
the sequences of that step; an `EngineFatal` (or a bug in planning) ends the engine, and with it the process.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from weft.core.clock import Clock
from weft.core.events import Event, FailureEvent
from weft.core.info import EngineStats
from weft.core.plan import StepPlan, StepResult
from weft.core.request import Request, RequestId
from weft.errors import EngineFatal, GenerationError, InvariantBroken, OverloadedError, RequestError
from weft.limits import LIMITS
from weft.scheduler.scheduler import Scheduler
from weft.server.executor import Executor, PendingResult

log = structlog.get_logger("weft.engine")

MAX_OPEN_STEPS = 2
_IDLE_TICK_S = 0.25
"""How often an idle engine looks at its clock, so that `stalled_ns` stays small and deadlines are seen."""


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class _ClearCache:
    freed_blocks: Future[int]


_Message = _Add | _Abort | _ClearCache


@dataclass(slots=True)
class _OpenStep:
    plan: StepPlan
    result: PendingResult
    plan_ns: int


class Engine:
    """Runs a scheduler against an executor on a thread of its own."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        publish: Callable[[Sequence[Event], EngineStats], None],
        on_fatal: Callable[[EngineFatal], None],
        *,
        lookahead: bool = True,
    ) -> None:
        """`publish` and `on_fatal` are called on the engine's thread."""
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._publish = publish
        self._on_fatal = on_fatal
        self._max_open_steps = MAX_OPEN_STEPS if lookahead else 1
        self._inbox: deque[_Message] = deque()
        self._inbox_changed = threading.Condition()
        self._is_stopping = False
        self._open_steps: deque[_OpenStep] = deque()
        self._num_steps = 0
        self._num_failed_steps = 0
        self._progress_ns = clock.now_ns()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._progress_ns = self._clock.now_ns()
        self._thread.start()

    def stop(self) -> None:
        """Finish the open steps, then end the thread. Requests still open get no further event."""
        with self._inbox_changed:
            self._is_stopping = True
            self._inbox_changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def add(self, request: Request) -> None:
        """Hand in a checked request; its events follow through `publish`.

        Raises   OverloadedError: the inbox is full
        """
        self._send(_Add(request), limit=LIMITS.max_inbox_messages)

    def abort(self, request_id: RequestId) -> None:
        """End a request whose events nobody reads any more. Unknown ids are fine: it may just have ended."""
        self._send(_Abort(request_id), limit=None)

    def clear_cache(self) -> Future[int]:
        """Forget the unused prefix blocks; the future holds how many."""
        freed_blocks: Future[int] = Future()
        self._send(_ClearCache(freed_blocks), limit=LIMITS.max_inbox_messages)
        return freed_blocks

    @property
    def stalled_ns(self) -> int:
        """Time since the loop last made progress. Waiting for work is progress, waiting for the device is not."""
        return max(self._clock.now_ns() - self._progress_ns, 0)

    def _send(self, message: _Message, limit: int | None) -> None:
        with self._inbox_changed:
            if limit is not None and len(self._inbox) >= limit:
                raise OverloadedError("Model is overloaded", retry_after_s=1.0)
            self._inbox.append(message)
            self._inbox_changed.notify()

    def _run(self) -> None:
        try:
            while self._run_step():
                pass
        except EngineFatal as error:
            self._on_fatal(error)
        except Exception as error:
            log.exception("engine.bug")
            self._on_fatal(InvariantBroken(f"the engine loop failed: {type(error).__name__}"))

    def _run_step(self) -> bool:
        """One turn of the loop. False when the engine is to stop."""
        self._read_inbox()
        if self._is_stopping and not self._open_steps:
            return False
        started_ns = self._clock.now_ns()
        plan = None if self._is_stopping else self._scheduler.plan_step(started_ns)
        if plan is not None:
            plan_ns = self._clock.now_ns() - started_ns
            self._open_steps.append(_OpenStep(plan, self._executor.submit(plan), plan_ns))
        self._publish_events(self._scheduler.take_events())
        if len(self._open_steps) == self._max_open_steps or (plan is None and self._open_steps):
            self._finish_oldest_step()
        elif plan is None:
            self._wait_for_message()
        return True

    def _finish_oldest_step(self) -> None:
        step = self._open_steps.popleft()
        result: StepResult | None = None
        try:
            result = step.result.result()
        except EngineFatal:
            raise
        except Exception:
            log.exception("engine.step_failed", step_id=step.plan.step_id, num_rows=step.plan.num_rows)
        self._progress_ns = now_ns = self._clock.now_ns()
        if result is None:
            self._num_failed_steps += 1
            message = "Request failed during generation: the step that computed it failed"
            events = self._scheduler.fail_rows(step.plan, GenerationError.code, message)
        else:
            events = self._scheduler.apply(step.plan, result, now_ns)
        self._num_steps += 1
        elapsed_ns = 0 if result is None else result.elapsed_ns
        self._publish(events, self._stats(step, elapsed_ns, self._clock.now_ns() - now_ns))

    def _read_inbox(self) -> None:
        # What arrives meanwhile waits for the next turn: nobody's messages can keep a step from being planned.
        for _ in range(len(self._inbox)):
            self._handle(self._inbox.popleft())

    def _handle(self, message: _Message) -> None:
        match message:
            case _Add(request):
                try:
                    self._scheduler.add(request, self._clock.now_ns())
                except RequestError as error:
                    failure = FailureEvent(request_id=request.request_id, code=error.code, message=error.message)
                    self._publish_events([failure])
            case _Abort(request_id):
                self._scheduler.abort(request_id)
            case _ClearCache(freed_blocks):
                freed_blocks.set_result(self._scheduler.clear_cache())

    def _wait_for_message(self) -> None:
        self._progress_ns = self._clock.now_ns()
        with self._inbox_changed:
            if not self._inbox and not self._is_stopping:
                self._inbox_changed.wait(_IDLE_TICK_S)
        self._progress_ns = self._clock.now_ns()

    def _publish_events(self, events: Sequence[Event]) -> None:
        if events:
            self._publish(events, self._stats())

    def _stats(self, step: _OpenStep | None = None, elapsed_ns: int = 0, apply_ns: int = 0) -> EngineStats:
        """The engine's state; what a step took is said once, right behind it."""
        stats = self._scheduler.stats()
        oldest_ns = self._scheduler.queue.oldest_added_ns
        return EngineStats(
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            oldest_waiting_ns=0 if oldest_ns is None else max(self._clock.now_ns() - oldest_ns, 1),
            used_blocks=stats.used_blocks,
            cached_blocks=stats.cached_blocks,
            total_blocks=stats.total_blocks,
            num_preemptions=stats.num_preemptions,
            prefix_hit_tokens=stats.prefix_hit_tokens,
            prefix_query_tokens=stats.prefix_query_tokens,
            step_decode_rows=stats.step_decode_rows if step else 0,
            step_prefill_rows=stats.step_prefill_rows if step else 0,
            step_tokens=stats.step_tokens if step else 0,
            step_starts=len(step.plan.starts) if step else 0,
            step_plan_ns=step.plan_ns if step else 0,
            step_elapsed_ns=elapsed_ns,
            step_apply_ns=apply_ns,
        )
