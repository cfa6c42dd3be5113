"""Stop strings, against a search in the whole text."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.text.stop import StopMatcher

# Few letters, so that stop strings overlap, contain and begin one another all the time.
TEXTS = st.text(alphabet="abc", max_size=24)
STOP_STRINGS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)
CUTS = st.lists(st.integers(min_value=1, max_value=5), max_size=24)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


def search_everything(text: str, stop_strings: list[str]) -> tuple[int, str] | None:
    """The leftmost match, the longest one at the same place."""
    found = [(text.find(stop), -len(stop), stop) for stop in stop_strings if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


@given(TEXTS, STOP_STRINGS, CUTS, st.booleans())
def test_the_text_shown_is_the_text_before_the_leftmost_match_however_it_was_cut(
    text: str, stop_strings: list[str], sizes: list[int], includes_match: bool
) -> None:
    expected = search_everything(text, stop_strings)
    matcher = StopMatcher(stop_strings, includes_match=includes_match)

    shown = "".join(matcher.push(piece).text for piece in cut(text, sizes)) + matcher.flush()

    if expected is None:
        assert (shown, matcher.matched) == (text, None)
    else:
        start, stop = expected
        assert (shown, matcher.matched) == (text[: start + len(stop) * includes_match], stop)


@given(TEXTS, STOP_STRINGS)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(text: str, stop_strings: list[str]) -> None:
    matcher = StopMatcher(stop_strings)
    shown = ""

    for end, character in enumerate(text, start=1):
        shown += matcher.push(character).text
        if search_everything(text[:end], stop_strings):
            return
        held = text[len(shown) : end]
        beginnings = [stop[:size] for stop in stop_strings for size in range(1, len(stop))]
        longest = max((len(start) for start in beginnings if text[:end].endswith(start)), default=0)
        assert len(held) == longest


@given(TEXTS, STOP_STRINGS, CUTS)
def test_overrun_counts_what_was_pushed_behind_the_match(text: str, stop_strings: list[str], sizes: list[int]) -> None:
    matcher = StopMatcher(stop_strings)

    overrun = sum(matcher.push(piece).overrun_chars for piece in cut(text, sizes))

    if matcher.matched is not None:
        start, stop = search_everything(text, stop_strings) or (0, "")
        assert overrun == len(text) - start - len(stop)


def test_a_match_that_could_grow_is_decided_by_the_next_character() -> None:
    matcher = StopMatcher(["\n", "\n\n"])

    assert matcher.push("one\n").matched is None
    result = matcher.push("two")

    assert (result.text, result.matched, result.overrun_chars) == ("", "\n", 3)


def test_a_match_that_could_have_grown_counts_when_the_text_ends() -> None:
    matcher = StopMatcher(["ab", "abc"])
    shown = matcher.push("xab").text

    shown += matcher.flush()

    assert (shown, matcher.matched) == ("x", "ab")


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher([])

    assert [matcher.push("any"), matcher.push("thing")] == [matcher.push("any"), matcher.push("thing")]
    assert (matcher.push("x").text, matcher.flush(), matcher.matched) == ("x", "", None)


def test_characters_with_a_meaning_in_regular_expressions_are_only_characters() -> None:
    matcher = StopMatcher(["^]", ".*", "\\d", "-"])

    assert (matcher.push("a1]^x.y").text, matcher.push("z^]!").matched) == ("a1]^x.y", "^]")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["ok", ""])


def test_time_grows_linearly_on_text_made_to_backtrack() -> None:
    def seconds(length: int) -> float:
        matcher = StopMatcher(["a" * 255 + "b", "a" * 254 + "c"])
        started = time.process_time()
        for _ in range(length // 4):
            matcher.push("aaaa")
        return time.process_time() - started

    ratio = min(seconds(40_000) / seconds(10_000) for _ in range(5))

    assert ratio < 4 * 1.5
