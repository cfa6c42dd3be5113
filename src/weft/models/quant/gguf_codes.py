"""GGUF's blocks as codes, scales and minima, for kernels that multiply by them as they are.

Codes lose nothing. Scales and minima are float16: exact for the plain formats, whose blocks hold them so; for the K
formats a block's scale times a small whole number is rounded, by at most 2⁻¹¹ of itself, a hundredth of a 4-bit step.

Source   block layouts: github.com/ggml-org/ggml, src/ggml-common.h; arithmetic: src/ggml-quants.c
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from weft.kernels.packed import QuantizedFormat
from weft.models.quant import gguf_blocks as blocks
from weft.models.weights.gguf_file import BLOCK_LAYOUT, GgmlType

ROWS_AT_ONCE_BYTES = 1 << 22
"""Blocks unpacked at a time, so that intermediates stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A matrix of few bits.

    Shapes   codes `[O, I]` uint8, scales and minima `[O, I / group]` float16
    """

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None
    form: QuantizedFormat

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Codes":
        """With the rows of codes, scales and minima put into another order."""
        minima = None if self.minima is None else change(self.minima)
        return replace(self, codes=change(self.codes), scales=change(self.scales), minima=minima)

    def columns(self, first: int, last: int) -> "Codes":
        """Some columns; `first` begins a group."""
        if (first, last) == (0, self.codes.shape[1]):
            return self
        groups = slice(first // self.form.group_size, -(-last // self.form.group_size))
        minima = None if self.minima is None else self.minima[:, groups].contiguous()
        return replace(
            self,
            codes=self.codes[:, first:last].contiguous(),
            scales=self.scales[:, groups].contiguous(),
            minima=minima,
        )


_Unpacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Of N blocks: codes `[N, numbers]`, scales and minima `[N, groups]`."""


def unpack(raw: torch.Tensor, ggml_type: GgmlType) -> Codes:
    """Shapes   raw `[O, bytes per row]` uint8, contiguous → Codes of `[O, I]`"""
    form, decode = _FORMATS[ggml_type]
    numbers, block_bytes = BLOCK_LAYOUT[ggml_type]
    per_row = raw.shape[1] // block_bytes
    groups = per_row * numbers // form.group_size
    codes = torch.empty(raw.shape[0], per_row * numbers, dtype=torch.uint8)
    scales = torch.empty(raw.shape[0], groups, dtype=torch.float16)
    minima = torch.empty_like(scales) if form.has_minimum else None
    rows = max(1, ROWS_AT_ONCE_BYTES // raw.shape[1])
    for first in range(0, raw.shape[0], rows):
        part = slice(first, first + rows)
        of_codes, of_scales, of_minima = decode(raw[part].reshape(-1, block_bytes))
        codes[part] = of_codes.view(-1, codes.shape[1])
        scales[part] = of_scales.view(-1, groups)
        if minima is not None and of_minima is not None:
            minima[part] = of_minima.view(-1, groups)
    return Codes(codes=codes, scales=scales, minima=minima, form=form)


def is_unpackable(ggml_type: GgmlType) -> bool:
    """Whether a tensor of this type has codes; floats have none."""
    return ggml_type in _FORMATS


def group_size(ggml_type: GgmlType) -> int:
    """Inputs that share a scale."""
    return _FORMATS[ggml_type][0].group_size


def stack(parts: Sequence[Codes]) -> Codes | None:
    """Rows of several matrices in one format that holds all of them without loss; None where there is none.

    Files give the matrices of one projection different types. A smaller group repeats scales, and a zero point is a
    minimum of -zero_point · scale, a power of two times a float16.
    """
    form = _common_form([part.form for part in parts])
    if form is None:
        return None
    same = [_converted(part, form) for part in parts]
    minima = [part.minima for part in same if part.minima is not None]
    return Codes(
        codes=torch.cat([part.codes for part in same]),
        scales=torch.cat([part.scales for part in same]),
        minima=torch.cat(minima) if form.has_minimum else None,
        form=form,
    )


def _common_form(forms: Sequence[QuantizedFormat]) -> QuantizedFormat | None:
    bits = max(form.bits for form in forms)
    size = min(form.group_size for form in forms)
    zero_points = {form.zero_point for form in forms}
    has_minimum = any(form.has_minimum for form in forms) or len(zero_points) > 1
    if has_minimum and bits == 8:
        return None
    zero_point = 0 if has_minimum else zero_points.pop()
    return QuantizedFormat(bits=bits, group_size=size, zero_point=zero_point, has_minimum=has_minimum)


def _converted(part: Codes, form: QuantizedFormat) -> Codes:
    repeats = part.form.group_size // form.group_size
    scales = part.scales.repeat_interleave(repeats, dim=1)
    minima = part.minima
    if form.has_minimum:
        minima = part.scales * -part.form.zero_point if minima is None else minima
        minima = minima.repeat_interleave(repeats, dim=1).contiguous()
    return replace(part, scales=scales.contiguous(), minima=minima, form=form)


def _half(block: torch.Tensor, first: int) -> torch.Tensor:
    return block[:, first : first + 2].contiguous().view(torch.float16)


def _q4_0(block: torch.Tensor) -> _Unpacked:
    return blocks.nibbles(block[:, 2:]).flatten(1), _half(block, 0), None


def _q4_1(block: torch.Tensor) -> _Unpacked:
    return blocks.nibbles(block[:, 4:]).flatten(1), _half(block, 0), _half(block, 2)


def _q5_0(block: torch.Tensor) -> _Unpacked:
    return blocks.nibbles(block[:, 6:]).flatten(1) | blocks.fifth_bits(block[:, 2:6]), _half(block, 0), None


def _q5_1(block: torch.Tensor) -> _Unpacked:
    codes = blocks.nibbles(block[:, 8:]).flatten(1) | blocks.fifth_bits(block[:, 4:8])
    return codes, _half(block, 0), _half(block, 2)


def _q8_0(block: torch.Tensor) -> _Unpacked:
    # -128 … 127 to 0 … 255: the uppermost bit turned over.
    return block[:, 2:] ^ 0x80, _half(block, 0), None


def _q2_k(block: torch.Tensor) -> _Unpacked:
    codes = blocks.fields(block[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scales = _half(block, 80).float() * (block[:, :16] & 0x0F).float()
    minima = _half(block, 82).float() * (block[:, :16] >> 4).float()
    return codes, scales.half(), -minima.half()


def _q3_k(block: torch.Tensor) -> _Unpacked:
    high = blocks.fields(block[:, :32], 1).reshape(-1, 256)
    codes = blocks.fields(block[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256) | (high << 2)
    scales = _half(block, 108).float() * blocks.scales_of_q3_k(block[:, 96:108]).float()
    return codes, scales.half(), None


def _q4_k(block: torch.Tensor) -> _Unpacked:
    codes = blocks.nibbles(block[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 256)
    return codes, *_scales_and_minima(block)


def _q5_k(block: torch.Tensor) -> _Unpacked:
    high = blocks.fields(block[:, 16:48], 1)
    low = blocks.nibbles(block[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return (low | (high << 4)).flatten(1), *_scales_and_minima(block)


def _q6_k(block: torch.Tensor) -> _Unpacked:
    low = blocks.nibbles(block[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = blocks.fields(block[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    scales = _half(block, 208).float() * block[:, 192:208].view(torch.int8).float()
    return (low | (high << 4)).flatten(1), scales.half(), None


def _scales_and_minima(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, minima = blocks.scales_and_minima(block[:, 4:16])
    return (_half(block, 0).float() * scales).half(), -(_half(block, 2).float() * minima).half()


def _form(bits: int, size: int, zero_point: int | None = None) -> QuantizedFormat:
    has_minimum = zero_point is None
    return QuantizedFormat(bits=bits, group_size=size, zero_point=zero_point or 0, has_minimum=has_minimum)


_FORMATS: dict[GgmlType, tuple[QuantizedFormat, Callable[[torch.Tensor], _Unpacked]]] = {
    GgmlType.Q4_0: (_form(4, 32, 8), _q4_0),
    GgmlType.Q4_1: (_form(4, 32), _q4_1),
    GgmlType.Q5_0: (_form(6, 32, 16), _q5_0),
    GgmlType.Q5_1: (_form(6, 32), _q5_1),
    GgmlType.Q8_0: (_form(8, 32, 128), _q8_0),
    GgmlType.Q2_K: (_form(4, 16), _q2_k),
    GgmlType.Q3_K: (_form(4, 16, 4), _q3_k),
    GgmlType.Q4_K: (_form(4, 32), _q4_k),
    GgmlType.Q5_K: (_form(6, 32), _q5_k),
    GgmlType.Q6_K: (_form(6, 16, 32), _q6_k),
}
