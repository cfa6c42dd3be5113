"""The router's side of an engine: a protocol of four methods and two implementations.

`ShardBackend` drives our own shards over one stream for all requests; `ScriptedBackend` plays a script in tests. A
generation yields lists: every event that has arrived since the last one, so that a reader that lags behind writes
once for several tokens. Closing the generator aborts the request; a failure is raised as its RequestError.
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import structlog

from weft.core.clock import Clock
from weft.core.events import EmbeddingEvent, FailureEvent, PromptReport, TokenEvent
from weft.core.info import EngineHealth, EngineInfo, EngineStats
from weft.core.plan import TopTokens
from weft.core.request import FinishReason, Request, RequestId
from weft.errors import GenerationError, NotReadyError, OverloadedError, RequestError, by_code
from weft.limits import LIMITS
from weft.proto import convert
from weft.proto.frames import BrokenFrameError, pack_frame, read_frames
from weft.proto.v1 import generate_pb2 as pb
from weft.proto.v1 import generate_pb2_grpc

log = structlog.get_logger("weft.backend")

RPC_TIMEOUT_S = 5.0
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 0.25

TokenBatch = Sequence[TokenEvent]
"""One or more events of one request, in order."""

Taker = Callable[[TokenEvent], bool]
"""Is offered an event the moment it arrives and says whether it took it: nobody has to wake up for that one."""


class Backend(Protocol):
    """Any engine."""

    def generate(self, request: Request, taker: Taker | None = None) -> AsyncGenerator[TokenBatch, None]:
        """Events until the final one, but for those that `taker` took. Closing it aborts. Raises RequestError.

        `taker` is offered what arrives while the reader waits, except the final event; what it raises is raised here.
        """
        ...

    async def embed(self, request: Request) -> EmbeddingEvent:
        """The vector of a request with pooling. Cancelling it aborts. Raises RequestError."""
        ...

    async def info(self) -> EngineInfo:
        """What is served. Raises NotReadyError."""
        ...

    async def health(self) -> EngineHealth:
        """Whether requests can be served now; never raises."""
        ...

    async def close(self) -> None:
        """End every open request and let go of the connection."""
        ...


_MAX_HEALTH_AGE_NS = 1_000_000_000


class BackendProbe:
    """Asks the engine for its health, at most once a second however many probes come."""

    def __init__(self, backend: Backend, clock: Clock) -> None:
        self._backend = backend
        self._clock = clock
        self._health = EngineHealth(is_ready=False)
        self._asked_ns: int | None = None

    async def health(self) -> EngineHealth:
        """The newest answer."""
        now_ns = self._clock.now_ns()
        if self._asked_ns is None or now_ns - self._asked_ns > _MAX_HEALTH_AGE_NS:
            self._asked_ns = now_ns
            self._health = await self._backend.health()
        return self._health


# --- our shards ---------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request on the stream, with all that is needed to add it again to another shard."""

    request: Request
    taker: Taker | None = None
    emitted_token_ids: list[int] = field(default_factory=list)
    pending: list[TokenEvent] = field(default_factory=list)
    vector: EmbeddingEvent | None = None
    failure: Exception | None = None
    is_known_to_shard: bool = True
    """The shard may still be working on it: giving it up means telling the shard."""
    _waiter: "asyncio.Future[None] | None" = None

    def put(self, event: TokenEvent) -> None:
        """Add an event; a reader that is too far behind loses its request instead of filling memory."""
        if self.failure is not None:
            return
        if len(self.pending) >= LIMITS.max_stream_buffer_events:
            self.fail(OverloadedError("The reader of this stream is too slow; the generation was stopped"))
            return
        self.emitted_token_ids.append(event.token_id)
        if event.finish_reason is None and self._is_awaited and self._is_taken(event):
            return
        self.pending.append(event)
        self._wake()

    def put_vector(self, event: EmbeddingEvent) -> None:
        """The one event of a request with pooling."""
        self.vector = event
        self._wake()

    def end(self, error: RequestError) -> None:
        """The shard has ended the request, or is gone."""
        self.is_known_to_shard = False
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the request after the events that are already here."""
        self.failure = error
        self._wake()

    async def next_batch(self) -> list[TokenEvent]:
        """All events that are here, at least one. Raises the failure once they are used up."""
        while not self.pending:
            if self.failure is not None:
                raise self.failure
            await self._change()
        batch, self.pending = self.pending, []
        return batch

    async def wait_for_vector(self) -> EmbeddingEvent:
        """The vector. Raises the failure that came instead."""
        while self.vector is None:
            if self.failure is not None:
                raise self.failure
            await self._change()
        return self.vector

    @property
    def _is_awaited(self) -> bool:
        """The reader has read everything and waits."""
        return self._waiter is not None and not self._waiter.done()

    def _is_taken(self, event: TokenEvent) -> bool:
        """Offer an event. A fault of the taker is its own request's, and belongs to whoever answers that."""
        try:
            return self.taker is not None and self.taker(event)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            self.fail(error)
            return True

    def _change(self) -> "asyncio.Future[None]":
        """Done when something is put or fails."""
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ShardBackend:
    """Our shard: one stream for all requests, opened again after it breaks."""

    def __init__(
        self,
        target: str,
        clock: Clock,
        *,
        on_stats: Callable[[EngineStats], None] = lambda _: None,
        on_delivery: Callable[[int], None] = lambda _: None,
        on_connection: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`target`: for example `unix:///run/…/shard-0.sock`. Call from a running loop.

        `on_stats` gets the state that came with a frame, `on_delivery` then how long handing out its events took, ns.
        """
        self._clock = clock
        self._on_stats = on_stats
        self._on_delivery = on_delivery
        self._on_connection = on_connection
        self._open: dict[RequestId, OpenRequest] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._channel = grpc.aio.insecure_channel(
            target,
            options=(
                ("grpc.max_receive_message_length", LIMITS.max_wire_message_bytes),
                ("grpc.max_send_message_length", LIMITS.max_wire_message_bytes),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 250),
                ("grpc.enable_http_proxy", 0),
            ),
        )
        self._stub = generate_pb2_grpc.GenerationStub(self._channel)
        self._connected = asyncio.Event()
        self._supervisor = asyncio.create_task(self._keep_connected(), name="backend-stream")

    @property
    def open_requests(self) -> Sequence[OpenRequest]:
        """Requests in flight, for whoever wants to continue them elsewhere."""
        return tuple(self._open.values())

    async def wait_connected(self) -> None:
        """Until the stream to the shard is open."""
        await self._connected.wait()

    async def generate(self, request: Request, taker: Taker | None = None) -> AsyncGenerator[TokenBatch, None]:
        """See `Backend.generate`."""
        entry = self._enter(request, taker)
        is_final = False
        try:
            self._send(pb.ClientFrame(add=convert.request_to_wire(request, self._clock.now_ns())))
            while not is_final:
                batch = await entry.next_batch()
                is_final = batch[-1].finish_reason is not None
                yield batch
        finally:
            self._leave(entry, is_final=is_final)

    async def embed(self, request: Request) -> EmbeddingEvent:
        """See `Backend.embed`."""
        entry = self._enter(request)
        try:
            self._send(pb.ClientFrame(add=convert.request_to_wire(request, self._clock.now_ns())))
            return await entry.wait_for_vector()
        finally:
            self._leave(entry, is_final=entry.vector is not None)

    def _enter(self, request: Request, taker: Taker | None = None) -> OpenRequest:
        if self._writer is None:
            raise NotReadyError("The model server is restarting. Try again later.", retry_after_s=2.0)
        entry = self._open[request.request_id] = OpenRequest(request, taker)
        return entry

    def _leave(self, entry: OpenRequest, *, is_final: bool) -> None:
        """Forget a request; the shard is told when it may still work on it."""
        request_id = entry.request.request_id
        self._open.pop(request_id, None)
        if not is_final and entry.is_known_to_shard:
            with contextlib.suppress(OverloadedError, NotReadyError):
                self._send(pb.ClientFrame(abort=pb.Abort(request_id=request_id)))

    async def info(self) -> EngineInfo:
        """See `Backend.info`."""
        try:
            return convert.info_from_wire(await self._stub.Info(pb.InfoRequest(), timeout=RPC_TIMEOUT_S))
        except grpc.aio.AioRpcError as error:
            raise NotReadyError("The model server does not answer. Try again later.", retry_after_s=2.0) from error

    async def health(self) -> EngineHealth:
        """See `Backend.health`."""
        try:
            reply = await self._stub.Health(pb.HealthRequest(), timeout=RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return EngineHealth(is_ready=False)
        return EngineHealth(is_ready=reply.is_ready and self._connected.is_set(), stalled_ns=reply.stalled_ns)

    async def close(self) -> None:
        """See `Backend.close`."""
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)
        self._fail_open("The server is shutting down")
        await self._channel.close(None)

    def _send(self, frame: pb.ClientFrame) -> None:
        """Write to the stream. Raises OverloadedError when the shard does not read what is there already."""
        if self._writer is None:
            raise NotReadyError("The model server is restarting. Try again later.", retry_after_s=2.0)
        if self._writer.transport.get_write_buffer_size() > LIMITS.max_frame_backlog_bytes:
            raise OverloadedError("Model is overloaded", retry_after_s=1.0)
        self._writer.write(pack_frame(frame))

    async def _keep_connected(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while True:
            try:
                # Answers only when the model is loaded, so that no request meets a shard that cannot take it.
                where = await self._stub.ServiceDiscovery(pb.ServiceDiscoveryRequest(), timeout=RPC_TIMEOUT_S)
                reader, writer = await asyncio.open_unix_connection(where.stream_path)
                backoff_s = MIN_BACKOFF_S
                await self._run_stream(reader, writer)
            except grpc.aio.AioRpcError as error:
                log.debug("backend.unavailable", status=error.code().name)
            except OSError as error:
                log.debug("backend.unavailable", status=error.strerror)
            except BrokenFrameError as error:
                log.error("backend.broken_frame", reason=str(error))  # noqa: TRY400 - the reason is all there is
            self._disconnected()
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    def _disconnected(self) -> None:
        if not self._connected.is_set():
            return
        log.error("backend.stream_lost", num_open=len(self._open))
        self._connected.clear()
        self._on_connection(False)
        self._fail_open("The model server stopped while it worked on this request; it is being restarted. Try again.")

    def _fail_open(self, message: str) -> None:
        for entry in self._open.values():
            entry.end(GenerationError(message, retry_after_s=2.0))

    async def _run_stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._connected.set()
        self._on_connection(True)
        log.info("backend.connected")
        try:
            async for frame in read_frames(reader, pb.ServerFrame):
                self._deliver(frame)
        finally:
            self._writer = None
            writer.transport.abort()

    def _deliver(self, frame: pb.ServerFrame) -> None:
        started_ns = self._clock.now_ns()
        for event in convert.events_from_frame(frame):
            entry = self._open.get(event.request_id)
            if entry is None:
                continue  # aborted while the frame was under way
            if isinstance(event, FailureEvent):
                entry.end(error_from_event(event))
            elif isinstance(event, EmbeddingEvent):
                entry.put_vector(event)
            else:
                entry.put(event)
        if frame.HasField("stats"):
            delivered_ns = self._clock.now_ns()
            self._on_stats(convert.stats_from_wire(frame.stats))
            self._on_delivery(delivered_ns - started_ns)


def error_from_event(event: FailureEvent) -> RequestError:
    """A failure keeps its class across the wire; an unknown code is a generation failure."""
    return by_code().get(event.code, GenerationError)(event.message)


# --- a script -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What `ScriptedBackend` says to one request."""

    token_ids: Sequence[int]
    finish_reason: FinishReason = FinishReason.EOS_TOKEN
    logprob: float = -0.5
    fail_after: int | None = None
    """Raise `error` after this many tokens; 0 = before the first."""
    error: RequestError = field(default_factory=lambda: GenerationError("Server error: scripted"))
    stop_silently: bool = False
    """End without a final event, as a broken engine would."""
    queue_ns: int = 1_000_000
    num_cached_tokens: int = 0
    vector: Sequence[float] = ()
    """The answer to a request with pooling."""


ScriptFor = Callable[[Request], Script]


class ScriptedBackend:
    """Plays scripts. `steps` releases one token per permit when given, so that a test decides what arrives when."""

    def __init__(
        self, script_for: ScriptFor, info: EngineInfo, *, steps: asyncio.Semaphore | None = None, batch_size: int = 1
    ) -> None:
        """`batch_size`: how many tokens arrive together."""
        self._script_for = script_for
        self._info = info
        self._steps = steps
        self._batch_size = batch_size
        self.requests: list[Request] = []
        self.aborted: list[RequestId] = []
        self.health_now = EngineHealth(is_ready=True)

    async def generate(self, request: Request, taker: Taker | None = None) -> AsyncGenerator[TokenBatch, None]:
        """See `Backend.generate`."""
        self.requests.append(request)
        is_final = False
        try:
            batch: list[TokenEvent] = []
            script = self._script_for(request)
            events = _scripted_events(request, script)
            for index, event in enumerate(events):
                await self._wait_for_step()
                if index == script.fail_after:
                    is_final = True
                    raise script.error
                is_offered = self._batch_size == 1 and event.finish_reason is None
                if is_offered and taker is not None and taker(event):
                    continue
                batch.append(event)
                is_last = index == len(events) - 1
                if len(batch) == self._batch_size or is_last:
                    is_final = is_last
                    yield batch
                    batch = []
            is_final = True
        finally:
            if not is_final:
                self.aborted.append(request.request_id)

    async def embed(self, request: Request) -> EmbeddingEvent:
        """See `Backend.embed`."""
        self.requests.append(request)
        script = self._script_for(request)
        try:
            await self._wait_for_step()
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            raise
        if script.fail_after is not None:
            raise script.error
        return EmbeddingEvent(
            request_id=request.request_id,
            values=struct.pack(f"<{len(script.vector)}f", *script.vector),
            prompt=PromptReport(num_cached_tokens=script.num_cached_tokens, queue_ns=script.queue_ns),
        )

    async def info(self) -> EngineInfo:
        """See `Backend.info`."""
        return self._info

    async def health(self) -> EngineHealth:
        """See `Backend.health`."""
        return self.health_now

    async def close(self) -> None:
        """See `Backend.close`."""

    async def _wait_for_step(self) -> None:
        if self._steps is None:
            await asyncio.sleep(0)
        else:
            await self._steps.acquire()


def _scripted_events(request: Request, script: Script) -> list[TokenEvent]:
    """The script cut to what the request allows, with reports and alternatives where it asks for them."""
    limit = request.stop.max_new_tokens
    token_ids = list(script.token_ids)[:limit]
    reason = FinishReason.LENGTH if len(script.token_ids) > limit else script.finish_reason
    report = PromptReport(
        num_cached_tokens=script.num_cached_tokens,
        queue_ns=script.queue_ns,
        prompt_logprobs=(-1.0,) * (len(request.prompt_token_ids) - 1) if request.sampling.prompt_logprobs else None,
        prompt_top_tokens=_scripted_prompt_tops(request),
    )
    return [
        TokenEvent(
            request_id=request.request_id,
            token_index=index,
            token_id=token_id,
            logprob=script.logprob,
            finish_reason=reason if index == len(token_ids) - 1 and not script.stop_silently else None,
            top_tokens=_scripted_alternatives(token_id, request, script),
            prompt=report if index == 0 else None,
        )
        for index, token_id in enumerate(token_ids)
    ]


def _scripted_prompt_tops(request: Request) -> tuple[TopTokens, ...] | None:
    """In every place of the prompt: the first tokens of the vocabulary, the first one certain."""
    count = request.sampling.prompt_top_n_tokens
    if not count:
        return None
    top = TopTokens(tuple(range(count)), tuple(-0.5 - rank for rank in range(count)))
    return (top,) * (len(request.prompt_token_ids) - 1)


def _scripted_alternatives(token_id: int, request: Request, script: Script) -> TopTokens | None:
    count = request.sampling.top_n_tokens
    if count == 0:
        return None
    ids = (token_id, *(other for other in range(count) if other != token_id))[:count]
    return TopTokens(ids, tuple(script.logprob - step for step in range(len(ids))))
