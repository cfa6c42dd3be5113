"""What children say: log events are passed on, other lines are kept until their writer dies.

Every child writes structured events, one JSON object per line. Here they become readable lines, or go on as they
are with `--json-output`. Ranks other than 0 repeat what rank 0 says, so only their warnings are shown.
"""

import json
import sys
from collections.abc import Mapping
from typing import TextIO

import structlog

from weft.config import Settings
from weft.telemetry.logging import LEVELS

Event = Mapping[str, object]

ENVELOPE_FIELDS = {"event", "level", "timestamp", "process"}
"""What every event has besides its own fields."""


def parse_event(line: str) -> Event | None:
    """The log event of a line; None when the line is something else."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


class LogRelay:
    """Shows the children's events as the launcher's own."""

    def __init__(self, settings: Settings, stream: TextIO | None = None) -> None:
        self._is_json = settings.json_output
        self._shows_all = settings.log_level == "debug"
        self._least_level = LEVELS[settings.log_level]
        self._stream = stream if stream is not None else sys.stderr
        self._log = structlog.get_logger()

    def show_event(self, child: str, rank: int | None, line: str, event: Event) -> None:
        """Pass on an event of a child; `rank` is that of a shard."""
        level = LEVELS.get(str(event.get("level")), LEVELS["info"])
        if level < self._least_level or (rank and not self._shows_all and level < LEVELS["warning"]):
            return
        if self._is_json:
            self._stream.write(line + "\n")
            self._stream.flush()
            return
        fields = {str(key): value for key, value in event.items() if key not in ENVELOPE_FIELDS}
        process = str(event.get("process", child))
        self._log.log(level, str(event["event"]), process=process, **fields)

    def show_text(self, child: str, line: str) -> None:
        """A line that is no event: shown at once to those who debug."""
        if self._shows_all:
            self._log.debug("child.line", process=child, text=line)

    def show_last_words(self, child: str, lines: list[str]) -> None:
        """What a dead child wrote besides events."""
        if self._is_json:
            self._log.error("child.last_lines", process=child, lines=lines)
        else:
            for line in lines:
                self._stream.write(f"    {child} | {line}\n")
            self._stream.flush()
