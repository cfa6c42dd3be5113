"""Detokenizing real vocabularies token by token, against decoding everything at once."""

import random
from pathlib import Path

import pytest

from weft.text.assets import load_text_assets
from weft.text.detokenize import Detokenizer

pytestmark = pytest.mark.slow

BYTE_LEVEL = ("command-r", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "qwen2", "starcoder")
SPACED = ("gemma-4", "llama-spm", "phi-3")


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *SPACED])
@pytest.mark.parametrize("skips", [True, False], ids=["special skipped", "special kept"])
def test_texts_come_back_piece_by_piece(
    name: str, skips: bool, llama_cpp_models: Path, sample_texts: list[str], tmp_path: Path
) -> None:
    tokenizer = load_text_assets(llama_cpp_models / f"ggml-vocab-{name}.gguf", tmp_path).tokenizer
    anchor = tokenizer.encode("a", add_special_tokens=False)
    dice = random.Random(3)
    sequences = [tokenizer.encode(text, add_special_tokens=False) for text in sample_texts]
    if name in BYTE_LEVEL:
        sequences += [[dice.randrange(tokenizer.vocab_size) for _ in range(12)] for _ in range(300)]

    for ids in sequences:
        detokenizer = Detokenizer(tokenizer, anchor, skip_special_tokens=skips)
        joined = "".join(map(detokenizer.push, ids)) + detokenizer.finish()

        before = tokenizer.decode(anchor, skips)
        assert joined == tokenizer.decode([*anchor, *ids], skips).removeprefix(before)
