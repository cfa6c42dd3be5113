"""Server-sent events: frames as bytes, a slow reader's limit, and exactly one end.

A stream is written by the task that answers the request; nothing is created per token. One watch per process looks
at all streams once a second: it sends a comment on those that are silent and ends those whose reader has stopped.

Source: WHATWG HTML, server-sent events; RELIABILITY R02
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Self

import msgspec
from starlette.types import Send

from weft.core.clock import Clock
from weft.errors import ClientGoneError, InvariantBroken, RequestError
from weft.limits import LIMITS
from weft.router.backend import TokenBatch
from weft.router.exchange import Exchange
from weft.telemetry.metrics import Registry

DONE_FRAME = b"data: [DONE]\n\n"
_COMMENT_FRAME = b":\n\n"
_KEEP_ALIVE_NS = 15_000_000_000
_STALL_NS = int(LIMITS.stream_stall_timeout_s * 1e9)
_WATCH_INTERVAL_S = 1.0

_HEADERS = (
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

encode_json = msgspec.json.Encoder().encode


def frame(value: object) -> bytes:
    """One event."""
    return b"data: " + encode_json(value) + b"\n\n"


def named_frame(name: str, value: object) -> bytes:
    """One event that says its name, too."""
    return b"event: " + name.encode() + b"\ndata: " + encode_json(value) + b"\n\n"


class EventStream:
    """One stream. `open` it when the first event exists, so that earlier failures have a status of their own.

    A stream that was announced and has nothing to say for as long as silence is allowed is opened by the watch, with a
    comment: what stands between server and client would take the connection for dead.
    """

    def __init__(self, exchange: Exchange, watch: "StreamWatch", end_frames: Callable[[RequestError], bytes]) -> None:
        """`end_frames` says a failure in the dialect of the route."""
        self._exchange = exchange
        self._watch = watch
        self._send: Send = exchange.send
        self._send_body: Send = exchange.send_body
        self._end_frames = end_frames
        self._task = asyncio.current_task()
        self.num_writes = 0
        self.is_writing = False
        self.changed_ns = 0
        """When the watch last saw a write begin or end; the writer itself reads no clock."""
        self.seen = (0, False)
        """`num_writes` and `is_writing` at that time."""
        self.is_open = False
        """The status line is out; from here on a failure is an event."""
        self._is_stalled = False
        self._is_over = False
        self._headers: Iterable[tuple[bytes, bytes]] = ()
        self._opening = asyncio.Lock()

    def __enter__(self) -> Self:
        """Nothing happens before `announce` or `open`."""
        return self

    def __exit__(self, *_: object) -> None:
        """However the block is left, the watch forgets the stream."""
        self._is_over = True
        self._watch.remove(self)

    def announce(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let the watch open the stream when the first event takes long."""
        self._headers = headers
        self._watch.add(self)

    async def open(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Send the status line, unless the watch has done so."""
        async with self._opening:
            if self.is_open or self._is_over:
                return
            self._exchange.end_stream = self.fail
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
            self.is_open = True
            self._watch.add(self)

    async def write(self, frames: bytes, *, more_body: bool = True) -> None:
        """Send frames. Raises ClientGoneError when the reader has taken nothing for too long."""
        self.num_writes += 1
        self.is_writing = True
        try:
            await self._send_body({"type": "http.response.body", "body": frames, "more_body": more_body})
        except asyncio.CancelledError:
            if not self._is_stalled or self._task is None:
                raise
            self._task.uncancel()
            raise ClientGoneError("The client stopped reading its stream") from None
        self.is_writing = False

    def show(self, frames_of: Callable[[TokenBatch], bytes], batch: TokenBatch) -> bool:
        """Send what becomes of a batch, unless that would mean waiting: then nothing has happened and it is False."""
        if not self.is_open or self.is_writing or self._exchange.is_complete or not self._exchange.sends_at_once:
            return False
        if frames := frames_of(batch):
            self.num_writes += 1
            _run_at_once(self._send_body({"type": "http.response.body", "body": frames, "more_body": True}))
        return True

    async def close(self, frames: bytes = b"") -> None:
        """Send the last frames and end the stream. Raises ClientGoneError as `write` does."""
        self._exchange.end_stream = None
        self._exchange.is_complete = True
        await self.write(frames, more_body=False)
        self._watch.remove(self)

    async def fail(self, error: RequestError) -> None:
        """End the stream by saying why, unless its reader does not even take that."""
        try:
            async with asyncio.timeout(LIMITS.stream_stall_timeout_s), self._opening:
                await self.close(self._end_frames(error))
        except (TimeoutError, ClientGoneError):
            self._exchange.abort_connection()

    def end_stalled(self) -> None:
        """Called by the watch: stop waiting for the reader."""
        if self._task is not None and not self._is_stalled:
            self._is_stalled = True
            self._task.cancel()

    async def keep_alive(self) -> None:
        """Called by the watch: a comment, so that proxies do not close a silent connection."""
        await self.open(self._headers)
        if not self._is_over:
            await self._send_body({"type": "http.response.body", "body": _COMMENT_FRAME, "more_body": True})


def _run_at_once(waiting: Awaitable[None]) -> None:
    """Run what is known not to wait."""
    try:
        next(waiting.__await__())
    except StopIteration:
        return
    raise InvariantBroken("the server waits to send although its client reads")


class StreamWatch:
    """Looks at every open stream once a second. Its task lives while there are streams."""

    def __init__(self, clock: Clock, metrics: Registry) -> None:
        self.clock = clock
        self._streams: set[EventStream] = set()
        self._task: asyncio.Task[None] | None = None
        self._comments: set[asyncio.Task[None]] = set()
        self._num_open = metrics.gauge("weft_streams_open")
        self._num_stalled = metrics.counter("weft_stream_stalled")

    def add(self, stream: EventStream) -> None:
        """Begin to look at a stream, or look at it as an open one."""
        stream.changed_ns = self.clock.now_ns()
        self._streams.add(stream)
        self._count()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="stream-watch")

    def remove(self, stream: EventStream) -> None:
        """A stream has ended."""
        self._streams.discard(stream)
        self._count()

    def _count(self) -> None:
        self._num_open.set(sum(stream.is_open for stream in self._streams))

    def look(self) -> None:
        """Look at every stream once."""
        now_ns = self.clock.now_ns()
        for stream in tuple(self._streams):
            seen = (stream.num_writes, stream.is_writing)
            if seen != stream.seen:
                stream.seen, stream.changed_ns = seen, now_ns
            elif stream.is_writing and now_ns - stream.changed_ns > _STALL_NS:
                self._num_stalled.add(1)
                self.remove(stream)
                stream.end_stalled()
            elif not stream.is_writing and now_ns - stream.changed_ns > _KEEP_ALIVE_NS:
                stream.changed_ns = now_ns
                comment = asyncio.create_task(stream.keep_alive())
                self._comments.add(comment)
                comment.add_done_callback(self._comments.discard)

    async def _run(self) -> None:
        while self._streams:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            self.look()


class ClientWatch:
    """Inside this block the client's leaving cancels the task at whatever it waits for; it becomes ClientGoneError."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._is_gone = False
        self._task: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        """Begin to listen."""
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._wait_for_disconnect(), name="client-watch")

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Stop listening."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._is_gone and kind is asyncio.CancelledError and self._task is not None:
            self._task.uncancel()
            raise ClientGoneError("The client left") from None

    async def _wait_for_disconnect(self) -> None:
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        if not self._exchange.is_complete and self._task is not None:
            self._is_gone = True
            self._task.cancel()
