"""Norms, rotary embedding and gated activations: row by row, near the exact result."""

import math

import pytest
import torch

from weft.errors import InvariantBroken
from weft.kernels import kv_layout, ops, registry

pytestmark = pytest.mark.numerics

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((0, 8), (1, 1), (3, 5), (2, 33), (5, 100), (64, 576), (1, 2048))


def assert_within(operation: str, y: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    bound = ops.TOLERANCES[operation].bound(exact, magnitude, y.dtype)
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all()), f"worst error {float((error / bound).max())} of what is allowed"


def exact_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    x64 = x.double()
    return x64 / (x64.square().mean(dim=-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm_is_near_the_exact_result(
    kernel_set: str, dtype: torch.dtype, offset: float, rows: int, width: int
) -> None:
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)

    y = ops.rms_norm(x, weight, 1e-5, offset)

    exact = exact_norm(x, weight, 1e-5, offset)
    assert_within("rms_norm", y, exact, exact.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_rms_norm_rounds_the_sum_before_it_normalizes(
    kernel_set: str, dtype: torch.dtype, rows: int, width: int
) -> None:
    x, residual, weight = torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    x, residual, weight = x.to(dtype), residual.to(dtype), weight.to(dtype)

    y, total = ops.add_rms_norm(x, residual, weight, 1e-6)

    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    exact = exact_norm(total, weight, 1e-6, 0.0)
    assert_within("rms_norm", y, exact, exact.abs())


def test_heads_are_normalized_one_by_one_inside_a_wider_tensor(kernel_set: str) -> None:
    """Queries of a fused projection, as models with a norm per head have them."""
    fused = torch.randn(5, 8 * 16)
    heads = fused[:, : 4 * 16].view(5, 4, 16)
    weight = torch.randn(16)

    y = ops.rms_norm(heads, weight, 1e-6)

    exact = exact_norm(heads, weight, 1e-6, 0.0)
    assert y.shape == (5, 4, 16)
    assert_within("rms_norm", y, exact, exact.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_gated_activation_is_near_the_exact_result(
    kernel_set: str, dtype: torch.dtype, kind: str, rows: int, width: int
) -> None:
    x = (4 * torch.randn(rows, 2 * width)).to(dtype)

    y = ops.gated_activation(x, kind)

    gate, up = x.double().chunk(2, dim=-1)
    if kind == "silu":
        activated = gate * torch.sigmoid(gate)
    else:
        activated = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    # Far left the result is a difference of nearly equal numbers: its magnitude is that of the gate.
    assert_within("gated_activation", y, activated * up, (gate * up).abs())


@pytest.mark.parametrize("kind", ops.ACTIVATIONS)
def test_activations_of_extreme_gates_are_their_limits(kernel_set: str, kind: str) -> None:
    gates = [-1e30, -1e4, -200.0, 0.0, 200.0, 1e4, math.inf]
    x = torch.tensor([[gate, 1.0] for gate in gates])

    y = ops.gated_activation(x, kind)

    assert y[:, 0].tolist() == [0.0, 0.0, 0.0, 0.0, 200.0, 1e4, math.inf]
    assert math.isnan(ops.gated_activation(torch.tensor([[math.nan, 1.0]]), kind).item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "rotary_size"), [(80, 80), (80, 40), (80, 34), (80, 2), (100, 100), (50, 26)])
def test_rotary_turns_queries_and_stores_turned_keys_and_plain_values(
    kernel_set: str, dtype: torch.dtype, head_size: int, rotary_size: int
) -> None:
    tokens, query_heads, kv_heads, blocks, block_size = 7, 4, 2, 5, 16
    fused = torch.randn(tokens, (query_heads + 2 * kv_heads) * head_size).to(dtype)
    sizes = [query_heads * head_size, kv_heads * head_size, kv_heads * head_size]
    q, k, v = (part.view(tokens, -1, head_size) for part in fused.split(sizes, dim=1))
    angles = torch.rand(50, rotary_size // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    slots = torch.tensor([0, 5, 79, 33, -1, 12, 13], dtype=torch.int32)
    keys, values = (torch.zeros(blocks, kv_heads, block_size, head_size).to(dtype) for _ in range(2))
    q_before, k_before, v_before = q.clone(), k.clone(), v.clone()

    ops.rotary_and_store(q, k, v, cos_sin, positions, slots, keys, values)

    def turned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = rotary_size // 2
        cos, sin = cos_sin[positions.long()][:, None].double().split(half, dim=-1)
        first, second, rest = x.double().split([half, half, head_size - 2 * half], dim=-1)
        exact = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
        magnitude = torch.cat([first.abs() + second.abs()] * 2 + [rest.abs()], dim=-1)
        return exact, magnitude

    assert_within("rotary_and_store", q, *turned(q_before))
    exact_k, magnitude_k = turned(k_before)
    written = slots >= 0
    block, offset = slots[written].long() // block_size, slots[written].long() % block_size
    all_blocks = torch.arange(blocks)
    stored_k = kv_layout.read_keys(keys, all_blocks, head_size).to(dtype)
    stored_v = kv_layout.read_values(values, all_blocks, head_size).to(dtype)
    assert_within("rotary_and_store", stored_k[block, :, offset], exact_k[written], magnitude_k[written])
    assert torch.equal(stored_v[block, :, offset], v_before[written])
    assert torch.equal(k, k_before)
    untouched = torch.ones(blocks, block_size, dtype=torch.bool)
    untouched[block, offset] = False
    assert not stored_k.transpose(1, 2)[untouched].any()
    assert not stored_v.transpose(1, 2)[untouched].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 32), (8, 16), (72, 48), (256, 16)])
def test_codes_and_scales_are_those_of_the_reference(
    compiled: str, dtype: torch.dtype, head_size: int, block_size: int
) -> None:
    """Rounding is defined to the bit: a pool may be written by one kernel set and read by another."""
    tokens, kv_heads, blocks = 40, 3, 6
    q, k, v = (torch.randn(tokens, heads, head_size).to(dtype) for heads in (6, kv_heads, kv_heads))
    k[3, 1], v[5, 0, 2], k[7, 2, 3] = 0.0, torch.nan, torch.inf
    angles = torch.rand(50, head_size // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(0, 50, (tokens,), dtype=torch.int32)
    slots = torch.randperm(blocks * block_size)[:tokens].int()
    pools = []
    for kernels in (compiled, "reference"):
        pool = [torch.zeros(blocks, kv_heads, block_size, head_size + 4, dtype=torch.int8) for _ in range(2)]
        with registry.force(kernels):
            ops.rotary_and_store(q.clone(), k, v, cos_sin, positions, slots, *pool)
        pools.append(pool)

    for got, wanted in zip(*pools, strict=True):
        assert torch.equal(got, wanted)
    stored = kv_layout.read_values(pools[0][1], torch.arange(blocks), head_size)
    block, offset = slots.long() // block_size, slots.long() % block_size
    widest = v.float().abs().amax(dim=-1, keepdim=True)
    error = (stored[block, :, offset] - v.float()).abs()
    assert (error[6:] <= widest[6:] * (0.5 / 127 + 1e-6)).all()
    assert stored[block[5], 0, offset[5]].isnan().all()


@pytest.mark.parametrize(("position", "slot"), [(50, 0), (-1, 0), (0, 80)])
def test_positions_and_slots_out_of_range_are_refused(compiled: str, position: int, slot: int) -> None:
    heads = torch.zeros(2, 1, 8)
    pool = torch.zeros(5, 1, 16, 8)

    with pytest.raises(InvariantBroken, match="row 1: position"):
        ops.rotary_and_store(
            heads,
            heads.clone(),
            heads.clone(),
            torch.zeros(50, 8),
            torch.tensor([0, position], dtype=torch.int32),
            torch.tensor([0, slot], dtype=torch.int32),
            pool,
            pool.clone(),
        )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`weight` must be \[8\]"):
        ops.rms_norm(torch.zeros(2, 8), torch.zeros(9), 1e-5)
    with pytest.raises(ValueError, match=r"`residual` must match x"):
        ops.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match=r"`kind` must be one of silu, gelu_tanh\. Given: relu"):
        ops.gated_activation(torch.zeros(2, 8), "relu")
    with pytest.raises(ValueError, match=r"`x` must be contiguous in the last dimension"):
        ops.gated_activation(torch.zeros(8, 2).T, "silu")
