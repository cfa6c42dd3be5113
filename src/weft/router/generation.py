"""The sequences of one HTTP request, from its places in the house to the last token. Knows no dialect.

The events of all sequences come out of one generator, so that a handler is one loop in one task whether there is one
choice or thirty. Leaving the loop, by any way, ends what still runs.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from functools import partial
from types import TracebackType
from typing import Self

from weft.core.events import TokenEvent
from weft.core.request import FinishReason, Request
from weft.errors import IncompleteGenerationError, RequestError
from weft.router.backend import Backend, Taker, TokenBatch
from weft.router.context import RouterContext
from weft.router.exchange import Exchange, RawHeaders
from weft.router.recording import REPLAY_PATH, request_line, system_fingerprint
from weft.router.request_trace import note_requests
from weft.router.sequence_text import SequenceText

Progress = tuple[SequenceText, TokenBatch]
Show = Callable[[TokenBatch], bool]
"""Shows a batch to the client at once, or says that this is not possible now."""


class Generation:
    """A context manager: inside it the request holds its places. Raises OverloadedError on entering."""

    def __init__(
        self, context: RouterContext, exchange: Exchange, requests: Sequence[Request], sequences: Sequence[SequenceText]
    ) -> None:
        """`sequences[i]` is the text of `requests[i]`; its index is i."""
        self._context = context
        self._exchange = exchange
        self._requests = requests
        self.sequences = sequences
        self._last_token_ns = [0] * len(requests)
        # What is asked again stands in a recording already.
        is_recorded = context.recorder is not None and exchange.route != REPLAY_PATH
        self._recorded: list[list[TokenEvent]] | None = [[] for _ in requests] if is_recorded else None
        self._places = ExitStack()
        metrics = context.metrics
        self._first_token_seconds = metrics.histogram("weft_time_to_first_token_seconds")
        self._finished = metrics.counter("weft_sequences_finished")
        self._inter_token_seconds = metrics.histogram("weft_inter_token_seconds")

    def __enter__(self) -> Self:
        """Take the places."""
        self._context.lifecycle.require_ready()
        self._places.enter_context(self._context.admission.admit(len(self._requests)))
        self._context.lifecycle.generation_started()
        self._exchange.stage = "queue"
        note_requests(self._context, self._exchange, self._requests)
        self._exchange.max_new_tokens = self._requests[0].stop.max_new_tokens
        self._exchange.timings.queued_ns = self._context.clock.now_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give them back and note how it went."""
        self._places.close()
        self._context.lifecycle.generation_ended()
        timings, exchange = self._exchange.timings, self._exchange
        timings.finished_ns = self._context.clock.now_ns()
        exchange.num_completion_tokens = sum(sequence.num_tokens for sequence in self.sequences)
        for sequence in self.sequences:
            if sequence.finish_reason is not None:
                self._finished.add(1, sequence.finish_reason)
                self._record(sequence, sequence.finish_reason)
        exchange.finish_reason = self.sequences[0].finish_reason or ""
        self._context.admission.observe_duration((timings.finished_ns - timings.queued_ns) / 1e9)

    async def progress(self, show: Show | None = None) -> AsyncGenerator[Progress, None]:
        """(sequence, its new events) until every sequence has ended. Raises RequestError when any fails.

        `show`: is offered the events of a lone sequence first, as they arrive; what it showed is not repeated here. The
        first event never is: with it an answer begins, whether or not a comment has opened its stream before.
        """
        if len(self._requests) > 1:
            async with aclosing(_merge(self._context.backend, self._requests, self.sequences)) as merged:
                async for sequence, batch in merged:
                    self._account(sequence.index, batch)
                    yield sequence, batch
            return
        sequence = self.sequences[0]
        taker = None if show is None or sequence.has_stop_strings else self._taker(show)
        async with aclosing(self._context.backend.generate(self._requests[0], taker)) as batches:
            async for batch in batches:
                self._account(0, batch)
                yield sequence, batch
                if sequence.finish_reason is not None:
                    return
        raise IncompleteGenerationError("Incomplete generation")

    def _taker(self, show: Show) -> Taker:
        def take(event: TokenEvent) -> bool:
            batch = (event,)
            if event.prompt is not None or not show(batch):
                return False
            self._account(0, batch)
            return True

        return take

    def _is_first_of_its_prompt(self, index: int) -> bool:
        """Later choices of a prompt find what the first one has just computed, which is no news to the client."""
        prompt = self._requests[index].prompt_token_ids
        return index == 0 or self._requests[index - 1].prompt_token_ids is not prompt

    def _record(self, sequence: SequenceText, reason: FinishReason) -> None:
        """Hand a finished sequence to the recorder, without the tokens behind its stop string."""
        recorder, model = self._context.recorder, self._context.model
        if recorder is None or self._recorded is None or model is None:
            return
        recorder.put(
            partial(
                request_line,
                self._requests[sequence.index],
                self._recorded[sequence.index][: sequence.num_tokens],
                reason,
                request_id=self._exchange.request_id,
                index=sequence.index,
                fingerprint=system_fingerprint(model.info, self._context.version),
            )
        )

    def _account(self, index: int, batch: TokenBatch) -> None:
        if self._recorded is not None:
            self._recorded[index] += batch
        now_ns = self._context.clock.now_ns()
        last_ns, self._last_token_ns[index] = self._last_token_ns[index], now_ns
        if last_ns:
            self._inter_token_seconds.observe((now_ns - last_ns) / 1e9 / len(batch), times=len(batch))
            return
        exchange, report = self._exchange, batch[0].prompt
        if report is not None:
            exchange.timings.queue_ns = max(exchange.timings.queue_ns, report.queue_ns)
            if self._is_first_of_its_prompt(index):
                exchange.num_cached_tokens += report.num_cached_tokens
        if not exchange.timings.first_token_ns:
            exchange.timings.first_token_ns = now_ns
            exchange.stage = "decode"
            self._first_token_seconds.observe((now_ns - exchange.timings.started_ns) / 1e9)


def timing_headers(exchange: Exchange, num_shown_tokens: int | None = None) -> RawHeaders:
    """TGI's: whole milliseconds, and seconds as a decimal in x-compute-time.

    `num_shown_tokens`: completion tokens of the answer, when it does not show all that were generated.
    """
    timings = exchange.timings
    num_tokens = exchange.num_completion_tokens if num_shown_tokens is None else num_shown_tokens
    milliseconds = {
        b"x-total-time": timings.total_ns,
        b"x-validation-time": timings.validation_ns,
        b"x-queue-time": timings.queue_ns,
        b"x-inference-time": timings.inference_ns,
        b"x-time-per-token": timings.inference_ns // max(num_tokens, 1),
    }
    return [
        (b"x-compute-time", b"%.9f" % (timings.total_ns / 1e9)),
        *((name, b"%d" % (value // 1_000_000)) for name, value in milliseconds.items()),
        (b"x-prompt-tokens", b"%d" % exchange.num_prompt_tokens),
        (b"x-generated-tokens", b"%d" % num_tokens),
    ]


async def _merge(
    backend: Backend, requests: Sequence[Request], sequences: Sequence[SequenceText]
) -> AsyncGenerator[Progress, None]:
    """Follows every request in a task of its own; the first failure ends all."""
    arrived: asyncio.Queue[tuple[SequenceText, TokenBatch | RequestError]] = asyncio.Queue(maxsize=len(requests))

    async def pump(request: Request, sequence: SequenceText) -> None:
        try:
            async with aclosing(backend.generate(request)) as batches:
                async for batch in batches:
                    await arrived.put((sequence, batch))
            await arrived.put((sequence, IncompleteGenerationError("Incomplete generation")))
        except RequestError as error:
            await arrived.put((sequence, error))

    pumps = {
        sequence.index: asyncio.create_task(pump(request, sequence))
        for request, sequence in zip(requests, sequences, strict=True)
    }
    try:
        while pumps:
            sequence, batch = await arrived.get()
            if sequence.index not in pumps:
                continue  # arrived while its sequence was being ended by a stop string
            if isinstance(batch, RequestError):
                raise batch
            yield sequence, batch
            if sequence.finish_reason is not None:
                pumps.pop(sequence.index).cancel()
    finally:
        for task in pumps.values():
            task.cancel()
        await asyncio.gather(*pumps.values(), return_exceptions=True)
