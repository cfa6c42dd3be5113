"""Weights of few bits: the compiled kernels give the bits of the reference, and the reference is near the truth."""

from collections.abc import Iterator

import pytest
import torch

from weft.errors import InvariantBroken
from weft.kernels import ops, quantized, registry
from weft.kernels.cpu import library as cpu_library
from weft.kernels.cpu import quantized as cpu_quantized
from weft.kernels.packed import PackedLinear, QuantizedFormat

pytestmark = pytest.mark.numerics

DTYPES = (torch.float32, torch.bfloat16)
FROM_WEIGHTS = {
    "8 bits per output, groups of 64": QuantizedFormat(bits=8, group_size=64, zero_point=128, is_per_output=True),
    "8 bits per output, groups of 16": QuantizedFormat(bits=8, group_size=16, zero_point=128, is_per_output=True),
    "4 bits, groups of 32": QuantizedFormat(bits=4, group_size=32, has_minimum=True),
    "4 bits, groups of 64": QuantizedFormat(bits=4, group_size=64, has_minimum=True),
    "4 bits, groups of 128": QuantizedFormat(bits=4, group_size=128, has_minimum=True),
    "6 bits, groups of 64": QuantizedFormat(bits=6, group_size=64, has_minimum=True),
}
FROM_CODES = {
    "Q8_0": QuantizedFormat(bits=8, group_size=32, zero_point=128),
    "Q4_0": QuantizedFormat(bits=4, group_size=32, zero_point=8),
    "Q4_1": QuantizedFormat(bits=4, group_size=32, has_minimum=True),
    "Q6_K": QuantizedFormat(bits=6, group_size=16, zero_point=32),
    "Q5_K": QuantizedFormat(bits=6, group_size=32, has_minimum=True),
}
FORMATS = FROM_WEIGHTS | FROM_CODES
# (outputs, inputs): below a panel, a step and a group; no multiple of any of them; SmolLM2's hidden size.
SHAPES = ((1, 1), (31, 33), (33, 64), (70, 200), (96, 576))
ROWS = (0, 1, 2, 3, 5, 7, 8, 9, 13, 64)


@pytest.fixture(params=cpu_quantized.KERNEL_SETS)
def quantized_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every table of kernels that this machine can run."""
    library = cpu_library.load().library
    if library is None or not library.weft_select_quantized(request.param.encode()):
        pytest.skip(f"this machine cannot run {request.param}")
    yield request.param
    library.weft_select_quantized(None)


def make(name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[PackedLinear, PackedLinear]:
    """The same weight in the layout of the compiled kernels and in that of the reference."""
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    if name in FROM_WEIGHTS:
        weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
        arguments = (weight, form, bias, 0, in_features)
        return cpu_quantized.quantize_linear(*arguments), quantized.quantize_linear(*arguments)
    codes = torch.randint(0, form.highest + 1, (out_features, in_features), generator=generator, dtype=torch.uint8)
    groups = -(-in_features // form.group_size)
    scales, minima = torch.randn(2, out_features, groups, generator=generator).half()
    parts = (codes, scales, minima if form.has_minimum else None, form, dtype, bias)
    return cpu_quantized.pack_codes(*parts), quantized.pack_codes(*parts)


def rows_of(num_rows: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different sizes, as activations are."""
    generator = torch.Generator().manual_seed(num_rows)
    sizes = 10.0 ** torch.randint(-3, 3, (num_rows, 1), generator=generator)
    return (torch.randn(num_rows, in_features, generator=generator) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_compiled_kernels_give_the_bits_of_the_reference(quantized_kernels: str, name: str, dtype: torch.dtype) -> None:
    for out_features, in_features in SHAPES:
        packed, expected = make(name, out_features, in_features, dtype)
        ids = torch.arange(out_features)

        assert torch.equal(ops.embedding(ids, packed, 2.5), ops.embedding(ids, expected, 2.5))
        for num_rows in ROWS:
            x = rows_of(num_rows, in_features, dtype)
            residual = rows_of(num_rows, out_features, dtype)

            assert torch.equal(ops.linear(x, packed), ops.linear(x, expected)), f"{num_rows} rows"
            y, z = (ops.linear(x, weight, torch.float32, residual) for weight in (packed, expected))
            assert torch.equal(y, z), f"{num_rows} rows with residual"


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(quantized_kernels: str, name: str) -> None:
    packed, _ = make(name, 1000, 200, torch.bfloat16)
    x = rows_of(230, 200, torch.bfloat16)
    alone = torch.cat([ops.linear(row[None], packed, torch.float32) for row in x])

    for threads in (1, 2, 5):
        registry.set_threads(threads)
        for num_rows in (2, 3, 6, 9, 17, 64, 230):
            assert torch.equal(ops.linear(x[:num_rows], packed, torch.float32), alone[:num_rows])


@pytest.mark.parametrize("name", FORMATS)
def test_the_error_is_that_of_rounding_activations(name: str) -> None:
    """A rounded activation is off by at most half a step, largest / 254, of its group, and meets its weight."""
    form = FORMATS[name]
    packed, _ = make(name, 70, 200, torch.float32)
    x = rows_of(9, 200, torch.float32)
    weight = ops.embedding(torch.arange(70), packed).double()

    y = ops.linear(x, packed)

    exact = x.double() @ weight.T + packed.bias.double()
    groups = torch.nn.functional.pad(x.double().abs(), (0, -200 % form.group_size)).view(9, -1, form.group_size)
    half_step = (groups.amax(dim=2, keepdim=True) / 254.0).expand_as(groups).flatten(1)[:, :200]
    # On top of that float32: scales, products and sums are rounded a few times each.
    magnitude = x.double().abs() @ weight.abs().T + packed.bias.double().abs()
    zero_point = form.zero_point if not form.has_minimum else form.highest
    in_codes = half_step.sum(dim=1, keepdim=True) * weight.abs().amax() * zero_point
    bound = half_step @ weight.abs().T + 2.0**-20 * (magnitude + in_codes)
    assert bool(((y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", FROM_WEIGHTS)
def test_a_weight_is_off_by_at_most_half_a_step(name: str) -> None:
    form = FORMATS[name]
    weight = torch.randn(70, 384)

    packed = ops.quantize_linear(weight, form)

    groups = weight.view(70, -1, 384 if form.is_per_output else form.group_size)
    if form.is_per_output:
        step = groups.abs().amax(dim=2, keepdim=True) / 127.0
    else:
        step = (groups.amax(dim=2, keepdim=True) - groups.amin(dim=2, keepdim=True)) / form.highest
    error = (ops.embedding(torch.arange(70), packed) - weight).abs().view(groups.shape)
    # Scale and minimum are float16: off by 2⁻¹¹ of themselves, the scale as often as the code says.
    rounding = 2.0**-11 * (form.highest * step + groups.abs().amax(dim=2, keepdim=True)) * (not form.is_per_output)
    assert bool((error <= 0.5001 * step + rounding).all())


def test_a_slice_of_columns_is_the_slice_of_the_whole() -> None:
    """Ranks hold columns of one matrix, not matrices of their own scale."""
    weight = torch.randn(40, 192)
    for name in ("8 bits per output, groups of 64", "4 bits, groups of 32"):
        form = FORMATS[name]
        whole = ops.embedding(torch.arange(40), ops.quantize_linear(weight, form))

        part = ops.quantize_linear(weight, form, first_column=64, in_features=128)

        assert torch.equal(ops.embedding(torch.arange(40), part), whole[:, 64:])


def test_a_row_that_is_not_finite_gives_nothing_but_nan() -> None:
    """So that the request it belongs to fails, and no other."""
    for pack in (cpu_quantized.quantize_linear, quantized.quantize_linear):
        packed = pack(torch.randn(40, 64), FORMATS["8 bits per output, groups of 64"], None, 0, 64)
        x = torch.randn(4, 64)
        x[1, 3], x[2, 5] = float("nan"), float("-inf")

        is_nan = ops.linear(x, packed).isnan()

        assert is_nan.all(dim=1).tolist() == is_nan.any(dim=1).tolist() == [False, True, True, False]


def test_rows_of_zeros_and_of_tiny_numbers_are_zero() -> None:
    for pack in (cpu_quantized.quantize_linear, quantized.quantize_linear):
        packed = pack(torch.randn(40, 64), FORMATS["4 bits, groups of 32"], None, 0, 64)
        x = torch.stack((torch.zeros(64), torch.full((64,), 1e-38)))

        assert torch.equal(ops.linear(x, packed), torch.zeros(2, 40))


def test_a_token_outside_of_the_vocabulary_is_refused() -> None:
    packed, _ = make("Q8_0", 31, 33, torch.float32)

    with pytest.raises(InvariantBroken, match="token id 31 at row 1"):
        ops.embedding(torch.tensor([30, 31]), packed)


def test_formats_without_kernels_are_refused() -> None:
    for fields in ({"bits": 5, "group_size": 32}, {"bits": 4, "group_size": 24}, {"bits": 4, "group_size": 0}):
        with pytest.raises(ValueError, match="no kernels"):
            QuantizedFormat(**fields)
    with pytest.raises(ValueError, match="form"):
        ops.quantize_linear(torch.zeros(1, 32), QuantizedFormat(bits=4, group_size=32, zero_point=8))


def test_a_quantized_weight_takes_the_memory_of_its_bits() -> None:
    """32 outputs, all groups whole: nothing is padded."""
    weight = torch.randn(64, 512)
    bits = {"8 bits per output, groups of 64": 8 + 32 / 512, "4 bits, groups of 32": 5, "6 bits, groups of 64": 6.5}
    for name, per_weight in bits.items():
        packed = cpu_quantized.quantize_linear(weight, FORMATS[name], None, 0, 512)

        assert packed.num_bytes == 64 + 64 * 512 * per_weight / 8
