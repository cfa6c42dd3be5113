"""What children say."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from weft.config import Settings
from weft.launcher.relay import LogRelay, parse_event
from weft.telemetry import logging as weft_logging


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.parametrize("line", ["", "words", "{", "[1]", '{"a": 1}', '{"event": 1}', "{" + "x" * 100])
def test_lines_that_are_no_events_are_not_taken_for_one(line: str) -> None:
    assert parse_event(line) is None


def shown(settings: Settings, level: str, rank: int | None) -> str:
    stream = io.StringIO()
    weft_logging.configure(process="launcher", level=settings.log_level, stream=stream)
    relay = LogRelay(settings, stream)
    line = json.dumps({"event": "shard.event", "level": level, "process": "shard-9", "count": 3})
    event = parse_event(line)
    assert event is not None
    relay.show_event("shard-9", rank, line, event)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("log_level", "level", "rank", "is_shown"),
    [
        ("info", "info", 0, True),
        ("info", "info", None, True),
        ("info", "debug", 0, False),
        ("info", "info", 1, False),
        ("info", "warning", 1, True),
        ("debug", "info", 1, True),
        ("warn", "info", 0, False),
        ("warn", "error", 0, True),
    ],
)
def test_events_are_filtered_by_level_and_ranks_do_not_repeat_each_other(
    log_level: str, level: str, rank: int | None, is_shown: bool
) -> None:
    assert ("shard.event" in shown(Settings(log_level=log_level), level, rank)) is is_shown


def test_a_readable_line_names_process_and_fields() -> None:
    text = shown(Settings(), "info", 0)

    assert "process=shard-9" in text
    assert "count=3" in text


def test_json_events_go_on_unchanged() -> None:
    event = json.loads(shown(Settings(json_output=True), "info", 0))

    assert event == {"event": "shard.event", "level": "info", "process": "shard-9", "count": 3}
