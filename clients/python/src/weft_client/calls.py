"""Every call as data: what is sent, how the answer is read, what a stream must end with. No input or output here, so
that the synchronous and the asynchronous client cannot differ.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from weft_client.errors import InvalidArgumentError, StreamInterruptedError, UnreadableAnswerError, error_of, read_error
from weft_client.types import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Generation,
    Health,
    Info,
    ModelList,
    StreamToken,
    TokenSpan,
)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One request and the type of its answer, or of each event of its stream."""

    method: str
    path: str
    answer: type[Answer]
    body: Mapping[str, Any] | None = None

    @property
    def content(self) -> bytes | None:
        """The bytes of the body. Raises InvalidArgumentError for what JSON cannot say."""
        if self.body is None:
            return None
        try:
            _check_leaves(self.body)
            return msgspec.json.encode(self.body)
        except InvalidArgumentError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"the request cannot be written as JSON: {error}") from error

    def read(self, content: bytes) -> Answer:
        """The answer. Raises UnreadableAnswerError."""
        return _decode(content, self.answer)


def _check_leaves(body: object) -> None:
    """Raises InvalidArgumentError for values that JSON has no words for: msgspec would send null instead of NaN."""
    for name, value in _leaves(body, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidArgumentError(f"`{name}` must be a finite number. Given: {value}")
        if isinstance(value, str) and not _is_unicode(value):
            raise InvalidArgumentError(f"`{name}` must be valid Unicode; it holds half of a surrogate pair")


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """(path, value) of everything in a body that is no container."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{name}[{place}]")
    else:
        yield name, value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(content: bytes, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnreadableAnswerError(f"the answer is not of this API: {error}") from error


class EventReader(Generic[Answer]):
    """Reads one stream of server-sent events, line by line. `finish` when there are no more lines."""

    def __init__(self, call: Call[Answer]) -> None:
        self._call = call
        self._is_complete = False

    def push(self, line: str) -> Answer | None:
        """The event of a line; None for lines without one.

        Raises   StreamInterruptedError: the server reports that it failed · UnreadableAnswerError
        """
        if not line.startswith("data:"):
            return None
        data = line.removeprefix("data:").strip().encode()
        if data == b"[DONE]":
            self._is_complete = True
            return None
        if bytes(_decode(data, _ErrorProbe).error) != b"null":
            raise StreamInterruptedError(read_error(data)[0])
        event = _decode(data, self._call.answer)
        if isinstance(event, StreamToken) and event.generated_text is not None:
            self._is_complete = True
        return event

    def finish(self) -> None:
        """Raises StreamInterruptedError when the stream ended before its last event."""
        if not self._is_complete:
            raise StreamInterruptedError("the stream ended before its last event")


class _ErrorProbe(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"null")


def generate(inputs: str, options: Mapping[str, Any]) -> Call[Generation]:
    """POST /generate."""
    return Call("POST", "/generate", Generation, {"inputs": inputs, "parameters": dict(options)})


def generate_stream(inputs: str, options: Mapping[str, Any]) -> Call[StreamToken]:
    """POST /generate_stream."""
    return Call("POST", "/generate_stream", StreamToken, {"inputs": inputs, "parameters": dict(options)})


def chat(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Call[ChatCompletion]:
    """POST /v1/chat/completions."""
    return Call("POST", "/v1/chat/completions", ChatCompletion, {"messages": _plain(messages), **_openai(options)})


def chat_stream(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Call[ChatChunk]:
    """POST /v1/chat/completions, streamed."""
    body = {"messages": _plain(messages), **_openai(options), **_STREAMED}
    return Call("POST", "/v1/chat/completions", ChatChunk, body)


def completion(prompt: str | Sequence[int] | Sequence[str], options: Mapping[str, Any]) -> Call[Completion]:
    """POST /v1/completions."""
    return Call("POST", "/v1/completions", Completion, {"prompt": prompt, **_openai(options)})


def completion_stream(prompt: str | Sequence[int], options: Mapping[str, Any]) -> Call[Completion]:
    """POST /v1/completions, streamed."""
    return Call("POST", "/v1/completions", Completion, {"prompt": prompt, **_openai(options), **_STREAMED})


def _plain(messages: object) -> object:
    """A list of any sequence; what is none is sent as it is, for the server to say what is wrong with it."""
    return list(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else messages


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def _openai(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(options)
    extra = fields.pop("extra", {})
    return {**fields, **extra}


def models() -> Call[ModelList]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", ModelList)


def info() -> Call[Info]:
    """GET /info."""
    return Call("GET", "/info", Info)


def tokenize(inputs: str) -> Call[list[TokenSpan]]:
    """POST /tokenize."""
    return Call("POST", "/tokenize", list[TokenSpan], {"inputs": inputs})


class _HealthBody(msgspec.Struct):
    error: str = ""
    state: str = ""
    phase: str = ""
    percent: float = 0.0


def read_health(status: int, headers: Mapping[str, str], content: bytes) -> Health:
    """What an answer of /health says. Raises ApiError for answers that say nothing about health."""
    if status == 200:
        return Health(is_ready=True, state="ready", percent=100.0)
    if status != 503:
        raise error_of(status, headers, content)
    try:
        body = msgspec.json.decode(content, type=_HealthBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        body = _HealthBody()
    return Health(is_ready=False, state=body.state, phase=body.phase, percent=body.percent, message=body.error)
