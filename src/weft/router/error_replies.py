"""An error as bytes, in the dialect of its route: TGI's `{error, error_type}`, OpenAI's or Anthropic's error object."""

import math
from enum import StrEnum

import msgspec

from weft.errors import (
    BadRequestError,
    DeadlineError,
    GenerationError,
    IncompleteGenerationError,
    MalformedJsonError,
    MethodNotAllowedError,
    NotReadyError,
    OverloadedError,
    RequestError,
    TemplateError,
    UnauthorizedError,
    ValidationError,
)
from weft.router.exchange import Exchange, RawHeaders
from weft.router.lifecycle import Progress
from weft.router.schemas_anthropic import AnthropicError, AnthropicErrorBody
from weft.router.schemas_native import ErrorResponse, NotReadyResponse
from weft.router.schemas_openai import ErrorBody, OpenAIError
from weft.router.stream import DONE_FRAME, frame, named_frame

_NATIVE_PREFIXES: tuple[tuple[type[RequestError], str], ...] = (
    (MalformedJsonError, "Failed to parse the request body as JSON: "),
    (BadRequestError, "Failed to deserialize the JSON body into the target type: "),
    (ValidationError, "Input validation error: "),
    (TemplateError, "Template error: "),
    (GenerationError, "Request failed during generation: "),
)


_WORTH_RETRYING = (OverloadedError, NotReadyError, DeadlineError)
_DEFAULT_RETRY_AFTER_S = 2.0
"""For errors that came over the wire, which carries no times."""


class Dialect(StrEnum):
    """Who speaks."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Status → `error.type`; what is not here is `invalid_request_error` below 500 and `api_error` above."""


def dialect_of(path: str) -> Dialect:
    """The dialect of a path, known or not."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return Dialect.ANTHROPIC
    return Dialect.OPENAI if path == "/v1" or path.startswith("/v1/") else Dialect.NATIVE


def speaks_anthropic(exchange: Exchange) -> bool:
    """Whether a client of Anthropic asks; its paths are in part those of OpenAI."""
    return exchange.header(b"anthropic-version") is not None


def dialect_for(exchange: Exchange) -> Dialect:
    """The dialect in which an exchange's errors are said."""
    dialect = dialect_of(exchange.speaks_like or exchange.scope["path"])
    return Dialect.ANTHROPIC if dialect is Dialect.OPENAI and speaks_anthropic(exchange) else dialect


def status_of(error: RequestError, dialect: Dialect) -> int:
    """HTTP status."""
    return error.http_status if dialect is Dialect.NATIVE else error.openai_status


def body_of(error: RequestError, dialect: Dialect, progress: Progress, request_id: str) -> bytes:
    """JSON body."""
    if dialect is Dialect.ANTHROPIC:
        return msgspec.json.encode(_anthropic(error, request_id))
    if dialect is Dialect.OPENAI:
        return msgspec.json.encode(_openai(error))
    if isinstance(error, NotReadyError):
        return msgspec.json.encode(
            NotReadyResponse(
                error=error.message,
                error_type=error.error_type,
                state=progress.state,
                phase=progress.phase,
                percent=progress.percent,
            )
        )
    return msgspec.json.encode(_native(error))


def headers_of(error: RequestError) -> RawHeaders:
    """Headers that tell a client what to do next."""
    headers: RawHeaders = []
    retry_after_s = error.retry_after_s
    if retry_after_s is None and isinstance(error, _WORTH_RETRYING):
        retry_after_s = _DEFAULT_RETRY_AFTER_S
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(retry_after_s))))
    if isinstance(error, UnauthorizedError):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowedError):
        headers.append((b"allow", ", ".join(error.allowed).encode()))
    return headers


def native_end_frames(error: RequestError) -> bytes:
    """The last event of a native stream that fails; the stream then simply ends."""
    body = _native(error)
    if isinstance(error, IncompleteGenerationError):
        body = ErrorResponse(error="Incomplete generation stream", error_type="incomplete_generation_stream")
    return frame(body)


def openai_end_frames(error: RequestError) -> bytes:
    """The last events of a `/v1` stream that fails."""
    return frame(_openai(error)) + DONE_FRAME


def anthropic_end_frames(error: RequestError, request_id: str) -> bytes:
    """The last event of a stream of `/v1/messages` that fails."""
    return named_frame("error", _anthropic(error, request_id))


def _anthropic(error: RequestError, request_id: str) -> AnthropicError:
    status = error.openai_status
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return AnthropicError(error=AnthropicErrorBody(type=kind, message=error.message), request_id=request_id)


def _native(error: RequestError) -> ErrorResponse:
    prefix = next((prefix for kind, prefix in _NATIVE_PREFIXES if isinstance(error, kind)), "")
    message = error.message.removeprefix(MalformedJsonError.preface)
    return ErrorResponse(error=prefix + message, error_type=error.error_type)


def _openai(error: RequestError) -> OpenAIError:
    return OpenAIError(
        error=ErrorBody(
            message=error.message, type=error.openai_type, param=error.field, code=error.openai_code or error.code
        )
    )
