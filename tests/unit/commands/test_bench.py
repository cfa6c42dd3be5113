"""The benchmark against a server that counts a word as a token, and figures from replies with known times."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from weft.benchmark.load import Reply
from weft.commands.bench import _readable, bench, words_for
from weft.commands.bench_report import Spread, as_json, chart, summarize_runs, tables
from weft.commands.endpoint import EndpointError
from weft.errors import UsageError

MS = 1_000_000


class WordServer:
    """Answers completions with as many tokens as asked; a prompt has a token per word and one for its beginning."""

    def __init__(self, refusal=None):
        self.bodies = []
        self.fails_at = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                server.send(self, 200, json.dumps({"data": [{"id": "words"}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.bodies.append(body)
                if refusal or len(server.bodies) == server.fails_at:
                    server.send(self, 400, refusal or b"broken")
                else:
                    server.send(self, 200, server.stream(body))

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @staticmethod
    def send(to, status, content):
        to.send_response(status)
        to.send_header("content-length", str(len(content)))
        to.send_header("connection", "close")
        to.end_headers()
        to.wfile.write(content)

    @staticmethod
    def prompt_tokens(body):
        return len(body["prompt"].split()) + 1

    def stream(self, body):
        count = body["max_tokens"]
        events = [{"choices": [{"text": " a"}]}] * count + [
            {"choices": [{"text": "", "finish_reason": "length"}]},
            {"choices": [], "usage": {"prompt_tokens": self.prompt_tokens(body), "completion_tokens": count}},
        ]
        return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode() + b"data: [DONE]\n\n"


def test_every_batch_size_gets_its_runs_with_prompts_of_the_exact_length(tmp_path, capsys):
    file = tmp_path / "result.json"
    flags = ["-b", "1", "-b", "3", "-s", "20", "-d", "5", "-r", "2", "-w", "1", "--json", str(file)]

    with WordServer() as server:
        assert bench(["--url", server.url, "-t", "organisation/model", *flags], {}) == 0

    measured = server.bodies[2:]
    assert len(measured) == (1 + 3) * (2 + 1)
    assert {server.prompt_tokens(body) for body in measured} == {20}
    assert len({body["prompt"] for body in measured}) == len(measured)
    assert {(body["max_tokens"], body["ignore_eos"], body["temperature"]) for body in measured} == {(5, True, 0.0)}
    result = json.loads(file.read_text())
    assert [point["batch_size"] for point in result["results"]] == [1, 3]
    assert [point["output_tokens"] for point in result["results"]] == [10, 30]
    assert result["parameters"]["sequence_length"] == 20
    shown = capsys.readouterr().out
    assert "| Decode (token) |" in shown
    assert "Output tokens/s by batch size" in shown


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        (["--temperature", "0.5"], {"temperature": 0.5}),
        (["--do-sample"], {"temperature": 1.0}),
        (["--top-p", "0.9", "--top-k", "5"], {"temperature": 1.0, "top_p": 0.9, "top_k": 5}),
        (["--repetition-penalty", "1.1"], {"temperature": 0.0, "repetition_penalty": 1.1}),
        (["--top-n-tokens", "3"], {"logprobs": 3}),
    ],
)
def test_sampling_flags_reach_the_requests(flags, fields):
    with WordServer() as server:
        bench(["--url", server.url, "-b", "1", "-r", "1", "-w", "0", *flags], {})
    assert {name: server.bodies[-1].get(name) for name in fields} == fields


def test_a_failed_request_is_counted_shown_and_the_exit_code(capsys):
    with WordServer() as server:
        server.fails_at = 4
        assert bench(["--url", server.url, "-b", "2", "-r", "2", "-w", "0"], {}) == 1
    assert "400 broken" in capsys.readouterr().err


def test_a_server_that_refuses_ends_the_benchmark_at_once():
    with WordServer(b'{"error": {"message": "no ignore_eos here"}}') as server:
        with pytest.raises(EndpointError, match="no ignore_eos here"):
            bench(["--url", server.url], {})
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b", "0"], "--batch-size: must be a whole number from 1"),
        (["-d", "x"], "--decode-length"),
        (["--watermark"], "--watermark"),
        (["-m", "/tmp/socket"], "--url instead of -m"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(UsageError, match=message):
        bench(flags, {})


def test_an_encrypted_server_is_refused_before_anything_is_sent():
    with pytest.raises(UsageError, match="plain http"):
        bench(["--url", "https://127.0.0.1:1", "--model", "m"], {})


@pytest.mark.parametrize(
    ("wanted", "counts", "words"),
    [(10, [16, 64], 10), (10, [17, 65], 9), (1, [17, 65], 1), (101, [33, 129], 50), (10, [0, 0], 10)],
)
def test_the_words_of_a_prompt_follow_from_two_counts(wanted, counts, words):
    assert words_for(wanted, counts) == words


def reply(sent_ms, first_ms, last_ms, tokens, *, prompt=10, error=None):
    times = [first_ms + (last_ms - first_ms) * index // max(tokens - 1, 1) for index in range(tokens)]
    return Reply(
        sent_ns=sent_ms * MS,
        finished_ns=last_ms * MS,
        status=200,
        token_ns=[time * MS for time in times],
        prompt_tokens=prompt,
        completion_tokens=tokens,
        error=error,
    )


def test_figures_are_those_of_the_replies():
    point = summarize_runs(2, [[reply(0, 100, 300, 5), reply(0, 200, 400, 5)]])

    assert point.prefill_ms == Spread(150, 100, 200, 150, 190, 199)
    assert point.decode_token_ms.average == 50
    assert point.decode_ms.average == 200
    assert (point.total_ms.lowest, point.total_ms.highest) == (300, 400)
    assert point.prefill_tokens_per_s.average == pytest.approx(20 / 0.2)
    assert point.decode_tokens_per_s.average == pytest.approx(8 / 0.3)
    assert point.output_tokens_per_s.average == pytest.approx(10 / 0.4)


def test_one_token_has_no_decode_phase():
    point = summarize_runs(1, [[reply(0, 100, 100, 1)]])
    assert (point.decode_token_ms, point.decode_tokens_per_s) == (None, None)
    assert "–" in tables({}, [point])


def test_a_run_with_a_failure_has_no_rate_and_its_replies_still_have_latencies():
    point = summarize_runs(2, [[reply(0, 100, 300, 5), reply(0, 0, 0, 0, error="reset")]])
    assert (point.output_tokens_per_s, point.num_failed, point.errors) == (None, 1, ("reset",))
    assert point.prefill_ms.average == 100


def test_the_bars_are_in_proportion():
    points = [summarize_runs(size, [[reply(0, 1, 100, 10 * size)]]) for size in (1, 2)]
    bars = [line.count("█") for line in chart(points).splitlines()[1:]]
    assert bars == [25, 50]
    assert json.dumps(as_json({"N Runs": 1}, points))


def test_a_sweep_without_any_answer_still_has_a_page():
    point = summarize_runs(1, [[reply(0, 0, 0, 0, error="reset")]])
    assert "–" in tables({"Model": None}, [point])
    assert "0.0" in chart([point])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--json", "/no/such/directory/x.json"], "--json: cannot write /no/such/directory/x.json"),
        (["--model", "caf\udce9"], "--model: must be valid Unicode"),
        (["--url", "https://server.test"], "--url: the benchmark measures plain http"),
    ],
)
def test_what_would_fail_in_the_end_fails_before_anything_is_measured(flags, named):
    with WordServer() as server:
        with pytest.raises(UsageError, match=named):
            bench(["-b", "1", *([] if "--url" in flags else ["--url", server.url]), *flags], {})

        assert server.bodies == []


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ('status 429 {"error": {"message": "Model is overloaded", "code": "x"}}', "status 429 Model is overloaded"),
        ('status 429 {"error": "Model is overloaded", "error_type": "x"}', "status 429 Model is overloaded"),
        ('status 500 {"error": {}}', 'status 500 {"error": {}}'),
        ("status 502 <html>", "status 502 <html>"),
        ("the connection broke", "the connection broke"),
    ],
)
def test_a_refusal_is_shown_without_its_json(error, shown):
    assert _readable(error) == shown
