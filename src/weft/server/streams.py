"""The streams of routers: requests in, packed token events out.

Everything runs on the event loop but `deliver_threadsafe`, with which the engine's thread hands over the events of a
step; they are split by stream, packed once per stream and written in order.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from weft.core.clock import Clock
from weft.core.events import Event, FailureEvent, is_final
from weft.core.info import EngineInfo, EngineStats
from weft.core.request import Request, RequestId
from weft.errors import RequestError, ValidationError
from weft.limits import LIMITS
from weft.proto import convert
from weft.proto.frames import BrokenFrameError, pack_frame, read_frames
from weft.proto.v1 import generate_pb2 as pb
from weft.server.engine import Engine
from weft.server.request_spans import RequestSpans

log = structlog.get_logger("weft.streams")

STATS_INTERVAL_S = 1.0
"""An idle stream still carries the engine's state this often."""


@dataclass(frozen=True, slots=True)
class _Serving:
    engine: Engine
    info: EngineInfo


class _Stream:
    """One router's open stream and the requests it brought."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.request_ids: set[RequestId] = set()
        self.is_silent = False
        """Nothing was written since somebody set this."""
        self._writer = writer

    def put(self, events: Iterable[Event], stats: EngineStats) -> None:
        """Write one frame. A router that reads too slowly is hung up on: its requests end rather than fill memory."""
        if self._writer.transport.get_write_buffer_size() > LIMITS.max_frame_backlog_bytes:
            log.error("streams.slow_router", num_requests=len(self.request_ids))
            self.hang_up()
            return
        try:
            self._writer.write(pack_frame(convert.frame_from_events(events, stats)))
        except BrokenFrameError as error:
            log.error("streams.frame_too_long", reason=str(error), num_requests=len(self.request_ids))  # noqa: TRY400
            self.hang_up()
        self.is_silent = False

    def hang_up(self) -> None:
        """Close without waiting for what is unread; the reader of this stream notices, and so does the router."""
        self._writer.transport.abort()


class RouterStreams:
    """All open streams. The engine arrives with `listen`, when the model is loaded."""

    def __init__(self, clock: Clock, path: Path, spans: RequestSpans | None = None) -> None:
        """`path`: of the socket that routers connect to. `spans`: None without a collector."""
        self.path = path
        self._clock = clock
        self._spans = spans
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._pulse: asyncio.Task[None] | None = None
        self._streams: set[_Stream] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._owners: dict[RequestId, _Stream] = {}
        self._stats = EngineStats()

    async def listen(self, engine: Engine, info: EngineInfo) -> None:
        """From here on streams are accepted."""
        serving = _Serving(engine, info)

        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, _Stream(writer), serving), name="router-stream")
            self._readers.add(task)
            task.add_done_callback(self._readers.discard)

        self._server = await asyncio.start_unix_server(serve, self.path)
        self._pulse = asyncio.create_task(self._keep_streams_informed(), name="stream-pulse")

    async def close(self) -> None:
        """Hang up on every router."""
        if self._server is None or self._pulse is None:
            return
        self._server.close()
        self._pulse.cancel()
        for stream in self._streams:
            stream.hang_up()
        if self._readers:
            await asyncio.wait(self._readers)

    def deliver_threadsafe(self, events: Sequence[Event], stats: EngineStats) -> None:
        """Called by the engine's thread after each step; never blocks."""
        self._loop.call_soon_threadsafe(self._deliver, events, stats)

    async def _serve(self, reader: asyncio.StreamReader, stream: _Stream, serving: _Serving) -> None:
        """One router's stream. When it ends, every request it brought is aborted."""
        self._streams.add(stream)
        try:
            async for frame in read_frames(reader, pb.ClientFrame):
                self._handle(frame, stream, serving)
        except BrokenFrameError as error:
            log.error("streams.broken_frame", reason=str(error))  # noqa: TRY400 - the reason is all there is
        finally:
            self._streams.discard(stream)
            for request_id in tuple(stream.request_ids):
                self._abort(request_id, serving.engine)
            stream.hang_up()

    def _handle(self, frame: pb.ClientFrame, stream: _Stream, serving: _Serving) -> None:
        match frame.WhichOneof("kind"):
            case "add":
                self._add(frame.add, stream, serving)
            case "abort":
                request_id = RequestId(frame.abort.request_id)
                if request_id in stream.request_ids:
                    self._abort(request_id, serving.engine)
            case unknown:
                log.warning("streams.unknown_frame", kind=unknown)

    def _add(self, message: pb.Request, stream: _Stream, serving: _Serving) -> None:
        request_id = RequestId(message.request_id)
        if request_id in self._owners:
            # Answering under this id would end somebody else's request.
            log.error("streams.duplicate_request_id")
            return
        try:
            request = convert.request_from_wire(message, self._clock.now_ns())
            request.check(vocab_size=serving.info.vocab_size, max_total_tokens=serving.info.max_total_tokens)
            _require_task(request, serving.info)
            serving.engine.add(request)
        except RequestError as error:
            failure = FailureEvent(request_id=request_id, code=error.code, message=error.message)
            stream.put([failure], self._stats)
            return
        if self._spans is not None:
            self._spans.begin(request)
        self._owners[request_id] = stream
        stream.request_ids.add(request_id)

    def _deliver(self, events: Sequence[Event], stats: EngineStats) -> None:
        self._stats = stats
        by_stream: dict[_Stream, list[Event]] = {}
        for event in events:
            owner = self._owners.get(event.request_id)
            if owner is None:
                continue
            by_stream.setdefault(owner, []).append(event)
            if self._spans is not None:
                self._spans.note(event)
            if is_final(event):
                self._forget(event.request_id)
        if stats.step_tokens and not by_stream:
            # A step of nothing but prompt tokens: who waits for them counts it all the same.
            by_stream = {stream: [] for stream in self._owners.values()}
        for stream, own_events in by_stream.items():
            stream.put(own_events, stats)

    async def _keep_streams_informed(self) -> None:
        while True:
            await asyncio.sleep(STATS_INTERVAL_S)
            for stream in self._streams:
                if stream.is_silent:
                    stream.put((), self._stats)
                stream.is_silent = True

    def _forget(self, request_id: RequestId) -> None:
        stream = self._owners.pop(request_id, None)
        if stream is not None:
            stream.request_ids.discard(request_id)

    def _abort(self, request_id: RequestId, engine: Engine) -> None:
        self._forget(request_id)
        if self._spans is not None:
            self._spans.abort(request_id)
        engine.abort(request_id)


def _require_task(request: Request, info: EngineInfo) -> None:
    """Raise ValidationError for a vector where tokens are made, and the other way round."""
    asked = "" if request.pooling is None else request.pooling
    if asked != info.pooling:
        raise ValidationError(
            f"`pooling` must be {info.pooling or 'absent'}. Given: {asked or 'none'}", field="pooling"
        )
