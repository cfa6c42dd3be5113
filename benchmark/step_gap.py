"""What lies between two models: the time from the end of one step's call to the start of the next.

    python benchmark/step_gap.py MODEL [--quantize int8|int4] [--streams 1,16,64] [--steps 200] [--temperature 0]
                                 [--parts]

Engine, scheduler, executor and runner are the server's, in this process; events are packed into frames on an event loop
as the service does. While a call runs both cores compute, so each microsecond between two calls is lost on all of
them, and what the other threads take meanwhile is taken from the model. Per step of steady decoding: wall time of the
gap, and CPU time of each thread outside the call. `--parts` also times the functions that fill the gap.
"""

import argparse
import gc
import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import uvloop

from weft.config import resolve
from weft.core.events import Event
from weft.core.info import EngineStats
from weft.core.request import Request, RequestId, SamplingParams, StopConditions
from weft.errors import EngineFatal
from weft.kernels.cpu.operations import library
from weft.kernels.cpu.program import Program
from weft.proto import convert
from weft.runner.batch import BatchBuilder
from weft.runner.runner import ModelRunner
from weft.runner.sampling.sampler import Sampler
from weft.runner.slots import SlotTables
from weft.scheduler.scheduler import Scheduler
from weft.server.engine import Engine
from weft.server.executor import LocalExecutor
from weft.server.startup import PhaseTimer, start_rank

PROMPT_TOKENS = 64
MAX_NEW_TOKENS = 2000


class MonotonicClock:
    """The monotonic clock of this machine."""

    def now_ns(self) -> int:
        """See `Clock.now_ns`."""
        return time.monotonic_ns()


class CallWatch:
    """Notes when each call of the model begins and ends, in wall time and in CPU time of the calling thread."""

    def __init__(self) -> None:
        self._call = library().weft_run_step
        self._ended_ns = self._ended_cpu_ns = 0
        self.gaps_ns: list[int] = []
        self.gaps_cpu_ns: list[int] = []
        self.calls_ns: list[int] = []
        setattr(library(), "weft_run_step", self)  # noqa: B010 - functions of a library are no attributes to a checker

    def __call__(self, *arguments: Any) -> Any:  # noqa: ANN401
        """The call itself."""
        began = time.perf_counter_ns()
        self.gaps_ns.append(began - self._ended_ns)
        self.gaps_cpu_ns.append(time.thread_time_ns() - self._ended_cpu_ns)
        fault = self._call(*arguments)
        self._ended_cpu_ns = time.thread_time_ns()
        self._ended_ns = time.perf_counter_ns()
        self.calls_ns.append(self._ended_ns - began)
        return fault


class PartWatch:
    """Notes the wall time of some functions."""

    def __init__(self) -> None:
        self.spent_ns: dict[str, list[int]] = defaultdict(list)

    def wrap(self, owner: Any, name: str) -> None:  # noqa: ANN401
        """Replace `owner.name` by the same with a clock around it."""
        function: Callable[..., Any] = getattr(owner, name)
        label = f"{owner.__name__}.{name}"

        def timed(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            began = time.perf_counter_ns()
            try:
                return function(*arguments, **options)
            finally:
                self.spent_ns[label].append(time.perf_counter_ns() - began)

        setattr(owner, name, timed)

    def tell(self) -> None:
        """Print calls and median of each function, and forget them."""
        for label, spent_ns in self.spent_ns.items():
            print(f"    {label:28} {len(spent_ns):5} calls, median {statistics.median(spent_ns) / 1e3:7.1f} µs")
        self.spent_ns.clear()


class Listener:
    """Receives events as the service does: handed to an event loop, packed there."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever, name="loop", daemon=True)
        self.thread.start()
        self.num_running = 0

    def deliver(self, events: Sequence[Event], stats: EngineStats) -> None:
        """Called by the engine's thread."""
        self._loop.call_soon_threadsafe(self._pack, events, stats)

    def fail(self, error: EngineFatal) -> None:
        """The engine ended; so does the benchmark."""
        print(f"the engine failed: {error}")
        os._exit(1)

    def _pack(self, events: Sequence[Event], stats: EngineStats) -> None:
        convert.frame_from_events(events, stats).SerializeToString()
        self.num_running = stats.step_decode_rows


def cpu_ns(thread: threading.Thread) -> int:
    """CPU time of a thread so far."""
    assert thread.ident is not None
    return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))


def measure(engine: Engine, listener: Listener, watch: CallWatch, streams: int, arguments: argparse.Namespace) -> str:
    """One line about a number of streams."""
    sampling = SamplingParams(do_sample=arguments.temperature > 0, temperature=arguments.temperature or 1.0, seed=1)
    first_id = time.monotonic_ns()
    ids = [RequestId(first_id + index) for index in range(streams)]
    for index, request_id in enumerate(ids):
        engine.add(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(range(1000 + index, 1000 + index + PROMPT_TOKENS)),
                sampling=sampling,
                stop=StopConditions(max_new_tokens=MAX_NEW_TOKENS, eos_token_ids=(2,), ignore_eos=True),
            )
        )
    while listener.num_running < streams:
        time.sleep(0.01)
    time.sleep(0.3)
    threads = {"engine": engine._thread, "loop": listener.thread}  # noqa: SLF001 - a benchmark may look
    first_step, before = len(watch.calls_ns), {name: cpu_ns(thread) for name, thread in threads.items()}
    while len(watch.calls_ns) < first_step + arguments.steps:
        time.sleep(0.05)
    last_step, after = len(watch.calls_ns), {name: cpu_ns(thread) for name, thread in threads.items()}
    for request_id in ids:
        engine.abort(request_id)
    while listener.num_running:
        time.sleep(0.01)
        if not engine._open_steps:  # noqa: SLF001
            break
    num_steps = last_step - first_step
    gaps = sorted(watch.gaps_ns[first_step:last_step])
    executor_us = statistics.fmean(watch.gaps_cpu_ns[first_step:last_step]) / 1e3
    engine_us, loop_us = ((after[name] - before[name]) / 1e3 / num_steps for name in threads)
    return (
        f"{streams:3} streams: model {statistics.median(watch.calls_ns[first_step:last_step]) / 1e6:6.2f} ms   "
        f"gap median {gaps[num_steps // 2] / 1e6:.3f} p90 {gaps[int(0.9 * num_steps)] / 1e6:.3f} ms   "
        f"CPU per step, µs: executor {executor_us:5.0f} engine {engine_us:5.0f} loop {loop_us:5.0f}   "
        f"executor + engine per token {(executor_us + engine_us) / streams:6.1f}"
    )


def watch_parts() -> PartWatch:
    """Clocks around what happens between two calls and beside them."""
    parts = PartWatch()
    for owner, names in (
        (Scheduler, ("plan_step", "apply", "stats")),
        (Engine, ("_stats", "_publish_events")),
        (SlotTables, ("append_blocks",)),
        (BatchBuilder, ("build", "_lay_out")),
        (Sampler, ("sample", "append")),
        (ModelRunner, ("_prompt_targets", "_write_on_host")),
        (Program, ("_bind_batch", "_lay_out")),
    ):
        for name in names:
            parts.wrap(owner, name)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    words = [] if arguments.quantize is None else ["--quantize", arguments.quantize]
    settings = resolve(["--model-id", str(arguments.model), *words], os.environ)
    settings = replace(settings, model_path=str(arguments.model), threads=len(os.sched_getaffinity(0)))
    started = start_rank(settings, rank=0, world_size=1, timer=PhaseTimer())
    gc.collect()
    gc.freeze()
    watch, listener = CallWatch(), Listener()
    parts = watch_parts() if arguments.parts else None
    executor = LocalExecutor(started.runner)
    engine = Engine(Scheduler(started.scheduler_config), executor, MonotonicClock(), listener.deliver, listener.fail)
    engine.start()
    for streams in map(int, arguments.streams.split(",")):
        print(measure(engine, listener, watch, streams, arguments), flush=True)
        if parts is not None:
            parts.tell()
    engine.stop()
    executor.close()


if __name__ == "__main__":
    main()
