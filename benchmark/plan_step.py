"""Host time of one step: `plan_step` and `apply` with many decoding sequences, without a model.

    python benchmark/plan_step.py --sequences 256 --steps 2000

Prints median and 99th percentile. The bar: `plan_step` ≤ 0.3 ms and both together ≤ 0.5 ms at 256 sequences.
"""

import argparse
import gc
import statistics
import time

from weft.core.plan import StepPlan, StepResult
from weft.core.request import Request, RequestId, SamplingParams, StopConditions
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.scheduler import Scheduler

PROMPT_TOKENS = 64
WAITING_REQUESTS = 64


def make_scheduler(num_sequences: int, block_size: int, num_steps: int) -> Scheduler:
    max_new_tokens = num_steps + 64
    num_blocks = num_sequences * ((PROMPT_TOKENS + max_new_tokens) // block_size + 2)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_sequences=num_sequences,
            num_blocks=num_blocks,
            block_size_tokens=block_size,
            max_total_tokens=PROMPT_TOKENS + max_new_tokens,
            vocab_size=50_000,
            max_batch_prefill_tokens=4096,
            prefix_key=bytes(32),
            inter_token_target_ns=80_000_000,
        )
    )
    for i in range(num_sequences + WAITING_REQUESTS):
        scheduler.add(
            Request(
                request_id=RequestId(i),
                prompt_token_ids=tuple(range(i, i + PROMPT_TOKENS)),
                sampling=SamplingParams(),
                stop=StopConditions(max_new_tokens=max_new_tokens, eos_token_ids=(2,)),
            ),
            now_ns=0,
        )
    return scheduler


def fake_result(plan: StepPlan) -> StepResult:
    num_sampled = sum(plan.samples)
    return StepResult(
        step_id=plan.step_id, elapsed_ns=5_000_000, token_ids=[11] * num_sampled, logprobs=[-0.5] * num_sampled
    )


def measure(scheduler: Scheduler, num_sequences: int, num_steps: int) -> tuple[list[float], list[float]]:
    """Microseconds of each `plan_step` and `apply` once every sequence decodes, two plans open as in the engine."""
    plans = [scheduler.plan_step(0)]
    plan_us: list[float] = []
    apply_us: list[float] = []
    now_ns = 0
    while len(plan_us) < num_steps:
        began = time.perf_counter_ns()
        plan = scheduler.plan_step(now_ns)
        planned = time.perf_counter_ns()
        oldest = plans.pop(0)
        plans.append(plan)
        assert plan is not None
        assert oldest is not None
        result = fake_result(oldest)
        now_ns += result.elapsed_ns
        ready = time.perf_counter_ns()
        events = scheduler.apply(oldest, result, now_ns)
        applied = time.perf_counter_ns()
        if len(events) == num_sequences == plan.num_rows:
            plan_us.append((planned - began) / 1e3)
            apply_us.append((applied - ready) / 1e3)
    return plan_us, apply_us


def describe(name: str, values: list[float]) -> str:
    percentiles = statistics.quantiles(values, n=100)
    return f"{name:<12} median {statistics.median(values):7.1f} µs   p99 {percentiles[98]:7.1f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of planning and applying one step.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--block-size-tokens", type=int, default=32)
    arguments = parser.parse_args()
    scheduler = make_scheduler(arguments.sequences, arguments.block_size_tokens, arguments.steps)
    gc.freeze()
    plan_us, apply_us = measure(scheduler, arguments.sequences, arguments.steps)
    both = [plan + apply for plan, apply in zip(plan_us, apply_us, strict=True)]
    print(f"{arguments.sequences} decoding sequences, {WAITING_REQUESTS} waiting, {arguments.steps} steps")
    for name, values in (("plan_step", plan_us), ("apply", apply_us), ("together", both)):
        print(describe(name, values))


if __name__ == "__main__":
    main()
