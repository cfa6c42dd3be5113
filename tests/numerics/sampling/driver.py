"""Builders for sampler tests: one sequence per row, one call for a whole batch."""

from dataclasses import dataclass, field

import numpy as np
import torch

from weft.core.plan import SequenceStart
from weft.core.request import RequestId, SamplingParams, Slot, StopConditions
from weft.runner.sampling.sampler import SampledTokens, Sampler
from weft.runner.sampling.watermark import WatermarkSettings

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """One sequence about to choose its next token."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    token_ids: tuple[int, ...] = (1, 2, 3)
    num_prompt_tokens: int = 2
    stop: StopConditions = field(default_factory=lambda: StopConditions(max_new_tokens=100))


def new_sampler(vocab_size: int, num_slots: int, watermark: WatermarkSettings | None = None) -> Sampler:
    return Sampler(
        max_num_sequences=num_slots,
        vocab_size=vocab_size,
        device=CPU,
        watermark=watermark or WatermarkSettings(),
    )


def start(sampler: Sampler, slot: int, row: Row) -> None:
    sampler.start(
        SequenceStart(
            slot=Slot(slot),
            request_id=RequestId(slot),
            token_ids=row.token_ids,
            num_prompt_tokens=row.num_prompt_tokens,
            sampling=row.sampling,
            stop=row.stop,
        )
    )


def sample(
    logits: torch.Tensor,
    rows: list[Row],
    *,
    slots: list[int] | None = None,
    token_masks: dict[int, torch.Tensor] | None = None,
    watermark: WatermarkSettings | None = None,
) -> SampledTokens:
    """Choose the next token of each row; `logits` [rows, V]."""
    slots = slots or list(range(len(rows)))
    sampler = new_sampler(logits.shape[1], max(slots) + 1, watermark)
    for slot, row in zip(slots, rows, strict=True):
        start(sampler, slot, row)
    return sampler.sample(
        logits,
        np.array(slots),
        np.array([len(row.token_ids) for row in rows]),
        torch.tensor([row.token_ids[-1] for row in rows], dtype=torch.int32),
        token_masks,
    )


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
