"""Real servers whose weights are rounded while they are loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import RunningServer, serving

pytestmark = pytest.mark.e2e

METHODS = {
    ("--quantize", "int8"): "int8",
    ("--quantize", "int4"): "int4 (groups of 32)",
    ("--gguf-compute", "packed"): "Q4_1 (packed)",
}


@pytest.fixture(scope="module", params=METHODS, ids=lambda flags: flags[1])
def quantized(request: pytest.FixtureRequest, default_model_gguf: Path) -> Iterator[tuple[RunningServer, str]]:
    """A server of each method, and what it must call itself."""
    with serving(default_model_gguf, *request.param) as server:
        yield server, METHODS[request.param]


def test_a_quantized_model_knows_the_capital_of_france(quantized: tuple[RunningServer, str]) -> None:
    server, _ = quantized

    answer = server.generate("The capital of France is", max_new_tokens=4)

    assert "Paris" in answer["generated_text"]


def test_info_names_the_quantization_and_the_smaller_memory(quantized: tuple[RunningServer, str]) -> None:
    server, name = quantized

    info = server.http.get("/info").json()

    assert info["quantization"] == name
    assert info["weights_bytes"] < 150_000_000
