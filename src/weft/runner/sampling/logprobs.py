"""Log-probabilities that are reported: of the alternatives, and of the prompt."""

import numpy as np
import torch

from weft.core.plan import TopTokens
from weft.kernels import ops
from weft.limits import LIMITS
from weft.runner.sampling.largest import largest

MAX_TIED_TOP_TOKENS = LIMITS.max_top_n_tokens_cap
"""Ties kept behind the last place: a flat distribution must not report the whole vocabulary."""


def top_tokens(scores: torch.Tensor, wanted: list[int]) -> list[TopTokens]:
    """The `wanted[r]` likeliest tokens of each row, best first, equals by id.

    Every token as likely as the last wanted one is kept, up to `MAX_TIED_TOP_TOKENS` more; tokens that cannot be
    chosen (-inf) are left out, so that a row may have fewer than wanted.

    Shapes  scores [R, V] float32, wanted [R]
    Source  TGI 3.3.7, `batch_top_tokens`
    """
    num_candidates = min(scores.shape[1], max(wanted) + MAX_TIED_TOP_TOKENS)
    values, ids = largest(scores, num_candidates)
    best_logprobs = ops.greedy(scores)[1]
    # Both devices and hosts agree on differences to the best score: no second pass over the vocabulary.
    logprobs = best_logprobs[:, None] + (values - values[:, :1])
    rows = zip(values.cpu().numpy(), ids.cpu().numpy(), logprobs.cpu().numpy(), wanted, strict=True)
    return [_best_of_row(*row) for row in rows]


def best_tokens(scores: torch.Tensor, wanted: list[int]) -> list[TopTokens]:
    """As `top_tokens`, but never more than wanted: equals beyond the last place go by id."""
    return [
        TopTokens(top.token_ids[:count], top.logprobs[:count])
        for top, count in zip(top_tokens(scores, wanted), wanted, strict=True)
    ]


def _best_of_row(values: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, wanted: int) -> TopTokens:
    last_place = min(wanted, len(values)) - 1
    is_kept = (values >= values[last_place]) & (values > -np.inf)
    values, ids, logprobs = values[is_kept], ids[is_kept], logprobs[is_kept]
    order = np.lexsort((ids, -values))[: wanted + MAX_TIED_TOP_TOKENS]
    return TopTokens(tuple(ids[order].tolist()), tuple(logprobs[order].tolist()))
