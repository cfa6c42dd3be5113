import asyncio
import json
import socket

import httpx2
import pytest
from tests.unit.commands.conversations import ENDPOINT

from weft.commands import batch_run
from weft.commands.batch import batch
from weft.commands.batch_file import check_input, finished_ids, lines_of
from weft.commands.batch_run import MAX_ATTEMPTS, BatchRun
from weft.commands.endpoint import EndpointError
from weft.errors import UsageError


class Batch:
    """A batch of numbered requests, and the server that answers each by its number."""

    def __init__(self, tmp_path, count, handler, concurrency=4):
        source = tmp_path / "in.jsonl"
        lines = [
            {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": {"prompt": str(number)}}
            for number in range(count)
        ]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.source = check_input(source)
        self.out, self.errors = tmp_path / "out.jsonl", tmp_path / "errors.jsonl"
        self.concurrency = concurrency
        self.handler = handler
        self.asked = []
        self.requests = []
        self.slept = []

    async def run(self):
        async def answer(request):
            number = int(json.loads(request.content)["prompt"])
            self.asked.append(number)
            self.requests.append(request)
            found = self.handler(number)
            return await found if asyncio.iscoroutine(found) else found

        async def sleep(seconds):
            self.slept.append(seconds)

        shown = []
        with lines_of(self.out) as answers, lines_of(self.errors, keeps_content=False) as failures:
            run = BatchRun(
                ENDPOINT,
                self.source,
                finished_ids(answers),
                answers,
                failures,
                concurrency=self.concurrency,
                transport=httpx2.MockTransport(answer),
                sleep=sleep,
            )
            await run.run(shown.append)
        return run, shown

    def ids_in(self, path):
        return sorted(int(json.loads(line)["custom_id"]) for line in path.read_text().splitlines())


def good(_number=0):
    return httpx2.Response(200, json={"usage": {"completion_tokens": 3}}, headers={"x-request-id": "r1"})


async def test_every_request_is_answered_once_in_the_format_of_openai(tmp_path):
    batch = Batch(tmp_path, 20, good)

    run, shown = await batch.run()

    assert sorted(batch.asked) == batch.ids_in(batch.out) == list(range(20))
    assert (run.num_answered, run.num_failed, run.completion_tokens, len(shown)) == (20, 0, 60, 20)
    line = json.loads(batch.out.read_text().splitlines()[0])
    assert line["id"].startswith("batch_req_")
    assert line["error"] is None
    assert line["response"] == {
        "status_code": 200,
        "request_id": "r1",
        "body": {"usage": {"completion_tokens": 3}},
    }


async def test_no_more_requests_are_in_flight_than_allowed(tmp_path):
    now = peak = 0

    async def slow():
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await asyncio.sleep(0)
        now -= 1
        return good()

    await Batch(tmp_path, 30, lambda _: slow(), concurrency=3).run()

    assert peak == 3


async def test_refusals_go_to_the_errors_and_are_asked_again_by_the_next_run(tmp_path):
    batch = Batch(tmp_path, 4, lambda n: httpx2.Response(400, json={"error": {"message": "no"}}) if n == 2 else good())
    run, _ = await batch.run()
    assert (run.num_answered, run.num_failed) == (3, 1)
    assert batch.ids_in(batch.errors) == [2]
    assert json.loads(batch.errors.read_text())["response"]["status_code"] == 400

    batch.asked.clear()
    batch.handler = good
    await batch.run()

    assert batch.asked == [2]
    assert batch.ids_in(batch.out) == [0, 1, 2, 3]
    assert batch.errors.read_text() == ""


async def test_a_busy_server_is_waited_for_as_long_as_it_asks(tmp_path):
    replies = iter([httpx2.Response(429, headers={"retry-after": "7"}) for _ in range(MAX_ATTEMPTS + 3)])
    batch = Batch(tmp_path, 1, lambda _: next(replies, None) or good())

    run, _ = await batch.run()

    assert run.num_answered == 1
    assert batch.slept == [7.0] * (MAX_ATTEMPTS + 3)


async def test_a_failing_server_is_asked_a_few_times_with_growing_pauses(tmp_path):
    batch = Batch(tmp_path, 1, lambda _: httpx2.Response(500, text="oops"))

    run, _ = await batch.run()

    assert (run.num_failed, len(batch.asked)) == (1, MAX_ATTEMPTS)
    assert all(0.5 * 2**step <= pause <= 2**step for step, pause in enumerate(batch.slept))
    assert "oops" in batch.errors.read_text()


async def test_a_connection_that_keeps_breaking_fails_that_request_alone(tmp_path):
    def handler(number):
        if number == 1:
            raise httpx2.ReadError("reset")
        return good()

    batch = Batch(tmp_path, 3, handler)
    run, _ = await batch.run()

    assert (run.num_answered, run.num_failed) == (2, 1)
    assert json.loads(batch.errors.read_text())["error"]["code"] == "connection_failed"


async def test_a_server_that_went_away_ends_the_run_and_keeps_what_was_answered(tmp_path):
    def handler(number):
        if number >= 2:
            raise httpx2.ConnectError("refused")
        return good()

    batch = Batch(tmp_path, 5, handler, concurrency=1)
    with pytest.raises(EndpointError, match="weft serve"):
        await batch.run()

    assert batch.ids_in(batch.out) == [0, 1]


async def test_a_full_disk_is_an_error_with_its_reason(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    batch = Batch(tmp_path, 3, good)
    monkeypatch.setattr(batch_run.AppendedLines, "append", fail)

    with pytest.raises(EndpointError, match="No space left"):
        await batch.run()


def test_a_batch_that_never_began_leaves_no_files(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}) + "\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(EndpointError, match="nothing answers"):
            batch(["run", str(source), "--url", f"http://127.0.0.1:{taken.getsockname()[1]}"], {})

    assert list(tmp_path.iterdir()) == [source]


def test_a_run_that_may_not_write_leaves_the_files_of_the_one_that_does(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(
        json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}) + "\n"
    )
    output = tmp_path / "in.out.jsonl"
    with lines_of(output) as _other_run:
        with pytest.raises(UsageError):
            batch(["run", str(source), "--url", "http://127.0.0.1:1"], {})
        assert output.exists()


async def test_answers_of_responses_count_and_broken_characters_pass_both_ways(tmp_path):
    broken = "\ud800"
    answer = {"usage": {"output_tokens": 4}, "text": broken}
    batch = Batch(tmp_path, 1, lambda _number: httpx2.Response(200, content=json.dumps(answer).encode()))
    line = {"custom_id": broken, "method": "POST", "url": "/v1/responses", "body": {"prompt": "0", "input": broken}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    batch.source = check_input(tmp_path / "in.jsonl")

    run, _ = await batch.run()

    assert (run.num_answered, run.completion_tokens) == (1, 4)
    assert b"\\ud800" in batch.requests[0].content, "for the server to refuse"
    assert batch.requests[0].headers["content-type"] == "application/json"
    written = json.loads(batch.out.read_text())
    assert (written["custom_id"], written["response"]["body"]["text"]) == (broken, broken)
