"""Memory for packed weights: cut from large chunks that the kernel may back with large pages.

A matrix of a small model is shorter than one 2 MiB page. Side by side in a chunk all of them live on large pages,
which spares a pass over the weights most of its address look-ups (3 to 8 % of a decode step).
"""

import contextlib
import mmap

import torch

CHUNK_BYTES = 256 << 20
_ALIGNMENT = 64
"""Of every piece: a cache line and the longest vector."""


class WeightArena:
    """Hands out pieces of chunks. A chunk is freed when the last tensor that views it is gone."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """A piece `[num_bytes]` uint8, aligned to 64 bytes, contents zero.

        Pages of a chunk that nobody has written yet cost no memory.
        """
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + num_bytes > self._chunk.numel():
            start = 0
            self._chunk = _map_pages(max(num_bytes, self._chunk_bytes))
        self._used = start + num_bytes
        return self._chunk[start : self._used]


def _map_pages(num_bytes: int) -> torch.Tensor:
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # an operating system without large pages: slower, and nothing else
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
