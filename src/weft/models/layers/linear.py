"""The linear layer whose inputs are spread over the ranks. Those whose outputs are spread are `ops.linear` alone."""

import torch

from weft.kernels import ops
from weft.models.layers.reader import WeightReader
from weft.models.spec import LinearSpec
from weft.models.weights.partition import Span
from weft.parallel.groups import Group


class RowParallelLinear:
    """A matrix whose input columns are spread over the ranks: each multiplies its part, the sum is the result.

    Shapes   x `[T, I of this rank]` → `[T, O]`, equal on every rank
    """

    def __init__(self, reader: WeightReader, linear: LinearSpec, columns: Span, group: Group) -> None:
        # The bias is added once, by the first rank.
        self._packed = reader.packed_columns(linear, columns, with_bias=group.rank == 0)
        self._group = group

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self._packed.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply and sum over the ranks. Partial sums travel in float32 and are rounded once."""
        if self._group.world_size == 1:
            return ops.linear(x, self._packed)
        return self._group.all_reduce(ops.linear(x, self._packed, torch.float32)).to(x.dtype)
