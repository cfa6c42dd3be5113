"""bfloat16 linear layers through torch's bundled oneDNN, weights laid out once: for machines without our kernels.

At one row this is twice as fast as `F.linear`, which lays the weight out anew in every call.
"""

import torch

from weft.kernels import reference
from weft.kernels.packed import PackedLinear

MAX_PACKED_OUTPUTS = 16384
"""Weights with more outputs stay as they are: a vocabulary matrix may also be the embedding table, whose rows are
looked up, and a second copy of the largest tensor would cost more than it saves."""


def is_available() -> bool:
    """Whether this build of torch has the operators and this CPU a use for them."""
    # None of these names is public.
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """The weight in oneDNN's own layout."""
    if weight.shape[0] > MAX_PACKED_OUTPUTS:
        return reference.pack_linear(weight, bias)
    return PackedLinear(
        layout="onednn",
        data=torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()),  # noqa: SLF001
        bias=bias,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=weight.dtype,
    )


def linear(
    x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums in float32, rounded to bfloat16 before the residual is added."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.data, packed.bias, "none", [], "")  # noqa: SLF001
    if residual is not None:
        y = y + residual
    return y.to(out_dtype or x.dtype)
