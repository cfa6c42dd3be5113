"""A weight matrix in the layout of the implementation that will multiply by it."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFormat:
    """How codes of few bits stand for weights: `scale · (code - zero_point)`, or `scale · code + minimum`.

    Raises ValueError for a combination that kernels do not have.
    """

    bits: int
    """4, 6 or 8."""
    group_size: int
    """Inputs that share a scale, a multiple of 16."""
    zero_point: int = 0
    """The code that means zero; unused with minima."""
    has_minimum: bool = False
    is_per_output: bool = False
    """The groups of an output share their scale; only activations have scales per group. For 8 bits."""

    def __post_init__(self) -> None:
        is_known = self.bits in {4, 6} or (self.bits == 8 and not self.has_minimum)
        if not is_known or (self.is_per_output and self.bits != 8) or self.group_size < 16 or self.group_size % 16:
            raise ValueError(f"there are no kernels for {self}: see `QuantizedFormat`")

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLinear:
    """Weight `[O, I]` and bias `[O]` of `y = x Wᵀ + b`, made once at load by `ops.pack_linear`.

    `data` replaces the original weight: drop every reference to that one after packing.
    """

    layout: str
    """Which implementation made it and must read it: `rows` (the weight as it was), `onednn`, `panels`, `codes`,
    `quantized`."""
    data: torch.Tensor
    bias: torch.Tensor | None
    """[O]; float32 for `panels`, otherwise the dtype of the weight."""
    out_features: int
    in_features: int
    dtype: torch.dtype
    """Of the original weight and of the activations that it multiplies."""
    scales: torch.Tensor | None = None
    """What a layout keeps beside `data`; most keep nothing."""
    form: QuantizedFormat | None = None
    """Of a quantized weight."""

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
