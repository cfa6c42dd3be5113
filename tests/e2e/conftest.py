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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a server stay on one worker of a parallel run, so that the server starts once."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            is_shared = "running_server" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("running server" if is_shared else item.path.stem))
