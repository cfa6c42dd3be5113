"""Reading JSON bodies: depth in linear time, errors that name the field."""

import contextlib
import json
import time

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import BadRequestError, MalformedJsonError
from weft.limits import LIMITS
from weft.router.body import check_depth, decode


class Inner(msgspec.Struct):
    count: int | None = None


class Outer(msgspec.Struct):
    name: str
    inner: Inner | None = None
    many: list[Inner] | None = None


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        (b"{}", "name", "Missing field `name`; add it"),
        (b'{"name": 1}', "name", "`name` must be a string. Given: 1"),
        (b'{"name": null}', "name", "`name` must be a string. Given: null"),
        (
            b'{"name":"a","inner":{"count":"x"}}',
            "inner.count",
            "`inner.count` must be an integer or null. Given: a string",
        ),
        (b'{"name":"a","many":[{},{"count":[]}]}', "many[1].count", "must be an integer or null. Given: an array"),
        (b'{"name":"a","inner":5}', "inner", "`inner` must be an object or null. Given: 5"),
        (b"[]", "body", "`body` must be an object. Given: an array"),
        (b'{"name":"a","inner":{"count":1e400}}', "inner.count", "of usual size. Given: 1e400"),
        (b'{"name":"a","inner":{"count":-7.25}}', "inner.count", "must be an integer or null. Given: -7.25"),
        (b'{"name":"a","many":[{},{"count":' + b"9" * 5000 + b"}]}", "many[1].count", "… (5000 characters)"),
        (b'{"name": 12, "inner": {', "name", "`name` must be a string. Given: an integer"),
    ],
)
def test_a_wrong_type_names_field_expectation_and_value(body: bytes, field: str, text: str):
    with pytest.raises(BadRequestError) as caught:
        decode(body, Outer)

    assert caught.value.field == field
    assert text in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b'{"name":"\xff"}', b'{"name":"\\ud800"}', b"nul", b'{"name":"a"}{}'])
def test_what_is_no_json_is_malformed(body: bytes):
    with pytest.raises(MalformedJsonError):
        decode(body, Outer)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"name":"a","name":"a"}', "name"),
        (b'{"name":"a","n\\u0061me":"b"}', "name"),
        (b'{"name":"a","inner":{"count":1,"count":1}}', "count"),
        (b'{"name":"a","many":[{},{"count":1,"count":null}]}', "count"),
        (b'{"name":"a","unknown":{"x":{"y":[],"y":1e400}}}', "y"),
        (b'{"":1,"name":"\\\\","":2}', ""),
    ],
)
def test_a_name_that_stands_twice_is_refused(body: bytes, name: str):
    """As in TGI; a reader that takes the first and one that takes the last would see different requests."""
    with pytest.raises(BadRequestError) as caught:
        decode(body, Outer)

    assert caught.value.field == name
    assert caught.value.message == f"Duplicate field `{name}`; send it once"


@pytest.mark.parametrize(
    "body",
    [
        b'{"name":"a","inner":{"count":1},"many":[{"count":1},{"count":1}]}',
        b'{"name":"::\\":\\\\","x":"{\\"name\\":1,\\"name\\":2}"}',
        b'{ "name" : "a\\\\" , "x" : [1e400, -0.0, 1.0, 18446744073709551616] }',
        '{"name":"é: 🙂","ключ":{"é":":"}}'.encode(),
    ],
)
def test_colons_and_quotes_in_texts_are_no_names(body: bytes):
    decode(body, Outer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(value=JSON, is_ascii=st.booleans(), indent=st.none() | st.integers(0, 2))
def test_no_json_without_repeated_names_is_refused(value: object, is_ascii: bool, indent: int | None):
    text = json.dumps({"name": "a", "x": value}, ensure_ascii=is_ascii, indent=indent)

    decode(text.encode(), Outer)


@given(names=st.lists(st.text(max_size=4), min_size=1, max_size=4), is_ascii=st.booleans(), data=st.data())
def test_every_repeated_name_is_refused(names: list[str], is_ascii: bool, data: st.DataObject):
    pairs = [*names, data.draw(st.sampled_from(names))]
    members = ",".join(f"{json.dumps(name, ensure_ascii=is_ascii)}:{json.dumps(data.draw(JSON))}" for name in pairs)

    with pytest.raises(BadRequestError, match="Duplicate field"):
        decode(f'{{"name":"a","x":{{{members}}}}}'.encode(), Outer)


@pytest.mark.parametrize("body", [b'{"name":"a","x":"\xff"}', b'{"name":"a","x":' + b"9" * 5000 + b"}"])
def test_what_a_decoder_skips_must_be_json_too(body: bytes):
    with pytest.raises(MalformedJsonError):
        decode(body, Outer)


def test_fields_that_no_api_defines_are_named_to_whoever_debugs():
    body = b'{"name":"a","x":1,"inner":{"count":1,"y":"secret"},"many":[{"z":1}]}'

    with structlog.testing.capture_logs() as logs:
        decode(body, Outer)

    assert [(entry["event"], entry["fields"]) for entry in logs] == [("request.unknown_fields", ["inner.y", "x"])]


def test_arrays_and_objects_are_bounded():
    """Beside the depth: what costs a reader most is their number."""
    most = LIMITS.max_json_containers

    check_depth(b'{"x":[' + b"[]," * (most - 3) + b"[]]}")
    with pytest.raises(BadRequestError, match=f"at most {most} arrays and objects.*Given: {most + 1}"):
        check_depth(b'{"x":[' + b"[]," * (most - 2) + b"[]]}")


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"b":'])
def test_depth_is_counted_exactly(opening: bytes):
    limit = LIMITS.max_json_depth
    per_opening = opening.count(b"[") + opening.count(b"{")

    check_depth(opening * (limit // per_opening))
    with pytest.raises(BadRequestError, match="nested"):
        check_depth(opening * (limit // per_opening + 1))


def test_closed_brackets_and_strings_do_not_add_up():
    check_depth(b"[" + b"[],{}," * 10_000 + b"1]")
    check_depth(b'["' + b"[{" * 10_000 + b'"]')
    check_depth(b'["\\"' + b"[" * 10_000 + b'\\\\"]')


@pytest.mark.parametrize("unit", [b'"', b'\\"', b'"\\', b"[", b'"[', b"[]", b'{"a":"b"},', b"\\"])
def test_the_scan_is_linear_whatever_the_bytes(unit: bytes):
    """Medians of ratios: eight times the bytes take about eight times as long, never sixty-four."""
    ratios = []
    for _ in range(5):
        small, large = (_scan_time(unit * (size // len(unit))) for size in (50_000, 400_000))
        ratios.append(large / small)

    assert sorted(ratios)[2] < 30


def _scan_time(body: bytes) -> float:
    """Many shallow brackets in front, so that the scan is not skipped."""
    started = time.process_time()
    with contextlib.suppress(BadRequestError):
        check_depth(b"[]," * LIMITS.max_json_depth + body)
    return max(time.process_time() - started, 1e-6)
