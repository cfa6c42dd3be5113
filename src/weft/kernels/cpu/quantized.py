"""Weights of few bits on the compiled kernels; formats and arithmetic stand in `quantized.h`."""

import ctypes
from ctypes import c_int32
from typing import Self

import torch

from weft.kernels.cpu.operations import DTYPE_CODES, WEIGHTS, finish_embedding, library
from weft.kernels.packed import PackedLinear, QuantizedFormat

LAYOUT = "quantized"
"""`data` holds a header that names the format, then panels of 32 outputs with their scales."""

KERNEL_SETS = ("avx2", "avx-vnni", "avx512", "avx512-vnni")
"""Names of the kernel tables; all compute the same bits."""


class _Format(ctypes.Structure):
    _fields_ = (
        ("bits", c_int32),
        ("group_size", c_int32),
        ("zero_point", c_int32),
        ("has_minimum", c_int32),
        ("is_per_output", c_int32),
    )

    @classmethod
    def of(cls, form: QuantizedFormat) -> Self:
        return cls(form.bits, form.group_size, form.zero_point, form.has_minimum, form.is_per_output)


def quantize_linear(
    weight: torch.Tensor, form: QuantizedFormat, bias: torch.Tensor | None, first_column: int, in_features: int
) -> PackedLinear:
    """Codes and panels in one pass over the weight, all threads."""
    out_features, row_features = weight.shape
    packed = _empty(out_features, in_features, form, weight.dtype, bias)
    library().weft_quantize_weight(
        weight.data_ptr(),
        weight.stride(0),
        DTYPE_CODES[weight.dtype],
        row_features,
        first_column,
        in_features,
        out_features,
        packed.data.data_ptr(),
        ctypes.byref(_Format.of(form)),
    )
    return packed


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    form: QuantizedFormat,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> PackedLinear:
    """Panels of codes that a file brought."""
    out_features, in_features = codes.shape
    packed = _empty(out_features, in_features, form, dtype, bias)
    library().weft_pack_codes(
        codes.data_ptr(),
        scales.data_ptr(),
        None if minima is None else minima.data_ptr(),
        in_features,
        out_features,
        packed.data.data_ptr(),
        ctypes.byref(_Format.of(form)),
    )
    return packed


def linear(
    x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantizes the rows of x, then multiplies; a row has the same bits whatever else is in x."""
    dtype = out_dtype or x.dtype
    out = torch.empty((x.shape[0], packed.out_features), dtype=dtype)
    library().weft_quantized_linear(
        x.data_ptr(),
        x.stride(0),
        packed.data.data_ptr(),
        None if packed.bias is None else packed.bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        packed.out_features,
        x.shape[0],
        packed.in_features,
        packed.out_features,
        DTYPE_CODES[packed.dtype],
        DTYPE_CODES[dtype],
    )
    return out


def embedding(token_ids: torch.Tensor, packed: PackedLinear, scale: float = 1.0) -> torch.Tensor:
    """Rows of the weight that the codes stand for."""
    out = torch.empty((token_ids.shape[0], packed.in_features), dtype=packed.dtype)
    ids = token_ids.to(torch.int32)
    bad = library().weft_quantized_embedding(
        ids.data_ptr(),
        ids.shape[0],
        packed.data.data_ptr(),
        packed.in_features,
        packed.out_features,
        DTYPE_CODES[packed.dtype],
        out.data_ptr(),
    )
    finish_embedding(out, token_ids, packed, scale, bad)
    return out


def _empty(
    out_features: int, in_features: int, form: QuantizedFormat, dtype: torch.dtype, bias: torch.Tensor | None
) -> PackedLinear:
    num_bytes = library().weft_quantized_bytes(out_features, in_features, ctypes.byref(_Format.of(form)))
    return PackedLinear(
        layout=LAYOUT,
        data=WEIGHTS.take(num_bytes),
        bias=None if bias is None else bias.to(torch.float32).contiguous(),
        out_features=out_features,
        in_features=in_features,
        dtype=dtype,
        form=form,
    )
