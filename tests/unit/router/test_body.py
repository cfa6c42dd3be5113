"""Reading JSON bodies: depth in linear time, errors that name the field."""

import contextlib
import time

import msgspec
import pytest

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
        (b'{"name": 1}', "name", "`name` must be a string. Given: an integer"),
        (b'{"name": null}', "name", "`name` must be a string. Given: null"),
        (
            b'{"name":"a","inner":{"count":"x"}}',
            "inner.count",
            "`inner.count` must be an integer or null. Given: a string",
        ),
        (b'{"name":"a","many":[{},{"count":[]}]}', "many[1].count", "must be an integer or null. Given: an array"),
        (b'{"name":"a","inner":5}', "inner", "`inner` must be an object or null. Given: an integer"),
        (b"[]", "body", "`body` must be an object. Given: an array"),
        (b'{"name":"a","inner":{"count":1e400}}', "inner.count", "number out of range"),
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
