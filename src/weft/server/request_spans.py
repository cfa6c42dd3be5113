"""One span per traced request on the shard: from its arrival to its last token, abort or failure.

Steps have no spans: what a step took is in the metrics, and a span per step would cost more than the step's planning.
"""

from weft.core.clock import Clock
from weft.core.events import EmbeddingEvent, Event, FailureEvent
from weft.core.request import Request, RequestId
from weft.telemetry.tracing import OpenSpan, Tracing, sane_trace_parent

_ABORTED = "aborted"


class RequestSpans:
    """The open spans of a shard. Runs on the event loop."""

    def __init__(self, tracing: Tracing, clock: Clock) -> None:
        self._tracing = tracing
        self._clock = clock
        self._open: dict[RequestId, OpenSpan] = {}

    def begin(self, request: Request) -> None:
        """A request arrived. Without a traceparent, or with one that asks for no sampling, there is no span."""
        trace_parent = sane_trace_parent(request.trace_parent)
        if not trace_parent:
            return
        span = self._tracing.start(
            "engine.generate",
            started_ns=self._clock.now_ns(),
            trace_parent=trace_parent,
            attributes={
                "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                "gen_ai.request.max_tokens": request.stop.max_new_tokens,
            },
        )
        if span.is_sampled:
            self._open[request.request_id] = span

    def note(self, event: Event) -> None:
        """An event on its way out; only the first and the last one of a request say something."""
        span = self._open.get(event.request_id)
        if span is None:
            return
        if isinstance(event, FailureEvent):
            self._end(event.request_id, error=event.code)
            return
        if event.prompt is not None:
            if not isinstance(event, EmbeddingEvent):
                span.event("first_token", self._clock.now_ns())
            span.note(
                {
                    "gen_ai.usage.cache_read.input_tokens": event.prompt.num_cached_tokens,
                    "gen_ai.latency.time_in_queue": event.prompt.queue_ns / 1e9,
                }
            )
        if isinstance(event, EmbeddingEvent):
            self._end(event.request_id)
        elif event.finish_reason is not None:
            span.note(
                {
                    "gen_ai.usage.output_tokens": event.token_index + 1,
                    "gen_ai.response.finish_reasons": [str(event.finish_reason)],
                }
            )
            self._end(event.request_id)

    def abort(self, request_id: RequestId) -> None:
        """The router gave the request up, as it does at a stop string and when a client leaves."""
        span = self._open.get(request_id)
        if span is not None:
            span.note({"gen_ai.response.finish_reasons": [_ABORTED]})
            self._end(request_id)

    def _end(self, request_id: RequestId, error: str = "") -> None:
        self._open.pop(request_id).end(self._clock.now_ns(), error=error)
