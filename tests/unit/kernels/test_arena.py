"""Pieces of large chunks: aligned, apart, and returned when nobody views them."""

import gc
import mmap
from pathlib import Path

from weft.kernels.cpu.arena import WeightArena


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_pieces_are_aligned_zero_and_apart() -> None:
    arena = WeightArena(chunk_bytes=4096)
    pieces = [arena.take(size) for size in (1, 64, 65, 0, 1000, 5000, 100)]

    for value, piece in enumerate(pieces, start=1):
        assert piece.data_ptr() % 64 == 0
        assert not piece.any()
        piece.fill_(value)
    for value, piece in enumerate(pieces, start=1):
        assert bool((piece == value).all())


def test_small_pieces_share_a_chunk() -> None:
    arena = WeightArena(chunk_bytes=4096)

    first, second = arena.take(100), arena.take(100)

    assert second.data_ptr() - first.data_ptr() == 128


def test_a_chunk_is_freed_when_its_last_piece_is_gone() -> None:
    arena = WeightArena(chunk_bytes=64 << 20)
    before = resident_bytes()
    piece = arena.take(64 << 20)
    piece.fill_(1)
    half = piece[: 32 << 20]
    arena.take(1)
    del piece
    gc.collect()
    assert resident_bytes() - before > 60 << 20

    del half
    gc.collect()
    assert resident_bytes() - before < 16 << 20
