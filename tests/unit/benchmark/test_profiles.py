"""Prompts have exactly the length that a profile names, and share exactly what it says."""

import pytest

from weft.benchmark.profiles import (
    PROFILES,
    USUAL_PROFILES,
    Profile,
    PromptWriter,
    completion_body,
    find_profiles,
    single_token_words,
)

WORDS = [f"word{letter}{other}" for letter in "abcdefghij" for other in "abcdefghij"]


def make_profile(**changes: object) -> Profile:
    values: dict[str, object] = {
        "name": "x",
        "title": "x",
        "concurrency": 2,
        "num_requests": 3,
        "prompt_tokens": 5,
        "output_tokens": 4,
    }
    return Profile(**{**values, **changes})  # type: ignore[arg-type]


def test_each_prompt_has_so_many_words_and_none_repeats() -> None:
    [prompts] = PromptWriter(WORDS, seed=1).rounds(make_profile())

    assert [len(prompt.split()) for prompt in prompts] == [5, 5, 5]
    assert len(set(prompts)) == 3
    assert all(prompt.startswith(" ") for prompt in prompts)


def test_a_shared_prefix_is_the_same_in_all_rounds_and_comes_on_top() -> None:
    first, second = PromptWriter(WORDS, seed=1).rounds(make_profile(shared_prefix_tokens=7, rounds=2))

    prefixes = {tuple(prompt.split()[:7]) for prompt in first + second}
    assert len(prefixes) == 1
    assert {len(prompt.split()) for prompt in first + second} == {12}
    assert len(set(first + second)) == 6


def test_one_seed_gives_one_series_and_another_seed_another() -> None:
    assert PromptWriter(WORDS, seed=3).text(50) == PromptWriter(WORDS, seed=3).text(50)
    assert PromptWriter(WORDS, seed=3).text(50) != PromptWriter(WORDS, seed=4).text(50)


@pytest.mark.parametrize("marker", ["\u0120", "\u2581"])
def test_words_are_found_in_both_kinds_of_vocabulary(marker: str) -> None:
    entries = [marker + chr(97 + i) * 3 + chr(97 + j) for i in range(20) for j in range(6)]

    words = single_token_words(["plain", marker + "Upper", marker + "no", *entries, marker + "d1git", "<s>"])

    assert words == sorted(entry[1:] for entry in entries)


def test_a_vocabulary_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 100"):
        single_token_words(["a", "b"])


def test_scaling_never_sends_fewer_requests_than_are_in_flight() -> None:
    assert PROFILES["streams-64"].scaled(0.01).num_requests == 64
    assert PROFILES["streams-16"].scaled(0.5).num_requests == 32


def test_bodies_fix_the_length_of_the_answer() -> None:
    body = completion_body("m", "p", 12)

    assert body["max_tokens"] == 12
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0.0


def test_a_newcomer_s_prompt_comes_last() -> None:
    [prompts] = PromptWriter(WORDS, seed=1).rounds(make_profile(newcomer_prompt_tokens=40))

    assert [len(prompt.split()) for prompt in prompts] == [5, 5, 5, 40]


def test_profiles_are_found_by_code_and_by_name() -> None:
    assert [profile.name for profile in find_profiles(["W1", "long-prompt"])] == ["streams-1", "long-prompt"]
    assert len(find_profiles(USUAL_PROFILES)) == len(USUAL_PROFILES)
    with pytest.raises(ValueError, match="no workload is called W9; there are"):
        find_profiles(["W1", "W9"])


def test_a_quick_sitting_sends_no_fewer_than_are_in_flight() -> None:
    assert all(profile.quick.num_requests >= profile.concurrency for profile in PROFILES.values())


def test_codes_are_unique() -> None:
    codes = [profile.code for profile in PROFILES.values()]

    assert len(set(codes)) == len(codes)
    assert all(codes)
