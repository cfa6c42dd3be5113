"""How a weight becomes what the kernels multiply by: as it is, rounded to few bits, or by the codes of its file.

A scheme sees one matrix at a time, or one rank's slice of it, and returns it packed. Layers never ask which one it is.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear
from weft.models.weights.partition import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix that has been read, all columns of it, and what of it is wanted."""

    weight: torch.Tensor
    """`[O, I]` of whole rows, so that a scale of a row is the same on every rank."""
    bias: torch.Tensor | None
    columns: Span
    is_vocabulary: bool
    """The output layer, whose rows may also be looked up as embeddings."""


class QuantScheme(Protocol):
    """Implementations: `Unquantized` here, `RoundedScheme` in `rounded.py`."""

    @property
    def name(self) -> str:
        """For people: the banner and `/info`; empty for none."""
        ...

    @property
    def needs_whole_rows(self) -> bool:
        """Whether `pack` must see all columns although a rank keeps only some of them."""
        ...

    def pack(self, matrix: Matrix) -> PackedLinear:
        """Lay the wanted columns out. `matrix.weight` is memory that is used again: nothing of it may be kept."""
        ...


@dataclass(frozen=True, slots=True)
class Unquantized:
    """Weights in the dtype of the activations."""

    name: str = ""
    needs_whole_rows: bool = False

    def pack(self, matrix: Matrix) -> PackedLinear:
        """See `QuantScheme.pack`."""
        first, last = matrix.columns.start, matrix.columns.stop
        return ops.pack_linear(matrix.weight[:, first:last], matrix.bias)
