"""Logits → tokens for a whole batch, with each row's own parameters.

The order is TGI's, with our additions in their places:

    watermark → repetition penalty → frequency and presence penalties → logit bias → token mask → EOS mask
    (min_new_tokens) → temperature → top_k → top_p → typical_p → min_p → choose

A parameter that is neutral for the whole batch costs nothing, and a row that does not use it keeps its bits. The
choice is the best score (greedy) or an exponential race on noise keyed by (seed, absolute position, id): a row's
token depends on its own logits, parameters, seed and position, never on its neighbours (ADR-0012).

Shape letters: S' rows that sample · R rows a step is applied to · V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weft.core.plan import SequenceStart, TopTokens
from weft.errors import InvariantBroken
from weft.kernels import ops
from weft.runner.sampling import processors
from weft.runner.sampling.logprobs import top_tokens
from weft.runner.sampling.parameters import (
    CHANGES_SCORES,
    MORE_THAN_A_DRAW,
    NEEDS_SAMPLER,
    Int64Array,
    ParameterTable,
    Uses,
)
from weft.runner.sampling.watermark import WatermarkSettings, green_list

_Step = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One choice per row; ids and log-probabilities are still on the device."""

    token_ids: torch.Tensor
    """[S'] int64; -1 for a row whose logits were no numbers"""
    logprobs: torch.Tensor
    """[S'] float32, in each row's style"""
    top_tokens: dict[int, TopTokens] = field(default_factory=dict)
    """Row → alternatives, for rows that ask for them"""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a batch, with what decides their treatment."""

    slots: Int64Array
    positions: Int64Array
    uses: Int64Array

    def __len__(self) -> int:
        return len(self.slots)

    def using(self, use: int) -> Int64Array:
        """Numbers of the rows that use something, ascending."""
        return np.flatnonzero(self.uses & use)

    @property
    def are_plain_draws(self) -> bool:
        """Every row is a draw with or without a temperature, and asks for nothing else."""
        return bool((self.uses & Uses.CHANCE).all()) and not (self.uses & MORE_THAN_A_DRAW).any()

    def pick(self, chosen: Int64Array) -> "_Rows":
        return _Rows(self.slots[chosen], self.positions[chosen], self.uses[chosen])


class Sampler:
    """Sampling parameters and history of every slot, and the choice of a batch."""

    def __init__(
        self, *, max_num_sequences: int, vocab_size: int, device: torch.device, watermark: WatermarkSettings
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._watermark = watermark
        self._table = ParameterTable(max_num_sequences, vocab_size)

    @property
    def wants_prompt_logprobs(self) -> npt.NDArray[np.bool_]:
        """[slots] whether a slot's sequence asks for the log-probabilities of its prompt."""
        return self._table.wants_prompt_logprobs

    @property
    def prompt_top_n_tokens(self) -> npt.NDArray[np.int64]:
        """[slots] how many alternatives a slot's sequence asks for in the places of its prompt."""
        return self._table.prompt_top_n_tokens

    def start(self, start: SequenceStart) -> None:
        """Take the parameters and the known tokens of the sequence that a slot now belongs to."""
        self._table.start(start)

    def append(self, slots: Int64Array, token_ids: list[int]) -> None:
        """Take the tokens just chosen into the histories that penalties read.

        Shapes  slots [S'], token_ids [S']
        """
        for row in np.flatnonzero(self._table.uses[slots] & Uses.HISTORY).tolist():
            self._table.append(slots[row], token_ids[row])

    def uses_of(self, slots: Int64Array) -> int:
        """Bits of `Uses` that at least one of these sequences has."""
        return int(np.bitwise_or.reduce(self._table.uses[slots]))

    def sample(
        self,
        logits: torch.Tensor,
        slots: Int64Array,
        positions: Int64Array,
        last_token_ids: torch.Tensor | None,
        token_masks: Mapping[int, torch.Tensor] | None = None,
    ) -> SampledTokens:
        """Choose one token per row. Changes neither the logits nor any history.

        Shapes  logits [S', V] float32 · slots [S'] · positions [S'], absolute, of the tokens to choose ·
                last_token_ids [S'], the newest known token of each row; only a watermark reads them ·
                token_masks row → [V] bool, ids allowed
        """
        masks = token_masks or {}
        rows = _Rows(slots, positions, self._table.uses[slots])
        if not masks and not (rows.uses & NEEDS_SAMPLER).any():
            return SampledTokens(*ops.greedy(logits))
        if not masks and rows.are_plain_draws:
            return SampledTokens(*self._draw(logits, rows))
        scores = logits
        if masks or (rows.uses & CHANGES_SCORES).any():
            scores = logits.clone()
            self._process(scores, rows, last_token_ids, masks)
        token_ids = self._choose(scores, rows)
        known_ids = token_ids
        if self._device.type != "cpu" or min(token_ids.tolist()) < 0:
            known_ids = token_ids.clamp(0, self._vocab_size - 1)
        is_raw = (rows.uses & Uses.RAW_LOGPROB) != 0
        groups = [
            (own, reported)
            for own, reported in ((np.flatnonzero(is_raw), logits), (np.flatnonzero(~is_raw), scores))
            if len(own)
        ]
        tops: dict[int, TopTokens] = {}
        for own, reported in groups:
            tops.update(self._top_tokens(reported, rows, own))
        if len(groups) == 1:
            return SampledTokens(token_ids, ops.token_logprobs(groups[0][1], known_ids), tops)
        logprobs = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
        for own, reported in groups:
            place = self._tensor(own)
            logprobs[place] = ops.token_logprobs(_take(reported, own), known_ids[place])
        return SampledTokens(token_ids, logprobs, tops)

    def _draw(self, logits: torch.Tensor, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
        table = self._table
        temperatures = np.where(rows.uses & Uses.TEMPERATURE, table.temperature[rows.slots], np.float32(1))
        return ops.draw(
            logits,
            self._tensor(np.maximum(temperatures, processors.MIN_TEMPERATURE, dtype=np.float32)),
            self._tensor(table.seeds[rows.slots]),
            self._tensor(rows.positions),
            self._tensor((rows.uses & Uses.RAW_LOGPROB) != 0),
        )

    def _process(
        self, scores: torch.Tensor, rows: _Rows, last_token_ids: torch.Tensor | None, masks: Mapping[int, torch.Tensor]
    ) -> None:
        """Everything between the logits and the choice, in place and in order."""
        table, asked = self._table, int(np.bitwise_or.reduce(rows.uses))
        if asked & Uses.WATERMARK:
            if last_token_ids is None:
                raise InvariantBroken("a watermark follows the last token, which was not brought")
            self._add_watermark(scores, rows, last_token_ids)
        if asked & Uses.HISTORY:
            self._penalize_history(scores, rows)
        if asked & Uses.BIAS:
            self._add_bias(scores, rows)
        for row, mask in masks.items():
            processors.keep_allowed(scores[row : row + 1], mask[None, :])
        if asked & Uses.MIN_NEW_TOKENS:
            self._forbid_early_eos(scores, rows)
        for use, step, column in (
            (Uses.TEMPERATURE, processors.scale_by_temperature, table.temperature),
            (Uses.TOP_K, processors.keep_top_k, table.top_k),
            (Uses.TOP_P, processors.keep_top_p, table.top_p),
            (Uses.TYPICAL_P, processors.keep_typical, table.typical_p),
            (Uses.MIN_P, processors.keep_min_p, table.min_p),
        ):
            if asked & use:
                self._apply(step, scores, rows, rows.using(use), column)

    def _apply(self, step: _Step, scores: torch.Tensor, rows: _Rows, own: Int64Array, column: npt.NDArray[Any]) -> None:
        """Run a step on the rows `own`, each with its value of the column; the others keep their bits."""
        values = self._tensor(column[rows.slots[own]])
        if len(own) == len(scores):
            step(scores, values)
            return
        place = self._tensor(own)
        part = scores[place]
        step(part, values)
        scores[place] = part

    def _add_watermark(self, scores: torch.Tensor, rows: _Rows, last_token_ids: torch.Tensor) -> None:
        place = self._tensor(rows.using(Uses.WATERMARK))
        is_green = green_list(last_token_ids[place], self._vocab_size, self._watermark.gamma)
        scores[place] += is_green * self._watermark.delta

    def _penalize_history(self, scores: torch.Tensor, rows: _Rows) -> None:
        own = rows.using(Uses.HISTORY)
        penalties = self._table.penalties(rows.slots[own])
        places = penalties.token_ids + np.repeat(own * self._vocab_size, penalties.lengths)
        processors.penalize_history(
            scores, self._tensor(places), self._tensor(penalties.repetition), self._tensor(penalties.subtracted)
        )

    def _add_bias(self, scores: torch.Tensor, rows: _Rows) -> None:
        own = rows.using(Uses.BIAS).tolist()
        biases = [self._table.biases(rows.slots[row]) for row in own]
        places = [row * self._vocab_size + token_ids for row, (token_ids, _) in zip(own, biases, strict=True)]
        values = np.concatenate([values for _, values in biases])
        processors.add_bias(scores, self._tensor(np.concatenate(places)), self._tensor(values))

    def _forbid_early_eos(self, scores: torch.Tensor, rows: _Rows) -> None:
        is_early = rows.positions < self._table.first_eos_position[rows.slots]
        own = np.flatnonzero(is_early & ((rows.uses & Uses.MIN_NEW_TOKENS) != 0)).tolist()
        if own:
            places = [row * self._vocab_size + self._table.eos_token_ids(rows.slots[row]) for row in own]
            processors.forbid(scores, self._tensor(np.concatenate(places)))

    def _choose(self, scores: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The race for rows that sample, the best score for the others: [S'] int64."""
        drawn, best = rows.using(Uses.CHANCE), np.flatnonzero((rows.uses & Uses.CHANCE) == 0)
        if not len(drawn):
            return ops.greedy(scores)[0]
        own = rows.pick(drawn)
        seeds, positions = self._tensor(self._table.seeds[own.slots]), self._tensor(own.positions)
        raced = ops.race(_take(scores, drawn), seeds, positions)
        if not len(best):
            return raced
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
        token_ids[self._tensor(drawn)] = raced
        token_ids[self._tensor(best)] = ops.greedy(_take(scores, best))[0]
        return token_ids

    def _top_tokens(self, scores: torch.Tensor, rows: _Rows, own: Int64Array) -> dict[int, TopTokens]:
        """Alternatives of those of the rows `own` that ask for them."""
        asking = own[(rows.uses[own] & Uses.TOP_TOKENS) != 0]
        if not len(asking):
            return {}
        wanted = self._table.top_n_tokens[rows.slots[asking]].tolist()
        return dict(zip(asking.tolist(), top_tokens(_take(scores, asking), wanted), strict=True))

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


def _take(scores: torch.Tensor, rows: Int64Array) -> torch.Tensor:
    """The given rows in ascending order, [R, V]; the tensor itself when these are all of them."""
    if len(rows) == len(scores):
        return scores
    return scores[torch.from_numpy(rows).to(scores.device)]
