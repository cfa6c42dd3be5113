"""The gated feed-forward, its width spread over the ranks."""

import torch

from weft.kernels import ops
from weft.models.layers.linear import RowParallelLinear
from weft.models.layers.reader import WeightReader
from weft.models.spec import MlpSpec
from weft.models.weights.partition import even_span
from weft.parallel.groups import Group

SPLIT_MULTIPLE = 32
"""Ranks own whole runs of this many features: a vector register's worth, and a block of most GGUF formats."""


class GatedMlp:
    """down(activation(gate x) · up x), gate and up as one matrix.

    Shapes   `[T, E]` → `[T, E]`
    Source   Shazeer 2020, arXiv 2002.05202
    """

    def __init__(self, reader: WeightReader, spec: MlpSpec, group: Group) -> None:
        span = even_span(spec.intermediate_size, group.rank, group.world_size, multiple=SPLIT_MULTIPLE)
        self._gate_up = reader.packed_rows([(spec.gate, span), (spec.up, span)])
        self._down = RowParallelLinear(reader, spec.down, span, group)
        self._activation = spec.activation

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return self._gate_up.num_bytes + self._down.num_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the feed-forward to every row."""
        return self._down(ops.gated_activation(ops.linear(x, self._gate_up), self._activation))
