"""GGUF tokenizers, against llama.cpp's expected ids, the published `tokenizer.json`, and SentencePiece itself."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.numerics.text.conftest import read_samples

from weft.text.assets import load_text_assets
from weft.text.gguf_pre_tokenizers import PRE_TOKENIZERS

pytestmark = pytest.mark.slow

VOCABULARIES = (
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
    "starcoder",
)

COMPOSING = ("command-r", "mpt", "qwen2", "qwen35")
"""Their published tokenizers compose characters (NFC) first; llama.cpp does not."""

PUBLISHED_RULES = {
    "qwen2": "qwen-2.5",
    "deepseek-r1-qwen": "deepseek-r1-distill-qwen-7b",
    "qwen35": "qwen-3.5",
    "llama-bpe": "deepseek-r1-distill-llama-8b",
    "glm4": "glm-4",
    "deepseek-llm": "deepseek-llm-7b-base",
    "deepseek-coder": "deepseek-coder-33b-base",
    "deepseek-v3": "deepseek-v3",
    "minimax-m2": "minimax-m3",
}
"""`tokenizer.ggml.pre` → a model whose `tokenizer.json` uses that rule."""


@pytest.mark.parametrize("name", VOCABULARIES)
def test_token_ids_are_those_of_llama_cpp(name: str, llama_cpp_models: Path, tmp_path: Path) -> None:
    path = llama_cpp_models / f"ggml-vocab-{name}.gguf"
    tokenizer = load_text_assets(path, tmp_path).tokenizer
    samples = read_samples(path.with_suffix(".gguf.inp"))
    expected = [[int(word) for word in line.split()] for line in path.with_suffix(".gguf.out").read_text().splitlines()]

    compared = [
        (sample, ids)
        for sample, ids in zip(samples, expected, strict=False)  # the inputs end with a separator
        if name not in COMPOSING or unicodedata.is_normalized("NFC", sample)
    ]

    assert len(compared) >= 46
    for sample, ids in compared:
        assert tokenizer.encode(sample, add_special_tokens=False) == ids, sample


@pytest.mark.parametrize(("rule", "model"), PUBLISHED_RULES.items())
def test_a_rule_is_the_one_in_the_published_tokenizer(
    rule: str, model: str, published_tokenizer: Callable[[str], dict[str, Any]]
) -> None:
    published = published_tokenizer(model)

    def essence(step: dict[str, Any]) -> tuple[object, ...]:
        # Where a raw line end is meant, files write it as itself or as an escape; the two ways to keep what a
        # pattern covers (cut around it, or drop the rest) are the same for patterns that cover everything.
        pattern = step.get("pattern", {}).get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
        return (step["type"], pattern, step.get("individual_digits"), step.get("use_regex"))

    ours = PRE_TOKENIZERS[rule]
    assert list(map(essence, ours.steps)) == list(map(essence, published["pre_tokenizer"]["pretokenizers"]))
    assert ours.composes_characters == ((published["normalizer"] or {}).get("type") == "NFC")
    assert ours.prefers_whole_words == published["model"].get("ignore_merges", False)


def test_the_tekken_rule_is_the_one_that_mistral_publishes(tekken_settings: dict[str, Any]) -> None:
    assert PRE_TOKENIZERS["tekken"].steps[0]["pattern"] == {"Regex": tekken_settings["pattern"]}


def write_gguf(path: Path, processor: Any) -> None:
    """Write a SentencePiece model as llama.cpp's converter does."""
    pieces = range(processor.get_piece_size())
    kinds = []
    for piece in pieces:
        normal, unknown, control, unused, byte = 1, 2, 3, 5, 6
        named = ((processor.is_unknown, unknown), (processor.is_control, control), (processor.is_unused, unused))
        kinds.append(next((kind for test, kind in (*named, (processor.is_byte, byte)) if test(piece)), normal))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([processor.id_to_piece(piece) for piece in pieces])
    writer.add_token_scores([processor.get_score(piece) for piece in pieces])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(processor.bos_id())
    writer.add_eos_token_id(processor.eos_id())
    writer.add_unk_token_id(processor.unk_id())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def test_scores_in_a_gguf_file_merge_as_sentencepiece_does(
    sentencepiece_model: Path, sample_texts: list[str], tmp_path: Path
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model / "tokenizer.model"))
    write_gguf(tmp_path / "m.gguf", processor)

    assets = load_text_assets(tmp_path / "m.gguf", tmp_path)

    for text in sample_texts:
        assert assets.tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text
    assert assets.tokenizer.encode("a", add_special_tokens=True)[0] == processor.bos_id()


def test_a_directory_with_a_sentencepiece_model_is_converted_once(
    sentencepiece_model: Path, sample_texts: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece")
    from transformers import AutoTokenizer

    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes((sentencepiece_model / "tokenizer.model").read_bytes())
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}')

    first = load_text_assets(directory, tmp_path / "cache")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
    load_text_assets(directory, tmp_path / "cache")

    theirs = AutoTokenizer.from_pretrained(directory)
    for text in sample_texts:
        assert first.tokenizer.encode(text, add_special_tokens=True) == theirs(text)["input_ids"], text
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")} == files
