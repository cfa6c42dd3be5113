"""The engine's second look at a request: every field at 0, its bounds, and one beyond."""

import math
from dataclasses import replace
from typing import Any

import pytest

from weft.core.request import MAX_SEED, Request, RequestId, SamplingParams, StopConditions
from weft.errors import ValidationError
from weft.limits import LIMITS

VOCAB_SIZE = 50
MAX_TOTAL_TOKENS = 16


def make_request(sampling: dict[str, Any] | None = None, stop: dict[str, Any] | None = None, **fields: Any) -> Request:
    request = Request(
        request_id=RequestId(1),
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(**(sampling or {})),
        stop=StopConditions(**({"max_new_tokens": 4} | (stop or {}))),
    )
    return replace(request, **fields)


def check(request: Request) -> None:
    request.check(vocab_size=VOCAB_SIZE, max_total_tokens=MAX_TOTAL_TOKENS)


ALLOWED_SAMPLING = [
    ("seed", 0),
    ("seed", MAX_SEED),
    ("temperature", 1e-6),
    ("temperature", 100.0),
    ("top_k", 0),
    ("top_k", 2**31 - 1),
    ("top_p", 1e-9),
    ("top_p", 1.0),
    ("min_p", 0.0),
    ("min_p", 1.0),
    ("typical_p", 1e-9),
    ("typical_p", 1.0),
    ("repetition_penalty", 1e-3),
    ("frequency_penalty", -2.0),
    ("frequency_penalty", 2.0),
    ("presence_penalty", -2.0),
    ("presence_penalty", 2.0),
    ("top_n_tokens", 0),
    ("top_n_tokens", LIMITS.max_top_n_tokens_cap),
    ("logit_bias", ((0, -100.0), (VOCAB_SIZE - 1, 100.0))),
]

REFUSED_SAMPLING = [
    ("seed", -1),
    ("seed", MAX_SEED + 1),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", math.inf),
    ("temperature", math.nan),
    ("top_k", -1),
    ("top_k", 2**31),
    ("top_p", 0.0),
    ("top_p", 1.0001),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("typical_p", 0.0),
    ("typical_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("presence_penalty", math.nan),
    ("top_n_tokens", -1),
    ("top_n_tokens", LIMITS.max_top_n_tokens_cap + 1),
    ("logit_bias", ((-1, 0.0),)),
    ("logit_bias", ((VOCAB_SIZE, 0.0),)),
    ("logit_bias", ((0, 100.1),)),
    ("logit_bias", ((0, math.nan),)),
    ("logit_bias", tuple((0, 0.0) for _ in range(LIMITS.max_logit_bias_entries + 1))),
]


@pytest.mark.parametrize(("field", "value"), ALLOWED_SAMPLING)
def test_sampling_values_at_their_bounds_are_accepted(field: str, value: object) -> None:
    check(make_request(sampling={field: value}))


@pytest.mark.parametrize(("field", "value"), REFUSED_SAMPLING)
def test_sampling_values_beyond_their_bounds_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        check(make_request(sampling={field: value}))

    assert caught.value.field is not None
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("length", [1, MAX_TOTAL_TOKENS - 1])
def test_a_prompt_may_leave_room_for_one_token(length: int) -> None:
    check(make_request(prompt_token_ids=(1,) * length, stop={"max_new_tokens": 1}))


@pytest.mark.parametrize("length", [0, MAX_TOTAL_TOKENS])
def test_an_empty_prompt_and_one_that_leaves_no_room_are_refused(length: int) -> None:
    with pytest.raises(ValidationError, match="prompt_token_ids"):
        check(make_request(prompt_token_ids=(1,) * length, stop={"max_new_tokens": 1}))


@pytest.mark.parametrize(
    ("field", "stop"),
    [
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("max_new_tokens", {"max_new_tokens": MAX_TOTAL_TOKENS - 3 + 1}),
        ("min_new_tokens", {"min_new_tokens": -1}),
        ("min_new_tokens", {"min_new_tokens": 5}),
        ("eos_token_ids", {"eos_token_ids": (VOCAB_SIZE,)}),
        ("eos_token_ids", {"eos_token_ids": (-1,)}),
    ],
)
def test_stop_conditions_that_cannot_be_met_are_refused(field: str, stop: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=field):
        check(make_request(stop=stop))


@pytest.mark.parametrize(
    "stop",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": MAX_TOTAL_TOKENS - 3},
        {"min_new_tokens": 4},
        {"eos_token_ids": (0, VOCAB_SIZE - 1)},
    ],
)
def test_stop_conditions_at_their_bounds_are_accepted(stop: dict[str, Any]) -> None:
    check(make_request(stop=stop))


@pytest.mark.parametrize(("num_emitted", "is_allowed"), [(0, True), (3, True), (4, False)])
def test_a_resumed_request_must_have_a_token_left(num_emitted: int, is_allowed: bool) -> None:
    request = make_request(emitted_token_ids=(1,) * num_emitted)

    if is_allowed:
        check(request)
    else:
        with pytest.raises(ValidationError, match="emitted_token_ids"):
            check(request)


@pytest.mark.parametrize("name", ["prompt_token_ids", "emitted_token_ids"])
@pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 2**63])
def test_the_first_token_id_outside_the_vocabulary_is_named(name: str, bad: int) -> None:
    with pytest.raises(ValidationError, match=rf"{name}.*0 to 49\. Given: {bad}"):
        check(make_request(**{name: (1, bad)}))


@pytest.mark.parametrize(
    ("sampling", "is_greedy"),
    [
        ({}, True),
        ({"seed": 5}, True),
        ({"repetition_penalty": 1.5}, True),
        ({"do_sample": True}, False),
        ({"temperature": 0.7}, False),
        ({"top_k": 1}, False),
        ({"top_p": 0.9}, False),
        ({"typical_p": 0.9}, False),
        ({"min_p": 0.1}, False),
    ],
)
def test_any_warper_means_sampling(sampling: dict[str, Any], is_greedy: bool) -> None:
    assert SamplingParams(**sampling).is_greedy is is_greedy


def test_the_trace_is_no_part_of_what_a_request_is() -> None:
    assert make_request(trace_parent="00-1") == make_request()
