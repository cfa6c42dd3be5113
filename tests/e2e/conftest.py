"""Servers that several tests share. Each starts when the first test asks for it and lives until the last is done."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import RunningServer, serving

from weft.config import DEFAULT_MODEL


@pytest.fixture(scope="session")
def running_server(default_model_gguf: Path) -> Iterator[RunningServer]:
    """The default model with default settings, under the reference that `serve` itself uses."""
    del default_model_gguf  # downloaded, so that no test waits for it
    with serving(DEFAULT_MODEL) as server:
        yield server


@pytest.fixture(scope="session")
def float32_server(default_model_gguf: Path) -> Iterator[RunningServer]:
    """The default model computed in float32, where the same request must give the same tokens in any company."""
    with serving(default_model_gguf, "--dtype", "float32") as server:
        yield server
