"""The client for asyncio. Its methods are those of `Client`, one for one."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
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


class AsyncClient:
    """Talks to one server. An async context manager; may be shared between the tasks of one event loop.

    Every method raises ApiError (by kind, see `errors`), ConnectionFailedError or UnreadableAnswerError; streams also
    StreamInterruptedError. Leaving a stream early (`aclose`, or its end as a generator) ends the generation.
    """

    def __init__(
        self,
        base_url: str = "http://localhost:3000",
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Units: timeout_s bounds each pause between two pieces of an answer, not the whole of it."""
        self._settings = ConnectionSettings.of(base_url, api_key, timeout_s, max_retries)
        self._sleep = sleep
        self._http = httpx2.AsyncClient(
            base_url=self._settings.base_url,
            headers=dict(self._settings.headers),
            timeout=self._settings.timeout,
            transport=transport,
        )

    # TGI's native API

    async def generate(self, inputs: str, **options: Unpack[GenerateOptions]) -> Generation:
        """Continue a text, with TGI's parameters."""
        return await self._answer(calls.generate(inputs, {"details": True, **options}))

    def generate_stream(self, inputs: str, **options: Unpack[GenerateOptions]) -> AsyncGenerator[StreamToken, None]:
        """Continue a text, token by token."""
        return self._events(calls.generate_stream(inputs, {"details": True, **options}))

    async def tokenize(self, inputs: str) -> list[TokenSpan]:
        """The tokens of a text."""
        return await self._answer(calls.tokenize(inputs))

    async def info(self) -> Info:
        """What is served, and within which limits."""
        return await self._answer(calls.info())

    async def health(self) -> Health:
        """Whether requests are served now. Not tried again: not being ready is an answer."""
        async with self._response(Call("GET", "/health", Health)) as response:
            return calls.read_health(response.status_code, response.headers, await response.aread())

    # OpenAI's API

    async def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> ChatCompletion:
        """Answer a conversation."""
        return await self._answer(calls.chat(messages, options))

    def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> AsyncGenerator[ChatChunk, None]:
        """Answer a conversation, piece by piece; the last chunk has the usage."""
        return self._events(calls.chat_stream(messages, options))

    async def completion(
        self, prompt: str | Sequence[int] | Sequence[str], **options: Unpack[CompletionOptions]
    ) -> Completion:
        """Continue a text, token ids, or each of several texts."""
        return await self._answer(calls.completion(prompt, options))

    def completion_stream(
        self, prompt: str | Sequence[int], **options: Unpack[CompletionOptions]
    ) -> AsyncGenerator[Completion, None]:
        """Continue a text, piece by piece; the last event has the usage."""
        return self._events(calls.completion_stream(prompt, options))

    async def models(self) -> list[Model]:
        """What the server serves."""
        return (await self._answer(calls.models())).data

    # The connection

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See `close`."""
        await self.close()

    async def _answer(self, call: Call[Answer]) -> Answer:
        async with self._accepted(call) as response:
            try:
                return call.read(await response.aread())
            except httpx2.TransportError as error:
                raise ConnectionFailedError(f"the connection broke in the answer: {error!r}") from error

    async def _events(self, call: Call[Answer]) -> AsyncGenerator[Answer, None]:
        reader = EventReader(call)
        async with self._accepted(call) as response:
            try:
                async for line in response.aiter_lines():
                    event = reader.push(line)
                    if event is not None:
                        yield event
            except httpx2.TransportError as error:
                raise StreamInterruptedError(f"the connection broke: {error!r}") from error
        reader.finish()

    @asynccontextmanager
    async def _accepted(self, call: Call[Any]) -> AsyncGenerator[httpx2.Response, None]:
        """The response once the server accepts the call, after as many tries as it takes and is allowed."""
        attempt = 0
        while True:
            failure: ApiError | ConnectionFailedError
            try:
                async with self._response(call) as response:
                    if response.status_code == 200:
                        yield response
                        return
                    failure = error_of(response.status_code, response.headers, await response.aread())
            except _NotSentError as error:
                failure = ConnectionFailedError(error.message)
            wait_s = self._settings.wait_before_retry_s(failure, attempt)
            if wait_s is None:
                raise failure
            await self._sleep(wait_s)
            attempt += 1

    @asynccontextmanager
    async def _response(self, call: Call[Any]) -> AsyncGenerator[httpx2.Response, None]:
        request = self._http.build_request(call.method, call.path, content=call.content)
        try:
            response = await self._http.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _NotSentError(f"nobody answers at {self._settings.base_url}: {error!r}") from error
        except httpx2.TransportError as error:
            raise ConnectionFailedError(f"no answer: {error!r}") from error
        try:
            yield response
        finally:
            await response.aclose()


class _NotSentError(ConnectionFailedError):
    """The server has seen nothing of the request, so it may be sent again."""
