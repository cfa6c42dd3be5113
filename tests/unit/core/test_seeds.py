"""Seeds of the sequences of one request."""

import pytest

from weft.core.request import MAX_SEED
from weft.core.seeds import derive_seed


@pytest.mark.parametrize("seed", [0, 1, 42, MAX_SEED])
def test_the_first_sequence_keeps_the_seed(seed: int) -> None:
    """The first of n choices equals the only one of n = 1."""
    assert derive_seed(seed, 0) == seed


def test_derived_seeds_never_meet() -> None:
    seeds = [derive_seed(seed, index) for seed in (*range(300), MAX_SEED, 0x9E3779B97F4A7C15) for index in range(32)]

    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)


def test_derived_seeds_never_change() -> None:
    """Clients keep seeds: a request repeated next year gives the same choices."""
    assert [derive_seed(42, index) for index in range(4)] == [
        42,
        10996452266160306281,
        2958219263312191191,
        3069497704473277141,
    ]


def test_half_of_the_bits_differ_between_neighbours() -> None:
    flips = [(derive_seed(seed, 1) ^ derive_seed(seed + 1, 1)).bit_count() for seed in range(1000)]

    assert 31 < sum(flips) / len(flips) < 33


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (MAX_SEED + 1, 0), (0, -1)])
def test_numbers_outside_their_range_are_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match="Given"):
        derive_seed(seed, index)
