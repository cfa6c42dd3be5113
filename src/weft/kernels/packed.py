"""A weight matrix in the layout of the implementation that will multiply by it."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """Weight `[O, I]` and bias `[O]` of `y = x Wᵀ + b`, made once at load by `ops.pack_linear`.

    `data` replaces the original weight: drop every reference to that one after packing.
    """

    layout: str
    """Which implementation made it and must read it: `rows` (the weight as it was), `onednn`, `panels`."""
    data: torch.Tensor
    bias: torch.Tensor | None
    """[O]; float32 for `panels`, otherwise the dtype of the weight."""
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Of the original weight and of the activations that it multiplies."""
    scales: torch.Tensor | None = None
    """What a layout keeps beside `data`; most keep nothing."""

    @classmethod
    def of_rows(cls, weight: torch.Tensor) -> Self:
        """A weight as it is: what rows are looked up in, when it is no output layer as well."""
        out_features, in_features = weight.shape
        return cls(
            layout="rows",
            data=weight,
            bias=None,
            out_features=out_features,
            in_features=in_features,
            dtype=weight.dtype,
        )

    @property
    def num_bytes(self) -> int:
        """Memory held by weight and bias."""
        return sum(part.nbytes for part in (self.data, self.bias, self.scales) if part is not None)
