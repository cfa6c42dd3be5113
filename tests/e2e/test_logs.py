"""What a server writes for machines: every line is one JSON object."""

import json
from pathlib import Path

import pytest
from tests.e2e.harness import serving

pytestmark = pytest.mark.e2e


def test_with_json_output_every_line_of_every_process_is_an_event(default_model_gguf: Path) -> None:
    flags = (
        "--json-output",
        "--env",
        "--max-waiting-tokens",
        "5",
        "--max-model-len",
        "512",
        "--kv-pool-bytes",
        "64MiB",
    )
    with serving(default_model_gguf, *flags) as server:
        server.http.post("/generate", json={"inputs": "Hello", "parameters": {"max_new_tokens": 2}})
        server.http.post("/generate", json={"inputs": ""})
        assert server.stop() == 0
        events = [json.loads(line) for line in server.output.splitlines()]

    assert all({"event", "level", "timestamp", "process"} <= set(event) for event in events)
    by_name = {event["event"]: event for event in events}
    assert by_name["server.ready"]["seconds"] > 0
    assert {"weft", "python", "torch", "cores", "memory_bytes", "gpus"} <= set(by_name["launcher.environment"])
    (warning,) = (event for event in events if event["event"] == "settings.no_effect")
    assert warning["level"] == "warning"
    assert warning["note"].startswith("--max-waiting-tokens has no effect")
    assert by_name["settings.note"]["note"] == "--max-model-len is --max-total-tokens here."
    assert [event["status"] for event in events if event["event"] == "request.finished"] == [200, 422]
