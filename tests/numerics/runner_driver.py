"""Drives a ModelRunner by hand: slots, blocks and plans for sequences that run as a test says."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from weft.core.plan import SequenceStart, StepPlan, StepResult, TopTokens
from weft.core.request import RequestId, SamplingParams, Slot, StopConditions
from weft.parallel.groups import Group
from weft.runner.kv_pool import KvPool
from weft.runner.runner import Model, ModelRunner

CPU = torch.device("cpu")


@dataclass
class Running:
    """One sequence on a slot."""

    slot: int
    start: SequenceStart
    token_ids: list[int]
    """Known and chosen tokens."""
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top_tokens: list[TopTokens] = field(default_factory=list)

    @property
    def completion(self) -> list[int]:
        return self.token_ids[len(self.start.token_ids) :]


class RunnerDriver:
    """Makes the plans that a scheduler would make."""

    def __init__(
        self,
        model: Model,
        *,
        vocab_size: int,
        kv_shape: tuple[int, int, int],
        max_num_sequences: int = 8,
        max_total_tokens: int = 4096,
        num_blocks: int = 256,
        block_size: int = 4,
        group: Group | None = None,
    ) -> None:
        num_layers, num_kv_heads, head_dim = kv_shape
        self.block_size = block_size
        self.pool = KvPool(
            num_layers=num_layers,
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            block_size_tokens=block_size,
            head_dim=head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        self.runner = ModelRunner(
            model,
            self.pool,
            max_num_sequences=max_num_sequences,
            max_total_tokens=max_total_tokens,
            vocab_size=vocab_size,
            device=CPU,
            group=group,
        )
        # Scrambled, so that nothing works by blocks being neighbours.
        self.free_blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.free_slots = list(range(max_num_sequences))
        self.num_steps = 0
        self._starts: list[SequenceStart] = []

    def start(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        stop: StopConditions | None = None,
        *,
        num_prompt_tokens: int | None = None,
    ) -> Running:
        start = SequenceStart(
            slot=Slot(self.free_slots.pop()),
            request_id=RequestId(self.num_steps),
            token_ids=tuple(token_ids),
            num_prompt_tokens=num_prompt_tokens or len(token_ids),
            sampling=sampling or SamplingParams(),
            stop=stop or StopConditions(max_new_tokens=1000),
        )
        self._starts.append(start)
        return Running(start.slot, start, list(token_ids))

    def finish(self, sequence: Running) -> None:
        self.free_slots.append(sequence.slot)
        self.free_blocks.extend(sequence.blocks)

    def plan(self, rows: Sequence[tuple[Running, int]], known: Sequence[int] | None = None) -> StepPlan:
        """A step that computes the next `n` tokens of each sequence; a row samples when it reaches the newest token.

        `known` overrides how many tokens each sequence has, for a step planned before the last one is applied.
        """
        known = known or [len(sequence.token_ids) for sequence, _ in rows]
        slots, blocks = [], []
        for sequence, num_tokens in rows:
            needed = -(-(sequence.num_computed + num_tokens) // self.block_size)
            while len(sequence.blocks) < needed:
                sequence.blocks.append(self.free_blocks.pop())
                slots.append(sequence.slot)
                blocks.append(sequence.blocks[-1])
        plan = StepPlan(
            step_id=self.num_steps,
            starts=tuple(self._starts),
            slots=[sequence.slot for sequence, _ in rows],
            first_positions=[sequence.num_computed for sequence, _ in rows],
            num_tokens=[num_tokens for _, num_tokens in rows],
            samples=[
                sequence.num_computed + num_tokens == length
                for (sequence, num_tokens), length in zip(rows, known, strict=True)
            ],
            new_block_slots=slots,
            new_block_ids=blocks,
        )
        self.num_steps += 1
        self._starts = []
        for sequence, num_tokens in rows:
            sequence.num_computed += num_tokens
        return plan

    def apply(self, plan: StepPlan, rows: Sequence[tuple[Running, int]], result: StepResult) -> None:
        chosen = iter(zip(result.token_ids, result.logprobs, strict=True))
        for row, (sequence, _) in enumerate(rows):
            if plan.samples[row]:
                token_id, logprob = next(chosen)
                sequence.token_ids.append(token_id)
                sequence.logprobs.append(logprob)
            sequence.prompt_logprobs.extend(result.prompt_logprobs.get(row, ()))
            sequence.prompt_top_tokens.extend(result.prompt_top_tokens.get(row, ()))

    def step(self, rows: Sequence[tuple[Running, int]]) -> StepResult:
        plan = self.plan(rows)
        result = self.runner.execute(plan)
        self.apply(plan, rows, result)
        return result

    def generate(self, sequence: Running, num_tokens: int, *, chunk: int = 10_000) -> list[int]:
        """Prefill in chunks, then decode alone, until the sequence has chosen `num_tokens` tokens."""
        while len(sequence.completion) < num_tokens:
            waiting = len(sequence.token_ids) - sequence.num_computed
            self.step([(sequence, min(chunk, waiting))])
        return sequence.completion
