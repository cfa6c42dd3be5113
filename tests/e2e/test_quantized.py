"""Real servers whose weights are rounded while they are loaded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import RunningServer, ServerFailed, serving

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


def test_info_says_what_the_few_bits_cost_and_no_start_waited_for_it(quantized: tuple[RunningServer, str]) -> None:
    """The package brings the receipts of the default model, whatever its file is called here."""
    server, _ = quantized

    info = server.http.get("/info").json()

    assert info["quality"]["reference"] == "bfloat16"
    assert 0.9 < info["quality"]["top1_agreement"] < 1.0
    assert 0.0 < info["quality"]["kl_nats"] < 0.05
    assert info["quality"]["num_tokens"] >= 2_000
    assert "quality" not in info["startup_seconds"]


def test_keys_and_values_of_8_bits_hold_nearly_twice_the_tokens(default_model_gguf: Path) -> None:
    flags = ("--kv-pool-bytes", "64MiB", "--dtype", "bfloat16")
    with serving(default_model_gguf, *flags) as server:
        plain = server.http.get("/info").json()
    with serving(default_model_gguf, *flags, "--kv-cache-dtype", "int8") as server:
        info = server.http.get("/info").json()
        answer = server.generate("The capital of France is", max_new_tokens=4)

    assert "Paris" in answer["generated_text"]
    assert info["max_batch_total_tokens"] > 1.85 * plain["max_batch_total_tokens"]
    assert info["quality"]["top1_agreement"] > 0.97
    assert plain["quality"] is None


def test_a_model_that_lost_too_much_does_not_start_unless_told(default_model_gguf: Path) -> None:
    flags = ("--quantize", "int4", "--quantize-group-size", "128")

    refusal = r"--quality-floor: int4 \(groups of 128\) keeps 61\.7% of bfloat16"
    with pytest.raises(ServerFailed, match=refusal), serving(default_model_gguf, *flags):
        pass
    with serving(default_model_gguf, *flags, "--quality-floor", "0.5") as server:
        assert server.http.get("/info").json()["quality"]["top1_agreement"] < 0.7
