"""From the bytes of a body to a typed struct: limits first, then JSON, then types, with errors that name the field.

Source: RELIABILITY laws 1 and 2; messages of axum's JSON extractor as TGI 3.3.7 shows them
"""

import asyncio
import json
import re
import types
import typing
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
import structlog
from msgspec import Struct

from weft.errors import (
    BadRequestError,
    ClientGoneError,
    MalformedJsonError,
    MissingFieldError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from weft.limits import LIMITS
from weft.router.exchange import Exchange
from weft.router.json_values import JsonValue, shortened

log = structlog.get_logger("weft.http")

Body = TypeVar("Body", bound=Struct)

_MIN_BODY_BYTES_PER_S = 16 * 1024
"""A client that sends more slowly than this, after `header_timeout_s` of grace, holds a connection for nothing."""

_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_KIND_OF_BRACKET = bytes.maketrans(b"{}", b"[]")
_READER = msgspec.json.Decoder(float_hook=len)
"""Reads any JSON; floats count for nothing here and may be larger than a double."""
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]+)`(?P<bound>[^,]*)(?:, got `(?P<given>[^`]+)`)?")
_STEP = re.compile(r"(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]")
"""One step of a path as msgspec writes it."""
_NUMBER = re.compile(r"-?[0-9][0-9.eE+-]*")
_MAX_SHOWN_CHARS = 40
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}


def require_json(exchange: Exchange) -> None:
    """Raises UnsupportedMediaTypeError unless the body claims to be plain JSON: a browser must not post it unasked."""
    media_type = (exchange.header(b"content-type") or "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json:
        given = "nothing" if not media_type else f"`{media_type[:_MAX_SHOWN_CHARS]}`"
        raise UnsupportedMediaTypeError(f"Expected request with `Content-Type: application/json`. Given: {given}")
    encoding = (exchange.header(b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(
            f"Expected request without `Content-Encoding`. Given: `{encoding[:_MAX_SHOWN_CHARS]}`; send plain JSON"
        )


async def read_body(exchange: Exchange, max_bytes: int) -> bytes:
    """The whole body, unless it is too large, too slow, or its sender leaves."""
    declared = exchange.header(b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes, f"{int(declared)} bytes")
    loop = asyncio.get_running_loop()
    started = loop.time()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout_at(started + LIMITS.header_timeout_s) as timeout:
            async for part in _body_parts(exchange):
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes, "more")
                parts.append(part)
                timeout.reschedule(started + LIMITS.header_timeout_s + size / _MIN_BODY_BYTES_PER_S)
    except TimeoutError:
        raise RequestTimeoutError("The body of the request came too slowly; send it at once") from None
    return b"".join(parts)


async def discard_body(exchange: Exchange) -> None:
    """Take what is still to come of a body that nobody wants, for a while.

    A connection that is closed with unread bytes is reset, and a client that is still sending never sees its answer.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + LIMITS.linger_s
    with suppress(TimeoutError, ClientGoneError):
        async with asyncio.timeout(LIMITS.linger_idle_s) as timeout:
            while not exchange.has_whole_body:
                await _next_part(exchange)
                timeout.reschedule(min(end, loop.time() + LIMITS.linger_idle_s))


async def _body_parts(exchange: Exchange) -> AsyncIterator[bytes]:
    while not exchange.has_whole_body:
        yield await _next_part(exchange)


async def _next_part(exchange: Exchange) -> bytes:
    message = await exchange.receive()
    if message["type"] == "http.disconnect":
        raise ClientGoneError("The client left while it sent its request")
    exchange.has_whole_body = not message.get("more_body", False)
    part: bytes = message.get("body", b"")
    return part


def decode(body: bytes, body_type: type[Body]) -> Body:
    """Raises MalformedJsonError for what is no JSON, BadRequestError naming the field for a wrong or repeated one."""
    check_depth(body)
    try:
        decoded: Body = _decoder(body_type).decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        detail = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise _malformed(detail.removeprefix("JSON is malformed: ")) from None
    check_unique_names(body)
    _note_unknown_fields(body, body_type)
    return decoded


def decode_query(exchange: Exchange, query_type: type[Body]) -> Body:
    """The query as a struct; of a repeated name, the last. Raises BadRequestError naming the parameter."""
    query: bytes = exchange.scope["query_string"]
    try:
        given = dict(parse_qsl(query.decode("latin-1"), max_num_fields=LIMITS.max_headers))
    except ValueError:
        raise BadRequestError(f"The query must have at most {LIMITS.max_headers} parameters") from None
    try:
        decoded = msgspec.convert(given, query_type, strict=False)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error), json.dumps(given).encode()) from None
    for name in given.keys() & set(query_type.__struct_encode_fields__):
        # A query has texts only: what was read as JSON's null is the word.
        if getattr(decoded, name) is None:
            raise _type_error(name, f"`{name}` must have a value or be left out. Given: null")
    return decoded


def check_depth(body: bytes) -> None:
    """Raises BadRequestError for JSON of too many levels or too many arrays and objects, before anything recurses.

    A body with few brackets cannot be deep, and most bodies have few. Of the others the innermost pairs are taken away
    until none is left, once per level, which costs no step of Python's per bracket.
    """
    limit = LIMITS.max_json_depth
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    brackets = _outside_of_strings(body).translate(_ONE_KIND_OF_BRACKET, _NO_BRACKETS)
    num_containers = brackets.count(b"[")
    if num_containers > LIMITS.max_json_containers:
        raise BadRequestError(
            f"The JSON body must have at most {LIMITS.max_json_containers} arrays and objects, nested at most {limit} "
            f"levels deep. Given: {num_containers}; send less"
        )
    for _ in range(limit):
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or brackets.count(b"[") > limit:
        raise BadRequestError(f"The JSON body must not be nested deeper than {limit} levels; flatten it")


def check_unique_names(body: bytes) -> None:
    """Raises BadRequestError for an object that has a name twice: two readers could take different values for it.

    `body` is JSON as far as `decode` has read it. Names are counted before and after a reader has merged them. Raises
    MalformedJsonError for what `decode` skipped and is no JSON.
    """
    try:
        merged = msgspec.json.encode(_READER.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _malformed("a text is not UTF-8, or an integer has thousands of digits") from None
    if _outside_of_strings(merged).count(b":") != _outside_of_strings(body).count(b":"):
        name = _repeated_name(body)
        raise _type_error(name, f"duplicate field `{name}`; send it once")


def _repeated_name(body: bytes) -> str:
    """A name that stands twice in one object."""

    def read(pairs: list[tuple[str, JsonValue]]) -> None:
        times = Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in times.items() if count > 1)

    repeated: list[str] = []
    json.loads(body, object_pairs_hook=read, parse_int=len, parse_float=len)
    return repeated[0][:_MAX_SHOWN_CHARS]


def _outside_of_strings(body: bytes) -> bytes:
    """What stands between the strings of JSON; also of broken JSON something, and in linear time."""
    without_escapes = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    return b"".join(without_escapes.split(b'"')[::2])


def _member(path: str, name: str) -> str:
    name = name[:_MAX_SHOWN_CHARS]
    return f"{path}.{name}" if path else name


@cache
def _decoder(body_type: type[Struct]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body_type)


def _wrong_type(problem: str, body: bytes) -> BadRequestError:
    """Rewrites msgspec's sentence as one that names the field, what it may be and what it was."""
    text, _, place = problem.partition(" - at `$")
    path = place.rstrip("`").removeprefix(".")
    if missing := _MISSING_FIELD.search(text):
        name = _member(path, missing["name"])
        return MissingFieldError(f"Missing field `{name}`; add it", field=name)
    name = path or "body"
    number = _number_at(path, body)
    if expected := _EXPECTED.match(text):
        allowed = " or ".join(_WORDS.get(word.strip(), f"`{word.strip()}`") for word in expected["expected"].split("|"))
        allowed += expected["bound"].replace(" or ", " and ")
        given = number or _WORDS.get(expected["given"], expected["given"])
        return _type_error(name, f"`{name}` must be {allowed}" + (f". Given: {given}" if given else ""))
    if "out of range" in text:
        return _type_error(name, f"`{name}` must be a number of usual size. Given: {number or 'a larger one'}")
    return _type_error(name, f"`{name}`: {text[0].lower()}{text[1:]}")


def _number_at(path: str, body: bytes) -> str:
    """The number at a place of the body, as far as it can be shown; "" where none stands."""
    value = msgspec.Raw(body)
    try:
        for step in _STEP.finditer(path):
            if step["index"] is None:
                value = msgspec.json.decode(value, type=dict[str, msgspec.Raw])[step["name"]]
            else:
                value = msgspec.json.decode(value, type=list[msgspec.Raw])[int(step["index"])]
        text = bytes(value).decode().strip()
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError):
        return ""  # the body is broken behind the place that was looked at
    return shortened(text) if _NUMBER.fullmatch(text) else ""


def _type_error(name: str, text: str) -> BadRequestError:
    return BadRequestError(text[0].upper() + text[1:], field=name)


def _malformed(detail: str) -> MalformedJsonError:
    return MalformedJsonError(f"{MalformedJsonError.preface}{detail}. Send one JSON value in UTF-8")


def _too_large(max_bytes: int, given: str) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"Failed to buffer the request body: length limit exceeded. At most {max_bytes} bytes are read "
        f"(--payload-limit). Given: {given}; send less"
    )


def _note_unknown_fields(body: bytes, body_type: type[Struct]) -> None:
    """Clients send fields of other servers; they are accepted, and visible to whoever debugs (only names)."""
    if not log.is_enabled_for(10):
        return
    unknown = sorted(_unknown_names(_READER.decode(body), body_type, ""))
    if unknown:
        log.debug("request.unknown_fields", fields=unknown[:32])


def _unknown_names(given: JsonValue, body_type: type[Struct], path: str) -> Iterator[str]:
    """Paths of members that the type does not have, also in the structs directly inside it."""
    if not isinstance(given, Mapping):
        return
    for name in given.keys() - set(body_type.__struct_encode_fields__):
        yield _member(path, name)
    hints = typing.get_type_hints(body_type)
    for name, inner in given.items():
        for kind in _structs_of(hints.get(name)):
            yield from _unknown_names(inner, kind, name)


def _structs_of(hint: object) -> Iterator[type[Struct]]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Struct):
            yield kind
