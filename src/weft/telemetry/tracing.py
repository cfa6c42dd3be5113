"""OpenTelemetry spans, sent over OTLP/gRPC by a thread of their own.

Without `--otlp-endpoint` nothing of OpenTelemetry is loaded and no span exists. With it, a collector that is slow or
gone costs spans and never requests: finished spans wait in a bounded queue, whose oldest are dropped, and one log
event says when deliveries begin to fail and when they work again.

Times come from the process's own clock and are shifted to wall time once per span, so that a span and its children
agree to the nanosecond. Prompts and completions are never attributes.

Source: W3C Trace Context; OpenTelemetry specification, OTLP 1.x; semantic conventions for HTTP and generative AI
"""

import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from weft.config import Settings
from weft.core.clock import Clock
from weft.limits import LIMITS

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Span, Tracer

log = structlog.get_logger("weft.tracing")

Attribute = str | bool | int | float | Sequence[str]

_DEFAULT_PORT = 4317
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def sane_trace_parent(text: str | None) -> str:
    """A W3C traceparent, or "" for what is none: a malformed one is no trace."""
    return text if text is not None and _TRACE_PARENT.fullmatch(text) else ""


@dataclass(slots=True)
class SpanCounts:
    """What became of the spans of this process."""

    ended: int = 0
    delivered: int = 0
    failed: int = 0
    """Refused by the collector or not taken in time. Dropped before that: ended less the other two, and the queue."""


class Tracing:
    """The spans of one process."""

    def __init__(self, tracer: "Tracer", counts: SpanCounts, clock: Clock, shut_down: threading.Thread) -> None:
        """See `open_tracing`."""
        self._tracer = tracer
        self._clock = clock
        self._shut_down = shut_down
        self.counts = counts

    def start(
        self,
        name: str,
        *,
        started_ns: int,
        trace_parent: str = "",
        trace_state: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> "OpenSpan":
        """Begin a span that serves a request; its parent is whoever asked. `started_ns` by the process's clock."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": trace_parent, "tracestate": trace_state} if trace_parent else {}
        offset_ns = time.time_ns() - self._clock.now_ns()
        span = self._tracer.start_span(
            name,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=started_ns + offset_ns,
        )
        return OpenSpan(self._tracer, span, offset_ns, self.counts)

    def close(self) -> None:
        """Send what is left, for as long as `limits.trace_flush_s` at most."""
        self._shut_down.start()
        self._shut_down.join(LIMITS.trace_flush_s)


class OpenSpan:
    """A span that has begun. All times are readings of the process's clock, in nanoseconds."""

    __slots__ = ("_counts", "_offset_ns", "_span", "_tracer", "is_sampled", "trace_parent")

    def __init__(self, tracer: "Tracer", span: "Span", offset_ns: int, counts: SpanCounts) -> None:
        """Made by `Tracing.start`."""
        context = span.get_span_context()
        self._tracer = tracer
        self._span = span
        self._offset_ns = offset_ns
        self._counts = counts
        self.is_sampled = bool(context.trace_flags.sampled)
        self.trace_parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        """What the next process gets, so that its spans hang under this one."""

    def note(self, attributes: Mapping[str, Attribute]) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def event(self, name: str, at_ns: int) -> None:
        """Mark a moment."""
        self._span.add_event(name, timestamp=at_ns + self._offset_ns)

    def child(self, name: str, started_ns: int, ended_ns: int) -> None:
        """A part of this span that is over."""
        from opentelemetry.trace import set_span_in_context

        child = self._tracer.start_span(
            name, context=set_span_in_context(self._span), start_time=started_ns + self._offset_ns
        )
        child.end(max(ended_ns, started_ns) + self._offset_ns)
        self._counts.ended += self.is_sampled

    def end(self, ended_ns: int, *, error: str = "") -> None:
        """The work is done. `error`: stable code of the failure; empty: it went well."""
        from opentelemetry.trace import StatusCode

        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(StatusCode.ERROR)
        self._span.end(ended_ns + self._offset_ns)
        self._counts.ended += self.is_sampled


class CountingExporter:
    """Hands batches on, counts them, and logs once when deliveries begin to fail and when they work again."""

    def __init__(self, exporter: "SpanExporter") -> None:
        self._exporter = exporter
        self._is_failing = False
        self.counts = SpanCounts()

    def export(self, spans: "Sequence[ReadableSpan]") -> "SpanExportResult":
        """Called on the sending thread; blocks for `limits.trace_export_timeout_s` at most."""
        result = self._exporter.export(spans)
        is_delivered = result.name == "SUCCESS"
        if is_delivered:
            self.counts.delivered += len(spans)
        else:
            self.counts.failed += len(spans)
        if is_delivered == self._is_failing:
            self._is_failing = not is_delivered
            if is_delivered:
                log.info("tracing.collector_back", num_failed=self.counts.failed)
            else:
                log.warning("tracing.collector_lost", num_failed=self.counts.failed)
        return result

    def shutdown(self) -> None:
        """Give up at once what is being sent."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 0) -> bool:
        """Nothing is kept here."""
        return self._exporter.force_flush(timeout_millis)


def open_tracing(settings: Settings, process: str, version: str, clock: Clock) -> Tracing | None:
    """Spans of this process go to `--otlp-endpoint`; None without one. `process` as in the log: router, shard-0.

    Headers and certificates for the collector come from OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_HEADERS …).
    """
    if settings.otlp_endpoint is None:
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased

    # Its lines repeat for every batch; `CountingExporter` says the same once.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    endpoint = with_default_port(settings.otlp_endpoint)
    exporter = CountingExporter(OTLPSpanExporter(endpoint=endpoint, timeout=LIMITS.trace_export_timeout_s))
    processor = BatchSpanProcessor(
        exporter,  # type: ignore[arg-type]  # has the methods; its class would load OpenTelemetry with this module
        max_queue_size=LIMITS.max_trace_queue_spans,
        schedule_delay_millis=LIMITS.trace_interval_s * 1000,
        max_export_batch_size=LIMITS.max_trace_batch_spans,
    )
    resource = Resource.create(
        {
            "service.name": service_name(settings.otlp_service_name, process),
            "service.version": version,
            "service.instance.id": f"{process}-{os.getpid()}",
        }
    )
    provider = TracerProvider(resource=resource, sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
    provider.add_span_processor(processor)
    # A daemon: a collector that hangs must not keep the process.
    shut_down = threading.Thread(target=processor.shutdown, name="tracing-shutdown", daemon=True)
    log.info("tracing.started", endpoint=endpoint)
    return Tracing(provider.get_tracer("weft", version), exporter.counts, clock, shut_down)


def with_default_port(endpoint: str) -> str:
    """OTLP/gRPC's port where none is given, and no encryption where no scheme is, as in TGI."""
    scheme, separator, rest = endpoint.rpartition("://")
    has_port = re.search(r":\d+$", rest) is not None
    return f"{scheme or 'http'}{separator or '://'}{rest}" + ("" if has_port else f":{_DEFAULT_PORT}")


def service_name(name: str, process: str) -> str:
    """TGI's launcher gives its one name to every process; where it ends in `.router`, shards are told apart."""
    if process.startswith("shard") and name.endswith(".router"):
        return name.removesuffix(".router") + ".server"
    return name
