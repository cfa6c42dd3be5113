"""Spans on their way to a real collector, and what happens when it is not there."""

import io
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tests.otlp_collector import attributes_of, collecting

from weft import limits
from weft.config import Settings
from weft.telemetry import logging as weft_logging
from weft.telemetry import tracing as weft_tracing
from weft.telemetry.tracing import Tracing, open_tracing, sane_trace_parent, service_name, with_default_port

PARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
UNSAMPLED = PARENT[:-2] + "00"


class Clock:
    def now_ns(self) -> int:
        return time.monotonic_ns()


CLOCK = Clock()


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        weft_tracing,
        "LIMITS",
        replace(limits.LIMITS, trace_interval_s=0.05, trace_export_timeout_s=0.5, trace_flush_s=0.3),
    )


def tracing_to(endpoint: str, name: str = "my-service") -> Tracing:
    tracing = open_tracing(Settings(otlp_endpoint=endpoint, otlp_service_name=name), "router", "1.2", CLOCK)
    assert tracing is not None
    return tracing


def test_without_an_endpoint_there_is_no_tracing_and_nothing_is_loaded() -> None:
    program = (
        "import sys; import weft.router.main, weft.telemetry.tracing as t; from weft.config import Settings;"
        "assert t.open_tracing(Settings(), 'router', '1', None) is None;"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_span_arrives_with_its_times_its_parent_and_its_parts() -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.endpoint)
        before_ns, started_ns = time.time_ns(), CLOCK.now_ns()
        span = tracing.start("work", started_ns=started_ns, trace_parent=PARENT, attributes={"a": 1})
        span.note({"b": ["x", "y"]})
        span.child("part", started_ns + 1_000, started_ns + 2_000)
        span.event("moment", started_ns + 1_500)
        span.end(started_ns + 5_000)
        found = collector.wait_for("work", "part")
        tracing.close()

    work, part = found["work"], found["part"]
    assert work.trace_id.hex() == part.trace_id.hex() == "ab" * 16
    assert work.parent_span_id.hex() == "cd" * 8
    assert part.parent_span_id == work.span_id
    assert span.trace_parent == f"00-{'ab' * 16}-{work.span_id.hex()}-01"
    assert attributes_of(work) == {"a": 1, "b": ["x", "y"]}
    assert work.end_time_unix_nano - work.start_time_unix_nano == 5_000
    assert part.start_time_unix_nano - work.start_time_unix_nano == 1_000
    assert work.events[0].time_unix_nano - work.start_time_unix_nano == 1_500
    assert abs(work.start_time_unix_nano - before_ns) < 1e9
    assert collector.resources[0].items() >= {"service.name": "my-service", "service.version": "1.2"}.items()
    assert (tracing.counts.ended, tracing.counts.delivered, tracing.counts.failed) == (2, 2, 0)


def test_a_failed_span_has_its_code() -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.endpoint)
        tracing.start("work", started_ns=CLOCK.now_ns()).end(CLOCK.now_ns(), error="overloaded")
        span = collector.wait_for("work")["work"]
        tracing.close()

    assert attributes_of(span) == {"error.type": "overloaded"}
    assert span.status.code == span.status.STATUS_CODE_ERROR


def test_a_caller_that_wants_no_sampling_gets_none() -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.endpoint)
        unsampled = tracing.start("unsampled", started_ns=CLOCK.now_ns(), trace_parent=UNSAMPLED)
        unsampled.end(CLOCK.now_ns())
        tracing.start("sampled", started_ns=CLOCK.now_ns()).end(CLOCK.now_ns())
        collector.wait_for("sampled")
        tracing.close()

    assert [span.name for span in collector.spans] == ["sampled"]
    assert not unsampled.is_sampled
    assert unsampled.trace_parent.endswith("-00")


def test_closing_sends_what_is_left() -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.endpoint)
        tracing.start("last", started_ns=CLOCK.now_ns()).end(CLOCK.now_ns())
        tracing.close()

        assert [span.name for span in collector.spans] == ["last"]


@pytest.fixture(autouse=True)
def log_lines() -> io.StringIO:
    stream = io.StringIO()
    weft_logging.configure(process="router", json_output=True, stream=stream)
    return stream


def events_of(log_lines: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in log_lines.getvalue().splitlines()]


def wait_until_failed(tracing: Tracing, count: int) -> None:
    deadline = time.monotonic() + 10
    while tracing.counts.failed < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lost_collector_is_said_once_and_so_is_its_return(log_lines: io.StringIO) -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.endpoint)
        collector.refuses = True
        for count in (1, 2):
            tracing.start("refused", started_ns=CLOCK.now_ns()).end(CLOCK.now_ns())
            wait_until_failed(tracing, count)
        collector.refuses = False
        tracing.start("taken", started_ns=CLOCK.now_ns()).end(CLOCK.now_ns())
        collector.wait_for("taken")
        tracing.close()

    assert events_of(log_lines) == ["tracing.started", "tracing.collector_lost", "tracing.collector_back"]


def dead_endpoint() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["dead", "hanging"])
def test_a_collector_that_does_not_answer_costs_no_time(kind: str, log_lines: io.StringIO) -> None:
    with collecting() as collector:
        collector.answers.clear()
        tracing = tracing_to(collector.endpoint if kind == "hanging" else dead_endpoint())
        began = time.monotonic()
        for _ in range(10_000):
            tracing.start("work", started_ns=CLOCK.now_ns()).end(CLOCK.now_ns())
        seconds_to_make = time.monotonic() - began
        began = time.monotonic()
        tracing.close()
        seconds_to_close = time.monotonic() - began
        # Before the collector answers after all, and is lost again when it stops.
        num_delivered, said = tracing.counts.delivered, events_of(log_lines)

    # 10,000 spans: the queue has overflowed, and nobody waited for the collector.
    assert seconds_to_make < 5
    assert seconds_to_close < 1
    assert tracing.counts.ended == 10_000
    assert num_delivered == 0
    assert said.count("tracing.collector_lost") <= 1


def test_spans_of_another_trace_state_go_on_with_it() -> None:
    with collecting() as collector:
        tracing = tracing_to(collector.endpoint)
        tracing.start("work", started_ns=CLOCK.now_ns(), trace_parent=PARENT, trace_state="vendor=1").end(
            CLOCK.now_ns()
        )
        span = collector.wait_for("work")["work"]
        tracing.close()

    assert span.trace_state == "vendor=1"


@pytest.mark.parametrize(
    ("text", "is_sane"),
    [
        (PARENT, True), (UNSAMPLED, True), ("", False), (None, False), ("ff" + PARENT[2:], False),
        (PARENT.upper(), False), (PARENT + "-x", False), ("00-" + "0" * 32 + PARENT[35:], False),
        (PARENT[:36] + "0" * 16 + "-01", False),
    ],
)  # fmt: skip
def test_a_malformed_trace_parent_is_none(text: str | None, is_sane: bool) -> None:
    assert bool(sane_trace_parent(text)) is is_sane


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("localhost", "http://localhost:4317"), ("http://a.b:1", "http://a.b:1"), ("https://a", "https://a:4317"),
        ("[::1]:4317", "http://[::1]:4317"), ("[::1]", "http://[::1]:4317"),
    ],
)  # fmt: skip
def test_the_endpoint_is_completed(given: str, used: str) -> None:
    assert with_default_port(given) == used


def test_router_and_shard_are_told_apart_where_the_name_says_router() -> None:
    assert service_name("text-generation-inference.router", "shard-0") == "text-generation-inference.server"
    assert service_name("text-generation-inference.router", "router") == "text-generation-inference.router"
    assert service_name("mine", "shard-0") == "mine"
