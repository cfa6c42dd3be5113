"""Structured log events: one JSON object per line, or a readable line on a terminal.

Events have stable names (`request.finished`); values are fields. Prompts and completions are never fields. Values
that a client chose are written with control characters escaped, so that nobody forges a line; secrets known to the
process are replaced wherever they occur.
"""

import logging
import sys
from collections.abc import Iterable, Mapping
from typing import TextIO

import structlog
from structlog.typing import EventDict, WrappedLogger

REDACTED = "[redacted]"

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


def configure(
    *,
    process: str,
    level: str = "info",
    json_output: bool = False,
    secrets: Iterable[str] = (),
    colors: bool | None = None,
    stream: TextIO | None = None,
) -> None:
    """Send the events of this process to `stream` (standard error by default).

    `process` is bound to every event; `level` is one of LEVELS (unknown words mean info); `secrets` are strings that
    must not appear; `colors` None means: on a terminal. Records of the standard library's loggers from warnings on
    take the same way.
    """
    target = stream if stream is not None else sys.stderr
    number = LEVELS.get(level.lower(), logging.INFO)
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _bind_process(process),
        structlog.processors.format_exc_info,
        _Redact(secrets),
    ]
    if json_output:
        processors.append(structlog.processors.JSONRenderer())
    else:
        # Not the rich traceback: it shows local variables, and those hold prompts and keys.
        console = structlog.dev.ConsoleRenderer(
            colors=target.isatty() if colors is None else colors,
            pad_event_to=24,
            exception_formatter=structlog.dev.plain_traceback,
        )
        processors += (_escape_controls, console)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=target),
        cache_logger_on_first_use=False,
    )
    _forward_standard_logging(max(number, logging.WARNING))


class _Redact:
    """Replaces known secrets inside every string of an event."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # Short strings would redact ordinary words.
        self._secrets = tuple(secret for secret in secrets if len(secret) >= 4)

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        if self._secrets:
            for key, value in event.items():
                if isinstance(value, str):
                    event[key] = self._clean(value)
        return event

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        return text


def _bind_process(process: str) -> structlog.typing.Processor:
    def bind(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    return bind


def _escape_controls(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """JSON escapes control characters by itself; the readable form must not pass them to a terminal."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key != "exception":
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


class _ToStructlog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(record.levelno, record.getMessage(), exc_info=record.exc_info)


def _forward_standard_logging(level: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(level)
