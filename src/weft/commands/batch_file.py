"""Files of a batch: the requests, checked before anything is sent, and the answers, appended so that no crash spoils
them.

Source: OpenAI API reference, "Batch": the request input object and the request output object
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from weft.errors import UsageError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_LINE_BYTES = 16 * 2**20
"""Servers refuse larger bodies."""
MAX_CUSTOM_ID_CHARS = 512
_MAX_SHOWN_FAULTS = 20


@dataclass(frozen=True, slots=True)
class BatchInput:
    """A file whose every line is a request."""

    path: Path
    custom_ids: tuple[str, ...]
    """In the order of the file; no two are equal."""

    def requests(self) -> Iterator[dict[str, Any]]:
        """The requests, read again from the file: only the ids are kept in memory."""
        with self.path.open("rb") as stream:
            for line in stream:
                if line.strip():
                    request: dict[str, Any] = json.loads(line)
                    yield request


def check_input(path: Path) -> BatchInput:
    """Read every line and say all that is wrong, with line numbers.

    Raises   UsageError
    """
    lines_by_id: dict[str, int] = {}
    faults: list[str] = []
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    faults.append(f"line {number}: longer than {MAX_LINE_BYTES} bytes; the rest was not read")
                    break
                if line.strip():
                    faults.extend(f"line {number}: {fault}" for fault in _faults(line, number, lines_by_id))
    except OSError as error:
        raise UsageError(f"weft batch: cannot read {path}: {error.strerror}.") from error
    if faults:
        more = len(faults) - _MAX_SHOWN_FAULTS
        shown = faults[:_MAX_SHOWN_FAULTS] + ([f"… and {more} more"] if more > 0 else [])
        raise UsageError("\n  ".join([f"{path}: nothing was sent. Faults: {len(faults)}", *shown]))
    if not lines_by_id:
        raise UsageError(f"{path}: there is no request in it.")
    return BatchInput(path, tuple(lines_by_id))


def _faults(line: bytes, number: int, lines_by_id: dict[str, int]) -> Iterator[str]:
    """What is wrong with one line; a new id is added to those seen."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        yield f"not JSON ({error})"
        return
    if not isinstance(request, dict):
        yield "not a JSON object"
        return
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        yield f"`custom_id` must be a text of 1 to {MAX_CUSTOM_ID_CHARS} characters"
    elif custom_id in lines_by_id:
        yield f"`custom_id` {custom_id[:80]!r} stands on line {lines_by_id[custom_id]} already"
    else:
        lines_by_id[custom_id] = number
    if request.get("method") != "POST":
        yield f'`method` must be "POST". Given: {str(request.get("method"))[:40]!r}'
    if request.get("url") not in URLS:
        yield f"`url` must be one of {', '.join(URLS)}. Given: {str(request.get('url'))[:80]!r}"
    body = request.get("body")
    if not isinstance(body, dict):
        yield "`body` must be an object"
        return
    if body.get("stream"):
        yield "`body.stream` must not be true: a batch has whole answers"
    try:
        encode_body(body)
    except ValueError:  # Python reads NaN and 1e999, which no JSON has
        yield "`body` must hold finite numbers only"


def encode_body(body: dict[str, Any]) -> bytes:
    """The body of a request as it is sent. Raises ValueError for a number that is none."""
    return json.dumps(body, allow_nan=False).encode()


class AppendedLines:
    """A file that only grows, by whole lines that are on the disk when `append` returns."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        """Every line that is there now."""
        self._stream.seek(0)
        yield from self._stream

    def append(self, values: list[dict[str, Any]]) -> None:
        """Write each value as a line of JSON. Blocks until the disk has them. Raises OSError."""
        texts = (json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in values)
        # Half of a surrogate pair, which JSON may have and UTF-8 may not, becomes JSON's own escape.
        lines = [text.encode(errors="backslashreplace") + b"\n" for text in texts]
        self._stream.seek(0, os.SEEK_END)
        self._stream.write(b"".join(lines))
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def drop_torn_line(self) -> None:
        """Cut off a last line without its end: what a crash left of an append."""
        end = 0
        for line in self:
            end += len(line) if line.endswith(b"\n") else 0
        self._stream.truncate(end)


@contextmanager
def lines_of(path: Path, *, keeps_content: bool = True) -> Iterator[AppendedLines]:
    """Open a file for appending, made if need be, for this process alone.

    Raises   UsageError: it cannot be written, or another run has it
    """
    try:
        stream = path.open("a+b")
    except OSError as error:
        raise UsageError(f"weft batch: cannot write {path}: {error.strerror}. Choose another file with -o.") from error
    with stream:
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"weft batch: another run is writing {path}. Choose another file with -o.") from error
        lines = AppendedLines(stream)
        if keeps_content:
            lines.drop_torn_line()
        else:
            stream.truncate(0)
        yield lines


def finished_ids(answers: AppendedLines) -> frozenset[str]:
    """Ids that need not be asked again.

    Raises   UsageError: the file holds something else than answers, so appending to it would spoil it
    """
    found: set[str] = set()
    for number, line in enumerate(answers, 1):
        try:
            found.add(json.loads(line)["custom_id"])
        except (ValueError, LookupError, TypeError) as error:
            raise UsageError(
                f"weft batch: line {number} of the output is no answer; choose another with -o."
            ) from error
    return frozenset(found)
