"""Recordings: what finished requests asked for and got, as token ids, for `weft verify`. See ADR-0018.

Off unless `--record FILE` names a file. One JSON object per line: a `server` line when a file begins, then one
`request` line per finished sequence. No text stands in it, but token ids are the text to whoever has the tokenizer:
the file is readable by its owner only, and belongs where prompts may lie.

The event loop only fills a bounded queue; a thread writes. When the queue is full or the disk takes no more, lines are
dropped and counted, and nothing else happens. Beyond half of `--record-max-bytes` the file becomes FILE.1, in place of
an older one.
"""

import contextlib
import fcntl
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import structlog

from weft.config import Settings
from weft.core.events import TokenEvent
from weft.core.info import EngineInfo
from weft.core.request import FinishReason, Request, SamplingParams, StopConditions
from weft.errors import StartupError, UsageError
from weft.limits import LIMITS
from weft.telemetry.metrics import Registry

log = structlog.get_logger("weft.recording")

SCHEMA_VERSION = 1
REPLAY_PATH = "/replay"
"""Where recorded requests are asked again."""
_CLOSE_TIMEOUT_S = 2.0


class ServerLine(msgspec.Struct, kw_only=True, frozen=True, tag_field="kind", tag="server"):
    """Who answered the requests that follow."""

    schema: int = SCHEMA_VERSION
    version: str
    system_fingerprint: str
    model: str
    """What `weft serve` was given: may be a path."""
    flags: list[str]
    """Those that decide about bits, resolved: with them `weft verify` starts a server alike."""
    kernel_set: str
    device: str


class RequestLine(msgspec.Struct, kw_only=True, frozen=True, tag_field="kind", tag="request"):
    """One finished sequence."""

    schema: int = SCHEMA_VERSION
    request_id: str
    """As in the header x-request-id and in the log."""
    index: int = 0
    """Place among the sequences of its HTTP request."""
    finished_s: int
    """Unix time."""
    system_fingerprint: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    """With the seed that was drawn."""
    stop: StopConditions
    token_ids: list[int]
    """Completion tokens; those behind a stop string are left out."""
    logprobs: list[str]
    """Of each of them, every bit: hexadecimal, as `float.hex` writes it."""
    finish_reason: FinishReason


Line = ServerLine | RequestLine

_encode = msgspec.json.Encoder().encode


def system_fingerprint(info: EngineInfo, version: str) -> str:
    """As `/v1` answers carry it: `fp_WEIGHTS-CONFIGURATION-KERNELS`, or the version of an engine without one."""
    return f"fp_{info.fingerprint or version}"


def server_line(settings: Settings, info: EngineInfo, version: str) -> ServerLine:
    """The first line of a file."""
    flags = {
        "--dtype": info.dtype,
        "--quantize": settings.quantize,
        "--quantize-group-size": settings.quantize_group_size if settings.quantize else None,
        "--gguf-compute": settings.gguf_compute,
        "--kv-cache-dtype": settings.kv_cache_dtype,
        "--block-size-tokens": info.block_size_tokens or None,
        "--max-total-tokens": info.max_total_tokens,
        "--num-shard": info.world_size,
        "--device": info.device_type,
        "--kernels": settings.kernels,
        "--watermark-gamma": settings.watermark_gamma,
        "--watermark-delta": settings.watermark_delta,
    }
    return ServerLine(
        version=version,
        system_fingerprint=system_fingerprint(info, version),
        model=settings.model_id,
        flags=[part for flag, value in flags.items() if value is not None for part in (flag, str(value))],
        kernel_set=info.kernel_set,
        device=info.device_name or info.device_type,
    )


def request_line(
    request: Request,
    events: Sequence[TokenEvent],
    finish_reason: FinishReason,
    *,
    request_id: str,
    index: int,
    fingerprint: str,
) -> RequestLine:
    """`events` are those that count."""
    return RequestLine(
        request_id=request_id,
        index=index,
        finished_s=int(time.time()),
        system_fingerprint=fingerprint,
        prompt_token_ids=list(request.prompt_token_ids),
        sampling=request.sampling,
        stop=request.stop,
        token_ids=[event.token_id for event in events],
        logprobs=[event.logprob.hex() for event in events],
        finish_reason=finish_reason,
    )


class Recorder:
    """Writes lines on a thread of its own. `put` never waits and never fails."""

    _END: ClassVar[None] = None

    def __init__(self, path: Path, max_bytes: int, metrics: Registry | None = None) -> None:
        """Raises UsageError when the file cannot be written, or another server writes to it."""
        self._path = path
        self._max_file_bytes = max(max_bytes // 2, 1)
        self._first_line: ServerLine | None = None
        self._lines: queue.Queue[Callable[[], Line] | None] = queue.Queue(LIMITS.max_recording_queue_lines)
        self.num_written = 0
        self.num_dropped = 0
        self._is_failing = False
        self._descriptor, self._num_bytes = self._open_first()
        self._thread = threading.Thread(target=self._run, name="recording", daemon=True)
        self._thread.start()
        if metrics is not None:
            self._export(metrics)

    @classmethod
    def from_settings(cls, settings: Settings, metrics: Registry) -> "Recorder | None":
        """None when nothing is to be recorded. Raises UsageError."""
        if settings.record is None:
            return None
        return cls(Path(settings.record), settings.record_max_bytes, metrics)

    def begin(self, line: ServerLine) -> None:
        """From here on requests are those of this server. Every file begins with this line."""

        def make() -> ServerLine:
            self._first_line = line
            return line

        self.put(make)

    def put(self, make_line: Callable[[], Line]) -> None:
        """Write the line that `make_line` returns; it is called on the thread."""
        try:
            self._lines.put_nowait(make_line)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> None:
        """Write what is waiting, within two seconds."""
        try:
            self._lines.put(self._END, timeout=_CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_TIMEOUT_S)

    # --- on the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (make_line := self._lines.get()) is not self._END:
            self._write(_encode(make_line()) + b"\n")
        os.close(self._descriptor)

    def _write(self, line: bytes) -> None:
        try:
            if self._num_bytes and self._num_bytes + len(line) > self._max_file_bytes:
                self._rotate()
            self._append(line)
        except OSError as error:
            self.num_dropped += 1
            if not self._is_failing:
                log.warning("recording.failed", problem=error.strerror, effect="lines are dropped until it works again")
            self._is_failing = True
            return
        self._is_failing = False
        self.num_written += 1

    def _append(self, line: bytes) -> None:
        if self._num_bytes + len(line) > self._max_file_bytes:
            raise OSError(0, "a line is longer than half of --record-max-bytes")
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            # Half a line would make the next one unreadable, too. Devices cannot be cut, and keep nothing.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._num_bytes)
            raise
        self._num_bytes += len(line)

    def _rotate(self) -> None:
        # It may be gone: deleted by somebody, or renamed here before there was no room for a new one.
        with contextlib.suppress(FileNotFoundError):
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        old = self._descriptor
        self._descriptor, self._num_bytes = self._open()
        os.close(old)
        if self._first_line is not None:
            self._append(_encode(self._first_line) + b"\n")

    def _open_first(self) -> tuple[int, int]:
        try:
            return self._open()
        except BlockingIOError:
            problem = "another server writes to it"
        except OSError as error:
            problem = error.strerror or "it cannot be opened"
        raise UsageError(
            f"--record: {problem}. Name a file for this server alone, in a directory that exists and is open to it."
        )

    def _open(self) -> tuple[int, int]:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor, _end_of_last_line(descriptor)
        except OSError:
            os.close(descriptor)
            raise

    def _export(self, metrics: Registry) -> None:
        exported = {"written": 0, "dropped": 0}

        def export() -> None:
            for outcome, count in (("written", self.num_written), ("dropped", self.num_dropped)):
                metrics.counter("weft_recorded_lines").add(count - exported[outcome], outcome)
                exported[outcome] = count

        metrics.before_exposition(export)


def _end_of_last_line(descriptor: int) -> int:
    """Size of the file once a line that a crash left unfinished is cut off."""
    size = os.fstat(descriptor).st_size
    end = size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(descriptor, end)
    return end


# --- reading ----------------------------------------------------------------------------------------------------------


class UnreadableRecordingError(StartupError):
    """A file is no recording, or one of a later version."""

    code = "recording"


def read_lines(lines: Iterable[bytes], name: str) -> Iterator[Line]:
    """The lines of a recording. Raises UnreadableRecordingError naming the line."""
    decoder = msgspec.json.Decoder(Line)
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            version = msgspec.json.decode(raw, type=_Versioned).schema
            if version > SCHEMA_VERSION:
                raise UnreadableRecordingError(
                    f"{name}, line {number}: schema {version} is newer than this version of Weft, which reads up to "
                    f"{SCHEMA_VERSION}. Use a newer Weft."
                )
            line = decoder.decode(raw)
            _check(line)
            yield line
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            raise UnreadableRecordingError(f"{name}, line {number}: no line of a recording ({error}).") from None


def _check(line: Line) -> None:
    """What types do not say. Raises ValueError, and OverflowError for a number that no float can hold."""
    if isinstance(line, ServerLine):
        if len(line.flags) % 2:
            raise ValueError("`flags` must be pairs of flag and value")
        return
    if len(line.token_ids) != len(line.logprobs):
        raise ValueError(f"{len(line.token_ids)} `token_ids` and {len(line.logprobs)} `logprobs`")
    for logprob in line.logprobs:
        float.fromhex(logprob)


class _Versioned(msgspec.Struct):
    schema: int
