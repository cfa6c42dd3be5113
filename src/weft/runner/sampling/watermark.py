"""A watermark that a detector can find again: a keyed half of the vocabulary gets a bonus.

Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", algorithm 2 with a window of one token;
gamma, delta and the key are TGI's (spec: TGI 3.3.7, `WATERMARK_GAMMA`, `WATERMARK_DELTA`). TGI draws the green list
from the device's own generator, so that CPU and GPU disagree; here membership is a hash of (last token, id) in exact
integer arithmetic, the same on every device, and each id is green with probability gamma on its own.
"""

from dataclasses import dataclass

import torch

_MASK = 0xFFFFFFFF
_HASH_KEY = 15485863


@dataclass(frozen=True, slots=True)
class WatermarkSettings:
    """gamma: share of the vocabulary that is green; delta: what a green token's logit gains."""

    gamma: float = 0.5
    delta: float = 2.0


def green_list(last_token_ids: torch.Tensor, vocab_size: int, gamma: float) -> torch.Tensor:
    """Which ids are green after each last token.

    Shapes  last_token_ids [R] integer → [R, V] bool
    """
    key = _hash32((last_token_ids.to(torch.int64) * _HASH_KEY) & _MASK)[:, None]
    ids = torch.arange(vocab_size, dtype=torch.int64, device=last_token_ids.device)[None, :]
    return _hash32(_hash32(ids) ^ key) < round(gamma * 2**32)


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words, held in int64. Source: Wellons 2018, "Prospecting for Hash Functions", lowbias32."""
    x = x ^ (x >> 16)
    # The product may pass 2^63: int64 wraps, and its low 32 bits stay right.
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
