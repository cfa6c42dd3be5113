"""Packed linear layers: near the exact result, and one fixed sum per element."""

import pytest
import torch

from weft.errors import InvariantBroken
from weft.kernels import ops, registry
from weft.kernels.packed import PackedLinear

pytestmark = pytest.mark.numerics

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((1, 1), (31, 33), (32, 2), (65, 127), (100, 576), (257, 64))
ROWS = (0, 1, 2, 3, 5, 11, 12, 13, 25, 64)


def make(
    out_features: int, in_features: int, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias, x, residual."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    sizes = ((out_features, in_features), (out_features,), (rows, in_features), (rows, out_features))
    weight, bias, x, residual = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return weight, bias, x, residual


def assert_near_exact(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *terms: torch.Tensor) -> None:
    exact = x.double() @ weight.double().T + sum(term.double() for term in terms)
    magnitude = x.double().abs() @ weight.double().abs().T + sum(term.double().abs() for term in terms)
    bound = ops.TOLERANCES["linear"].bound(exact, magnitude, y.dtype)
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_linear_is_near_the_exact_result(
    kernel_set: str, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    for rows in ROWS:
        weight, bias, x, residual = make(out_features, in_features, rows, dtype)
        packed = ops.pack_linear(weight, bias)

        assert_near_exact(ops.linear(x, packed), x, weight, bias)
        assert_near_exact(ops.linear(x, packed, torch.float32), x, weight, bias)
        assert_near_exact(ops.linear(x, ops.pack_linear(weight)), x, weight)
        assert ops.linear(x, packed).dtype == dtype
        if kernel_set != "reference":
            assert_near_exact(ops.linear(x, packed, residual=residual), x, weight, bias, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_row_has_the_same_bits_in_any_batch(
    compiled: str, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    weight, bias, x, _ = make(out_features, in_features, 64, dtype)
    packed = ops.pack_linear(weight, bias)
    alone = torch.cat([ops.linear(row[None], packed) for row in x])

    for rows in (*range(2, 26), 37, 64):
        assert torch.equal(ops.linear(x[:rows], packed), alone[:rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(compiled: str, dtype: torch.dtype) -> None:
    weight, bias, x, _ = make(3000, 128, 200, dtype)
    packed = ops.pack_linear(weight, bias)
    results = []
    for threads in (1, 2, 5):
        registry.set_threads(threads)
        results.append(ops.linear(x, packed))

    assert all(torch.equal(result, results[0]) for result in results)


def test_a_float32_row_has_the_same_bits_with_any_instruction_set() -> None:
    """They all add the same products in the same order, rounding once per step."""
    weight, _, x, _ = make(65, 127, 3, torch.float32)
    results = []
    for name in registry.kernel_sets():
        if name != "reference":
            with registry.force(name):
                results.append(ops.linear(x, ops.pack_linear(weight)))

    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_memory_replaces_the_weight(compiled: str, dtype: torch.dtype) -> None:
    weight, bias, _, _ = make(96, 64, 1, dtype)

    packed = ops.pack_linear(weight, bias)

    assert packed.layout == "panels"
    assert packed.data.nbytes == weight.nbytes
    assert packed.num_bytes == weight.nbytes + 4 * 96


def test_a_weight_may_be_a_slice_of_a_wider_one(compiled: str) -> None:
    """A rank's columns of a row-parallel layer."""
    wide = torch.randn(40, 96)
    x = torch.randn(3, 32)

    assert torch.equal(
        ops.linear(x, ops.pack_linear(wide[:, 32:64])), ops.linear(x, ops.pack_linear(wide[:, 32:64].contiguous()))
    )


def test_rows_of_x_may_be_apart(compiled: str) -> None:
    weight, _, _, _ = make(33, 32, 1, torch.bfloat16)
    wide = torch.randn(5, 96).bfloat16()
    packed = ops.pack_linear(weight)

    assert torch.equal(ops.linear(wide[:, 32:64], packed), ops.linear(wide[:, 32:64].contiguous(), packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_embedding_gives_back_the_rows_of_the_weight(
    kernel_set: str, dtype: torch.dtype, out_features: int, in_features: int
) -> None:
    weight, _, _, _ = make(out_features, in_features, 1, dtype)
    packed = ops.pack_linear(weight)
    for id_dtype in (torch.int32, torch.int64):
        ids = torch.randint(0, out_features, (19,), dtype=id_dtype)
        assert torch.equal(ops.embedding(ids, packed), weight[ids.long()])


@pytest.mark.parametrize("bad", [-1, 65])
def test_an_id_outside_the_vocabulary_is_refused(compiled: str, bad: int) -> None:
    packed = ops.pack_linear(torch.randn(65, 8))

    with pytest.raises(InvariantBroken, match=f"token id {bad} at row 1"):
        ops.embedding(torch.tensor([0, bad]), packed)


def test_wrong_shapes_and_dtypes_are_named() -> None:
    packed = ops.pack_linear(torch.randn(4, 8))

    with pytest.raises(ValueError, match=r"`x` must be \[T, 8\]"):
        ops.linear(torch.randn(2, 9), packed)
    with pytest.raises(ValueError, match=r"`x` must have the weight's dtype torch.float32"):
        ops.linear(torch.randn(2, 8).bfloat16(), packed)
    with pytest.raises(ValueError, match=r"`residual` must be \[2, 4\]"):
        ops.linear(torch.randn(2, 8), packed, residual=torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"`weight` must be \[O, I\] with contiguous rows"):
        ops.pack_linear(torch.randn(4, 8).T)


def test_onednn_is_near_the_exact_result_without_compiled_kernels(without_compiled_kernels: str) -> None:
    from weft.kernels import onednn

    if not onednn.is_available():
        pytest.skip("this torch or CPU has no packed bfloat16 linear")
    weight, bias, x, residual = make(100, 577, 5, torch.bfloat16)

    packed: PackedLinear = ops.pack_linear(weight, bias)

    assert packed.layout == "onednn"
    assert packed.num_bytes == weight.nbytes + bias.nbytes
    assert_near_exact(ops.linear(x, packed), x, weight, bias)
    exact = x.double() @ weight.double().T + bias.double() + residual.double()
    assert (ops.linear(x, packed, residual=residual).double() - exact).abs().max() < 0.02 * exact.abs().max()
