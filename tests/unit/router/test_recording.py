"""Recordings: what a line holds, how little a file may grow, and that no disk hurts the server."""

import errno
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from weft.core.events import TokenEvent
from weft.core.request import (
    FinishReason,
    LogprobStyle,
    PenaltyStyle,
    Request,
    RequestId,
    SamplingParams,
    StopConditions,
)
from weft.errors import StartupError
from weft.limits import LIMITS
from weft.router.recording import (
    Line,
    Recorder,
    RequestLine,
    ServerLine,
    UnreadableRecordingError,
    read_lines,
    request_line,
)
from weft.telemetry.metrics import Registry

SERVER = ServerLine(
    version="1", system_fingerprint="fp_a-b-c", model="m", flags=["--dtype", "float32"], kernel_set="k", device="d"
)
EVERYTHING = SamplingParams(
    do_sample=True,
    seed=2**64 - 1,
    temperature=0.1,
    top_k=3,
    top_p=0.3,
    min_p=0.05,
    typical_p=0.7,
    repetition_penalty=1.1,
    frequency_penalty=-0.1,
    presence_penalty=0.2,
    penalty_style=PenaltyStyle.OPENAI,
    logit_bias=((5, -1.25), (7, 0.1)),
    watermark=True,
    logprob_style=LogprobStyle.RAW,
    top_n_tokens=2,
)


def a_line(request_id: str = "r", num_tokens: int = 3) -> RequestLine:
    request = Request(
        request_id=RequestId(1),
        prompt_token_ids=(1, 2, 3),
        sampling=EVERYTHING,
        stop=StopConditions(max_new_tokens=9, min_new_tokens=1, eos_token_ids=(0, 4), ignore_eos=True),
    )
    events = [
        TokenEvent(request_id=RequestId(1), token_index=index, token_id=10 + index, logprob=-1 / (index + 3))
        for index in range(num_tokens)
    ]
    return request_line(request, events, FinishReason.LENGTH, request_id=request_id, index=0, fingerprint="fp_a-b-c")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording.jsonl"


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    recorder = Recorder(path, 2**20)
    yield recorder
    recorder.close()


def lines_of(path: Path) -> list[Line]:
    with path.open("rb") as file:
        return list(read_lines(file, path.name))


def test_what_is_written_is_read_back_to_the_last_bit(recorder: Recorder, path: Path) -> None:
    recorder.begin(SERVER)
    recorder.put(a_line)
    recorder.close()

    server, request = lines_of(path)

    assert server == SERVER
    assert isinstance(request, RequestLine)
    assert request.sampling == EVERYTHING
    assert request.stop == StopConditions(max_new_tokens=9, min_new_tokens=1, eos_token_ids=(0, 4), ignore_eos=True)
    assert [float.fromhex(text) for text in request.logprobs] == [-1 / 3, -1 / 4, -1 / 5]


def test_a_line_holds_ids_and_no_text(recorder: Recorder, path: Path) -> None:
    recorder.put(a_line)
    recorder.close()

    fields = json.loads(path.read_text())

    assert set(fields) == {
        "kind", "schema", "request_id", "index", "finished_s", "system_fingerprint", "prompt_token_ids", "sampling",
        "stop", "token_ids", "logprobs", "finish_reason",
    }  # fmt: skip


def test_only_its_owner_can_read_the_file(recorder: Recorder, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert recorder.num_dropped == 0


def test_files_stay_below_the_bound_and_each_begins_with_the_server(path: Path) -> None:
    max_bytes = 8_000
    recorder = Recorder(path, max_bytes)
    recorder.begin(SERVER)
    for number in range(100):
        recorder.put(lambda number=number: a_line(f"request-{number}"))
    recorder.close()

    older = path.with_name(f"{path.name}.1")
    assert path.stat().st_size + older.stat().st_size <= max_bytes
    kept = [lines_of(older), lines_of(path)]
    assert all(lines[0] == SERVER for lines in kept)
    assert kept[-1][-1].request_id == "request-99"  # type: ignore[union-attr]
    assert sorted(path.parent.iterdir()) == [path, older]


def test_a_line_longer_than_a_file_is_dropped(path: Path) -> None:
    recorder = Recorder(path, 2_000)
    recorder.put(lambda: a_line("long", num_tokens=500))
    recorder.put(lambda: a_line("short"))
    recorder.close()

    (line,) = lines_of(path)

    assert isinstance(line, RequestLine)
    assert line.request_id == "short"
    assert (recorder.num_written, recorder.num_dropped) == (1, 1)


def test_a_full_disk_drops_lines_leaves_none_half_written_and_recovers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [40]

    def write(descriptor: int, data: memoryview) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = data[: room[0]] if room[0] > 0 else data
        room[0] -= len(part) if room[0] > 0 else 0
        return real_write(descriptor, part)

    real_write = os.write
    monkeypatch.setattr("weft.router.recording.os.write", write)
    recorder = Recorder(path, 2**20)
    dropped = threading.Event()

    def then_make_room() -> RequestLine:
        room[0] = -1
        dropped.set()
        return a_line("after")

    recorder.put(lambda: a_line("lost"))
    recorder.put(then_make_room)
    recorder.close()

    assert dropped.is_set()
    (line,) = lines_of(path)
    assert isinstance(line, RequestLine)
    assert line.request_id == "after"
    assert (recorder.num_written, recorder.num_dropped) == (1, 1)


def test_a_disk_that_hangs_fills_the_queue_and_nothing_else(path: Path) -> None:
    is_stuck, goes_on = threading.Event(), threading.Event()

    def stuck() -> RequestLine:
        is_stuck.set()
        assert goes_on.wait(10)
        return a_line()

    recorder = Recorder(path, 2**30)
    recorder.put(stuck)
    assert is_stuck.wait(10)
    for _ in range(LIMITS.max_recording_queue_lines + 5):
        recorder.put(a_line)
    assert recorder.num_dropped == 5
    goes_on.set()
    recorder.close()

    assert recorder.num_written == LIMITS.max_recording_queue_lines + 1


def test_a_restart_goes_on_behind_the_last_whole_line(path: Path) -> None:
    recorder = Recorder(path, 2**20)
    recorder.put(lambda: a_line("before"))
    recorder.close()
    with path.open("ab") as file:
        file.write(b'{"kind":"request","schema":1,"req')

    recorder = Recorder(path, 2**20)
    recorder.put(lambda: a_line("after"))
    recorder.close()

    assert [line.request_id for line in lines_of(path) if isinstance(line, RequestLine)] == ["before", "after"]


def test_two_servers_cannot_write_to_one_file(recorder: Recorder, path: Path) -> None:
    with pytest.raises(StartupError, match="--record: another server writes to it"):
        Recorder(path, 2**20)
    assert recorder.num_dropped == 0


def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="--record: No such file or directory"):
        Recorder(tmp_path / "missing" / "file", 2**20)


def test_lines_are_counted_for_the_metrics_page(path: Path) -> None:
    metrics = Registry()
    recorder = Recorder(path, 2**20, metrics)
    recorder.put(a_line)
    recorder.close()

    for _ in range(2):
        assert 'weft_recorded_lines{outcome="written"} 1' in metrics.exposition()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{}\n", "line 1: no line of a recording"),
        (b"not json\n", "line 1: no line of a recording"),
        (b'\n{"schema": 2, "kind": "request"}\n', "line 2: schema 2 is newer"),
    ],
)
def test_what_is_no_recording_is_named_with_its_line(content: bytes, words: str) -> None:
    with pytest.raises(UnreadableRecordingError, match=words):
        list(read_lines(content.splitlines(keepends=True), "file"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": ["-0x1p-3", "-0x1p-3"]}, "line 2: no line of a recording.*3 `token_ids` and 2 `logprobs`"),
        ({"logprobs": ["-0x1p-3", "zzz", "-0x1p-3"]}, "line 2: no line of a recording.*hexadecimal"),
        ({"logprobs": ["-0x1p-3", "0x1p99999", "-0x1p-3"]}, "line 2: no line of a recording"),
    ],
)
def test_a_damaged_request_is_named_with_its_line(changes: dict[str, object], words: str) -> None:
    good, bad = msgspec.json.encode(SERVER), json.loads(msgspec.json.encode(a_line()))

    with pytest.raises(UnreadableRecordingError, match=words):
        list(read_lines([good, json.dumps(bad | changes).encode()], "file"))


def test_a_server_whose_flags_have_no_values_is_named_with_its_line() -> None:
    bad = json.loads(msgspec.json.encode(SERVER)) | {"flags": ["--dtype", "float32", "--device"]}

    with pytest.raises(UnreadableRecordingError, match=r"line 1: no line of a recording.*pairs of flag and value"):
        list(read_lines([json.dumps(bad).encode()], "file"))
