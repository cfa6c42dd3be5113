"""The pool's layout and the memory it takes."""

from pathlib import Path

import pytest
import torch

from weft.errors import InvariantBroken
from weft.runner.kv_pool import KvPool


def new_pool(num_blocks: int = 5, dtype: torch.dtype = torch.float32) -> KvPool:
    return KvPool(
        num_layers=3,
        num_blocks=num_blocks,
        num_kv_heads=2,
        block_size_tokens=8,
        head_dim=16,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_sees_its_own_keys_and_values(dtype: torch.dtype) -> None:
    pool = new_pool(dtype=dtype)
    for number, layer in enumerate(pool.layers):
        layer.keys.fill_(number + 1)
        layer.values.fill_(-number - 1)

    for number, layer in enumerate(pool.layers):
        assert layer.keys.shape == layer.values.shape == (5, 2, 8, 16)
        assert layer.keys.is_contiguous()
        assert (layer.keys == number + 1).all()
        assert (layer.values == -number - 1).all()
    assert pool.bytes == 3 * 2 * 5 * 2 * 8 * 16 * dtype.itemsize


def test_a_pool_of_codes_has_room_for_a_scale_beside_each_row() -> None:
    pool = new_pool(dtype=torch.int8)

    assert pool.layers[0].keys.shape == (5, 2, 8, 16 + 4)
    assert pool.bytes == 3 * 2 * 5 * 2 * 8 * (16 + 4)


def test_an_untouched_pool_reads_as_zeros() -> None:
    assert not any(layer.keys.any() or layer.values.any() for layer in new_pool().layers)


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_memory_is_taken_when_blocks_are_written() -> None:
    before = resident_bytes()
    pool = new_pool(num_blocks=400_000)
    assert pool.bytes > 2 * 1024**3

    for layer in pool.layers:
        layer.keys[:10] = 1.0

    assert resident_bytes() - before < 64 * 1024**2


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(InvariantBroken):
        new_pool(num_blocks=0)
