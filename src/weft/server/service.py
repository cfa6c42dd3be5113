"""The gRPC service of rank 0: requests in, packed token events out.

Everything here runs on the event loop. The engine's thread hands over the events of a step with
`deliver_threadsafe`; they are split by stream, packed once per stream and written in order.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog

from weft.core.clock import Clock
from weft.core.events import Event, FailureEvent, is_final
from weft.core.info import EngineInfo, EngineStats
from weft.core.request import Request, RequestId
from weft.errors import OverloadedError, RequestError, ValidationError
from weft.limits import LIMITS
from weft.proto import convert
from weft.proto.v1 import generate_pb2 as pb
from weft.proto.v1 import generate_pb2_grpc
from weft.server.engine import Engine
from weft.server.request_spans import RequestSpans

log = structlog.get_logger("weft.service")

STATS_INTERVAL_S = 1.0
"""An idle stream still carries the engine's state this often."""


@dataclass(frozen=True, slots=True)
class _Serving:
    """What exists once the model is loaded."""

    engine: Engine
    info: EngineInfo
    warmup_seconds: float


class _NotLoadedError(Exception):
    """Raised to leave a handler after the call was answered with UNAVAILABLE."""


class _Stream:
    """One router's open stream: the requests it brought and the frames waiting to be written."""

    def __init__(self) -> None:
        self.request_ids: set[RequestId] = set()
        self.frames: asyncio.Queue[pb.ServerFrame] = asyncio.Queue(maxsize=LIMITS.max_inbox_messages)

    def put(self, events: Sequence[Event], stats: EngineStats) -> bool:
        """False when the router reads too slowly: its requests must end rather than fill memory."""
        try:
            self.frames.put_nowait(convert.frame_from_events(events, stats))
        except asyncio.QueueFull:
            return False
        return True


class GenerationService(generate_pb2_grpc.GenerationServicer):
    """Implements `weft.v1.Generation`; the engine arrives when the model is loaded."""

    def __init__(self, clock: Clock, urls: Sequence[str], spans: RequestSpans | None = None) -> None:
        """`urls`: sockets that a router may connect to, rank 0 first. `spans`: None without a collector."""
        self._clock = clock
        self._urls = tuple(urls)
        self._loop = asyncio.get_running_loop()
        self._serving: _Serving | None = None
        self._owners: dict[RequestId, _Stream] = {}
        self._stats = EngineStats()
        self._spans = spans

    def open(self, engine: Engine, info: EngineInfo, warmup_seconds: float) -> None:
        """From here on requests are accepted."""
        self._serving = _Serving(engine, info, warmup_seconds)

    def deliver_threadsafe(self, events: Sequence[Event], stats: EngineStats) -> None:
        """Called by the engine's thread after each step; never blocks."""
        self._loop.call_soon_threadsafe(self._deliver, events, stats)

    async def Generate(  # noqa: N802 - gRPC's spelling
        self,
        request_iterator: AsyncIterator[pb.ClientFrame],
        context: "grpc.aio.ServicerContext[pb.ClientFrame, pb.ServerFrame]",
    ) -> AsyncIterator[pb.ServerFrame]:
        """One router's stream. When it ends, every request it brought is aborted."""
        serving = await self._require_ready(context)
        stream = _Stream()
        reader = asyncio.create_task(self._read_frames(request_iterator, stream, serving))
        try:
            while not reader.done() or not stream.frames.empty():
                try:
                    async with asyncio.timeout(STATS_INTERVAL_S):
                        frame = await stream.frames.get()
                except TimeoutError:
                    frame = pb.ServerFrame(stats=convert.stats_to_wire(self._stats))
                yield frame
        finally:
            reader.cancel()
            self._abort_requests_of(stream, serving.engine)

    async def Info(  # noqa: N802 - gRPC's spelling
        self, request: pb.InfoRequest, context: "grpc.aio.ServicerContext[pb.InfoRequest, pb.InfoResponse]"
    ) -> pb.InfoResponse:
        """What is served. UNAVAILABLE while loading."""
        del request
        return convert.info_to_wire((await self._require_ready(context)).info)

    async def Health(  # noqa: N802 - gRPC's spelling
        self, request: pb.HealthRequest, context: "grpc.aio.ServicerContext[pb.HealthRequest, pb.HealthResponse]"
    ) -> pb.HealthResponse:
        """Answered here and not by the engine, so that a hung engine shows as a large `stalled_ns`."""
        del request, context
        if self._serving is None:
            return pb.HealthResponse(is_ready=False)
        return pb.HealthResponse(is_ready=True, stalled_ns=self._serving.engine.stalled_ns)

    async def ServiceDiscovery(  # noqa: N802 - gRPC's spelling
        self,
        request: pb.ServiceDiscoveryRequest,
        context: "grpc.aio.ServicerContext[pb.ServiceDiscoveryRequest, pb.ServiceDiscoveryResponse]",
    ) -> pb.ServiceDiscoveryResponse:
        """Where to connect."""
        del request, context
        return pb.ServiceDiscoveryResponse(urls=self._urls)

    async def Warmup(  # noqa: N802 - gRPC's spelling
        self, request: pb.WarmupRequest, context: "grpc.aio.ServicerContext[pb.WarmupRequest, pb.WarmupResponse]"
    ) -> pb.WarmupResponse:
        """The worst-case step has run when the engine opens; UNAVAILABLE before."""
        del request
        return pb.WarmupResponse(seconds=(await self._require_ready(context)).warmup_seconds)

    async def ClearCache(  # noqa: N802 - gRPC's spelling
        self,
        request: pb.ClearCacheRequest,
        context: "grpc.aio.ServicerContext[pb.ClearCacheRequest, pb.ClearCacheResponse]",
    ) -> pb.ClearCacheResponse:
        """Forget unused prefix blocks."""
        del request
        engine = (await self._require_ready(context)).engine
        return pb.ClearCacheResponse(freed_blocks=await asyncio.wrap_future(engine.clear_cache()))

    async def _require_ready(self, context: "grpc.aio.ServicerContext[Any, Any]") -> _Serving:
        if self._serving is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is loading")
            raise _NotLoadedError
        return self._serving

    async def _read_frames(self, frames: AsyncIterator[pb.ClientFrame], stream: _Stream, serving: _Serving) -> None:
        async for frame in frames:
            match frame.WhichOneof("kind"):
                case "add":
                    self._add(frame.add, stream, serving)
                case "abort":
                    request_id = RequestId(frame.abort.request_id)
                    if request_id in stream.request_ids:
                        self._abort(request_id, serving.engine)
                case unknown:
                    log.warning("service.unknown_frame", kind=unknown)

    def _add(self, message: pb.Request, stream: _Stream, serving: _Serving) -> None:
        request_id = RequestId(message.request_id)
        if request_id in self._owners:
            # Answering under this id would end somebody else's request.
            log.error("service.duplicate_request_id")
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
            if not stream.put(own_events, stats):
                self._drop_slow_stream(stream)

    def _drop_slow_stream(self, stream: _Stream) -> None:
        log.error("service.slow_router", num_requests=len(stream.request_ids))
        failures = [
            FailureEvent(request_id=request_id, code=OverloadedError.code, message="Model is overloaded")
            for request_id in stream.request_ids
        ]
        if self._serving is not None:
            self._abort_requests_of(stream, self._serving.engine)
        while not stream.frames.empty():
            stream.frames.get_nowait()
        stream.put(failures, self._stats)

    def _forget(self, request_id: RequestId) -> None:
        stream = self._owners.pop(request_id, None)
        if stream is not None:
            stream.request_ids.discard(request_id)

    def _abort_requests_of(self, stream: _Stream, engine: Engine) -> None:
        for request_id in list(stream.request_ids):
            self._abort(request_id, engine)

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
