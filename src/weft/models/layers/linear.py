"""Linear layers of one rank: rows (column-parallel) or columns (row-parallel) of the checkpoint's matrices."""

from collections.abc import Sequence

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear
from weft.models.layers.reader import WeightReader
from weft.models.spec import LinearSpec
from weft.models.weights.partition import Span
from weft.parallel.groups import Group


def load_fused_rows(reader: WeightReader, parts: Sequence[tuple[LinearSpec, Span]]) -> PackedLinear:
    """Stack row slices of several matrices into one, in order: `[Σ span, I]`. Either all have a bias or none."""
    weight = torch.cat([reader.rows(linear, span) for linear, span in parts])
    biases = [bias for linear, span in parts if (bias := reader.bias(linear, span)) is not None]
    return ops.pack_linear(weight, torch.cat(biases) if biases else None)


class RowParallelLinear:
    """A matrix whose input columns are spread over the ranks: each multiplies its part, the sum is the result.

    Shapes   x `[T, I of this rank]` → `[T, O]`, equal on every rank
    """

    def __init__(self, reader: WeightReader, linear: LinearSpec, columns: Span, group: Group) -> None:
        # The bias is added once, by the first rank.
        bias = reader.bias(linear, Span(0, linear.out_features)) if group.rank == 0 else None
        self._packed = ops.pack_linear(reader.columns(linear, columns), bias)
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
