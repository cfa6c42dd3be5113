"""How a weight becomes what the kernels multiply by: as it is, rounded to few bits, or by the codes of its file.

A scheme sees one matrix at a time, or one rank's slice of it, and returns it packed. Layers never ask which one it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear
from weft.models.weights.partition import Span
from weft.models.weights.source import WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix that has been read, all columns of it, and what of it is wanted."""

    weight: torch.Tensor
    """`[O, I]` of whole rows, so that a scale of a row is the same on every rank."""
    bias: torch.Tensor | None
    columns: Span
    is_vocabulary: bool
    """The output layer, whose rows may also be looked up as embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPart:
    """A slice of a matrix that has not been read: one of those that are stacked into one."""

    name: str
    rows: Span
    columns: Span


class QuantScheme(Protocol):
    """Implementations: `Unquantized` here, `RoundedScheme` in `rounded.py`, `GgufPacked` in `gguf_packed.py`."""

    @property
    def name(self) -> str:
        """For people: the banner and `/info`; empty for none."""
        ...

    @property
    def needs_whole_rows(self) -> bool:
        """Whether `pack` must see all columns although a rank keeps only some of them."""
        ...

    def pack_stored(
        self, source: WeightSource, parts: Sequence[StoredPart], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """By what the file holds, without reading it as numbers; None where `pack` must do it."""
        ...

    def pack(self, matrix: Matrix) -> PackedLinear:
        """Lay the wanted columns out. `matrix.weight` is memory that is used again: nothing of it may be kept."""
        ...


@dataclass(frozen=True, slots=True)
class Unquantized:
    """Weights in the dtype of the activations."""

    name: str = ""
    needs_whole_rows: bool = False

    def pack_stored(
        self, source: WeightSource, parts: Sequence[StoredPart], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """None: the file is read as numbers."""
        del source, parts, bias, dtype
        return None

    def pack(self, matrix: Matrix) -> PackedLinear:
        """See `QuantScheme.pack`."""
        first, last = matrix.columns.start, matrix.columns.stop
        return ops.pack_linear(matrix.weight[:, first:last], matrix.bias)
