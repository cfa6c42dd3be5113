"""Every call as data: what is sent, how the answer is read, what a stream must end with. No input or output here, so
that the synchronous and the asynchronous client cannot differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from weft_client.errors import StreamInterruptedError, UnreadableAnswerError, error_of, read_error
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
        """The bytes of the body."""
        return None if self.body is None else msgspec.json.encode(self.body)

    def read(self, content: bytes) -> Answer:
        """The answer. Raises UnreadableAnswerError."""
        return _decode(content, self.answer)


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
    return Call("POST", "/v1/chat/completions", ChatCompletion, {"messages": list(messages), **_openai(options)})


def chat_stream(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Call[ChatChunk]:
    """POST /v1/chat/completions, streamed."""
    body = {"messages": list(messages), **_openai(options), **_STREAMED}
    return Call("POST", "/v1/chat/completions", ChatChunk, body)


def completion(prompt: str | Sequence[int] | Sequence[str], options: Mapping[str, Any]) -> Call[Completion]:
    """POST /v1/completions."""
    return Call("POST", "/v1/completions", Completion, {"prompt": prompt, **_openai(options)})


def completion_stream(prompt: str | Sequence[int], options: Mapping[str, Any]) -> Call[Completion]:
    """POST /v1/completions, streamed."""
    return Call("POST", "/v1/completions", Completion, {"prompt": prompt, **_openai(options), **_STREAMED})


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
