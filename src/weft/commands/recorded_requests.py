"""Recordings as `weft verify` reads them: every line is checked before anything is asked, and read again when it is its
turn. Places are all that memory holds, so that a recording may be as long as the disk allows.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from sys import intern
from tempfile import TemporaryFile
from typing import IO

from weft.errors import UsageError
from weft.router.recording import RequestLine, ServerLine, UnreadableRecordingError, read_lines


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a line is the first one that is not blank."""

    file: IO[bytes]
    offset: int
    fingerprint: str


class RecordedRequests:
    """Requests in the order of the files. Each access reads a line; the files stay open."""

    def __init__(self, places: list[_Place]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> RequestLine:
        """Raises UnreadableRecordingError when the file is no longer the one that was checked."""
        place = self._places[index]
        place.file.seek(place.offset)
        line = next(read_lines(iter(place.file.readline, b""), "the recording"), None)
        if isinstance(line, RequestLine):
            return line
        raise UnreadableRecordingError("The recording has changed since it was checked. Verify a copy of it.")

    def by_fingerprint(self) -> Counter[str]:
        """System fingerprint → number of requests that its server answered."""
        return Counter(place.fingerprint for place in self._places)

    def of(self, fingerprint: str) -> "RecordedRequests":
        """Those that one server answered."""
        return RecordedRequests([place for place in self._places if place.fingerprint == fingerprint])

    def first(self, count: int | None) -> "RecordedRequests":
        """At most the first `count`; all of them for None."""
        return RecordedRequests(self._places[:count])


@dataclass(frozen=True, slots=True)
class Recording:
    """What files of `--record` hold."""

    servers: list[ServerLine]
    requests: RecordedRequests


def open_recording(names: Iterable[str], stack: ExitStack) -> Recording:
    """Check every line of the files, which stay open as long as `stack`. Requests without a token are left out.

    Raises   UsageError: a file cannot be read, or there is no request; UnreadableRecordingError naming a bad line
    """
    servers: list[ServerLine] = []
    places: list[_Place] = []
    for name in names:
        try:
            file = stack.enter_context(_opened(name))
            begin = 0
            for line in read_lines(iter(file.readline, b""), name):
                if isinstance(line, ServerLine):
                    servers.append(line)
                elif line.token_ids:
                    places.append(_Place(file, begin, intern(line.system_fingerprint)))
                begin = file.tell()
        except OSError as error:
            raise UsageError(f"weft verify: {name}: {error.strerror}.") from error
    if not places:
        raise UsageError("weft verify: the recording holds no request. Serve some with --record first.")
    return Recording(servers, RecordedRequests(places))


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """The file, or a copy of what comes out of a pipe: lines are read twice."""
    with Path(name).open("rb") as file:
        if file.seekable():
            yield file
            return
        with TemporaryFile() as copy:
            copyfileobj(file, copy)
            copy.seek(0)
            yield copy
