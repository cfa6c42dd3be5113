"""Load over HTTP: streamed requests, sent in a closed or an open loop, each reply with its own clock.

The generator usually shares its cores with the server under test, so a streamed token must cost it little: one
`asyncio.Protocol` per request, httptools for the framing, one typed JSON decode per event, one clock reading per
read from the socket. Nothing here knows which server answers: OpenAI's two dialects and TGI's are all read.

A reply that is not complete is an error and never counts as speed: wrong status, an error event, a connection that
closes before the end of the stream, no token at all.
"""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import msgspec

MAX_ERROR_CHARS = 300
"""How much of an error body a reply keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go. `headers` are sent as they are, for example an API key."""

    host: str
    port: int
    path: str = "/v1/completions"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True, kw_only=True)
class Reply:
    """What came back for one request. Times are nanoseconds of one monotonic clock."""

    sent_ns: int
    finished_ns: int = 0
    status: int = 0
    token_ns: list[int] = field(default_factory=list)
    """Arrival of each event that carried text (several tokens may share one event)."""
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    """0 when the server reported no usage."""
    completion_tokens: int = 0
    """As the server reported them, otherwise the number of events with text."""
    cached_tokens: int = 0
    error: str | None = None

    @property
    def time_to_first_token_ns(self) -> int | None:
        """TTFT: from sending to the first event with text. None when there was none."""
        return self.token_ns[0] - self.sent_ns if self.token_ns else None

    @property
    def inter_token_ns(self) -> list[int]:
        """ITL: gaps between successive events with text."""
        return [later - earlier for earlier, later in zip(self.token_ns, self.token_ns[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _CachedDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedDetails | None = None


class _NativeToken(msgspec.Struct):
    text: str = ""


class _NativeDetails(msgspec.Struct):
    finish_reason: str | None = None
    generated_tokens: int = 0
    input_length: int = 0


class _Event(msgspec.Struct):
    """One server-sent event of either dialect; fields that nobody measures are skipped."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    token: _NativeToken | None = None
    generated_text: str | None = None
    details: _NativeDetails | None = None
    error: object = None


_decode_event = msgspec.json.Decoder(_Event).decode


class _Exchange(asyncio.Protocol):
    """One request and its streamed reply on a connection of its own."""

    def __init__(self, payload: bytes, reply: Reply, done: asyncio.Future[None]) -> None:
        self._payload = payload
        self._reply = reply
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.BaseTransport | None = None
        self._pending = b""
        self._now_ns = 0
        self._texts: list[str] = []
        self._is_complete = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._reply.sent_ns = time.perf_counter_ns()
        # uvloop's transports write but are no subclass of asyncio.WriteTransport.
        cast("asyncio.WriteTransport", transport).write(self._payload)

    def data_received(self, data: bytes) -> None:
        self._now_ns = time.perf_counter_ns()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, msgspec.DecodeError) as error:
            self._fail(f"unreadable reply: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._now_ns = time.perf_counter_ns()
            self._finish(f"connection closed: {exc}" if exc else None)

    # httptools

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._pending += body
            return
        lines = (self._pending + body).split(b"\n")
        self._pending = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip())

    def on_message_complete(self) -> None:
        self._finish(None)

    def _on_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self._is_complete = True
            return
        event = _decode_event(data)
        if event.error is not None:
            self._fail(f"error event: {data.decode(errors='replace')}")
            return
        reply = self._reply
        if event.usage is not None:
            reply.prompt_tokens = event.usage.prompt_tokens
            reply.completion_tokens = event.usage.completion_tokens
            if event.usage.prompt_tokens_details is not None:
                reply.cached_tokens = event.usage.prompt_tokens_details.cached_tokens or 0
        for choice in event.choices:
            self._on_text(choice.text or (choice.delta.content if choice.delta else None))
            if choice.finish_reason:
                reply.finish_reason = choice.finish_reason
        if event.token is not None:
            self._on_text(event.token.text)
            self._is_complete |= event.generated_text is not None
        if event.details is not None:
            reply.finish_reason = event.details.finish_reason
            reply.prompt_tokens = event.details.input_length
            reply.completion_tokens = event.details.generated_tokens

    def _on_text(self, text: str | None) -> None:
        if text:
            self._reply.token_ns.append(self._now_ns)
            self._texts.append(text)

    def _fail(self, error: str) -> None:
        self._reply.error = error[:MAX_ERROR_CHARS]
        self._finish(None)

    def _finish(self, error: str | None) -> None:
        if self._done.done():
            return
        reply = self._reply
        reply.finished_ns = self._now_ns
        reply.status = self._parser.get_status_code()
        reply.text = "".join(self._texts)
        reply.completion_tokens = reply.completion_tokens or len(reply.token_ns)
        reply.error = reply.error or error or self._incompleteness()
        self._done.set_result(None)
        if self._transport is not None:
            self._transport.close()

    def _incompleteness(self) -> str | None:
        if self._reply.status != 200:
            return f"status {self._reply.status} {self._pending.decode(errors='replace')}"[:MAX_ERROR_CHARS]
        if not (self._is_complete or self._reply.finish_reason):
            return "the stream ended early"
        if not self._reply.token_ns:
            return "no text"
        return None


def encode_request(target: Target, body: dict[str, Any]) -> bytes:
    """The bytes of a POST with a JSON body on a connection that closes afterwards."""
    content = msgspec.json.encode(body)
    head = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.host}:{target.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
        *(f"{name}: {value}" for name, value in target.headers),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


async def stream_request(
    target: Target, body: dict[str, Any], timeout_s: float = 600.0, reply: Reply | None = None
) -> Reply:
    """Send one request and read its stream to the end. Failures are in `Reply.error`, never raised.

    A `reply` that is passed in is filled as the stream arrives, for whoever watches it, and returned.
    """
    loop = asyncio.get_running_loop()
    reply = reply or Reply(sent_ns=time.perf_counter_ns())
    done: asyncio.Future[None] = loop.create_future()
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await loop.create_connection(
                lambda: _Exchange(encode_request(target, body), reply, done), target.host, target.port
            )
            await done
    except TimeoutError:
        reply.error = f"no complete reply within {timeout_s:g} s"
    except OSError as error:
        reply.error = f"connection failed: {error}"
    finally:
        if transport is not None:
            transport.close()
    reply.finished_ns = reply.finished_ns or time.perf_counter_ns()
    return reply


Send = Callable[[dict[str, Any]], Coroutine[Any, Any, Reply]]
"""Sends one body and returns its reply."""


async def run_closed_loop(send: Send, bodies: Iterable[dict[str, Any]], concurrency: int) -> list[Reply]:
    """Keep `concurrency` requests in flight until the bodies are used up: as many users who each wait for an answer.

    Replies are in order of completion.
    """
    waiting = iter(bodies)
    replies: list[Reply] = []

    async def worker() -> None:
        for body in waiting:
            reply = await send(body)
            replies.append(reply)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return replies


def arrival_gaps_s(rate_per_s: float, count: int, rng: random.Random) -> list[float]:
    """Seconds before each of `count` arrivals of a Poisson process: exponential gaps of mean 1 / rate."""
    return [rng.expovariate(rate_per_s) for _ in range(count)]


async def run_open_loop(send: Send, bodies: Sequence[dict[str, Any]], gaps_s: Sequence[float]) -> list[Reply]:
    """Send each body after its gap, however many are still open: users who do not know of one another.

    A late wake-up is made good at the next arrival, so the offered rate holds. Replies are in order of arrival.
    """
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    tasks: list[asyncio.Task[Reply]] = []
    for body, gap_s in zip(bodies, gaps_s, strict=True):
        due_s += gap_s
        await asyncio.sleep(max(0.0, due_s - loop.time()))
        tasks.append(asyncio.create_task(send(body)))
    return list(await asyncio.gather(*tasks))


async def run_stream_and_newcomer(
    target: Target, stream: dict[str, Any], newcomer: dict[str, Any], *, tokens_before: int, timeout_s: float = 600.0
) -> tuple[Reply, Reply]:
    """Start a stream, and send the newcomer once `tokens_before` of the stream's tokens have arrived: both replies."""
    running = Reply(sent_ns=time.perf_counter_ns())
    task = asyncio.create_task(stream_request(target, stream, timeout_s, running))
    while len(running.token_ns) < tokens_before and not task.done():  # noqa: ASYNC110 - a protocol fills the list
        await asyncio.sleep(0.002)
    arrived = await stream_request(target, newcomer, timeout_s)
    return await task, arrived


def gaps_beside_newcomer(running: Reply, newcomer: Reply) -> list[int]:
    """Nanoseconds between the stream's tokens from the newcomer's sending to the newcomer's first token.

    The gap in which the newcomer was sent counts, and so does the one in which its first token came.
    """
    first_ns = newcomer.token_ns[0] if newcomer.token_ns else newcomer.finished_ns
    pairs = zip(running.token_ns, running.token_ns[1:], strict=False)
    return [later - earlier for earlier, later in pairs if later > newcomer.sent_ns and earlier < first_ns]


def sum_of_metric(exposition: str, name: str, label: str = "") -> float:
    """The values of a metric in Prometheus' text format, added up over its labels, or over those that hold `label`.

    0 when it is not there.
    """
    values = [line.rpartition(" ") for line in exposition.splitlines() if not line.startswith("#")]
    return sum(float(value) for head, _, value in values if head.partition("{")[0] == name and label in head)
