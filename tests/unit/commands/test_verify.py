"""`weft verify`: what counts as a difference, how it is said, and which servers may be compared."""

import asyncio
import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from tests.unit.commands.conversations import ENDPOINT

from weft.commands import verify as verify_command
from weft.commands.endpoint import Endpoint, EndpointError
from weft.commands.recorded_requests import open_recording
from weft.commands.verify import OtherServerError, verify, with_flags
from weft.commands.verify_run import Difference, Token, VerifyRun, differing_parts, first_difference, replay_body
from weft.core.request import FinishReason, SamplingParams, StopConditions
from weft.errors import UsageError
from weft.router.recording import RequestLine, ServerLine, UnreadableRecordingError
from weft.router.replay import ReplayAnswer

FINGERPRINT = "fp_aaaa-bbbb-cccc"


def recorded(number: int = 1, **changes: Any) -> RequestLine:
    fields: dict[str, Any] = {
        "request_id": f"request-{number}",
        "finished_s": 1,
        "system_fingerprint": FINGERPRINT,
        "prompt_token_ids": [number, 2, 3],
        "sampling": SamplingParams(seed=2**64 - 1, temperature=0.1, top_n_tokens=3),
        "stop": StopConditions(max_new_tokens=8, eos_token_ids=(0,)),
        "token_ids": [10, 11, 12],
        "logprobs": [(-0.25).hex(), (-0.1).hex(), (-3.5).hex()],
        "finish_reason": FinishReason.EOS_TOKEN,
    }
    return RequestLine(**{**fields, **changes})


def answered(line: RequestLine, **changes: Any) -> ReplayAnswer:
    fields: dict[str, Any] = {
        "token_ids": line.token_ids,
        "logprobs": line.logprobs,
        "finish_reason": line.finish_reason,
        "system_fingerprint": FINGERPRINT,
    }
    return ReplayAnswer(**{**fields, **changes})


def test_the_same_is_no_difference() -> None:
    assert first_difference(recorded(), answered(recorded())) is None


@pytest.mark.parametrize(
    ("changes", "position", "recorded_token", "got"),
    [
        ({"token_ids": [10, 99, 98]}, 1, Token(11, (-0.1).hex()), Token(99, (-0.1).hex())),
        ({"logprobs": [(-0.25).hex(), (-0.1).hex(), (-3.5000000000000004).hex()]}, 2, Token(12, (-3.5).hex()),
         Token(12, (-3.5000000000000004).hex())),
        ({"token_ids": [10], "logprobs": [(-0.25).hex()]}, 1, Token(11, (-0.1).hex()), None),
        ({"token_ids": [10, 11, 12, 13], "logprobs": [(-0.25).hex(), (-0.1).hex(), (-3.5).hex(), "0x0p0"]}, 3, None,
         Token(13, "0x0p0")),
    ],
)  # fmt: skip
def test_the_first_id_bit_or_end_that_differs_is_found(
    changes: dict[str, Any], position: int, recorded_token: Token | None, got: Token | None
) -> None:
    line = recorded()

    assert first_difference(line, answered(line, **changes)) == Difference(line, position, recorded_token, got)


def test_another_reason_to_end_is_a_difference_unless_text_ended_it() -> None:
    line = recorded()
    difference = first_difference(line, answered(line, finish_reason=FinishReason.LENGTH))
    assert difference is not None
    assert "recorded the end eos_token, got length" in difference.problem

    stopped = recorded(finish_reason=FinishReason.STOP_SEQUENCE)
    assert first_difference(stopped, answered(stopped, finish_reason=FinishReason.LENGTH)) is None


def test_a_request_is_asked_as_it_was_and_a_stopped_one_as_long_as_it_was() -> None:
    body = json.loads(replay_body(recorded()))
    stopped = json.loads(
        replay_body(
            recorded(finish_reason=FinishReason.STOP_SEQUENCE, stop=StopConditions(max_new_tokens=8, min_new_tokens=5))
        )
    )

    assert body["prompt_token_ids"] == [1, 2, 3]
    assert body["sampling"]["seed"] == 2**64 - 1
    assert body["sampling"]["temperature"] == 0.1
    assert body["sampling"]["top_n_tokens"] == 0
    assert body["stop"]["max_new_tokens"] == 8
    assert (stopped["stop"]["max_new_tokens"], stopped["stop"]["min_new_tokens"]) == (3, 3)


@pytest.mark.parametrize(
    ("served", "parts"),
    [
        (FINGERPRINT, []),
        ("fp_aaaX-bbbb-cccc", ["other weights"]),
        ("fp_aaaa-bbbX-cccX", ["another numeric configuration", "other kernels"]),
        ("fp_0.1.0", ["another server"]),
    ],
)
def test_fingerprints_say_which_part_differs(served: str, parts: list[str]) -> None:
    assert differing_parts(FINGERPRINT, served) == parts


Handler = Callable[[httpx2.Request], httpx2.Response]


def good(request: httpx2.Request) -> httpx2.Response:
    """Answers as recorded."""
    del request
    return httpx2.Response(200, content=msgspec.json.encode(answered(recorded())))


def run_of(lines: list[RequestLine], handler: Handler, **options: Any) -> tuple[VerifyRun, list[Difference | None]]:
    async def sleep(_seconds: float) -> None:
        await asyncio.sleep(0)

    run = VerifyRun(
        ENDPOINT, lines, **{"concurrency": 4, "transport": httpx2.MockTransport(handler), "sleep": sleep, **options}
    )
    shown: list[Difference | None] = []
    asyncio.run(run.run(shown.append))
    return run, shown


def test_every_request_is_asked_once_and_counted() -> None:
    asked: list[int] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(json.loads(request.content)["prompt_token_ids"][0])
        changes = {"token_ids": [10, 11, 99]} if asked[-1] == 7 else {}
        return httpx2.Response(200, content=msgspec.json.encode(answered(recorded(), **changes)))

    run, shown = run_of([recorded(number) for number in range(1, 21)], answer)

    assert sorted(asked) == list(range(1, 21))
    assert (run.tally.num_requests, run.tally.num_tokens, run.tally.num_different) == (20, 60, 1)
    (difference,) = [found for found in shown if found is not None]
    assert (difference.line.request_id, difference.position) == ("request-7", 2)


def test_shuffling_changes_the_order_and_can_be_repeated() -> None:
    def order(seed: int | None) -> list[int]:
        asked: list[int] = []

        def answer(request: httpx2.Request) -> httpx2.Response:
            asked.append(json.loads(request.content)["prompt_token_ids"][0])
            return good(request)

        run_of([recorded(number) for number in range(1, 21)], answer, concurrency=1, shuffle_seed=seed)
        return asked

    assert order(None) == list(range(1, 21))
    assert order(3) == order(3) != order(4)
    assert sorted(order(3)) == order(None)


def test_a_busy_server_is_waited_for_and_a_refusal_is_a_difference() -> None:
    statuses = iter([503, 429])

    def answer(request: httpx2.Request) -> httpx2.Response:
        status = next(statuses, 200)
        return good(request) if status == 200 else httpx2.Response(status, headers={"retry-after": "1"})

    run, _ = run_of([recorded()], answer)
    assert run.tally.num_different == 0

    _, (difference,) = run_of([recorded()], lambda _: httpx2.Response(422, json={"error": "too long"}))
    assert difference is not None
    assert "the server refused it: 422 too long" in difference.problem


@pytest.mark.parametrize(
    "handler", [lambda _: httpx2.Response(404), lambda _: httpx2.Response(200, content=b"hello")], ids=["404", "text"]
)
def test_what_is_no_weft_ends_the_run(handler: Handler) -> None:
    with pytest.raises(EndpointError, match="/replay"):
        run_of([recorded()], handler)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[[Handler], None]:
    """Lets the command talk to a function instead of a server."""

    def install(handler: Handler) -> None:
        transport = httpx2.MockTransport(handler)
        monkeypatch.setattr(Endpoint, "client", lambda self: httpx2.Client(base_url=self.root, transport=transport))
        monkeypatch.setattr(
            verify_command,
            "VerifyRun",
            lambda *arguments, **options: VerifyRun(*arguments, **options, transport=transport),
        )

    return install


def serving(request: httpx2.Request) -> httpx2.Response:
    if request.url.path == "/info":
        return httpx2.Response(200, json={"fingerprint": FINGERPRINT.removeprefix("fp_")})
    if request.url.path == "/detokenize":
        return httpx2.Response(200, json={"prompt": f" word{json.loads(request.content)['tokens'][0]}"})
    return good(request)


def file_of(directory: Path, *lines: ServerLine | RequestLine) -> str:
    path = directory / "recording.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return str(path)


def test_all_the_same_is_exit_code_0(
    tmp_path: Path, ask: Callable[[Handler], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(serving)

    status = verify([file_of(tmp_path, *map(recorded, range(1, 6))), "--url", "http://x", "--shuffle"], {})

    assert status == 0
    assert "5 requests with 15 tokens asked again of fp_aaaa-bbbb-cccc: every id and every bit is the same" in (
        capsys.readouterr().out
    )


def test_the_first_difference_is_named_with_ids_texts_and_bits_and_exit_code_1(
    tmp_path: Path, ask: Callable[[Handler], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path != "/replay":
            return serving(request)
        changes = {"token_ids": [10, 99, 12]}
        return httpx2.Response(200, content=msgspec.json.encode(answered(recorded(), **changes)))

    ask(answer)

    status = verify([file_of(tmp_path, recorded(index=2)), "--url", "http://x"], {})

    assert status == 1
    assert capsys.readouterr().out.splitlines()[0] == (
        "request request-1#2: token 1 of 3: recorded 11 ' word11' logprob -0x1.999999999999ap-4 (-0.100000), "
        "got 99 ' word99' logprob -0x1.999999999999ap-4 (-0.100000)"
    )


def test_another_server_is_refused_with_the_part_that_differs_unless_told(
    tmp_path: Path, ask: Callable[[Handler], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(serving)
    other = file_of(tmp_path, recorded(system_fingerprint="fp_aaaa-XXXX-cccc"))

    with pytest.raises(OtherServerError, match=r"fp_aaaa-XXXX-cccc: another numeric configuration.*--any-fingerprint"):
        verify([other, "--url", "http://x"], {})
    assert verify([other, "--url", "http://x", "--any-fingerprint"], {}) == 0
    assert "1 requests are compared all the same: fp_aaaa-XXXX-cccc recorded them" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_requests_of_other_servers_in_the_same_file_are_left_out_and_counted(
    tmp_path: Path, ask: Callable[[Handler], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(serving)
    lines = [recorded(1), recorded(2, system_fingerprint="fp_XXXX-bbbb-cccc"), recorded(3)]

    assert verify([file_of(tmp_path, *lines), "--url", "http://x"], {}) == 0

    output = capsys.readouterr()
    assert "2 requests with 6 tokens" in output.out
    assert "1 requests are left out" in " ".join(output.err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jsonl", "--url", "http://x"], "missing.jsonl: No such file"),
        ([], "RECORDING"),
        (["file", "--url", "http://x", "--", "--threads", "1"], "flags behind `--` are for a server of its own"),
        (["file", "--url", "http://x", "--model", "m"], "not allowed with"),
        (["file", "--concurrency", "0"], "--concurrency"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        verify(words, {})


def test_the_users_flags_replace_recorded_ones() -> None:
    recorded_flags = ["--dtype", "bfloat16", "--block-size-tokens", "32"]

    assert with_flags(recorded_flags, []) == recorded_flags
    assert with_flags(recorded_flags, ["--dtype", "float32"]) == ["--block-size-tokens", "32", "--dtype", "float32"]
    assert with_flags(recorded_flags, ["--dtype=float32", "--threads", "1"]) == [
        "--block-size-tokens", "32", "--dtype=float32", "--threads", "1",
    ]  # fmt: skip


def test_a_recording_without_requests_or_without_a_server_says_what_to_do(tmp_path: Path) -> None:
    server = ServerLine(version="1", system_fingerprint=FINGERPRINT, model="m", flags=[], kernel_set="k", device="d")

    with pytest.raises(UsageError, match="holds no request"):
        verify([file_of(tmp_path, server)], {})
    with pytest.raises(UsageError, match="Name one with --url"):
        verify([file_of(tmp_path, recorded())], {})


def test_a_long_recording_is_read_line_by_line(tmp_path: Path, ask: Callable[[Handler], None]) -> None:
    """8 MiB are held in less than one: lines are checked once and read again when they are asked."""
    ask(serving)
    many = 500
    line = recorded(token_ids=[10] * many, logprobs=[(-0.1).hex()] * many)
    path = tmp_path / "recording.jsonl"
    count = 2**23 // len(msgspec.json.encode(line))
    with path.open("wb") as file:
        file.writelines(msgspec.json.encode(line) + b"\n" for _ in range(count))

    tracemalloc.start()
    try:
        with ExitStack() as stack:
            requests = open_recording([str(path)], stack).requests
            assert len(requests) == count
            assert requests[count - 1] == line
            _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 2**20


def test_many_differences_are_counted_and_the_first_ones_shown(
    tmp_path: Path, ask: Callable[[Handler], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path != "/replay":
            return serving(request)
        return httpx2.Response(200, content=msgspec.json.encode(answered(recorded(), token_ids=[10, 99, 12])))

    ask(answer)

    assert verify([file_of(tmp_path, *map(recorded, range(30))), "--url", "http://x"], {}) == 1

    output = capsys.readouterr().out
    assert output.count("recorded 11") == 20
    assert "30 requests with 90 tokens asked again of fp_aaaa-bbbb-cccc: 30 differ (10 not shown)." in output


def test_what_comes_out_of_a_pipe_is_verified_too(
    tmp_path: Path, ask: Callable[[Handler], None], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(serving)
    content = Path(file_of(tmp_path, recorded(1), recorded(2))).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()

    status = verify([str(pipe), "--url", "http://x"], {})
    writer.join()

    assert status == 0
    assert "2 requests with 6 tokens" in capsys.readouterr().out


def test_a_recording_that_changes_meanwhile_ends_the_run(tmp_path: Path, ask: Callable[[Handler], None]) -> None:
    path = Path(file_of(tmp_path, recorded(1), recorded(2)))

    def answer(request: httpx2.Request) -> httpx2.Response:
        path.write_bytes(b"something else\n")
        return serving(request)

    ask(answer)

    with pytest.raises(UnreadableRecordingError):
        verify([str(path), "--url", "http://x", "--concurrency", "1"], {})


def test_lines_between_blank_ones_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "recording.jsonl"
    one, two = (msgspec.json.encode(recorded(number)) for number in (1, 2))
    path.write_bytes(b"\n" + one + b"\n\n  \n" + two)

    with ExitStack() as stack:
        requests = open_recording([str(path)], stack).requests

        assert [requests[1], requests[0]] == [recorded(2), recorded(1)]
