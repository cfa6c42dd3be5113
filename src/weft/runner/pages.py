"""Large tensors whose memory is taken only where it is written."""

import contextlib
import math
import mmap

import torch


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU the operating system hands out each page on first write.

    `torch.zeros` would write all of it now (seconds for several GiB, and the memory is gone even if no request
    ever needs it); `torch.empty` may show another tensor's old bytes. Elsewhere this is `torch.zeros`.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_elements = math.prod(shape)
    pages = mmap.mmap(-1, num_elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Attention walks the KV pool block by block: large pages spare most of its TLB misses. A kernel built
        # without transparent huge pages refuses, which costs only that.
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=num_elements).view(shape)
