"""The shard's part of a trace: one span per request, whatever becomes of it."""

import time

import pytest
from tests.otlp_collector import attributes_of, collecting

from weft.config import Settings
from weft.core.events import FailureEvent, PromptReport, TokenEvent
from weft.core.request import FinishReason, Request, RequestId, SamplingParams, StopConditions
from weft.server.request_spans import RequestSpans
from weft.telemetry.tracing import open_tracing

TRACEPARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-0"


class Clock:
    def now_ns(self) -> int:
        return time.monotonic_ns()


def request(request_id: int, flags: str = "1") -> Request:
    return Request(
        request_id=RequestId(request_id),
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(),
        stop=StopConditions(max_new_tokens=5),
        trace_parent=TRACEPARENT + flags if flags else "",
    )


def token(request_id: int, index: int, *, reason: FinishReason | None = None) -> TokenEvent:
    report = PromptReport(num_cached_tokens=2, queue_ns=1_500_000_000) if index == 0 else None
    return TokenEvent(
        request_id=RequestId(request_id),
        token_index=index,
        token_id=1,
        logprob=0.0,
        finish_reason=reason,
        prompt=report,
    )


def test_a_request_is_one_span_under_the_routers_however_it_ends() -> None:
    with collecting() as collector:
        settings, clock = Settings(otlp_endpoint=collector.endpoint), Clock()
        tracing = open_tracing(settings, "shard-0", "1", clock)
        assert tracing is not None
        spans = RequestSpans(tracing, clock)
        for request_id in (1, 2, 3):
            spans.begin(request(request_id))
        spans.note(token(1, 0))
        spans.note(token(1, 1))
        spans.note(token(1, 2, reason=FinishReason.LENGTH))
        spans.abort(RequestId(2))
        spans.note(FailureEvent(request_id=RequestId(3), code="numerical_error", message="NaN"))
        tracing.close()

    finished, aborted, failed = collector.spans
    assert {span.name for span in collector.spans} == {"engine.generate"}
    assert {span.parent_span_id.hex() for span in collector.spans} == {"cd" * 8}
    assert collector.resources[0]["service.name"] == "text-generation-inference.server"
    assert [event.name for event in finished.events] == ["first_token"]
    assert attributes_of(finished) == {
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.latency.time_in_queue": 1.5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert attributes_of(aborted)["gen_ai.response.finish_reasons"] == ["aborted"]
    assert attributes_of(failed)["error.type"] == "numerical_error"


@pytest.mark.parametrize("flags", ["", "0"])
def test_an_untraced_request_has_no_span(flags: str) -> None:
    with collecting() as collector:
        clock = Clock()
        tracing = open_tracing(Settings(otlp_endpoint=collector.endpoint), "shard-0", "1", clock)
        assert tracing is not None
        spans = RequestSpans(tracing, clock)
        spans.begin(request(1, flags))
        spans.note(token(1, 0, reason=FinishReason.LENGTH))
        spans.abort(RequestId(1))
        tracing.close()

    assert collector.spans == []
