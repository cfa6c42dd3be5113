"""Schemes on whole models: what ranks hold, how near the rounded model is, and that no bit depends on the batch."""

from pathlib import Path

import pytest
import torch
from tests.numerics.paged_driver import PagedDriver
from tests.suites.quant_scheme import QuantSchemeSuite

from weft.models.decoder import Decoder, load_decoder
from weft.models.quant.rounded import int4, int8, rounded_scheme
from weft.models.quant.scheme import QuantScheme, Unquantized
from weft.models.registry import describe
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


def test_a_method_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="int8 or int4"):
        rounded_scheme("awq", 32)


def load(path: Path, scheme: QuantScheme) -> Decoder:
    description = describe(path)
    return load_decoder(
        path, description, dtype=torch.bfloat16, device=torch.device("cpu"), group=SoloGroup(), scheme=scheme
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [int8(), int4()], ids=lambda scheme: scheme.name)
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
