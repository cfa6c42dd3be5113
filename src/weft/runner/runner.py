"""One forward step on this rank: StepPlan in, StepResult out.

The runner decides nothing. It keeps what a step needs from earlier ones (slot tables, sampling parameters and
histories), makes tensors, runs the model, samples, and writes the sampled tokens into the token table *before* it
copies anything to the host: the next step reads them there, so its plan need not know them. Where device and host are
one, a batch of steady decoding has them written to where its next step reads, too.

Every rank runs the same plans. Rank 0 alone samples; the others receive its token ids in one collective, so that no
rounding difference between ranks can ever make their sequences differ.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from weft.core.plan import StepPlan, StepResult, TopTokens
from weft.errors import GenerationError, InvariantBroken, NumericalError
from weft.kernels import ops
from weft.models.forward_batch import ForwardBatch
from weft.parallel.groups import Group
from weft.runner.batch import BatchBuilder, StepBatch
from weft.runner.host_memory import PROMPT_LOGPROB_BYTES
from weft.runner.kv_pool import KvPool
from weft.runner.sampling.logprobs import best_tokens
from weft.runner.sampling.parameters import NEEDS_SAMPLER, Float32Array, Uses
from weft.runner.sampling.sampler import SampledTokens, Sampler
from weft.runner.sampling.watermark import WatermarkSettings
from weft.runner.slots import Int64Array, SlotTables

_NO_TOPS = TopTokens((), ())
_NO_TOP_TOKENS: Mapping[int, TopTokens] = {}


class Model(Protocol):
    """What the runner needs of a model (`models.decoder.Decoder`)."""

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Write the keys and values of the step's rows; return the logits of `batch.logit_rows`, [S', V] float32."""
        ...

    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """The first half of `forward`: what the output layer takes for `batch.logit_rows`, [S', E]."""
        ...

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The second half of `forward`: [S', E] → [S', V] float32."""
        ...


@runtime_checkable
class ChoosingModel(Model, Protocol):
    """A model that can also choose the best token of each row in the same breath."""

    def greedy(self, batch: ForwardBatch) -> tuple[Int64Array, Float32Array]:
        """`ops.greedy` of `forward`, on the host: ids [S'] and log-probabilities [S'], valid until the next step.

        No tensors: the first one that is touched after a model costs 70 µs, all of them cache misses.
        """
        ...


@dataclass(frozen=True, slots=True)
class _PromptScores:
    """What a step tells about prompt tokens, by plan row."""

    logprobs: dict[int, tuple[float, ...]]
    top_tokens: dict[int, tuple[TopTokens, ...]]


_NO_PROMPT = _PromptScores({}, {})


class ModelRunner:
    """Runs plans in order. Not safe for use from two threads at once."""

    def __init__(
        self,
        model: Model,
        kv_pool: KvPool,
        *,
        max_num_sequences: int,
        max_total_tokens: int,
        vocab_size: int,
        device: torch.device,
        watermark: WatermarkSettings | None = None,
        group: Group | None = None,
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._device = device
        self._group = group if group is not None and group.world_size > 1 else None
        self._choosing_model = model if isinstance(model, ChoosingModel) and self._group is None else None
        self._tables = SlotTables(
            max_num_sequences=max_num_sequences,
            max_total_tokens=max_total_tokens,
            num_blocks=kv_pool.num_blocks,
            block_size_tokens=kv_pool.block_size_tokens,
            device=device,
        )
        self._batches = BatchBuilder(self._tables, kv_pool.layers, kv_pool.block_size_tokens, device)
        self._sampler = Sampler(
            max_num_sequences=max_num_sequences,
            vocab_size=vocab_size,
            device=device,
            watermark=watermark or WatermarkSettings(),
        )
        self._last_batch: StepBatch | None = None
        self._uses = 0
        """What any of the last batch's sampling rows asks of the sampler."""

    def execute(self, plan: StepPlan, on_launch: Callable[[], None] | None = None) -> StepResult:
        """Run one step. Plans must come in the order in which they were made.

        `on_launch` is called when the model is about to run: from here on this thread leaves the interpreter to others.

        Raises   InvariantBroken: the plan contradicts the tables (a bug: this process must not go on)
        """
        started_ns = time.perf_counter_ns()
        for start in plan.starts:
            self._tables.start(start)
            self._sampler.start(start)
        self._tables.append_blocks(plan)
        batch = self._batches.build(plan)
        if batch is not self._last_batch:
            self._last_batch, self._uses = batch, self._sampler.uses_of(batch.sampling_slots)
        wanted = {} if batch.is_decoding else self._prompt_targets(batch)
        if on_launch is not None:
            on_launch()
        prompt, top_tokens = _NO_PROMPT, _NO_TOP_TOKENS
        if self._choosing_model is not None and not (wanted or self._uses & NEEDS_SAMPLER):
            on_host = self._choosing_model.greedy(batch.forward)
            sampled_ids, logprobs = on_host[0].tolist(), on_host[1].tolist()
            chosen = self._write_on_host(sampled_ids, on_host[0], batch)
        else:
            with torch.inference_mode():
                sampled, prompt = self._compute(batch, wanted)
                sampled_ids, chosen = self._write_tokens(sampled.token_ids, batch)
                logprobs, top_tokens = sampled.logprobs.tolist(), sampled.top_tokens
        # A sum is finite only if every term is.
        is_sound = sampled_ids == chosen and isfinite(sum(logprobs))
        failures = {} if is_sound else self._failures(sampled_ids, logprobs, batch)
        failures |= {row: NumericalError.code for row, told in prompt.logprobs.items() if not all(map(isfinite, told))}
        if self._device.type == "cuda":
            # A step that samples nothing has copied nothing back: without this it would seem to cost nothing, and the
            # next batch would be written over the buffer that this one is still being read from.
            torch.cuda.current_stream(self._device).synchronize()
        if self._uses & Uses.HISTORY:
            self._sampler.append(batch.sampling_slots, chosen)
        return StepResult(
            step_id=plan.step_id,
            elapsed_ns=time.perf_counter_ns() - started_ns,
            token_ids=chosen,
            logprobs=logprobs,
            top_tokens={int(batch.sampling_rows[row]): tops for row, tops in top_tokens.items()},
            prompt_logprobs=prompt.logprobs,
            prompt_top_tokens=prompt.top_tokens,
            failures=failures,
        )

    def _compute(self, batch: StepBatch, wanted: dict[int, tuple[int, int]]) -> tuple[SampledTokens, _PromptScores]:
        """The choice of each sampling row, and what is to be told about the wanted prompt tokens."""
        if wanted:
            logits, prompt = self._forward_with_prompt(batch, wanted)
            return self._sample(logits, batch), prompt
        logits = self._checked(self._model.forward(batch.forward), len(batch.sampling_rows))
        return self._sample(logits, batch), _NO_PROMPT

    def _checked(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        if logits.shape != (num_rows, self._vocab_size) or logits.dtype != torch.float32:
            expected = f"[{num_rows}, {self._vocab_size}] float32"
            raise InvariantBroken(f"the model gave logits {list(logits.shape)} {logits.dtype} instead of {expected}")
        return logits

    def _sample(self, logits: torch.Tensor, batch: StepBatch) -> SampledTokens:
        if len(logits) == 0 or (self._group is not None and self._group.rank != 0):
            return SampledTokens(
                torch.zeros(len(logits), dtype=torch.int64, device=self._device),
                torch.zeros(len(logits), dtype=torch.float32, device=self._device),
            )
        last_token_ids: torch.Tensor | None = None
        if self._uses & Uses.WATERMARK:
            last_token_ids = batch.forward.token_ids[batch.forward.logit_rows]
        positions = batch.sampling_positions.astype(np.int64)
        return self._sampler.sample(logits, batch.sampling_slots, positions, last_token_ids)

    def _write_tokens(self, token_ids: torch.Tensor, batch: StepBatch) -> tuple[list[int], list[int]]:
        """Put the chosen tokens at their positions on every rank. Returns what was sampled, and what was written.

        A failed row gets some token of the vocabulary: the step after this one may already be planned with it, and
        must not look up an id that the embedding table does not have.
        """
        if self._tables.host_token_ids is not None and self._group is None:
            sampled_ids = token_ids.tolist()
            return sampled_ids, self._write_on_host(sampled_ids, token_ids.numpy(), batch)
        clamped = token_ids.clamp(0, self._vocab_size - 1)
        if self._group is not None and len(clamped):
            # The other ranks hold zeros: the sum is rank 0's choice.
            self._group.all_reduce(clamped)
        slots, positions = batch.device_sampling_slots, batch.device_sampling_positions
        self._tables.token_ids[slots, positions] = clamped.int()
        chosen = clamped.tolist()
        if batch.next_token_ids is not None:
            batch.next_token_ids[:] = chosen
        return token_ids.tolist(), chosen

    def _write_on_host(self, sampled_ids: list[int], token_ids: Int64Array, batch: StepBatch) -> list[int]:
        """As `_write_tokens`, where this rank is alone and its device the host; the ids come in both forms."""
        if sampled_ids and not 0 <= min(sampled_ids) <= max(sampled_ids) < self._vocab_size:
            sampled_ids = [min(max(token_id, 0), self._vocab_size - 1) for token_id in sampled_ids]
            token_ids = np.array(sampled_ids)
        self._tables.write_on_host(batch.sampling_slots, batch.sampling_positions, token_ids)
        if batch.next_token_ids is not None:
            batch.next_token_ids[:] = token_ids
        return sampled_ids

    def _failures(self, token_ids: list[int], logprobs: list[float], batch: StepBatch) -> dict[int, str]:
        """Plan row → error code, for rows whose token means nothing."""
        failures: dict[int, str] = {}
        for row, token_id, logprob in zip(batch.sampling_rows.tolist(), token_ids, logprobs, strict=True):
            if not -1 <= token_id < self._vocab_size:
                failures[row] = GenerationError.code
            elif token_id == -1 or not isfinite(logprob):
                failures[row] = NumericalError.code
        return failures

    def _prompt_targets(self, batch: StepBatch) -> dict[int, tuple[int, int]]:
        """Plan row → (first, end) of the prompt positions whose log-probability the step can tell."""
        targets: dict[int, tuple[int, int]] = {}
        for row in np.flatnonzero(self._sampler.wants_prompt_logprobs[batch.slots]).tolist():
            first = int(batch.first_positions[row]) + 1
            num_prompt = int(self._tables.num_prompt_tokens[batch.slots[row]])
            end = min(first + int(batch.num_tokens[row]), num_prompt)
            if first < end:
                targets[row] = (first, end)
        return targets

    def _forward_with_prompt(
        self, batch: StepBatch, wanted: dict[int, tuple[int, int]]
    ) -> tuple[torch.Tensor, _PromptScores]:
        """Logits of the sampling rows, and what the raw logits say about the wanted prompt tokens.

        The hidden states of all these rows are kept, their logits only piece by piece: those of a whole prompt
        may be larger than the model.
        """
        packed = [np.arange(end - first) + batch.query_starts[row] for row, (first, end) in wanted.items()]
        prompt_rows = torch.from_numpy(np.concatenate(packed).astype(np.int32)).to(self._device)
        targets = torch.cat([self._tables.token_ids[batch.slots[row], slice(*span)] for row, span in wanted.items()])
        logit_rows = torch.cat([batch.forward.logit_rows, prompt_rows])
        hidden = self._model.hidden_states(replace(batch.forward, logit_rows=logit_rows))
        num_sampling = len(batch.sampling_rows)
        logits = self._checked(self._model.logits(hidden[:num_sampling]), num_sampling)
        counts = self._sampler.prompt_top_n_tokens[batch.slots].tolist()
        wanted_tops = [counts[row] for row, (first, end) in wanted.items() for _ in range(first, end)]
        logprobs, tops = self._piecewise_scores(hidden[num_sampling:], targets.long(), wanted_tops)
        prompt, start = _PromptScores({}, {}), 0
        for row, (first, end) in wanted.items():
            own = slice(start, start + end - first)
            start = own.stop
            prompt.logprobs[row] = tuple(logprobs[own])
            if counts[row]:
                prompt.top_tokens[row] = tuple(tops[own])
        return logits, prompt

    def _piecewise_scores(
        self, hidden: torch.Tensor, targets: torch.Tensor, wanted_tops: list[int]
    ) -> tuple[list[float], list[TopTokens]]:
        """Log-softmax of the logits of each hidden state at its target, and the `wanted_tops` likeliest tokens.

        Shapes   hidden [n, E], targets [n], wanted_tops [n]
        """
        rows_per_piece = max(1, PROMPT_LOGPROB_BYTES // (4 * self._vocab_size))
        logprobs: list[float] = []
        tops: list[TopTokens] = []
        for start in range(0, len(targets), rows_per_piece):
            stop = start + rows_per_piece
            piece, wanted = targets[start:stop], wanted_tops[start:stop]
            logits = self._checked(self._model.logits(hidden[start:stop]), len(piece))
            logprobs.extend(ops.token_logprobs(logits, piece).tolist())
            tops.extend(best_tokens(logits, wanted) if any(wanted) else [_NO_TOPS] * len(piece))
        return logprobs, tops
