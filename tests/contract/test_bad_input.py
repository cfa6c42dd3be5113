"""Every field, every kind of wrong value, through every door: a typed 4xx that names the field, never a 5xx.

The table gives for each field the values that are fine; everything else in VALUES must be refused by name. Fields
that take anything (`user`) list what is refused instead.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from tests.contract.house import MAX_TOTAL_TOKENS, VOCAB_SIZE, build_house

from weft.router.app import ROUTES
from weft.router.routes import Route

HUGE = 10**400
VALUES: dict[str, object] = {
    "null": None,
    "true": True,
    "false": False,
    "text": "x",
    "empty text": "",
    "number as text": "1",
    "unicode": "\ud7ff\U0010ffff\u0000é",
    "array": [],
    "array of text": ["x"],
    "array of empty text": [""],
    "array of null": [None],
    "array of int": [1],
    "nested": [[[]]],
    "object": {},
    "odd object": {"x": {"y": []}},
    "minus huge": -HUGE,
    "-2^63-1": -(2**63) - 1,
    "-2^63": -(2**63),
    "-2^31": -(2**31),
    "-101": -101,
    "-3": -3,
    "-2": -2,
    "-1": -1,
    "-0.5": -0.5,
    "0": 0,
    "0.0": 0.0,
    "tiny": 5e-324,
    "0.5": 0.5,
    "1": 1,
    "1.0": 1.0,
    "1.5": 1.5,
    "2": 2,
    "2.5": 2.5,
    "4": 4,
    "5": 5,
    "6": 6,
    "20": 20,
    "21": 21,
    "32": 32,
    "33": 33,
    "63": 63,
    "64": 64,
    "65": 65,
    "1000": 1000,
    "2^31-1": 2**31 - 1,
    "2^31": 2**31,
    "2^32-1": 2**32 - 1,
    "2^32": 2**32,
    "2^63": 2**63,
    "2^64-1": 2**64 - 1,
    "2^64": 2**64,
    "1e308": 1e308,
    "huge": HUGE,
}

NULL = ["null"]
BOOLEANS = [*NULL, "true", "false"]
ALL_NUMBERS = [name for name, value in VALUES.items() if isinstance(value, int | float) and not isinstance(value, bool)]
INTEGERS = [name for name in ALL_NUMBERS if isinstance(VALUES[name], int)]


def numbers(low: float, high: float, *, integers: bool = False, open_low: bool = False) -> list[str]:
    """Names of the numbers within a range, and null."""
    names = INTEGERS if integers else ALL_NUMBERS
    inside = [name for name in names if low <= VALUES[name] <= high]
    # JSON numbers beyond a double cannot be read as one.
    return [*NULL, *(name for name in inside if not (open_low and VALUES[name] == low) and "huge" not in name)]


@dataclass(frozen=True)
class Door:
    """A route, the smallest body it takes, and where its fields stand."""

    path: str
    body: dict[str, object]
    inner: str | None = None

    def with_field(self, name: str, value: object) -> dict[str, object]:
        return {**self.body, self.inner: {name: value}} if self.inner else {**self.body, name: value}


GENERATE = Door("/generate", {"inputs": "a"}, "parameters")
STREAM = Door("/generate_stream", {"inputs": "a"}, "parameters")
COMPAT = Door("/", {"inputs": "a"}, "parameters")
GENERATE_BODY = Door("/generate", {"inputs": "a"})
COMPAT_BODY = Door("/", {"inputs": "a"})
CHAT = Door("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
MESSAGE = Door("/v1/chat/completions", {})
COMPLETIONS = Door("/v1/completions", {"prompt": "a"})
OPENAI = (CHAT, COMPLETIONS)

U32 = numbers(0, 2**32 - 1, integers=True)
TEXTS = [*NULL, "text", "empty text", "number as text", "unicode"]
CHAT_PROMPT_TOKENS = len("[user]a[assistant]")
SAMPLES = {"do_sample": True}


def without(names: Iterable[str], *excluded: str) -> list[str]:
    return [name for name in names if name not in excluded]


NATIVE_FIELDS: dict[str, list[str]] = {
    "temperature": numbers(0, 1e308, open_low=True),
    "repetition_penalty": numbers(0, 1e308, open_low=True),
    "frequency_penalty": numbers(-2, 2),
    "top_k": numbers(1, 2**31 - 1, integers=True),
    "top_p": numbers(0, 1, open_low=True),
    "typical_p": numbers(0, 1, open_low=True),
    "do_sample": BOOLEANS,
    "max_new_tokens": without(U32, "0"),
    "return_full_text": BOOLEANS,
    "stop": [*NULL, "array", "array of text"],
    "truncate": numbers(1, MAX_TOTAL_TOKENS - 1, integers=True),
    "watermark": BOOLEANS,
    "details": BOOLEANS,
    "decoder_input_details": BOOLEANS,
    "seed": numbers(0, 2**64 - 1, integers=True),
    "top_n_tokens": numbers(0, 5, integers=True),
    "best_of": [*NULL, "0", "1"],
    "grammar": NULL,
    "adapter_id": [*NULL, "empty text"],
}

OPENAI_FIELDS: dict[str, list[str]] = {
    "temperature": numbers(0, 2),
    "top_p": numbers(0, 1),
    "typical_p": numbers(0, 1, open_low=True),
    "min_p": numbers(0, 1),
    "top_k": numbers(-1, 2**31 - 1, integers=True),
    "repetition_penalty": numbers(0, 1e308, open_low=True),
    "presence_penalty": numbers(-2, 2),
    "frequency_penalty": numbers(-2, 2),
    "n": numbers(1, 32, integers=True),
    "seed": numbers(-(2**63), 2**64 - 1, integers=True),
    "stop": [*NULL, "text", "number as text", "unicode", "array", "array of text"],
    "logit_bias": [*NULL, "object", "array"],
    "ignore_eos": BOOLEANS,
    "stream": BOOLEANS,
    "stream_options": [*NULL, "object", "odd object"],
    "model": [*NULL, "empty text"],
    "user": TEXTS,
    "guided_json": NULL,
    "guided_regex": NULL,
    "structured_outputs": NULL,
}

MAX_CHAT_TOKENS = MAX_TOTAL_TOKENS - CHAT_PROMPT_TOKENS
CHAT_FIELDS: dict[str, list[str]] = {
    "messages": [],
    "max_tokens": numbers(1, MAX_CHAT_TOKENS, integers=True),
    "max_completion_tokens": numbers(1, MAX_CHAT_TOKENS, integers=True),
    "min_tokens": numbers(0, 2**400, integers=True),
    "logprobs": BOOLEANS,
    "top_logprobs": [*NULL, "0"],
    "tools": [*NULL, "array"],
    "tool_choice": NULL,
    "tool_prompt": TEXTS,
    "response_format": NULL,
    "add_generation_prompt": BOOLEANS,
    "continue_final_message": BOOLEANS,
    "chat_template_kwargs": [*NULL, "object", "odd object"],
    "chat_template": NULL,
    "functions": [*NULL, "array"],
    "function_call": NULL,
    "modalities": [*NULL, "array"],
    "audio": NULL,
    "web_search_options": NULL,
}

COMPLETION_FIELDS: dict[str, list[str]] = {
    "prompt": ["text", "number as text", "unicode", "array of text", "array of int"],
    "max_tokens": numbers(0, MAX_TOTAL_TOKENS - 2, integers=True),
    "min_tokens": numbers(0, 16, integers=True),
    "echo": BOOLEANS,
    "logprobs": numbers(0, 20, integers=True),
    "best_of": [*NULL, "1"],
    "suffix": NULL,
}

TABLE: list[tuple[Door, str, list[str]]] = [
    *((door, name, fine) for door in (GENERATE, COMPAT) for name, fine in NATIVE_FIELDS.items()),
    *(
        (STREAM, name, without(fine, *{"best_of": ["0"], "decoder_input_details": ["true"]}.get(name, [])))
        for name, fine in NATIVE_FIELDS.items()
    ),
    (GENERATE_BODY, "inputs", ["text", "number as text", "unicode"]),
    (GENERATE_BODY, "parameters", [*NULL, "object", "odd object"]),
    (COMPAT_BODY, "stream", BOOLEANS),
    *((door, name, fine) for door in OPENAI for name, fine in OPENAI_FIELDS.items()),
    *((CHAT, name, fine) for name, fine in CHAT_FIELDS.items()),
    *((COMPLETIONS, name, fine) for name, fine in COMPLETION_FIELDS.items()),
]


def as_json(value: object) -> bytes:
    """JSON, with integers that Python's own encoder would write just as well, and 1e400 for the huge ones."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= HUGE:
        return b"-1e400" if value < 0 else b"1e400"
    return json.dumps(value).encode()


def body_with(door: Door, name: str, value: object) -> bytes:
    marker = "__value__"
    return json.dumps(door.with_field(name, marker)).encode().replace(f'"{marker}"'.encode(), as_json(value))


@pytest.mark.parametrize(
    ("door", "name", "fine"), TABLE, ids=lambda part: getattr(part, "path", part if isinstance(part, str) else "")
)
async def test_a_wrong_value_is_a_typed_error_that_names_its_field(door: Door, name: str, fine: list[str]):
    house = build_house()
    wrong = []
    for kind, value in VALUES.items():
        answer = await house.request("POST", door.path, body_with(door, name, value))
        if answer.status >= 500:
            wrong.append((kind, answer.status, "server error"))
        elif kind in fine:
            if answer.status != 200:
                wrong.append((kind, answer.status, answer.body))
        elif answer.status == 200:
            wrong.append((kind, 200, "accepted"))
        else:
            problem = problem_with(answer, door, name)
            if problem:
                wrong.append((kind, answer.status, problem))
    assert wrong == []
    assert house.context.admission.used == 0


def problem_with(answer, door: Door, name: str) -> str:
    """Why an error is not as it should be; "" when it is."""
    if door.path.startswith("/v1"):
        error = answer.json["error"]
        if set(error) != {"message", "type", "param", "code"} or error["type"] != "invalid_request_error":
            return f"shape: {error}"
        if answer.status not in (400, 404):
            return "status"
        named = error["param"] or ""
        is_named = named.split(".")[0].split("[")[0] in (name, "max_tokens")
    else:
        if set(answer.json) != {"error", "error_type"} or answer.json["error_type"] != "validation":
            return f"shape: {answer.json}"
        if answer.status != 422:
            return "status"
        is_named = name in answer.json["error"]
    return "" if is_named else f"does not name the field: {answer.body!r}"


@pytest.mark.parametrize(
    ("door", "name"), [(GENERATE_BODY, "inputs"), (COMPAT_BODY, "inputs"), (CHAT, "messages"), (COMPLETIONS, "prompt")]
)
async def test_a_missing_field_is_named(door: Door, name: str):
    answer = await build_house().post(door.path, {})

    assert answer.status in (400, 422)
    assert f"missing field `{name}`" in answer.body.decode().lower()


@pytest.mark.parametrize("body", [b"null", b"1", b'"x"', b"[]", b"true", b"[{}]"])
@pytest.mark.parametrize("door", [GENERATE, STREAM, COMPAT, CHAT, COMPLETIONS], ids=lambda door: door.path)
async def test_a_body_that_is_no_object_is_refused(door: Door, body: bytes):
    answer = await build_house().post(door.path, body)

    assert answer.status == (400 if door.path.startswith("/v1") else 422)
    assert "must be an object" in answer.body.decode()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("door", [GENERATE, CHAT, COMPLETIONS], ids=lambda door: door.path)
async def test_what_json_does_not_have_is_malformed(door: Door, value: str):
    body = body_with(door, "temperature", 0.5).replace(b"0.5", value.encode())

    assert (await build_house().post(door.path, body)).status == 400


@pytest.mark.parametrize("route", [route for route in ROUTES if route.body], ids=lambda route: route.path)
@pytest.mark.parametrize("is_known", [True, False])
async def test_a_name_that_stands_twice_is_refused_at_every_door(route: Route, is_known: bool):
    """TGI: 422 for a field that it knows."""
    body = json.dumps(route.example)
    name, value = next(iter(route.example.items())) if is_known else ("no_such_field", None)
    member = f"{json.dumps(name)}: {json.dumps(value)}"
    twice = f"{{{member}, {member}, {body[1:]}".encode()

    answer = await build_house(max_total_tokens=200).post(route.path.replace("{name}", "m"), twice)

    assert answer.status == (400 if route.path.startswith("/v1") else 422)
    assert f"Duplicate field `{name}`" in answer.body.decode()


MESSAGES: list[tuple[object, bool]] = [
    ({"role": "user", "content": "a"}, True),
    ({"role": "assistant", "content": None}, True),
    ({"role": "user", "content": []}, True),
    ({"role": "user", "content": [{"type": "text", "text": "a"}]}, True),
    ({"role": "user", "content": "a", "name": None, "tool_calls": None, "extra": 1}, True),
    ({"role": "assistant"}, True),
    ({"role": "assistant", "tool_calls": [{}], "content": None}, True),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "not json"}}]}, True),
    ({"role": "user", "content": None}, False),
    ({"role": "user"}, False),
    ({}, False),
    ({"content": "a"}, False),
    ({"role": None, "content": "a"}, False),
    ({"role": "", "content": "a"}, False),
    ({"role": "x" * 65, "content": "a"}, False),
    ({"role": 1, "content": "a"}, False),
    ({"role": "user", "content": 1}, False),
    ({"role": "user", "content": {}}, False),
    ({"role": "user", "content": [1]}, False),
    ({"role": "user", "content": [{"type": "text"}]}, False),
    ({"role": "user", "content": [{"type": "text", "text": 1}]}, False),
    ({"role": "user", "content": [{"type": "video"}]}, False),
    ({"role": "user", "content": [{}]}, False),
    ({"role": "user", "content": "a", "tool_calls": "x"}, False),
    ({"role": "user", "content": "a", "tool_call_id": 5}, False),
    (None, False),
    ("user", False),
    ([], False),
]


@pytest.mark.parametrize(("message", "is_fine"), MESSAGES)
async def test_messages_are_read_or_refused_by_name(message: object, is_fine: bool):
    house = build_house(max_total_tokens=200)

    answer = await house.post("/v1/chat/completions", {"messages": [message, {"role": "user", "content": "a"}]})

    assert answer.status == (200 if is_fine else 400)
    if not is_fine:
        assert answer.json["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "bias",
    [
        {"-1": 1}, {str(VOCAB_SIZE): 1}, {"x": 1}, {"1.0": 1}, {"": 1}, {"٣": 1}, {"9" * 50: 1}, {"1": 101},
        {"1": -101}, {"1": "a"}, {"1": None}, [1.0], {str(index): 1 for index in range(2000)},
    ],
)  # fmt: skip
async def test_a_bad_logit_bias_is_named(bias: object):
    answer = await build_house().post(CHAT.path, CHAT.with_field("logit_bias", bias))

    assert answer.status == 400
    assert answer.json["error"]["param"].startswith("logit_bias")


@pytest.mark.parametrize("door", [GENERATE, CHAT, COMPLETIONS], ids=lambda door: door.path)
@pytest.mark.parametrize("stop", [["a"] * 5, ["a" * 257], ["a", ""]])
async def test_too_many_too_long_and_empty_stops_are_named(door: Door, stop: list[str]):
    answer = await build_house().post(door.path, door.with_field("stop", stop))

    assert answer.status in (400, 422)
    assert "`stop`" in answer.body.decode()


class TestOrderOfTgi:
    """The first fault in TGI's order is the one reported, with TGI's text."""

    ORDER = (
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3; ask for less (--max-best-of)"),
        (
            {"best_of": 2},
            "you must use sampling when `best_of` is > 1. Given: 2; set `do_sample` to true, or leave `best_of` out",
        ),
        (
            {"temperature": 0.0},
            "`temperature` must be strictly positive. Given: 0.0; leave it out for the likeliest token",
        ),
        (
            {"repetition_penalty": 0.0},
            "`repetition_penalty` must be strictly positive. Given: 0.0; leave it out to turn it off",
        ),
        (
            {"frequency_penalty": 2.1},
            "`frequency_penalty` must be >= -2.0 and <= 2.0. Given: 2.1; leave it out to turn it off",
        ),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0. Given: 0.0; leave it out, or send 1.0, to turn it off"),
        (
            {"typical_p": 0.0},
            "`typical_p` must be > 0.0 and < 1.0. Given: 0.0; leave it out, or send 1.0, to turn it off",
        ),
        ({"top_k": 0}, "`top_k` must be strictly positive. Given: 0; leave it out to turn it off"),
        (
            {"max_new_tokens": 0},
            "`max_new_tokens` must be strictly positive. Given: 0; leave it out for all that the context holds",
        ),
        (
            {"stop": ["a", "b", "c", "d", "e"]},
            "`stop` supports up to 4 stop sequences. Given: 5; leave some out (--max-stop-sequences)",
        ),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6; ask for less (--max-top-n-tokens)"),
        (
            {"truncate": 0},
            (
                "`truncate` must be strictly positive and less than 63. Given: 0; 63 is the most that is kept "
                "(--max-input-tokens)"
            ),
        ),
        (
            {"truncate": 64},
            (
                "`truncate` must be strictly positive and less than 63. Given: 64; 63 is the most that is kept "
                "(--max-input-tokens)"
            ),
        ),
    )

    @pytest.mark.parametrize(("parameters", "message"), ORDER)
    async def test_each_text(self, parameters: dict[str, object], message: str):
        answer = await build_house().post("/generate", {"inputs": "a", "parameters": parameters})

        assert answer.status == 422
        assert answer.json == {"error": f"Input validation error: {message}", "error_type": "validation"}

    async def test_the_first_fault_wins(self):
        faults = [fault for fault, _ in self.ORDER if "best_of" not in fault]
        texts = [text for fault, text in self.ORDER if "best_of" not in fault]
        for first in range(len(faults) - 1):
            parameters = {name: value for fault in reversed(faults[first:-1]) for name, value in fault.items()}
            answer = await build_house().post("/generate", {"inputs": "a", "parameters": parameters})
            assert answer.json["error"].endswith(texts[first])

    async def test_parameters_come_before_the_prompt(self):
        answer = await build_house().post("/generate", {"inputs": "", "parameters": {"temperature": 0}})
        assert "temperature" in answer.json["error"]

        answer = await build_house().post("/generate", {"inputs": "", "parameters": {"truncate": 0}})
        assert answer.json["error"] == "Input validation error: `inputs` cannot be empty; send a text"

    @pytest.mark.parametrize(
        ("parameters", "message"),
        [
            ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
            ({"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens"),
            (
                {"decoder_input_details": True, "temperature": 0.0},
                "`decoder_input_details` == true is not supported when streaming tokens",
            ),
        ],
    )
    async def test_streams_have_checks_of_their_own_first(self, parameters: dict[str, object], message: str):
        answer = await build_house().post("/generate_stream", {"inputs": "a", "parameters": parameters})

        assert answer.status == 422
        assert answer.json["error"].startswith(f"Input validation error: {message}. Given: ")
        assert answer.json["error"].endswith("; leave it out, or do not stream")

    async def test_a_server_with_one_sequence_says_so(self):
        house = build_house(settings={"max_best_of": 1})

        answer = await house.post("/generate", {"inputs": "a", "parameters": {"best_of": 2}})

        assert answer.json["error"] == (
            "Input validation error: `best_of` != 1 is not allowed for this endpoint. Given: 2; "
            "ask for less (--max-best-of)"
        )

    @pytest.mark.parametrize("value", [0.99, 1.0, 1])
    async def test_top_p_of_one_is_off(self, value: float):
        parameters = {"top_p": value, "typical_p": value}

        assert (await build_house().post("/generate", {"inputs": "a", "parameters": parameters})).status == 200

    async def test_a_prompt_without_room_for_a_token_names_both_counts(self):
        house = build_house(max_input_tokens=63, max_total_tokens=64)

        answer = await house.post("/generate", {"inputs": "a" * 64, "parameters": {"max_new_tokens": 7}})

        assert answer.json["error"] == (
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 64. "
            "Given: 65 `inputs` tokens and 7 `max_new_tokens`; `inputs` may have 63 (--max-input-tokens): shorten it, "
            "or set `truncate`"
        )
