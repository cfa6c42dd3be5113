"""The synchronous client. Its methods are those of `AsyncClient`, one for one."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from weft_client import calls
from weft_client.calls import Call, EventReader
from weft_client.errors import ApiError, ConnectionFailedError, StreamInterruptedError, error_of
from weft_client.options import ChatOptions, CompletionOptions, GenerateOptions
from weft_client.settings import ConnectionSettings
from weft_client.types import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Generation,
    Health,
    Info,
    Model,
    StreamToken,
    TokenSpan,
)

Answer = TypeVar("Answer")


class Client:
    """Talks to one server. A context manager; may be shared between threads.

    Every method raises ApiError (by kind, see `errors`), ConnectionFailedError or UnreadableAnswerError; streams also
    StreamInterruptedError. Leaving a stream early (`close`, or its end as a generator) ends the generation.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:3000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Units: timeout_s bounds each pause between two pieces of an answer, not the whole of it."""
        self._settings = ConnectionSettings.of(base_url, api_key, timeout_s, max_retries)
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=self._settings.base_url,
            headers=dict(self._settings.headers),
            timeout=self._settings.timeout,
            transport=transport,
        )

    # TGI's native API

    def generate(self, inputs: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Continue a text, with TGI's parameters."""
        return self._answer(calls.generate(inputs, {"details": True, **options}))

    def generate_stream(self, inputs: str, **options: Unpack[GenerateOptions]) -> Generator[StreamToken, None, None]:
        """Continue a text, token by token."""
        return self._events(calls.generate_stream(inputs, {"details": True, **options}))

    def tokenize(self, inputs: str) -> list[TokenSpan]:
        """The tokens of a text."""
        return self._answer(calls.tokenize(inputs))

    def info(self) -> Info:
        """What is served, and within which limits."""
        return self._answer(calls.info())

    def health(self) -> Health:
        """Whether requests are served now. Not tried again: not being ready is an answer."""
        with self._response(Call("GET", "/health", Health)) as response:
            return calls.read_health(response.status_code, response.headers, response.read())

    # OpenAI's API

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Answer a conversation."""
        return self._answer(calls.chat(messages, options))

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> Generator[ChatChunk, None, None]:
        """Answer a conversation, piece by piece; the last chunk has the usage."""
        return self._events(calls.chat_stream(messages, options))

    def completion(
        self, prompt: str | Sequence[int] | Sequence[str], **options: Unpack[CompletionOptions]
    ) -> Completion:
        """Continue a text, token ids, or each of several texts."""
        return self._answer(calls.completion(prompt, options))

    def completion_stream(
        self, prompt: str | Sequence[int], **options: Unpack[CompletionOptions]
    ) -> Generator[Completion, None, None]:
        """Continue a text, piece by piece; the last event has the usage."""
        return self._events(calls.completion_stream(prompt, options))

    def models(self) -> list[Model]:
        """What the server serves."""
        return self._answer(calls.models()).data

    # The connection

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()

    def _answer(self, call: Call[Answer]) -> Answer:
        with self._accepted(call) as response:
            try:
                return call.read(response.read())
            except httpx2.TransportError as error:
                raise ConnectionFailedError(f"the connection broke in the answer: {error!r}") from error

    def _events(self, call: Call[Answer]) -> Generator[Answer, None, None]:
        reader = EventReader(call)
        with self._accepted(call) as response:
            try:
                for line in response.iter_lines():
                    event = reader.push(line)
                    if event is not None:
                        yield event
            except httpx2.TransportError as error:
                raise StreamInterruptedError(f"the connection broke: {error!r}") from error
        reader.finish()

    @contextmanager
    def _accepted(self, call: Call[Any]) -> Generator[httpx2.Response, None, None]:
        """The response once the server accepts the call, after as many tries as it takes and is allowed."""
        attempt = 0
        while True:
            failure: ApiError | ConnectionFailedError
            try:
                with self._response(call) as response:
                    if response.status_code == 200:
                        yield response
                        return
                    failure = error_of(response.status_code, response.headers, response.read())
            except _NotSentError as error:
                failure = ConnectionFailedError(error.message)
            wait_s = self._settings.wait_before_retry_s(failure, attempt)
            if wait_s is None:
                raise failure
            self._sleep(wait_s)
            attempt += 1

    @contextmanager
    def _response(self, call: Call[Any]) -> Generator[httpx2.Response, None, None]:
        request = self._http.build_request(call.method, call.path, content=call.content)
        try:
            response = self._http.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _NotSentError(f"nobody answers at {self._settings.base_url}: {error!r}") from error
        except httpx2.TransportError as error:
            raise ConnectionFailedError(f"no answer: {error!r}") from error
        try:
            yield response
        finally:
            response.close()


class _NotSentError(ConnectionFailedError):
    """The server has seen nothing of the request, so it may be sent again."""
