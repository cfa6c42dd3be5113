"""Limits that follow from the machine: never a reason not to start, always said, and by the flag that changes them."""

import json
from pathlib import Path

import pytest
from tests.e2e.harness import serving

pytestmark = pytest.mark.e2e


def test_a_context_beyond_memory_and_model_is_clipped_and_said_once_with_its_flag(default_model_gguf: Path) -> None:
    flags = ("--kv-pool-bytes", "16MiB", "--max-total-tokens", "100000", "--max-input-tokens", "90000", "--json-output")

    with serving(default_model_gguf, *flags) as server:
        info = server.http.get("/info").json()
        too_long = server.http.post("/generate", json={"inputs": "word " * 3000})
        output = server.output

    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    clipped = [event for event in events if event["event"] == "startup.context_clipped"]
    assert [event["flag"] for event in clipped] == ["--max-total-tokens", "--kv-pool-bytes"]
    assert clipped[0]["asked"] == 100_000
    assert clipped[0]["given"] == clipped[1]["asked"] == 8192
    assert info["max_total_tokens"] == clipped[1]["given"] < 1000
    assert info["max_input_tokens"] < info["max_total_tokens"]
    assert too_long.status_code == 422
    assert str(info["max_input_tokens"]) in too_long.json()["error"]
