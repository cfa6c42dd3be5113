"""Vocabularies in GGUF files become tokenizers, once."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.unit.text.vocabularies import (
    BYTE_LEVEL_TOKENS,
    USER_DEFINED,
    byte_level_tokenizer,
    spaced_tokenizer,
    write_byte_level_gguf,
    write_spaced_gguf,
)

from weft.errors import ModelNotFoundError, StartupError
from weft.text.gguf_tokenizer import cached_tokenizer_directory
from weft.text.tokenizer import Tokenizer

TEXTS = (
    "hello world",
    "hi hi  hi",
    "ihi ihihi",
    "12345",
    "  w\n\n",
    "é 日本 👋",
    "<|start|>hel<think><|end|>",
    "<s>hi</s>hi",
    "",
)


def load(gguf_path: Path) -> Tokenizer:
    return Tokenizer.load(cached_tokenizer_directory(gguf_path, gguf_path.parent / "cache"), num_threads=1)


def settings(gguf_path: Path, name: str) -> dict[str, object]:
    directory = cached_tokenizer_directory(gguf_path, gguf_path.parent / "cache")
    content: dict[str, object] = json.loads((directory / name).read_text())
    return content


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_vocabularies_encode_as_the_tokenizer_they_came_from(tmp_path: Path, text: str) -> None:
    converted = load(write_byte_level_gguf(tmp_path / "m.gguf", pre="gpt-2"))

    assert converted.encode(text, add_special_tokens=True) == byte_level_tokenizer().encode(text, True)


@pytest.mark.parametrize("text", TEXTS)
def test_scored_vocabularies_encode_as_the_tokenizer_they_came_from(tmp_path: Path, text: str) -> None:
    converted = load(write_spaced_gguf(tmp_path / "m.gguf", add_bos_token=False))

    assert converted.encode(text, add_special_tokens=True) == spaced_tokenizer().encode(text, True)


def test_the_named_rule_decides_how_digits_are_cut(tmp_path: Path) -> None:
    digits = {"tokens": [*BYTE_LEVEL_TOKENS, "12"], "merges": ["1 2"], "token_type": [1] * (len(BYTE_LEVEL_TOKENS) + 1)}

    alone = load(write_byte_level_gguf(tmp_path / "a.gguf", pre="smollm", **digits))
    together = load(write_byte_level_gguf(tmp_path / "b.gguf", pre="gpt-2", **digits))

    assert [len(tokenizer.encode("1212", add_special_tokens=False)) for tokenizer in (alone, together)] == [4, 2]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, [0]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 1]),
        ({"pre": "llama-bpe"}, [0]),
        ({"pre": "llama-bpe", "add_bos_token": False}, []),
        ({"add_bos_token": True, "bos_token_id": 4_000_000_000}, []),
    ],
)
def test_ends_of_a_text_get_the_tokens_that_the_file_asks_for(
    tmp_path: Path, keys: dict[str, object], expected: list[int]
) -> None:
    tokenizer = load(write_byte_level_gguf(tmp_path / "m.gguf", **keys))

    assert tokenizer.encode("", add_special_tokens=True) == expected
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_scored_vocabularies_begin_with_bos_unless_told_otherwise(tmp_path: Path) -> None:
    assert load(write_spaced_gguf(tmp_path / "m.gguf")).encode("hi", add_special_tokens=True)[0] == 1


def test_a_file_may_say_that_no_space_is_put_in_front(tmp_path: Path) -> None:
    tokenizer = load(write_spaced_gguf(tmp_path / "m.gguf", add_space_prefix=False))
    ids = tokenizer.encode("hi", add_special_tokens=False)

    assert [tokenizer.id_to_token(token_id) for token_id in ids] == ["hi"]
    assert tokenizer.decode(tokenizer.encode(" hi", False), skip_special_tokens=True) == " hi"


def test_control_tokens_are_special_and_user_defined_ones_are_text(tmp_path: Path) -> None:
    tokenizer = load(write_byte_level_gguf(tmp_path / "m.gguf"))
    thinking = tokenizer.token_to_id(USER_DEFINED)
    assert thinking is not None

    assert tokenizer.encode(f"h{USER_DEFINED}", add_special_tokens=False)[1:] == [thinking]
    assert [tokenizer.is_special(token_id) for token_id in (0, 1, thinking)] == [True, True, False]


def test_phi3_control_tokens_take_the_spaces_behind_them(tmp_path: Path) -> None:
    other = load(write_byte_level_gguf(tmp_path / "other.gguf"))
    phi3 = load(write_byte_level_gguf(tmp_path / "phi3.gguf", **{"general.name": "Phi3 mini"}))

    assert phi3.encode("<|end|>  h", False) == other.encode("<|end|>h", False)
    assert phi3.encode("<|end|>  h", False) != other.encode("<|end|>  h", False)


def test_every_end_of_turn_is_listed(tmp_path: Path) -> None:
    tokens = [*BYTE_LEVEL_TOKENS, "<|eot_id|>", "<|im_end|>", "<eos>"]
    kinds = [1] * len(BYTE_LEVEL_TOKENS) + [3, 3, 1]
    path = write_byte_level_gguf(tmp_path / "m.gguf", tokens=tokens, token_type=kinds, eot_token_id=5)

    assert settings(path, "generation_config.json")["eos_token_id"] == [1, 5, len(tokens) - 3, len(tokens) - 2]


def test_names_and_templates_are_kept(tmp_path: Path) -> None:
    templates = {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_template": "plain",
    }

    config = settings(write_byte_level_gguf(tmp_path / "m.gguf", **templates), "tokenizer_config.json")

    assert config == {
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
        "chat_template": [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}],
    }


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model": "bert"}, "kind `bert`"),
        ({"model": None}, "kind `None`"),
        ({"pre": "from-the-future"}, "unknown rule `from-the-future`"),
        ({"pre": None}, "does not name"),
        ({"tokens": None}, "0 tokens"),
        ({"token_type": [1]}, "1 kinds"),
        ({"merges": ["x yz"]}, "merges tokens that its vocabulary does not have"),
        ({"merges": ["xyz"]}, "merges tokens that its vocabulary does not have"),
    ],
)
def test_a_vocabulary_that_cannot_be_converted_is_refused_with_a_remedy(
    tmp_path: Path, keys: dict[str, object], reason: str
) -> None:
    with pytest.raises(StartupError, match=f"(?s){reason}.*Use "):
        load(write_byte_level_gguf(tmp_path / "m.gguf", **keys))


def test_scores_must_be_as_many_as_tokens(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="1 scores"):
        load(write_spaced_gguf(tmp_path / "m.gguf", scores=[0.5]))


def test_a_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path, cache = write_byte_level_gguf(tmp_path / "m.gguf"), tmp_path / "cache"
    first = cached_tokenizer_directory(path, cache)
    written = (first / "tokenizer.json").stat().st_mtime_ns

    again = cached_tokenizer_directory(path, cache)
    assert (again, (again / "tokenizer.json").stat().st_mtime_ns) == (first, written)

    write_byte_level_gguf(path, pre="gpt-2")
    assert cached_tokenizer_directory(path, cache) != first


def test_conversions_at_the_same_moment_give_one_complete_result(tmp_path: Path) -> None:
    path, cache = write_byte_level_gguf(tmp_path / "m.gguf"), tmp_path / "cache"
    at_once = threading.Barrier(8)

    def convert(_: int) -> Path:
        at_once.wait()
        return cached_tokenizer_directory(path, cache)

    with ThreadPoolExecutor(8) as threads:
        directories = set(threads.map(convert, range(8)))

    assert len(directories) == 1
    assert [entry.name for entry in (cache / "tokenizers").iterdir()] == [directories.pop().name]


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        cached_tokenizer_directory(write_byte_level_gguf(tmp_path / "m.gguf", pre="?"), tmp_path / "cache")

    assert not (tmp_path / "cache").exists()


def test_a_missing_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        cached_tokenizer_directory(tmp_path / "missing.gguf", tmp_path)
