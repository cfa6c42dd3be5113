"""Log events of the contract tests go nowhere, in the form that production writes."""

import io

import pytest

from weft.telemetry import logging as weft_logging


@pytest.fixture(autouse=True)
def log_lines() -> io.StringIO:
    """What the server logs, one JSON object per line."""
    stream = io.StringIO()
    weft_logging.configure(process="router", level="debug", json_output=True, stream=stream)
    return stream
