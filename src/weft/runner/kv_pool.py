"""The paged KV pool: every key and value that this rank remembers.

A model sees one `LayerKv` per layer. It is one tensor `[L, 2, N, Hkv, B, W]`, so that a block of one layer and one head
is one contiguous tile for attention; what stands where in a tile, and W, is `kernels.kv_layout`'s.
"""

import torch

from weft.errors import InvariantBroken
from weft.kernels import kv_layout
from weft.models.forward_batch import LayerKv
from weft.runner.pages import lazy_zeros


class KvPool:
    """Keys and values of `num_blocks` blocks for every layer.

    Shapes   storage [L, 2, N, Hkv, B, W]
    Note     reads as zeros until written, so that no attention kernel meets a NaN in a block's unused tail. On the
             CPU the pages are taken from the operating system when they are first written, not here
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.num_kv_heads = num_kv_heads
        self.block_size_tokens = block_size_tokens
        self.head_dim = head_dim
        self.dtype = dtype
        self.device = device
        shape = (num_layers, 2, num_blocks, num_kv_heads, block_size_tokens)
        if min(*shape, head_dim) < 1:
            raise InvariantBroken(f"a KV pool of shape {shape} has no block")
        self._storage = lazy_zeros((*shape, kv_layout.pool_width(head_dim, dtype)), dtype, device)
        self.layers: list[LayerKv] = [LayerKv(keys=layer[0], values=layer[1]) for layer in self._storage.unbind(0)]

    @property
    def bytes(self) -> int:
        """Size of the pool when every block has been used."""
        return self._storage.numel() * self._storage.element_size()
