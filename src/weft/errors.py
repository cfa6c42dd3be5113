"""Every way a user or the environment can be at fault.

    WeftError
    ├── RequestError                 ends one request; has an HTTP status
    │   ├── BadRequestError          the body is not what the route reads (JSON, type, content type)
    │   ├── ValidationError          a field has a value outside its range (NotSupported, ContextLength, …)
    │   ├── TemplateError            the chat template refused the messages
    │   ├── UnauthorizedError  NotFoundError  PayloadTooLargeError  MethodNotAllowedError  UnsupportedMediaTypeError
    │   ├── RequestTimeoutError      headers or body came too slowly
    │   ├── OverloadedError          too many requests; carries retry_after_s
    │   ├── NotReadyError            loading or draining; carries retry_after_s
    │   ├── DeadlineError            waited in the queue past its deadline
    │   ├── GenerationError          the engine could not go on with this request
    │   ├── NumericalError           the model produced NaN for this request
    │   ├── IncompleteGenerationError   a stream ended without a final token
    │   ├── InternalError            a bug met this request
    │   └── ClientGoneError          the client left; nobody reads this answer
    ├── StartupError                 ends the process; has an exit code
    │   ├── UsageError (2)  ModelNotFoundError (3)  DoesNotFitError (4)  DeviceError (5)  PortInUseError (6)
    └── EngineFatal                  the shard cannot be trusted any more and must restart

A bug is not in this tree: it is an `assert` or `InvariantBroken` (an EngineFatal: better no tokens than wrong ones).
Texts name the field or flag, the value, the allowed range and what to do; never a path, a prompt or a repr.
"""

from typing import ClassVar


class WeftError(Exception):
    """Root of every expected failure."""

    code: ClassVar[str] = "internal_error"
    """Stable name of the failure, the same on the wire, in metrics and in the documentation."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class RequestError(WeftError):
    """Ends one request and touches no other.

    http_status   on native routes
    openai_status on `/v1` routes
    error_type    TGI's word for it (`error_type` in its JSON bodies)
    openai_type   `error.type` on `/v1` routes
    openai_code   `error.code` on `/v1` routes, where OpenAI has a word of its own; "" = `code`
    """

    code = "request_error"
    http_status: ClassVar[int] = 424
    openai_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "generation"
    openai_type: ClassVar[str] = "server_error"
    openai_code: ClassVar[str] = ""
    metric_label: ClassVar[str] = "generation"
    """Value of `err` in `tgi_request_failure`."""

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_s = retry_after_s


class BadRequestError(RequestError):
    """The body cannot be read as what the route expects: syntax, type of a field, missing field."""

    code = "invalid_body"
    openai_code = "invalid_type"
    http_status = 422
    openai_status = 400
    error_type = "validation"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class MalformedJsonError(BadRequestError):
    """The body is no JSON."""

    code = "invalid_json"
    openai_code = ""
    http_status = 400
    preface: ClassVar[str] = "The request body is not valid JSON: "
    """How its message begins, where the dialect has no such beginning of its own."""


class MissingFieldError(BadRequestError):
    """The body lacks a field that the route needs."""

    code = "missing_field"
    openai_code = "missing_required_parameter"


class ValidationError(RequestError):
    """A field is readable but its value is not allowed."""

    code = "validation"
    openai_code = "invalid_value"
    http_status = 422
    openai_status = 400
    error_type = "validation"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class NotSupportedError(ValidationError):
    """A field of the API that this server knows and does not implement."""

    code = "not_supported"
    openai_code = "unsupported_parameter"


class EncodingError(ValidationError):
    """The bytes of a KServe tensor are no UTF-8."""

    code = "utf8"
    openai_code = ""
    error_type = "utf8"


class TensorCountError(ValidationError):
    """A KServe request asks for more or fewer outputs than it has inputs."""

    code = "length_mismatch"
    openai_code = ""
    error_type = "length mismatch"


class PreviousResponseNotFoundError(ValidationError):
    """`previous_response_id` names no stored response."""

    code = "previous_response_not_found"
    openai_code = ""


class ContextLengthError(ValidationError):
    """Prompt and completion do not fit the context."""

    code = "context_length_exceeded"
    openai_code = ""


class TemplateError(RequestError):
    """The chat template is missing, failed, or called `raise_exception`."""

    code = "template_error"
    http_status = 422
    openai_status = 400
    error_type = "template_error"
    openai_type = "invalid_request_error"
    metric_label = "template"


class UnauthorizedError(RequestError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"
    http_status = 401
    openai_status = 401
    error_type = "unauthorized"
    openai_type = "invalid_request_error"
    metric_label = "unauthorized"


class NotFoundError(RequestError):
    """No such route."""

    code = "not_found"
    http_status = 404
    openai_status = 404
    error_type = "not_found"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class ModelNotServedError(NotFoundError):
    """`model` names something this server does not serve."""

    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    """The route exists for another method."""

    code = "method_not_allowed"
    allowed: tuple[str, ...] = ()
    """Methods that the route has, for the header `Allow`."""
    openai_code = "method_not_supported"
    http_status = 405
    openai_status = 405
    error_type = "method_not_allowed"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class UnsupportedMediaTypeError(RequestError):
    """The content type is not JSON."""

    code = "unsupported_media_type"
    http_status = 415
    openai_status = 415
    error_type = "validation"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class PayloadTooLargeError(RequestError):
    """The body is larger than `--payload-limit`."""

    code = "payload_too_large"
    http_status = 413
    openai_status = 413
    error_type = "validation"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class HeadersTooLargeError(RequestError):
    """The request's headers are more or longer than allowed."""

    code = "headers_too_large"
    http_status = 431
    openai_status = 431
    error_type = "validation"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class RequestTimeoutError(RequestError):
    """The client took too long to send its request."""

    code = "request_timeout"
    http_status = 408
    openai_status = 408
    error_type = "validation"
    openai_type = "invalid_request_error"
    metric_label = "validation"


class OverloadedError(RequestError):
    """Every place, running and waiting, is taken."""

    code = "overloaded"
    openai_code = "rate_limit_exceeded"
    http_status = 429
    openai_status = 429
    error_type = "overloaded"
    openai_type = "rate_limit_error"
    metric_label = "overloaded"


class NotReadyError(RequestError):
    """The model is loading, restarting, or the server is draining."""

    code = "not_ready"
    http_status = 503
    openai_status = 503
    error_type = "healthcheck"
    openai_type = "server_error"
    metric_label = "unavailable"


class DeadlineError(RequestError):
    """The request waited longer than its deadline allows."""

    code = "deadline_exceeded"
    http_status = 503
    openai_status = 503
    error_type = "overloaded"
    openai_type = "server_error"
    metric_label = "overloaded"


class GenerationError(RequestError):
    """The engine lost this request (for example: its shard died)."""

    code = "generation"
    openai_status = 503


class NumericalError(GenerationError):
    """The logits of this request were not numbers, twice."""

    code = "numerical_error"
    openai_status = 500


class IncompleteGenerationError(RequestError):
    """A stream ended without its final token."""

    code = "incomplete_generation"
    http_status = 500
    openai_status = 500
    error_type = "incomplete_generation"
    metric_label = "incomplete"


class InternalError(RequestError):
    """A bug: the answer to a request whose handler raised something that nobody expected."""

    code = "internal_error"
    http_status = 500
    openai_status = 500


class ClientGoneError(RequestError):
    """The client closed the connection. 499 is nginx' status for it; it appears in logs only."""

    code = "client_gone"
    http_status = 499
    openai_status = 499
    error_type = "dropped"
    metric_label = "dropped"


class StartupError(WeftError):
    """Ends the process before it serves."""

    code = "startup"
    exit_code: ClassVar[int] = 1


class UsageError(StartupError):
    """Flags, environment or configuration file are wrong; the message lists every fault found."""

    code = "usage"
    exit_code = 2


class ModelNotFoundError(StartupError):
    """The model, or a file of it, cannot be found, read or accessed."""

    code = "model_not_found"
    exit_code = 3


class DoesNotFitError(StartupError):
    """Weights, cache or disk space do not fit."""

    code = "does_not_fit"
    exit_code = 4


class DeviceError(StartupError):
    """The device is missing or unusable."""

    code = "device"
    exit_code = 5


class PortInUseError(StartupError):
    """The port or socket is taken or not allowed."""

    code = "port_in_use"
    exit_code = 6


class EngineFatal(WeftError):
    """The shard must restart: the device is lost or its state is not to be trusted."""

    code = "engine_fatal"


class InvariantBroken(EngineFatal):
    """A statement that must always hold does not. Always a bug; the state is in the message."""

    code = "invariant_broken"


def by_code() -> dict[str, type[RequestError]]:
    """Code → request error class, so that a failure keeps its class across the wire."""
    found: dict[str, type[RequestError]] = {}
    pending: list[type[RequestError]] = [RequestError]
    while pending:
        cls = pending.pop()
        found.setdefault(cls.code, cls)
        pending.extend(cls.__subclasses__())
    return found
