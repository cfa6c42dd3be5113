"""A model of the hub, from its id on the command line to an answer."""

from pathlib import Path

import httpx
import pytest
from tests.e2e.harness import launch
from tests.e2e.lookalike_hub import LookalikeHub

pytestmark = pytest.mark.e2e


def test_a_hub_model_is_downloaded_through_a_cut_and_served(default_model_gguf: Path, tmp_path: Path) -> None:
    hub = LookalikeHub({"SmolLM2.gguf": default_model_gguf.read_bytes(), "README.md": b"words"})
    hub.faults["SmolLM2.gguf"] = ["truncate"]
    hub.faults["api"] = ["503"]
    server = launch(
        "organisation/model/SmolLM2.gguf",
        *("--hub-endpoint", hub.url, "--huggingface-hub-cache", str(tmp_path / "hub")),
        *("--cache-dir", str(tmp_path / "weft")),
    )
    try:
        server.wait_ready()
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        url = f"http://127.0.0.1:{server.port}/v1"
        answer = httpx.post(f"{url}/chat/completions", json={"model": "SmolLM2", **body}, timeout=60).json()
        by_full_id = httpx.post(
            f"{url}/chat/completions", json={"model": "organisation/model/SmolLM2.gguf", **body}, timeout=60
        )
    finally:
        server.destroy()
        hub.close()

    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert by_full_id.status_code == 200
    assert hub.sent["SmolLM2.gguf"] < 1.2 * len(hub.files["SmolLM2.gguf"])
    assert hub.sent["README.md"] == 0
