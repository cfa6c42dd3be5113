"""Schemes on whole models: what ranks hold, how near the rounded model is, and that no bit depends on the batch."""

from pathlib import Path

import gguf
import pytest
import torch
from tests.numerics.gguf_files import K_TYPES, QUANTIZABLE, random_blocks
from tests.numerics.paged_driver import PagedDriver
from tests.suites.quant_scheme import QuantSchemeSuite

from weft.kernels.quantized import dequantize
from weft.models.decoder import Decoder, load_decoder
from weft.models.quant.gguf_codes import stack, unpack
from weft.models.quant.gguf_packed import GgufPacked
from weft.models.quant.rounded import int4, int8, rounded_scheme
from weft.models.quant.scheme import QuantScheme, Unquantized
from weft.models.registry import describe
from weft.models.weights.gguf_file import GgmlType
from weft.parallel.groups import SoloGroup

pytestmark = [pytest.mark.numerics]


class TestUnquantized(QuantSchemeSuite):
    scheme = Unquantized()
    max_error = 0.0


class TestInt8(QuantSchemeSuite):
    scheme = int8()
    max_error = 0.501 / 127


class TestInt4(QuantSchemeSuite):
    scheme = int4()
    max_error = 0.51 * 2 / 15


class TestInt4InGroupsOf64(QuantSchemeSuite):
    scheme = int4(64)
    max_error = 0.51 * 2 / 15


class TestGgufPackedOfFloats(QuantSchemeSuite):
    """What the file stores as floats stays as it is."""

    scheme = GgufPacked("Q4_1 (packed)")
    max_error = 0.0


@pytest.mark.parametrize("kind", [*QUANTIZABLE, *K_TYPES])
def test_codes_stand_for_the_numbers_that_the_file_means(kind: str) -> None:
    """Exactly, where a block holds its scales as float16; else each scale and minimum is rounded to that once."""
    raw = random_blocks(kind, 8, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).copy())

    codes = unpack(torch.from_numpy(raw), GgmlType[kind])

    error = (dequantize(codes.codes, codes.scales, codes.minima, codes.form) - expected).abs()
    # scale · code and minimum are each off by 2⁻¹¹ of themselves, at most the range of the group.
    groups = expected.view(8, -1, codes.form.group_size)
    span = groups.amax(dim=2) - groups.amin(dim=2) + groups.abs().amax(dim=2)
    bound = 0.0 if kind in QUANTIZABLE else 2.0**-10 * span.repeat_interleave(codes.form.group_size, dim=1)
    assert bool((error <= bound).all())


@pytest.mark.parametrize("kinds", [("Q4_K", "Q6_K"), ("Q4_0", "Q5_0"), ("Q4_1", "Q2_K"), ("Q8_0", "Q8_0")])
def test_stacked_matrices_of_different_types_lose_nothing(kinds: tuple[str, str]) -> None:
    parts = [unpack(torch.from_numpy(random_blocks(kind, 8, 512, scale=0.1)), GgmlType[kind]) for kind in kinds]

    stacked = stack(parts)

    assert stacked is not None
    expected = torch.cat([dequantize(part.codes, part.scales, part.minima, part.form) for part in parts])
    values = dequantize(stacked.codes, stacked.scales, stacked.minima, stacked.form)
    # -zero_point · scale + scale · code is added up in another order.
    assert torch.allclose(values, expected, rtol=0.0, atol=1e-6 * float(expected.abs().amax()))


def test_types_without_a_common_format_are_not_stacked() -> None:
    parts = [unpack(torch.from_numpy(random_blocks(kind, 2, 512)), GgmlType[kind]) for kind in ("Q8_0", "Q4_1")]

    assert stack(parts) is None


def test_a_method_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 or int4"):
        rounded_scheme("awq", 32)


def load(path: Path, scheme: QuantScheme) -> Decoder:
    description = describe(path)
    return load_decoder(
        path, description, dtype=torch.bfloat16, device=torch.device("cpu"), group=SoloGroup(), scheme=scheme
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [int8(), int4(), GgufPacked("Q4_1 (packed)")], ids=lambda scheme: scheme.name)
def test_the_default_model_says_paris_and_keeps_its_bits_in_any_chunking(
    default_model_gguf: Path, scheme: QuantScheme
) -> None:
    decoder = load(default_model_gguf, scheme)
    token_ids = [504, 3575, 282, 4649, 314]  # The capital of France is
    results = []
    for chunks in ([5], [1, 1, 1, 1, 1], [2, 3]):
        driver = PagedDriver([decoder], block_size=32, num_blocks=2, dtype=torch.bfloat16)
        sequence = driver.start(token_ids)
        results.append(torch.cat([driver.step([(sequence, chunk)])[0] for chunk in chunks]))

    assert all(torch.equal(result, results[0]) for result in results)
    assert int(results[0][-1].argmax()) == 7042  # " Paris"
    assert decoder.weights_bytes < 0.6 * load(default_model_gguf, Unquantized()).weights_bytes
