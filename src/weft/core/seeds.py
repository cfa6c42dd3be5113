"""Seeds of the several sequences of one request.

A sequence's randomness is keyed by (seed, absolute position, vocabulary id), so two sequences of one prompt need
two seeds. They are derived by a hash, not drawn, so that a request repeated with its seed repeats all its choices.
"""

_MASK = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def derive_seed(seed: int, index: int) -> int:
    """Seed of the index-th sequence of a request (`n`, `best_of`).

    Units   seed: 0 … 2^64 - 1; index: 0-based; the result lies in the same range
    Note    index 0 keeps the seed itself: the first of n choices equals the only one of n = 1
    Source  Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", SplitMix64
    """
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed must lie in 0 … 2^64 - 1. Given: {seed}")
    if index < 0:
        raise ValueError(f"index must not be negative. Given: {index}")
    if index == 0:
        return seed
    # The seed is mixed before the stride is added: otherwise seed s + gamma, index 1 would equal seed s, index 2.
    return _mix((_mix(seed) + index * _GOLDEN_GAMMA) & _MASK)


def _mix(value: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every input bit moves every output bit."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
