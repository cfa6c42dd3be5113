"""Prompts to vectors: the runner of an embedding server. StepPlan in, StepResult with vectors out.

Nothing is sampled: a row that finishes a prompt yields the pooled hidden states of the whole prompt. What earlier
chunks contribute is kept per slot. The sum of a mean is one addition after another in the order of positions, so that
a vector has the same bits however its prompt was cut into chunks and whatever stood beside it.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import SequenceStart, StepPlan, StepResult
from weft.core.request import Pooling, Slot
from weft.errors import InvariantBroken, NumericalError
from weft.runner.batch import BatchBuilder, StepBatch
from weft.runner.kv_pool import KvPool
from weft.runner.runner import Model
from weft.runner.slots import SlotTables

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]


class EmbeddingRunner:
    """Runs plans of sequences with pooling, in order. Not safe for use from two threads at once."""

    def __init__(
        self, model: Model, kv_pool: KvPool, *, max_num_sequences: int, max_total_tokens: int, device: torch.device
    ) -> None:
        self._model = model
        self._device = device
        self._tables = SlotTables(
            max_num_sequences=max_num_sequences,
            max_total_tokens=max_total_tokens,
            num_blocks=kv_pool.num_blocks,
            block_size_tokens=kv_pool.block_size_tokens,
            device=device,
        )
        self._batches = BatchBuilder(self._tables, kv_pool.layers, kv_pool.block_size_tokens, device)
        self._poolers: dict[Slot, Pooler] = {}

    def execute(self, plan: StepPlan, on_launch: Callable[[], None] | None = None) -> StepResult:
        """Run one step. Plans must come in the order in which they were made; `on_launch` as in `ModelRunner`.

        Raises   InvariantBroken: the plan contradicts the tables (a bug: this process must not go on)
        """
        started_ns = time.perf_counter_ns()
        with torch.inference_mode():
            for start in plan.starts:
                self._tables.start(start)
                self._poolers[start.slot] = pooler_of(start)
            self._tables.append_blocks(plan)
            batch = self._batches.build(plan)
            spans = [self._poolers[slot].wanted(first, first + num) for slot, first, num in _rows(plan)]
            if on_launch is not None:
                on_launch()
            hidden = self._hidden_states(batch, spans)
        if self._device.type == "cuda":
            # As in `ModelRunner`: a step that finishes no prompt has copied nothing back.
            torch.cuda.current_stream(self._device).synchronize()
        embeddings = self._pool(plan, spans, hidden)
        is_sound = {row: bool(np.isfinite(vector).all()) for row, vector in embeddings.items()}
        return StepResult(
            step_id=plan.step_id,
            elapsed_ns=time.perf_counter_ns() - started_ns,
            token_ids=[0] * len(embeddings),
            logprobs=[0.0] * len(embeddings),
            embeddings={row: vector.astype("<f4").tobytes() for row, vector in embeddings.items()},
            failures={row: NumericalError.code for row in embeddings if not is_sound[row]},
        )

    def _hidden_states(self, batch: StepBatch, spans: list[range]) -> Float32Array:
        """[n, E] of the wanted positions, row after row; the model runs whether or not any is wanted."""
        first_rows = batch.query_starts[:-1] - batch.first_positions
        wanted = [np.arange(span.start, span.stop) + first for span, first in zip(spans, first_rows, strict=True)]
        rows = torch.from_numpy(np.concatenate(wanted).astype(np.int32)).to(self._device)
        hidden = self._model.hidden_states(replace(batch.forward, logit_rows=rows))
        if len(hidden) != len(rows):
            raise InvariantBroken(f"the model gave {len(hidden)} hidden states instead of {len(rows)}")
        # A copy: the model's result is valid until its next step.
        copied: Float32Array = hidden.to(device="cpu", dtype=torch.float32, copy=True).numpy()
        return copied

    def _pool(self, plan: StepPlan, spans: list[range], hidden: Float32Array) -> dict[int, Float32Array]:
        """Plan row → vector, for rows that finish their prompt."""
        vectors: dict[int, Float32Array] = {}
        place = 0
        for row, (slot, span) in enumerate(zip(plan.slots, spans, strict=True)):
            pooler = self._poolers[Slot(slot)]
            pooler.add(hidden[place : place + len(span)])
            place += len(span)
            if plan.samples[row]:
                vectors[row] = pooler.vector()
        return vectors


def _rows(plan: StepPlan) -> "zip[tuple[Slot, int, int]]":
    return zip(map(Slot, plan.slots), plan.first_positions, plan.num_tokens, strict=True)


class Pooler:
    """Gathers what one prompt's vector is made of, chunk by chunk. This one takes a single position."""

    def __init__(self, position: int) -> None:
        self._position = position
        self._row: Float32Array | None = None

    def wanted(self, first: int, stop: int) -> range:
        """Which of the positions `first` … `stop` - 1, all computed by one step, `add` is to be called with."""
        position = self._position
        return range(position, position + 1) if first <= position < stop else range(first, first)

    def add(self, hidden: Float32Array) -> None:
        """Take the wanted rows `[n, E]`; n may be 0."""
        if len(hidden):
            self._row = hidden[-1]

    def vector(self) -> Float32Array:
        """[E], once every position of the prompt was offered. Raises InvariantBroken when one is missing."""
        if self._row is None:
            raise InvariantBroken(f"a prompt ended without the hidden state of its position {self._position}")
        return self._row


class MeanPooler(Pooler):
    """Takes all positions."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(num_tokens - 1)
        self._num_tokens = num_tokens
        self._num_added = 0
        self._sum: Float64Array | None = None

    def wanted(self, first: int, stop: int) -> range:
        """See `Pooler.wanted`."""
        return range(first, stop)

    def add(self, hidden: Float32Array) -> None:
        """See `Pooler.add`. A library's sum would choose its own order, by the number of rows."""
        if self._sum is None:
            self._sum = np.zeros(hidden.shape[1], dtype=np.float64)
        for row in hidden:
            self._sum += row
        self._num_added += len(hidden)

    def vector(self) -> Float32Array:
        """See `Pooler.vector`."""
        if self._sum is None or self._num_added != self._num_tokens:
            raise InvariantBroken(f"a mean over {self._num_tokens} tokens got {self._num_added} hidden states")
        return (self._sum / self._num_tokens).astype(np.float32)


def pooler_of(start: SequenceStart) -> Pooler:
    """The pooler of a sequence that takes a slot. Raises InvariantBroken for one that is to generate."""
    num_tokens = len(start.token_ids)
    match start.pooling:
        case Pooling.LAST:
            return Pooler(num_tokens - 1)
        case Pooling.CLS:
            return Pooler(0)
        case Pooling.MEAN:
            return MeanPooler(num_tokens)
    raise InvariantBroken("a sequence without pooling was planned on an embedding server")
