"""An OTLP/gRPC collector on loopback that remembers the spans it gets, and can refuse or stall."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE_S = 20.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What was received, and how to misbehave."""

    def __init__(self) -> None:
        self.port = 0
        self.refuses = False
        self.answers = threading.Event()
        """Clear: calls hang."""
        self.answers.set()
        self.num_calls = 0
        self.spans: list[Span] = []
        self.resources: list[dict[str, Any]] = []
        self.metadata: list[dict[str, str]] = []
        self._changed = threading.Condition()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's spelling
        with self._changed:
            self.num_calls += 1
            self._changed.notify_all()
        self.answers.wait(PATIENCE_S)
        if self.refuses:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused by the test")
        with self._changed:
            self.metadata.append(dict(context.invocation_metadata()))
            for group in request.resource_spans:
                self.resources.append(attributes_of(group.resource))
                self.spans += [span for scope in group.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait_for(self, *names: str) -> dict[str, Span]:
        """Until a span of each name is here; by name, the newest of each."""
        with self._changed:
            assert self._changed.wait_for(lambda: set(names) <= {span.name for span in self.spans}, PATIENCE_S), (
                f"wanted {names}, got {[span.name for span in self.spans]}"
            )
            return {span.name: span for span in self.spans}

    def wait_for_calls(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.num_calls >= count, PATIENCE_S)


def attributes_of(holder: Any) -> dict[str, Any]:
    """Attributes of a span or resource as plain values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(item) for item in value.array_value.values]
        return getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in holder.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that runs while the block does."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        collector.answers.set()
        server.stop(grace=None).wait()
