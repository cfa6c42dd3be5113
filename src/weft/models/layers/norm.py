"""Root-mean-square norm, with and without the residual sum before it."""

import torch

from weft.kernels import ops
from weft.models.layers.reader import WeightReader
from weft.models.spec import NormSpec


class RmsNorm:
    """x / rms(x) · (weight + offset) over the last dimension.

    Source   Zhang & Sennrich 2019, arXiv 1910.07467
    """

    def __init__(self, reader: WeightReader, spec: NormSpec) -> None:
        self._weight = reader.norm(spec)
        self._spec = spec

    @property
    def num_bytes(self) -> int:
        """Memory of the weight."""
        return self._weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, size]` → the same shape."""
        return ops.rms_norm(x, self._weight, self._spec.eps, self._spec.weight_offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (norm of x + residual, x + residual)."""
        return ops.add_rms_norm(x, residual, self._weight, self._spec.eps, self._spec.weight_offset)
