"""Weights of few bits in plain PyTorch: the oracle of the compiled kernels, and the fallback where there are none.

The format and the arithmetic are those of `cpu/quantized.h`; the names are those of `ops.py`. Weights keep one byte
per code here, so this is a way to check and to run anywhere, not a way to save memory.
"""

import torch

from weft.errors import InvariantBroken
from weft.kernels.packed import PackedLinear, QuantizedFormat

LAYOUT = "codes"
"""`data` holds codes `[O, I]` uint8, `scales` the scales `[O, G]` or scales and minima `[2, O, G]`."""

LARGEST_CODE = 127.0
LEAST_ACTIVATION = 1e-30
"""A group of activations whose largest is below counts as zero."""
EXACT_INPUTS = 512
"""Products of this many codes add up exactly in float32: 512 · 255 · 127 < 2²⁴."""


def quantize_linear(
    weight: torch.Tensor, form: QuantizedFormat, bias: torch.Tensor | None, first_column: int, in_features: int
) -> PackedLinear:
    """Rounds to nearest: symmetric with a scale per output, or the range of each group divided evenly."""
    rows = weight.float()
    if form.is_per_output:
        largest = rows.abs().amax(dim=1, keepdim=True)
        inverse = torch.where(largest > 0.0, _inverse_step(largest), 0.0)
        scales = largest / LARGEST_CODE
        codes = torch.round(rows[:, first_column : first_column + in_features] * inverse) + form.zero_point
        return _packed(codes.clamp(0.0, form.highest), scales, form, weight.dtype, bias)
    groups = _groups(rows[:, first_column : first_column + in_features], form, fill=float("nan"))
    low = groups.nan_to_num(float("inf")).amin(dim=2)
    high = groups.nan_to_num(float("-inf")).amax(dim=2)
    scales, minima = ((high - low) / form.highest).half().float(), low.half().float()
    inverse = torch.where(scales > 0.0, 1.0 / scales, 0.0)
    codes = torch.round((groups - minima[..., None]) * inverse[..., None]).clamp(0.0, form.highest)
    codes = codes.flatten(1)[:, :in_features]
    return _packed(codes, torch.stack((scales, minima)).half(), form, weight.dtype, bias)


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    form: QuantizedFormat,
    dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> PackedLinear:
    """The codes as they are."""
    both = scales if minima is None else torch.stack((scales, minima))
    return _packed(codes, both, form, dtype, bias)


def _packed(
    codes: torch.Tensor, scales: torch.Tensor, form: QuantizedFormat, dtype: torch.dtype, bias: torch.Tensor | None
) -> PackedLinear:
    return PackedLinear(
        layout=LAYOUT,
        data=codes.to(torch.uint8),
        scales=scales,
        bias=bias,
        out_features=codes.shape[0],
        in_features=codes.shape[1],
        dtype=dtype,
        form=form,
    )


def quantize_activations(x: torch.Tensor, form: QuantizedFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -127 … 127 and scales of each row and group; a group that is not finite has a NaN for its scale.

    Shapes  x `[T, I]` → codes `[T, G, size]` float32 (the last group filled with zeros), scales `[T, G]` float32
    """
    groups = _groups(x.float(), form, fill=0.0)
    largest = groups.abs().amax(dim=2)
    is_coded = torch.isfinite(largest) & (largest >= LEAST_ACTIVATION)
    inverse = torch.where(is_coded, _inverse_step(largest), 0.0)
    codes = torch.where(is_coded[..., None], torch.round(groups * inverse[..., None]), 0.0)
    scales = torch.where(is_coded, largest / LARGEST_CODE, 0.0)
    return codes, torch.where(torch.isfinite(largest), scales, float("nan"))


def linear(
    x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Exact sums of products per group, then one fixed order of float operations per output."""
    form = _format(packed)
    codes, x_scales = quantize_activations(x, form)
    weights = _groups(packed.data.float(), form, fill=0.0)
    scales, minima = _scales(packed)
    y = torch.zeros(x.shape[0], packed.out_features, device=x.device)
    for group in range(x_scales.shape[1]):
        sums = _exact_products(codes[:, group], weights[:, group])
        of_x = x_scales[:, group, None]
        code_sums = codes[:, group].sum(dim=1, dtype=torch.float64)[:, None]
        if form.is_per_output:
            y = _fma((sums - form.zero_point * code_sums).float(), of_x.expand_as(y), y)
        elif minima is None:
            y = _fma((sums - form.zero_point * code_sums).float(), scales[:, group] * of_x, y)
        else:
            y = _fma(sums.float(), scales[:, group] * of_x, y)
            y = _fma(minima[:, group].expand_as(y), of_x * code_sums.float(), y)
    if form.is_per_output:
        y = y * scales[:, 0]
    if packed.bias is not None:
        y = y + packed.bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype or x.dtype)


def embedding(token_ids: torch.Tensor, packed: PackedLinear, scale: float = 1.0) -> torch.Tensor:
    """Rows of the weight that the codes stand for."""
    ids = token_ids.long()
    scales, minima = _scales(packed)
    rows = dequantize(packed.data[ids], scales[ids], None if minima is None else minima[ids], _format(packed))
    rows = rows.to(packed.dtype)
    return rows if scale == 1.0 else rows * scale


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor | None, form: QuantizedFormat
) -> torch.Tensor:
    """Shapes  codes `[O, I]` uint8, scales and minima `[O, G]` → `[O, I]` float32"""
    groups = _groups(codes.float(), form, fill=0.0)
    if minima is None:
        values = (groups - form.zero_point) * scales.float()[..., None]
    else:
        values = _fma(groups, scales.float()[..., None].expand_as(groups), minima.float()[..., None].expand_as(groups))
    return values.flatten(1)[:, : codes.shape[1]]


def _format(packed: PackedLinear) -> QuantizedFormat:
    if packed.form is None:
        raise InvariantBroken("codes without a format")
    return packed.form


def _scales(packed: PackedLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    if packed.scales is None:
        raise InvariantBroken("codes without scales")
    if packed.scales.dim() == 2:
        return packed.scales.float(), None
    scales, minima = packed.scales.float()
    return scales, minima


def _groups(x: torch.Tensor, form: QuantizedFormat, *, fill: float) -> torch.Tensor:
    """`[R, I]` → `[R, G, size]`, the last group filled up."""
    missing = -x.shape[1] % form.group_size
    filled = torch.nn.functional.pad(x, (0, missing), value=fill)
    return filled.view(x.shape[0], filled.shape[1] // form.group_size, form.group_size)


def _inverse_step(largest: torch.Tensor) -> torch.Tensor:
    # One division: `127.0 / x` is a reciprocal and a product in torch, rounded twice.
    return torch.full_like(largest, LARGEST_CODE) / largest


def _exact_products(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Shapes  `[T, I]`, `[O, I]` → `[T, O]` float64, whole numbers"""
    total = torch.zeros(x.shape[0], codes.shape[0], dtype=torch.float64, device=x.device)
    for first in range(0, x.shape[1], EXACT_INPUTS):
        part = slice(first, first + EXACT_INPUTS)
        total += (x[:, part] @ codes[:, part].T).double()
    return total


def _fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a · b + c` rounded once (twice in rare cases: the sum in float64 is itself rounded)."""
    return (a.double() * b.double() + c.double()).float()
