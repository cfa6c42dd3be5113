"""How the KV pool holds keys and values: the one layout that every implementation writes and reads.

A pool is `[N, Hkv, B, W]`: W is the head size D, or D + 4 for int8, where a block of a head is B · D codes and then B
float32 scales, and an element is code · scale of its position. Elements of a block lie as dot products read them:

    keys    [B/16][D/n][16][n]    n dimensions of a position side by side, 16 positions one after another
    values  [B/n][D][n]           n positions of a dimension side by side

n is 2, and 1 in float32. Where B is no multiple of 16, or D odd, runs are shorter and n is 1: only the
reference reads that.

A position is rounded when it is written, each head by itself: scale = max|x| / 127, code = x · (127 / max|x|) to the
nearest integer. A row with an infinity or a NaN gets an infinite scale and codes 0, so that it reads as NaN.
"""

import math

import torch

RUN_POSITIONS = 16
SCALE_BYTES = 4
LARGEST_CODE = 127


def pool_width(head_size: int, dtype: torch.dtype) -> int:
    """W: elements of the pool per position and head."""
    return head_size + SCALE_BYTES if dtype == torch.int8 else head_size


def bytes_per_position(head_size: int, dtype: torch.dtype) -> int:
    """Memory of one position's key, or value, of one head."""
    return pool_width(head_size, dtype) * dtype.itemsize


def write_keys(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Store keys `[T, Hkv, D]` at slots `[T]` (block · B + offset), rounded where the pool is int8."""
    block, offset = slots // pool.shape[2], slots % pool.shape[2]
    elements = _encode(pool, block, offset, rows)
    units = _key_units(pool, rows.shape[2])
    run = units.shape[4]
    units[block, :, offset // run, :, offset % run] = elements.reshape(*rows.shape[:2], -1, units.shape[5])


def write_values(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Store values `[T, Hkv, D]` at slots `[T]`, as `write_keys`."""
    block, offset = slots // pool.shape[2], slots % pool.shape[2]
    elements = _encode(pool, block, offset, rows)
    units = _value_units(pool, rows.shape[2])
    per_unit = units.shape[4]
    units[block, :, offset // per_unit, :, offset % per_unit] = elements


def read_keys(pool: torch.Tensor, blocks: torch.Tensor, head_size: int) -> torch.Tensor:
    """Keys `[…, Hkv, B, D]` float32 of blocks `[…]`."""
    units = _key_units(pool, head_size)[blocks]
    return _decode(pool, blocks, units.transpose(-2, -3).flatten(-2).flatten(-3, -2), head_size)


def read_values(pool: torch.Tensor, blocks: torch.Tensor, head_size: int) -> torch.Tensor:
    """Values `[…, Hkv, B, D]` float32 of blocks `[…]`."""
    units = _value_units(pool, head_size)[blocks]
    return _decode(pool, blocks, units.transpose(-1, -2).flatten(-3, -2), head_size)


def _per_unit(pool: torch.Tensor, size: int) -> int:
    """n, for dimensions or positions of which there are `size`."""
    return 1 if pool.dtype.itemsize == 4 else math.gcd(2, size)


def _elements(pool: torch.Tensor, head_size: int) -> torch.Tensor:
    """[N, Hkv, B · D] without scales; a view."""
    return pool.flatten(2)[:, :, : pool.shape[2] * head_size]


def _scales(pool: torch.Tensor, head_size: int) -> torch.Tensor:
    """[N, Hkv, B] float32; a view."""
    return pool.flatten(2)[:, :, pool.shape[2] * head_size :].view(torch.float32)


def _key_units(pool: torch.Tensor, head_size: int) -> torch.Tensor:
    """[N, Hkv, B/16, D/n, 16, n]; a view."""
    run, per_unit = math.gcd(RUN_POSITIONS, pool.shape[2]), _per_unit(pool, head_size)
    return _elements(pool, head_size).view(*pool.shape[:2], pool.shape[2] // run, head_size // per_unit, run, per_unit)


def _value_units(pool: torch.Tensor, head_size: int) -> torch.Tensor:
    """[N, Hkv, B/n, D, n]; a view."""
    per_unit = _per_unit(pool, pool.shape[2])
    return _elements(pool, head_size).view(*pool.shape[:2], pool.shape[2] // per_unit, head_size, per_unit)


def _encode(pool: torch.Tensor, block: torch.Tensor, offset: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows in the pool's dtype; in int8 their scales are stored."""
    if pool.dtype != torch.int8:
        return rows.to(pool.dtype)
    x = rows.float()
    widest = x.abs().amax(dim=-1)
    is_finite = torch.isfinite(widest)
    # A number divided by a tensor is, in torch, its product with the reciprocal: another rounding.
    quotient = torch.full_like(widest, LARGEST_CODE) / widest
    inverse = torch.where(is_finite & (widest > 0), quotient, torch.zeros_like(widest))
    codes = torch.where(is_finite[..., None], torch.round(x * inverse[..., None]), torch.zeros_like(x))
    scales = torch.where(is_finite, widest / LARGEST_CODE, torch.full_like(widest, torch.inf))
    _scales(pool, rows.shape[2])[block, :, offset] = scales
    return codes.to(torch.int8)


def _decode(pool: torch.Tensor, blocks: torch.Tensor, elements: torch.Tensor, head_size: int) -> torch.Tensor:
    if pool.dtype != torch.int8:
        return elements.float()
    return elements.float() * _scales(pool, head_size)[blocks][..., None]
