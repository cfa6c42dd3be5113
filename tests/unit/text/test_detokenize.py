"""Text of a completion, token by token, against the decoder of the whole sequence."""

import re
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.text.vocabularies import BYTE_LEVEL_TOKENS, SPACED_TOKENS, byte_level_tokenizer, spaced_tokenizer

from weft.text.detokenize import Detokenizer
from weft.text.tokenizer import Tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SPACED = spaced_tokenizer()
BYTE_LEVEL_IDS = st.lists(st.integers(min_value=0, max_value=len(BYTE_LEVEL_TOKENS) + 3), max_size=16)
SPACED_IDS = st.lists(st.integers(min_value=0, max_value=len(SPACED_TOKENS) - 1), max_size=16)


def detokenize(tokenizer: Tokenizer, prompt: Sequence[int], completion: Sequence[int], *, skips: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skips)
    return "".join(detokenizer.push(token_id) for token_id in completion) + detokenizer.finish()


def decode_behind(tokenizer: Tokenizer, prompt: list[int], completion: list[int], *, skips: bool = True) -> str:
    before = tokenizer.decode(prompt, skip_special_tokens=skips)
    return tokenizer.decode([*prompt, *completion], skip_special_tokens=skips).removeprefix(before)


@given(BYTE_LEVEL_IDS, st.booleans())
def test_byte_level_pieces_join_to_what_the_library_decodes_for_any_tokens(ids: list[int], skips: bool) -> None:
    prompt = BYTE_LEVEL.encode("h", add_special_tokens=False)

    assert detokenize(BYTE_LEVEL, prompt, ids, skips=skips) == decode_behind(BYTE_LEVEL, prompt, ids, skips=skips)


@given(st.text(max_size=12), st.text(min_size=1, max_size=12))
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SPACED], ids=["byte level", "spaced"])
def test_pieces_join_to_the_text_that_was_encoded(tokenizer: Tokenizer, before: str, text: str) -> None:
    text = text.replace("▁", "")  # the mark of a space is a space to these tokenizers
    ids = tokenizer.encode(before + text, add_special_tokens=False)
    prompt = tokenizer.encode("i", add_special_tokens=False)

    joined = detokenize(tokenizer, prompt, ids)

    # A tokenizer that puts a space in front of every text shows it here, behind a prompt.
    assert joined.removeprefix(" ").endswith(text.removeprefix(" "))


@given(SPACED_IDS, st.booleans())
def test_byte_tokens_join_to_what_the_library_decodes_wherever_they_are_utf8(ids: list[int], skips: bool) -> None:
    prompt = SPACED.encode("h", add_special_tokens=False)
    runs = re.findall("(?:<0x..>)+", "".join(SPACED_TOKENS[i] for i in ids if not (skips and SPACED.is_special(i))))
    for run in runs:
        try:
            bytes.fromhex("".join(re.findall("<0x(..)>", run))).decode()
        except UnicodeDecodeError:
            return

    assert detokenize(SPACED, prompt, ids, skips=skips) == decode_behind(SPACED, prompt, ids, skips=skips)


def test_an_emoji_split_over_four_tokens_appears_with_the_last_one() -> None:
    ids = SPACED.encode("👋", add_special_tokens=False)[-4:]
    detokenizer = Detokenizer(SPACED, [1])

    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "👋"]


@pytest.mark.parametrize("make", [byte_level_tokenizer, spaced_tokenizer])
def test_an_end_inside_a_character_shows_a_replacement_and_loses_nothing_before_it(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = make()
    ids = tokenizer.encode("hé👋", add_special_tokens=False)[:-1]

    assert detokenize(tokenizer, [1], ids).lstrip() == "hé\ufffd"


def test_a_broken_character_does_not_take_back_the_one_before_it() -> None:
    wave = SPACED.encode("👋", add_special_tokens=False)[-4:]

    assert detokenize(SPACED, [1], [*wave, wave[0], *wave]) == "👋\ufffd👋"


def test_a_leading_space_stays_because_the_completion_continues_the_prompt() -> None:
    prompt = SPACED.encode("hi", add_special_tokens=False)

    assert detokenize(SPACED, prompt, prompt) == " hi"


def test_a_character_that_the_prompt_left_unfinished_is_finished() -> None:
    ids = BYTE_LEVEL.encode("日", add_special_tokens=False)

    assert detokenize(BYTE_LEVEL, ids[:1], ids[1:]) == "日"


def test_special_tokens_are_skipped_or_kept_as_asked() -> None:
    ids = BYTE_LEVEL.encode("hel<|end|> w<think>", add_special_tokens=False)

    assert detokenize(BYTE_LEVEL, [0], ids, skips=True) == "hel w<think>"
    assert detokenize(BYTE_LEVEL, [0], ids, skips=False) == "hel<|end|> w<think>"


def test_a_skipped_token_inside_a_character_does_not_break_it() -> None:
    first, *rest = BYTE_LEVEL.encode("é", add_special_tokens=False)

    assert detokenize(BYTE_LEVEL, [0], [first, 1, *rest]) == "é"


def test_ids_beyond_the_vocabulary_add_nothing() -> None:
    assert detokenize(BYTE_LEVEL, [0], [10_000, *BYTE_LEVEL.encode("h", add_special_tokens=False)]) == "h"


def test_time_grows_linearly_on_tokens_that_are_no_text() -> None:
    broken = SPACED.token_to_id("<0xF0>")
    assert broken is not None

    def seconds(count: int) -> float:
        detokenizer = Detokenizer(SPACED, [1])
        started = time.process_time()
        for _ in range(count):
            detokenizer.push(broken)
        return time.process_time() - started

    assert min(seconds(16_000) / seconds(4_000) for _ in range(5)) < 4 * 1.5
