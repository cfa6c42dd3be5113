"""Counter-based random bits: Philox4x32-10, in tensor arithmetic that is exact on every device.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section 3.4; the test
vectors are those of the authors' Random123 library.
"""

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four random words per counter. All tensors are int64 holding values 0 … 2³²-1 and broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A 32 by 32 bit product may pass 2⁶³: int64 wraps, and shift and mask still read the right bits.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _MASK) ^ c1 ^ k0,
            product_1 & _MASK,
            ((product_0 >> 32) & _MASK) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def token_words(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Random word of every (row, vocabulary id).

    Layout  key = (seed mod 2³², seed div 2³²); counter = (id div 4, position mod 2³², position div 2³², 0);
            the word of an id is output number id mod 4
    Shapes  seeds `[S]` int64 (the bits of an unsigned seed), positions `[S]` → `[S, V]` int64, 0 … 2³²-1
    """
    groups = torch.arange((vocab_size + 3) // 4, device=seeds.device, dtype=torch.int64)[None, :]
    seed = seeds.to(torch.int64)[:, None]
    position = positions.to(torch.int64)[:, None]
    zero = torch.zeros_like(groups)
    words = philox4x32(
        (groups, position & _MASK, (position >> 32) & _MASK, zero),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
