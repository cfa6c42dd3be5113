"""GGUF's block formats to floats, whole tensors at a time.

Each decoder takes raw blocks `[N, bytes per block]` uint8 and returns `[N, numbers per block]` float32 by exactly the
multiplications and additions of the reference, so that results are bit-equal to `gguf.quants.dequantize`.

Source   block layouts: github.com/ggml-org/ggml, src/ggml-common.h; arithmetic: src/ggml-quants.c
"""

from collections.abc import Callable

import torch

from weft.models.weights.gguf_file import BLOCK_LAYOUT, GgmlType

MAX_CHUNK_NUMBERS = (1 << 15) - 1
"""Numbers decoded at a time: intermediates stay in the second-level cache, and torch, which splits work from 2¹⁵
elements on, starts no threads that would wait for one another twelve times per chunk (35 times slower on busy cores).
"""


def dequantize_into(out: torch.Tensor, raw: torch.Tensor, ggml_type: GgmlType) -> None:
    """Decode rows of blocks: float32 arithmetic, rounded once to the dtype of `out`.

    Shapes   raw `[O, bytes per row]` uint8, contiguous → out `[O, I]`
    """
    if ggml_type in _FLOATS:
        out.copy_(raw.view(_FLOATS[ggml_type]))
        return
    block_bytes = BLOCK_LAYOUT[ggml_type][1]
    decode = _DECODERS[ggml_type]
    rows = max(1, MAX_CHUNK_NUMBERS // out.shape[1])
    for first in range(0, raw.shape[0], rows):
        part = raw[first : first + rows]
        out[first : first + rows] = decode(part.reshape(-1, block_bytes)).view(part.shape[0], -1)


def _half(blocks: torch.Tensor, first: int) -> torch.Tensor:
    """The float16 at byte `first` of each block: `[N, 1]` float32."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low halves of all bytes, then high halves: `[…, B]` → `[…, 2, B]`."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-2)


def fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit fields from the lowest up: `[…, B]` → `[…, 8 / bits, B]`."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> shift) & mask for shift in range(0, 8, bits)], dim=-2)


def fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Four bytes of 32 flags to `[N, 32]`, each flag worth 16."""
    return fields(packed, 1).transpose(-1, -2).flatten(1) << 4


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (nibbles(blocks[:, 2:]).flatten(1).to(torch.int8) - 8).float()


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return (_half(blocks, 0) * nibbles(blocks[:, 4:]).flatten(1).float()).add_(_half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    numbers = nibbles(blocks[:, 6:]).flatten(1) | fifth_bits(blocks[:, 2:6])
    return _half(blocks, 0) * (numbers.to(torch.int8) - 16).float()


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    numbers = nibbles(blocks[:, 8:]).flatten(1) | fifth_bits(blocks[:, 4:8])
    return (_half(blocks, 0) * numbers.float()).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, packed = blocks[:, :16], blocks[:, 16:80]
    scale = _half(blocks, 80) * (scales & 0x0F).float()
    minimum = _half(blocks, 82) * (scales >> 4).float()
    numbers = fields(packed.reshape(-1, 2, 32), 2).reshape(-1, 16, 16).float()
    return (scale[:, :, None] * numbers).sub_(minimum[:, :, None]).flatten(1)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    high, packed, scale_bits = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    scales = scales_of_q3_k(scale_bits)
    numbers = fields(packed.reshape(-1, 2, 32), 2).reshape(-1, 16, 16).to(torch.int8)
    # A number lacks its upper bit when the mask's bit is 0: then 4 is taken off.
    offset = (fields(high, 1) ^ 1).reshape(-1, 16, 16).to(torch.int8) << 2
    scale = _half(blocks, 108) * scales.float()
    return (scale[:, :, None] * (numbers - offset).float()).flatten(1)


def scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twelve bytes to eight 6-bit scales and eight 6-bit minima (Q4_K, Q5_K)."""
    first, second, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)), dim=1)
    minima = torch.cat((second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)), dim=1)
    return scales.float(), minima.float()


def scales_of_q3_k(packed: torch.Tensor) -> torch.Tensor:
    """Twelve bytes to sixteen 6-bit scales, -32 … 31."""
    low, high = nibbles(packed[:, :8]).flatten(1), fields(packed[:, 8:], 2).flatten(1)
    return (low | (high << 4)).to(torch.int8) - 32


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = scales_and_minima(blocks[:, 4:16])
    numbers = nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32).float()
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scale[:, :, None] * numbers).sub_(minimum[:, :, None]).flatten(1)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = scales_and_minima(blocks[:, 4:16])
    high = fields(blocks[:, 16:48], 1)
    low = nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    numbers = (low | (high << 4)).float()
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scale[:, :, None] * numbers).sub_(minimum[:, :, None]).flatten(1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    high = fields(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    numbers = ((low | (high << 4)).to(torch.int8) - 32).reshape(-1, 16, 16).float()
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scale[:, :, None] * numbers).flatten(1)


_FLOATS = {GgmlType.F32: torch.float32, GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}

_DECODERS: dict[GgmlType, Callable[[torch.Tensor], torch.Tensor]] = {
    GgmlType.Q4_0: _q4_0,
    GgmlType.Q4_1: _q4_1,
    GgmlType.Q5_0: _q5_0,
    GgmlType.Q5_1: _q5_1,
    GgmlType.Q8_0: _q8_0,
    GgmlType.Q2_K: _q2_k,
    GgmlType.Q3_K: _q3_k,
    GgmlType.Q4_K: _q4_k,
    GgmlType.Q5_K: _q5_k,
    GgmlType.Q6_K: _q6_k,
}
