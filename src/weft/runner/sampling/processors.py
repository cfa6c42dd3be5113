"""What happens to logits between the model and the choice: one function per sampling parameter.

Each function changes `scores` [R, V] float32 in place and treats every row by itself, in an order of operations
that does not depend on R, so that a row's bits never depend on the rows beside it. Callers pass only rows for which
the parameter is not neutral. `sampler.py` calls them in TGI's order. Shape letters: R rows · V vocabulary.

Source: definitions of TGI 3.3.7, `utils/logits_process.py` and `utils/tokens.py`.
"""

from collections.abc import Callable

import torch

from weft.kernels import ops
from weft.runner.sampling.largest import largest

_MAX_SCORE = torch.finfo(torch.float32).max
MIN_TEMPERATURE = torch.finfo(torch.float32).tiny
_CANDIDATES = (64, 1024)
"""A nucleus is looked for among so many best tokens before the whole vocabulary is sorted, which is 50 times dearer."""


def add_watermark(scores: torch.Tensor, is_green: torch.Tensor, delta: float) -> None:
    """Add delta to the green ids. Shapes: is_green [R, V] bool."""
    scores.add_(is_green, alpha=delta)


def penalize_history(
    scores: torch.Tensor, places: torch.Tensor, repetition: torch.Tensor, subtracted: torch.Tensor
) -> None:
    """Repetition penalty, then frequency and presence penalties, on the ids that a row already has.

    A score s becomes s·θ when negative and s/θ otherwise, and then loses `subtracted`.

    Shapes  places [H] int64, distinct: row · V + id · repetition θ [H] · subtracted [H]
    Source  Keskar et al. 2019, "CTRL", section 4.1, with the sign rule of transformers
    """
    flat = scores.view(-1)
    old = flat[places]
    new = torch.where(old < 0, old * repetition, old / repetition)
    # An extreme penalty may overflow, which must not cost the row; what was no number stays none, so that the row
    # is recognised as broken.
    new = new.sub_(subtracted).clamp_(-_MAX_SCORE, _MAX_SCORE)
    flat[places] = torch.where(torch.isfinite(old), new, old)


def add_bias(scores: torch.Tensor, places: torch.Tensor, biases: torch.Tensor) -> None:
    """Add a bias to single ids. Shapes: places [H] int64, distinct: row · V + id · biases [H]."""
    flat = scores.view(-1)
    flat[places] += biases


def forbid(scores: torch.Tensor, places: torch.Tensor) -> None:
    """Make single ids impossible. Shapes: places [H] int64, row · V + id."""
    scores.view(-1)[places] = -torch.inf


def keep_allowed(scores: torch.Tensor, is_allowed: torch.Tensor) -> None:
    """Make every other id impossible. Shapes: is_allowed [R, V] bool."""
    scores.masked_fill_(~is_allowed, -torch.inf)


def scale_by_temperature(scores: torch.Tensor, temperatures: torch.Tensor) -> None:
    """Divide by the temperature. Shapes: temperatures [R].

    The best score is moved to zero first, which changes no probability: a temperature near zero then sends the
    others to -inf instead of the best ones to +inf.
    """
    scores -= scores.amax(dim=-1, keepdim=True)
    scores /= temperatures.clamp(min=MIN_TEMPERATURE)[:, None]


def keep_top_k(scores: torch.Tensor, top_k: torch.Tensor) -> None:
    """Keep scores not below the k-th best: ties at the last place stay. Shapes: top_k [R] int64, 1 ≤ k ≤ V."""
    best, _ = largest(scores, int(top_k.max()))
    threshold = best.gather(1, top_k[:, None] - 1)
    scores.masked_fill_(scores < threshold, -torch.inf)


def keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> None:
    """Keep the smallest set of best tokens whose probability reaches p; equal scores go in order of their ids.

    Shapes  top_p [R], 0 < p < 1
    Source  Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1
    """
    best_logprobs = ops.greedy(scores)[1]

    def probabilities(rows: torch.Tensor, values: torch.Tensor, _ids: torch.Tensor) -> torch.Tensor:
        return torch.exp((values - values[:, :1]).double() + best_logprobs[rows, None].double())

    last_kept, num_kept, is_tied = _nucleus(scores, top_p, probabilities)
    for row in torch.nonzero(is_tied).flatten().tolist():
        _drop_ties(scores[row], last_kept[row], num_kept[row])
    scores.masked_fill_(scores < last_kept[:, None], -torch.inf)


def _drop_ties(scores: torch.Tensor, last_kept: torch.Tensor, num_kept: torch.Tensor) -> None:
    """Of the tokens that tie for the last place, [V], leave those with the smallest ids, `num_kept` in all."""
    ties = torch.nonzero(scores == last_kept).flatten()
    num_above = (scores > last_kept).sum()
    scores[ties[num_kept - num_above :]] = -torch.inf


def keep_typical(scores: torch.Tensor, typical_p: torch.Tensor) -> None:
    """Keep the tokens whose information is nearest to the entropy, until their probability reaches m.

    Tokens as near as the last one stay.

    Shapes  typical_p m [R], 0 < m < 1
    Source  Meister et al. 2023, "Locally Typical Sampling", section 4
    """
    logprobs = torch.log_softmax(scores, dim=-1)
    probabilities = torch.exp(logprobs)
    information = torch.where(probabilities > 0, -logprobs * probabilities, 0.0)
    nearness = -torch.abs(logprobs + _row_sum(information))

    def probabilities_of(rows: torch.Tensor, _values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return probabilities[rows].gather(1, ids).double()

    last_kept, _, _ = _nucleus(nearness, typical_p, probabilities_of)
    scores.masked_fill_(nearness < last_kept[:, None], -torch.inf)


def keep_min_p(scores: torch.Tensor, min_p: torch.Tensor) -> None:
    """Keep tokens at least min_p times as likely as the best one. Shapes: min_p [R], 0 < min_p ≤ 1.

    Source  Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", arXiv 2407.01082, section 3
    """
    threshold = scores.amax(dim=-1) + torch.log(min_p)
    scores.masked_fill_(scores < threshold[:, None], -torch.inf)


_ProbabilitiesOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _nucleus(
    keys: torch.Tensor, mass: torch.Tensor, probabilities_of: _ProbabilitiesOf
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By falling key, the tokens that are needed to reach a probability mass.

    Shapes  keys [R, V], mass [R] → key of the last one [R], how many [R] int64 (at least 1), whether others, not
            needed, have the key of the last one [R] bool
    """
    num_rows, vocab_size = keys.shape
    last_kept = torch.empty_like(keys[:, 0])
    num_kept = torch.empty(num_rows, dtype=torch.int64, device=keys.device)
    is_tied = torch.empty(num_rows, dtype=torch.bool, device=keys.device)
    rows = torch.arange(num_rows, device=keys.device)
    for num_candidates in (*(n for n in _CANDIDATES if n < vocab_size), vocab_size):
        values, ids = largest(keys if len(rows) == num_rows else keys[rows], num_candidates)
        probabilities = probabilities_of(rows, values, ids)
        # A token is needed when those before it do not reach the mass; the sum runs in float64, in order of rank.
        before = probabilities.cumsum(dim=-1) - probabilities
        needed = (before < mass[rows, None].double()).sum(dim=-1).clamp_(min=1)
        last_kept[rows] = values.gather(1, needed[:, None] - 1)[:, 0]
        num_kept[rows] = needed
        next_values = values.gather(1, needed.clamp(max=num_candidates - 1)[:, None])[:, 0]
        is_tied[rows] = (needed < num_candidates) & (next_values == last_kept[rows])
        rows = rows[needed == num_candidates]
        if len(rows) == 0:
            break
    return last_kept, num_kept, is_tied


def _row_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row, [R, V] → [R, 1]. A running sum has one order; `sum` splits a lone row among threads."""
    return x.cumsum(dim=-1)[:, -1:]
