"""Host time per decode step of the runner around a model that costs nothing.

    python benchmark/runner_overhead.py [--rows 256] [--steps 300]

The vocabulary is tiny, so that what is measured is the runner's own work: plan → arrays → tensors, the bookkeeping of
sampling, result → plan of the next step. The budget is 0.3 ms for 256 greedy rows.
"""

import argparse
import statistics
import time

import torch

from weft.core.plan import SequenceStart, StepPlan
from weft.core.request import RequestId, SamplingParams, Slot, StopConditions
from weft.models.forward_batch import ForwardBatch
from weft.runner.kv_pool import KvPool
from weft.runner.runner import ModelRunner

VOCAB_SIZE = 64
BLOCK_SIZE = 32
CONTEXT = 512
SAMPLING = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(do_sample=True, temperature=0.8, seed=1),
    "temperature, top_k, top_p": SamplingParams(do_sample=True, temperature=0.8, top_k=20, top_p=0.9, seed=1),
    "repetition penalty": SamplingParams(repetition_penalty=1.1),
}


class FreeModel:
    """Random logits, made once."""

    def __init__(self, rows: int) -> None:
        self._logits = torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Model.forward`."""
        return self._logits[: len(batch.logit_rows)]

    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Model.hidden_states`: here these are the logits."""
        return self._logits[batch.logit_rows.long()]

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Model.logits`."""
        return hidden_states


def measure(rows: int, steps: int, sampling: SamplingParams) -> tuple[float, float]:
    """(median, 90th percentile) milliseconds per step."""
    device = torch.device("cpu")
    blocks_each = (CONTEXT + steps) // BLOCK_SIZE + 1
    pool = KvPool(
        num_layers=1,
        num_blocks=rows * blocks_each,
        num_kv_heads=1,
        block_size_tokens=BLOCK_SIZE,
        head_dim=8,
        dtype=torch.float32,
        device=device,
    )
    runner = ModelRunner(
        FreeModel(rows),
        pool,
        max_num_sequences=rows,
        max_total_tokens=CONTEXT + steps + 1,
        vocab_size=VOCAB_SIZE,
        device=device,
    )
    slots = list(range(rows))
    starts = tuple(
        SequenceStart(
            slot=Slot(slot),
            request_id=RequestId(slot),
            token_ids=tuple(token % VOCAB_SIZE for token in range(CONTEXT)),
            num_prompt_tokens=CONTEXT,
            sampling=sampling,
            stop=StopConditions(max_new_tokens=steps),
        )
        for slot in slots
    )
    took: list[float] = []
    for step in range(steps):
        is_first = step == 0
        plan = StepPlan(
            step_id=step,
            starts=starts if is_first else (),
            slots=slots,
            first_positions=[CONTEXT - 1 + step] * rows,
            num_tokens=[1] * rows,
            samples=[True] * rows,
            new_block_slots=slots * blocks_each if is_first else (),
            new_block_ids=list(range(rows * blocks_each)) if is_first else (),
        )
        begin = time.perf_counter_ns()
        runner.execute(plan)
        took.append((time.perf_counter_ns() - begin) / 1e6)
    steady = sorted(took[steps // 10 :])
    return statistics.median(steady), steady[int(0.9 * len(steady))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.rows} decode rows, context {CONTEXT}, vocabulary {VOCAB_SIZE}, torch {torch.__version__}")
    for name, sampling in SAMPLING.items():
        median, tail = measure(arguments.rows, arguments.steps, sampling)
        print(f"{name:28} median {median:6.3f} ms   p90 {tail:6.3f} ms")


if __name__ == "__main__":
    main()
