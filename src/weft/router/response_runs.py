"""Responses while they are generated: for a client that waits, for one that reads events, or for nobody.

A background run belongs to the server: it holds its places, outlives its request, and ends when it is done, cancelled
or deleted, or when the server stops; a shutdown waits for it as for any other generation.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace

import msgspec
import structlog
from starlette.types import Message

from weft.core.request import FinishReason
from weft.errors import ClientGoneError, InternalError, OverloadedError, RequestError, ValidationError
from weft.router.context import RouterContext
from weft.router.conversation import Conversation, counted
from weft.router.error_replies import openai_end_frames
from weft.router.exchange import Exchange, Timings
from weft.router.generation import Generation
from weft.router.response_events import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    INCOMPLETE,
    ResponseText,
    Transcript,
    response_usage,
)
from weft.router.schemas_responses import IncompleteDetails, Item, Response, ResponseError
from weft.router.store import StoredResponse, this_process
from weft.router.stream import EventStream, encode_json

log = structlog.get_logger("weft.responses")


class ResponseRun:
    """One response on its way from created to its end."""

    def __init__(
        self,
        context: RouterContext,
        conversation: Conversation,
        transcript: Transcript,
        text: ResponseText,
        *,
        items: list[Item],
        tenant: str,
        keeps_deltas: bool = False,
    ) -> None:
        """`items` are what this turn brought in; `keeps_deltas`: its events can be repeated later."""
        self.conversation = conversation
        self.transcript = transcript
        self.tenant = tenant
        self.keeps_deltas = keeps_deltas
        self.is_deleted = False
        self._context = context
        self._text = text
        self._items = items
        self._num_sent = 0

    def generation(self, exchange: Exchange) -> Generation:
        """To be entered around `advance`."""
        return Generation(self._context, exchange, self.conversation.requests, [self._text.sequence])

    async def advance(self, generation: Generation) -> AsyncGenerator[None, None]:
        """One turn per batch of tokens, until the text ends. Raises RequestError."""
        async with aclosing(generation.progress()) as progress:
            async for _, batch in progress:
                self.transcript.begun.status = IN_PROGRESS
                self.transcript.add(*self._text.take(batch))
                yield

    async def complete(self, exchange: Exchange) -> None:
        """The text has ended: count, and keep the response when it is to be kept."""
        is_cut = self._text.sequence.finish_reason is FinishReason.LENGTH
        usage = counted(exchange, self.conversation.num_prompt_tokens, self._text.num_shown_tokens)
        self.transcript.is_text_done = True
        self.transcript.final = msgspec.structs.replace(
            self.transcript.begun,
            status=INCOMPLETE if is_cut else COMPLETED,
            completed_at=None if is_cut else int(time.time()),
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if is_cut else None,
            output=[self.transcript.item(INCOMPLETE if is_cut else COMPLETED)],
            usage=response_usage(usage),
        )
        await self.save()

    def fail(self, error: RequestError) -> None:
        """End it by an error, unless it has ended."""
        self._end(FAILED, ResponseError(code=_failure_code(error), message=error.message))

    def end_cancelled(self) -> None:
        """End it as cancelled, unless it has ended."""
        self._end(CANCELLED, None)

    async def save(self) -> None:
        """Keep it as it is now. Where that is impossible the response says that it is not stored."""
        store, response = self._context.responses, self.transcript.now()
        if store is None or not response.store or self.is_deleted:
            return
        if not await store.put(self.stored()):
            response.store = self.transcript.begun.store = False

    def stored(self) -> StoredResponse:
        """The row."""
        response = self.transcript.now()
        lengths = [len(delta) for delta in self.transcript.deltas]
        return StoredResponse(
            id=response.id,
            tenant=self.tenant,
            previous_id=response.previous_response_id,
            owner=this_process(),
            is_final=self.transcript.final is not None,
            response=encode_json(response),
            items=encode_json(self._items),
            delta_chars=encode_json(lengths) if self.keeps_deltas else None,
        )

    @contextmanager
    def findable(self) -> Iterator[None]:
        """Inside this block the response can be asked for by its id."""
        response = self.transcript.begun
        if response.store:
            self._context.live_responses[response.id] = self
        try:
            yield
        finally:
            self._context.live_responses.pop(response.id, None)

    def new_frames(self) -> bytes:
        """Events since the last call."""
        first, self._num_sent = self._num_sent, self.transcript.num_events
        return self.transcript.frames(first)

    def last_frames(self, error: RequestError) -> bytes:
        """Events that end a stream by an error."""
        self.fail(error)
        return self.new_frames()

    def _end(self, status: str, error: ResponseError | None) -> None:
        transcript = self.transcript
        if transcript.final is None:
            output: list[Item] = [transcript.item(INCOMPLETE)] if transcript.deltas else []
            transcript.final = msgspec.structs.replace(transcript.begun, status=status, error=error, output=output)


async def answer(exchange: Exchange, run: ResponseRun) -> Response:
    """Run for a client that waits for the whole. Raises RequestError."""
    with run.findable():
        with run.generation(exchange) as generation:
            async with aclosing(run.advance(generation)) as progress:
                async for _ in progress:
                    pass
        await run.complete(exchange)
    return run.transcript.now()


async def stream(context: RouterContext, exchange: Exchange, run: ResponseRun) -> None:
    """Run for a client that reads events. Raises RequestError."""
    events = EventStream(exchange, context.streams, run.last_frames)
    with events, run.findable():
        try:
            with run.generation(exchange) as generation:
                events.announce(())
                async with aclosing(run.advance(generation)) as progress:
                    async for _ in progress:
                        if not events.is_open:
                            await events.open()
                        await events.write(run.new_frames())
            await run.complete(exchange)
        except RequestError as error:
            if exchange.is_answering and not isinstance(error, ClientGoneError):
                run.fail(error)
                await run.save()
            raise
        await events.close(run.new_frames())


class BackgroundRun(ResponseRun):
    """A response that nobody needs to wait for."""

    _task: "asyncio.Task[None] | None" = None
    _is_cancelled = False

    async def start(self, exchange: Exchange) -> None:
        """Take the places and begin. Raises OverloadedError."""
        self._news = asyncio.Event()
        detached = replace(
            exchange,
            receive=_nothing,
            send=_nowhere,
            body=b"",
            timings=Timings(started_ns=exchange.timings.started_ns),
        )
        exchange.generates_later = True
        places = ExitStack()
        generation = places.enter_context(self.generation(detached))
        try:
            places.enter_context(self.findable())
            await self.save()
        except BaseException:
            places.close()
            raise
        self._task = asyncio.create_task(self._run(detached, generation, places), name="background-response")

    def cancel(self) -> None:
        """Stop it. `wait_over` tells when it has stopped."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def wait_over(self) -> None:
        """Until it has ended and is stored."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def follow(self, context: RouterContext, exchange: Exchange, first: int) -> None:
        """Stream its events from sequence number `first` on, until it ends. Leaving does not stop it."""
        events = EventStream(exchange, context.streams, openai_end_frames)
        with events:
            await events.open()
            while True:
                news, is_over = self._news, self.transcript.final is not None
                frames = self.transcript.frames(first)
                first = max(first, self.transcript.num_events)
                if is_over:
                    await events.close(frames)
                    return
                if frames:
                    await events.write(frames)
                await news.wait()

    async def _run(self, exchange: Exchange, generation: Generation, places: ExitStack) -> None:
        try:
            try:
                async with aclosing(self.advance(generation)) as progress:
                    async for _ in progress:
                        self._tell()
            finally:
                places.close()
            await self.complete(exchange)
        except asyncio.CancelledError:
            if not self._is_cancelled:
                raise
            self.end_cancelled()
            exchange.error = ClientGoneError("The client cancelled the response")
            await self.save()
        except RequestError as error:
            exchange.error = error
            self.fail(error)
            await self.save()
        except Exception:  # a border: nobody waits for this task, so nobody would see what it raises
            log.exception("response.bug", request_id=exchange.request_id)
            exchange.error = InternalError("The server made a mistake with this response; it is logged")
            self.fail(exchange.error)
            await self.save()
        finally:
            self._tell()
            self._context.account(exchange)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _failure_code(error: RequestError) -> str:
    """OpenAI's three words for it."""
    if isinstance(error, OverloadedError):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, ValidationError) else "server_error"


async def _nothing() -> Message:
    """Nobody is at the other end."""
    raise InternalError("a background response has no client to receive from")


async def _nowhere(message: Message) -> None:
    """See `_nothing`."""
    raise InternalError(f"a background response has no client to send {message['type']} to")
