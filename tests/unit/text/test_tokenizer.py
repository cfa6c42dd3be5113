"""The tokenizer's face: special tokens, single tokens, offsets, threads, bad files."""

import asyncio
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.text.vocabularies import BYTE_LEVEL_TOKENS, USER_DEFINED, byte_level_tokenizer, spaced_tokenizer
from tokenizers import decoders, models, pre_tokenizers

from weft.errors import ModelNotFoundError, ValidationError
from weft.limits import LIMITS
from weft.text.tokenizer import Tokenizer, TokenSpan

BYTE_LEVEL = byte_level_tokenizer(adds_start=True)


def test_special_tokens_are_added_only_when_asked_for() -> None:
    with_special = BYTE_LEVEL.encode("hel", add_special_tokens=True)

    assert with_special == [0, *BYTE_LEVEL.encode("hel", add_special_tokens=False)]


def test_a_special_token_in_the_text_is_that_token() -> None:
    assert BYTE_LEVEL.encode("<|end|>", add_special_tokens=False) == [1]


async def test_encoding_on_a_thread_gives_the_same_ids() -> None:
    texts = [f"hello {number} wörld" for number in range(20)]

    encoded = await asyncio.gather(*(BYTE_LEVEL.encode_async(text, add_special_tokens=True) for text in texts))

    assert encoded == [BYTE_LEVEL.encode(text, add_special_tokens=True) for text in texts]


def test_offsets_count_bytes_and_added_tokens_have_none() -> None:
    spans = BYTE_LEVEL.encode_with_offsets("é<|end|>h", add_special_tokens=True)

    assert spans[0] == TokenSpan(0, "", 0, 0)
    assert [(span.text, span.start, span.stop) for span in spans[1:]] == [
        ("é", 0, 2),
        ("é", 0, 2),
        ("<|end|>", 2, 9),
        ("h", 9, 10),
    ]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_every_span_is_a_slice_of_the_text_in_bytes(text: str) -> None:
    for span in BYTE_LEVEL.encode_with_offsets(text, add_special_tokens=True):
        assert text.encode()[span.start : span.stop].decode() == span.text


@pytest.mark.parametrize("encode", [BYTE_LEVEL.encode, BYTE_LEVEL.encode_with_offsets])
def test_half_a_surrogate_pair_is_refused_by_its_place(encode: object) -> None:
    with pytest.raises(ValidationError, match="surrogate pair at character 2") as caught:
        encode("ab\ud83dc", add_special_tokens=False)  # type: ignore[operator]

    assert caught.value.field == "inputs"


def test_the_text_of_a_token_keeps_its_space_and_shows_special_ones() -> None:
    spaced = spaced_tokenizer()
    word = spaced.token_to_id("▁hi")
    assert word is not None

    assert [spaced.token_text(word), spaced.token_text(1)] == [" hi", "<s>"]
    assert [spaced.is_special(word), spaced.is_special(1)] == [False, True]


def test_the_text_of_a_part_of_a_character_is_a_replacement_and_of_no_token_empty() -> None:
    first = BYTE_LEVEL.encode("é", add_special_tokens=False)[0]

    assert [BYTE_LEVEL.token_text(first), BYTE_LEVEL.token_text(99_999)] == ["\ufffd", ""]


def test_sizes_include_added_tokens() -> None:
    assert BYTE_LEVEL.vocab_size == len(BYTE_LEVEL_TOKENS) + 1
    assert BYTE_LEVEL.longest_token_chars == len("<|start|>")
    assert BYTE_LEVEL.is_special(BYTE_LEVEL.vocab_size - 1) is False
    assert BYTE_LEVEL.id_to_token(BYTE_LEVEL.vocab_size - 1) == USER_DEFINED


def test_token_texts_are_right_for_decoders_that_look_at_neighbours() -> None:
    backend = tokenizers.Tokenizer(models.WordPiece({"a": 0, "b": 1, "##c": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(backend)

    assert [tokenizer.token_text(1), tokenizer.token_text(2)] == [" b", "c"]


def test_padding_and_truncation_of_a_training_run_are_switched_off(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()._backend
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))

    assert len(Tokenizer.load(tmp_path).encode("abcdef", add_special_tokens=False)) == 6


def test_a_directory_without_tokenizer_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')

    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(LIMITS.max_tokenizer_file_bytes + 1)

    with pytest.raises(ModelNotFoundError, match="at most"):
        Tokenizer.load(tmp_path)
