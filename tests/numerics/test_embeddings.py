"""Vectors of whole engines against transformers, and the law that a vector depends on its text alone."""

from pathlib import Path

import pytest
import torch
from tests.numerics.embedding_models import reference_vector, write_embedding_model

from weft import LLM
from weft.core.request import Pooling
from weft.errors import ModelNotFoundError, NotSupportedError, ValidationError

pytestmark = pytest.mark.numerics

SETTINGS = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": "8MiB", "block_size_tokens": 16}
DRAW = torch.Generator().manual_seed(5)
SHARED = torch.randint(2, 200, (24,), generator=DRAW).tolist()
TEXTS = [
    *(torch.randint(2, 200, (length,), generator=DRAW).tolist() for length in (1, 2, 7, 8, 9, 31, 64, 200, 256)),
    [*SHARED, 5, 6],
    [*SHARED, 7],
    SHARED,
]


@pytest.mark.parametrize("config_class", ["Qwen3Config", "LlamaConfig", "MistralConfig", "Qwen2Config"])
@pytest.mark.parametrize("mode", list(Pooling))
def test_vectors_equal_those_of_transformers(tmp_path: Path, config_class: str, mode: Pooling) -> None:
    reference = write_embedding_model(tmp_path, config_class=config_class, mode=mode, normalizes=False)

    with LLM(tmp_path, max_batch_prefill_tokens=48, **SETTINGS) as llm:
        vectors = llm.embed(TEXTS)

    for token_ids, vector in zip(TEXTS, vectors, strict=True):
        expected = reference_vector(reference, token_ids, mode)
        torch.testing.assert_close(torch.tensor(vector), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", list(Pooling))
def test_a_vector_has_the_same_bits_whatever_it_is_computed_beside(tmp_path: Path, mode: Pooling) -> None:
    """Chunks, neighbours, the prefix cache and the recorded program change nothing."""
    write_embedding_model(tmp_path, mode=mode)
    with LLM(tmp_path, max_batch_prefill_tokens=512, prefix_caching=False, **SETTINGS) as llm:
        alone = [llm.embed([text])[0] for text in TEXTS]

    for settings in ({"max_batch_prefill_tokens": 16}, {"max_batch_prefill_tokens": 40, "kernels": "auto"}):
        with LLM(tmp_path, **SETTINGS, **settings) as llm:
            together = llm.embed(TEXTS)
            again = llm.embed(list(reversed(TEXTS)))[::-1]
        assert together == alone
        assert again == alone


def test_vectors_are_normalised_and_cut(tmp_path: Path) -> None:
    reference = write_embedding_model(tmp_path)
    expected = reference_vector(reference, TEXTS[5], Pooling.LAST)

    with LLM(tmp_path, **SETTINGS) as llm:
        whole, short = llm.embed([TEXTS[5]])[0], llm.embed([TEXTS[5]], dimensions=16)[0]
        with pytest.raises(ValidationError, match="dimensions"):
            llm.embed("text", dimensions=49)

    torch.testing.assert_close(torch.tensor(whole), torch.nn.functional.normalize(expected, dim=0))
    torch.testing.assert_close(torch.tensor(short), torch.nn.functional.normalize(expected[:16], dim=0))


def test_a_text_ends_with_the_token_that_the_tokenizer_settings_ask_for(tmp_path: Path) -> None:
    reference = write_embedding_model(tmp_path, normalizes=False)

    with LLM(tmp_path, **SETTINGS) as llm:
        token_ids = llm._loaded.model.tokenizer.encode("hello", add_special_tokens=True)
        vector = llm.embed("hello")

    expected = reference_vector(reference, [*token_ids, 1], Pooling.LAST)
    torch.testing.assert_close(torch.tensor(vector), expected, rtol=2e-5, atol=2e-5)


def test_the_longest_text_is_as_long_as_the_model_says(tmp_path: Path) -> None:
    write_embedding_model(tmp_path, max_seq_length=20)

    with LLM(tmp_path, **SETTINGS) as llm:
        llm.embed([list(range(2, 22))])
        with pytest.raises(ValidationError, match="at most 20 tokens"):
            llm.embed([list(range(2, 23))])


def test_a_generating_model_embeds_when_it_is_told_to(tmp_path: Path) -> None:
    reference = write_embedding_model(tmp_path, normalizes=False)
    (tmp_path / "modules.json").unlink()
    text = TEXTS[6]

    with LLM(tmp_path, task="embed", pooling="mean", **SETTINGS) as llm:
        vector = llm.embed([text])[0]
        with pytest.raises(NotSupportedError, match="generate"):
            llm.generate("Hello")

    expected = torch.nn.functional.normalize(reference_vector(reference, text, Pooling.MEAN), dim=0)
    torch.testing.assert_close(torch.tensor(vector), expected, rtol=2e-5, atol=2e-5)


def test_a_model_without_output_layer_generates_nothing(tmp_path: Path) -> None:
    write_embedding_model(tmp_path)

    with pytest.raises(ModelNotFoundError, match="generates text"):
        LLM(tmp_path, task="generate", **SETTINGS)
