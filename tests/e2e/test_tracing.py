"""A real server and a real collector: one trace from the client to the shard, and a server that needs no collector."""

import time
from pathlib import Path

import pytest
from tests.e2e.harness import free_port, serving
from tests.otlp_collector import attributes_of, collecting

pytestmark = pytest.mark.e2e

TRACE, CLIENT_SPAN = "ab" * 16, "cd" * 8
BODY = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 5}}


def test_router_and_shard_share_the_clients_trace(default_model_gguf: Path) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
    with collecting() as collector:
        flags = ("--otlp-endpoint", collector.endpoint, "--otlp-service-name", "tests.router")
        with serving(default_model_gguf, *flags) as server:
            assert server.http.post("/generate", json=BODY, headers=headers).status_code == 200
            spans = collector.wait_for("POST /generate", "validate", "queue", "inference", "engine.generate")

    http, engine = spans["POST /generate"], spans["engine.generate"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert http.parent_span_id.hex() == CLIENT_SPAN
    assert engine.parent_span_id == http.span_id
    # Two processes, one clock of the machine.
    assert http.start_time_unix_nano <= engine.start_time_unix_nano
    assert engine.end_time_unix_nano <= http.end_time_unix_nano + 100_000_000
    assert attributes_of(engine)["gen_ai.usage.output_tokens"] == 5
    assert {resource["service.name"] for resource in collector.resources} == {"tests.router", "tests.server"}


def test_a_server_whose_collector_is_gone_serves_and_stops_as_ever(default_model_gguf: Path) -> None:
    with serving(default_model_gguf, "--otlp-endpoint", f"127.0.0.1:{free_port()}") as server:
        for _ in range(3):
            assert server.http.post("/generate", json=BODY).status_code == 200
        began = time.monotonic()
        assert server.stop() == 0
        seconds = time.monotonic() - began
        output = server.output

    assert seconds < 6
    assert "Traceback" not in output
