"""What can go wrong, one class for each thing a caller may want to do about it.

ClientError
├── ApiError                  the server answered with an error
│   ├── InvalidRequestError      400, 413, 422: change the request; `param` names the field
│   ├── AuthenticationError      401, 403
│   ├── NotFoundError            404: no such route or model
│   ├── OverloadedError          429: try later, `retry_after_s`
│   ├── NotReadyError            503: loading, restarting or draining
│   └── ServerError              anything else
├── InvalidArgumentError      what was asked for cannot be sent; nothing was
├── ConnectionFailedError     nobody answered, or the connection broke
├── StreamInterruptedError    a stream ended in the middle; `message` says why if the server did
└── UnreadableAnswerError     what came back is not what this API sends
"""

from collections.abc import Mapping

import msgspec

_MAX_TEXT_CHARS = 500


class ClientError(Exception):
    """Root of everything that this package raises."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidArgumentError(ClientError, ValueError):
    """An argument of this package is wrong, or cannot stand in a request; the message names it. Nothing was sent."""


class ConnectionFailedError(ClientError):
    """Nobody answered, or the connection broke before the answer was whole."""


class StreamInterruptedError(ClientError):
    """A stream ended before its last event. What it sent until then is valid, and incomplete."""


class UnreadableAnswerError(ClientError):
    """The answer is not of this API: probably another kind of server."""


class ApiError(ClientError):
    """The server answered with an error.

    status         HTTP status
    code           stable name of the failure: `error.code`, or TGI's `error_type`
    param          the field at fault, where the server names one
    request_id     what to search the server's log for
    retry_after_s  when the server asks to come back
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class InvalidRequestError(ApiError):
    """The request is at fault; sending it again is of no use."""


class AuthenticationError(ApiError):
    """The API key is missing, wrong, or not allowed to do this."""


class NotFoundError(ApiError):
    """There is no such route or model."""


class OverloadedError(ApiError):
    """Every place is taken."""


class NotReadyError(ApiError):
    """The model is loading or restarting, or the server is about to end."""


class ServerError(ApiError):
    """The server failed."""


_CLASSES: Mapping[int, type[ApiError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    413: InvalidRequestError,
    422: InvalidRequestError,
    429: OverloadedError,
    503: NotReadyError,
}


def error_of(status: int, headers: Mapping[str, str], content: bytes) -> ApiError:
    """The error that an answer stands for: OpenAI's object, TGI's two fields, or any other text."""
    message, code, param = read_error(content)
    return _CLASSES.get(status, ServerError)(
        f"{status}: {message}",
        status=status,
        code=code,
        param=param,
        request_id=headers.get("x-request-id"),
        retry_after_s=retry_after_s(headers),
    )


def read_error(content: bytes) -> tuple[str, str | None, str | None]:
    """(message, code, field) of an error's body."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict):
        return (
            str(error.get("message")),
            _text(error.get("code")) or _text(error.get("type")),
            _text(error.get("param")),
        )
    if isinstance(error, str) and isinstance(body, dict):
        return error, _text(body.get("error_type")), None
    return content.decode(errors="replace").strip()[:_MAX_TEXT_CHARS] or "no further explanation", None, None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait; None when it names none (dates, which nobody here sends, included)."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    return None
