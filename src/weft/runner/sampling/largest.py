"""The k largest scores of each row, without sorting the vocabulary."""

import torch

_STRIDES = 32
_MOST = 64
"""Beyond this many, the candidates are too many for the detour to pay."""


def largest(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest scores of each row, falling, with their ids; which of equal scores at the border is left open.

    The row is cut into groups of 32 and only the k groups with the best maxima are looked into: each holds a score
    at least as large as any score elsewhere. That is an elementwise maximum over the vocabulary and two small
    selections, several times cheaper on a CPU than `torch.topk` of the whole row.

    Shapes  scores [R, V] → values [R, k], ids [R, k] int64; 1 ≤ k ≤ V
    """
    num_rows, vocab_size = scores.shape
    num_groups = vocab_size // _STRIDES
    if scores.device.type != "cpu" or k > min(_MOST, num_groups // 2):
        values, ids = torch.topk(scores, k, dim=-1)
        return values, ids
    # Group g holds the ids g, g + G, g + 2G, …: the maximum over groups then runs along contiguous memory.
    grouped = scores[:, : num_groups * _STRIDES].view(num_rows, _STRIDES, num_groups)
    best_groups = torch.topk(grouped.amax(dim=1), k, dim=-1, sorted=False).indices
    members = torch.arange(_STRIDES, device=scores.device)[None, :, None] * num_groups
    tail = torch.arange(num_groups * _STRIDES, vocab_size, device=scores.device)
    candidates = torch.cat([(best_groups[:, None, :] + members).flatten(1), tail.expand(num_rows, -1)], dim=-1)
    values, places = torch.topk(scores.gather(1, candidates), k, dim=-1)
    return values, candidates.gather(1, places)
