"""From the bytes of a body to a typed struct: limits first, then JSON, then types, with errors that name the field.

Source: RELIABILITY laws 1 and 2; messages of axum's JSON extractor as TGI 3.3.7 shows them
"""

import asyncio
import re
from collections.abc import AsyncIterator
from functools import cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import msgspec
import structlog
from msgspec import Struct
from starlette.types import Receive

from weft.errors import (
    BadRequestError,
    ClientGoneError,
    MalformedJsonError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from weft.limits import LIMITS
from weft.router.exchange import Exchange

log = structlog.get_logger("weft.http")

Body = TypeVar("Body", bound=Struct)

_MIN_BODY_BYTES_PER_S = 16 * 1024
"""A client that sends more slowly than this, after `header_timeout_s` of grace, holds a connection for nothing."""

_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
# Possessive, and an unterminated string matches too: linear time whatever the bytes.
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>[^`]+)`")
_EXPECTED = re.compile(r"Expected `(?P<expected>[^`]+)`(?P<bound>[^,]*)(?:, got `(?P<given>[^`]+)`)?")
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
    """Raises UnsupportedMediaTypeError unless the body claims to be JSON: a browser must not post it unasked."""
    media_type = (exchange.header(b"content-type") or "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json:
        raise UnsupportedMediaTypeError("Expected request with `Content-Type: application/json`")


async def read_body(exchange: Exchange, max_bytes: int) -> bytes:
    """The whole body, unless it is too large, too slow, or its sender leaves."""
    declared = exchange.header(b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    loop = asyncio.get_running_loop()
    started = loop.time()
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout_at(started + LIMITS.header_timeout_s) as timeout:
            async for part in _body_parts(exchange.receive):
                size += len(part)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(part)
                timeout.reschedule(started + LIMITS.header_timeout_s + size / _MIN_BODY_BYTES_PER_S)
    except TimeoutError:
        raise RequestTimeoutError("The body of the request came too slowly; send it at once") from None
    return b"".join(parts)


async def _body_parts(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("The client left while it sent its request")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def decode(body: bytes, body_type: type[Body]) -> Body:
    """Raises MalformedJsonError for what is no JSON, BadRequestError naming the field for a wrong type."""
    check_depth(body)
    try:
        decoded: Body = _decoder(body_type).decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        detail = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise MalformedJsonError(f"The request body is not valid JSON: {detail}") from None
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
        return msgspec.convert(given, query_type, strict=False)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from None


def check_depth(body: bytes) -> None:
    """Raises BadRequestError when JSON is nested deeper than `limits.max_json_depth`, before anything recurses.

    A body with few brackets cannot be deep, and most bodies have few; the others are scanned once, strings skipped.
    """
    limit = LIMITS.max_json_depth
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        sign = match[0]
        if sign in (b"[", b"{"):
            depth += 1
            if depth > limit:
                raise BadRequestError(f"The JSON body must not be nested deeper than {limit} levels; flatten it")
        elif sign in (b"]", b"}"):
            depth -= 1


@cache
def _decoder(body_type: type[Struct]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(body_type)


def _wrong_type(problem: str) -> BadRequestError:
    """Rewrites msgspec's sentence as one that names the field, what it may be and what it was."""
    text, _, place = problem.partition(" - at `$")
    path = place.rstrip("`").removeprefix(".")
    if missing := _MISSING_FIELD.search(text):
        name = f"{path}.{missing['name']}" if path else missing["name"]
        return _type_error(name, f"missing field `{name}`; add it")
    name = path or "body"
    if expected := _EXPECTED.match(text):
        allowed = " or ".join(_WORDS.get(word.strip(), f"`{word.strip()}`") for word in expected["expected"].split("|"))
        allowed += expected["bound"].replace(" or ", " and ")
        given = f". Given: {_WORDS.get(expected['given'], expected['given'])}" if expected["given"] else ""
        return _type_error(name, f"`{name}` must be {allowed}{given}")
    return _type_error(name, f"`{name}`: {text[0].lower()}{text[1:]}")


def _type_error(name: str, text: str) -> BadRequestError:
    return BadRequestError(text[0].upper() + text[1:], field=name)


def _too_large(max_bytes: int) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"Failed to buffer the request body: length limit exceeded. At most {max_bytes} bytes are read "
        "(--payload-limit)"
    )


def _note_unknown_fields(body: bytes, body_type: type[Struct]) -> None:
    """Clients send fields of other servers; they are accepted, and visible to whoever debugs (only names)."""
    if not log.is_enabled_for(10):
        return
    names = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()
    unknown = sorted(names - set(body_type.__struct_encode_fields__))
    if unknown:
        log.debug("request.unknown_fields", fields=[name[:64] for name in unknown[:32]])
