"""A process dies or hangs: who was asking gets one typed error, the rest of the server goes on."""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.harness import RunningServer, chat, serving

pytestmark = pytest.mark.e2e

PROMPT = "The capital of France is"
COUNTING = "Count: 1 2 3 4 5 6 7 8 9"
"""The model goes on for thousands of tokens by itself, where a route has no way to ignore the end of the text."""
MANY = 8000
"""More tokens than will ever be generated before the process dies."""


@pytest.fixture(scope="module")
def server(default_model_gguf: Path) -> Iterator[RunningServer]:
    """One server that is hit again and again, and must not give up because of that."""
    flags = ("--kv-pool-bytes", "512MiB", "--max-quick-failures", "100", "--watchdog-timeout-s", "4")
    with serving(default_model_gguf, *flags) as server:
        yield server


def stream_body(path: str) -> dict[str, Any]:
    if path == "/generate_stream":
        return {"inputs": COUNTING, "parameters": {"max_new_tokens": MANY}}
    if path == "/v1/chat/completions":
        return chat("Tell a long story", stream=True, ignore_eos=True, max_tokens=MANY)
    return {"prompt": PROMPT, "stream": True, "ignore_eos": True, "max_tokens": MANY}


class OpenStreams:
    """Streams of all dialects, each of which has given some tokens when this exists."""

    PATHS = ("/generate_stream", "/v1/chat/completions", "/v1/completions")

    def __init__(self, server: RunningServer) -> None:
        self._pool = ThreadPoolExecutor(len(self.PATHS))
        self._lines: dict[str, list[str]] = {path: [] for path in self.PATHS}
        self._reads: list[Future[None]] = [self._pool.submit(self._read, server, path) for path in self.PATHS]
        server.wait_until(
            lambda: all(len(lines) > 4 for lines in self._lines.values()) or any(read.done() for read in self._reads),
            "all streams run",
        )

    def _read(self, server: RunningServer, path: str) -> None:
        with server.http.stream("POST", path, json=stream_body(path)) as answer:
            assert answer.status_code == 200, answer.read()
            self._lines[path].extend(line for line in answer.iter_lines() if line.startswith("data:"))

    def finish(self) -> dict[str, list[Any]]:
        """Path → events of each stream, once the server has ended all of them."""
        for read in self._reads:
            read.result(60)
        self._pool.shutdown()
        return {
            path: ["[DONE]" if "[DONE]" in line else json.loads(line.removeprefix("data:")) for line in lines]
            for path, lines in self._lines.items()
        }


def assert_each_ends_with_one_error(streams: dict[str, list[Any]]) -> None:
    for path, stream in streams.items():
        events = [event for event in stream if event != "[DONE]"]
        assert stream[len(events) :] == (["[DONE]"] if path.startswith("/v1") else [])
        failed = [event for event in events if "error" in event]
        assert failed == events[-1:], f"{path} has {len(failed)} errors among {len(events)} events"
        [error] = failed
        kind = error["error"]["code"] if path.startswith("/v1") else error["error_type"]
        assert kind == "generation"


def post_in_background(server: RunningServer, pool: ThreadPoolExecutor) -> list[Future[httpx.Response]]:
    """Requests without streaming, of both dialects, that would take very long."""
    native = {"inputs": COUNTING, "parameters": {"max_new_tokens": MANY}}
    openai = {"prompt": PROMPT, "max_tokens": MANY, "ignore_eos": True}
    before = server.metrics().value("tgi_batch_current_size")
    answers = [
        pool.submit(server.http.post, "/generate", json=native),
        pool.submit(server.http.post, "/v1/completions", json=openai),
    ]
    server.wait_until(lambda: server.metrics().value("tgi_batch_current_size") == before + 2, "both run")
    return answers


def greedy_ids(server: RunningServer) -> list[int]:
    details = server.generate(PROMPT, max_new_tokens=12, details=True)["details"]
    return [token["id"] for token in details["tokens"]]


def test_killing_the_shard_costs_open_requests_one_typed_error_and_nothing_else(server: RunningServer) -> None:
    server.wait_ready()
    expected = greedy_ids(server)
    router, shard = server.wait_child("router"), server.wait_child("shard-0")
    streams = OpenStreams(server)

    with ThreadPoolExecutor(2) as pool:
        native, openai = post_in_background(server, pool)
        shard.kill()
        events = streams.finish()
        statuses = [native.result(30).status_code, openai.result(30).status_code]
    server.wait_until(lambda: (answer := server.health()) is not None and answer.status_code == 503, "not ready", 5)
    refused = server.http.post("/generate", json={"inputs": PROMPT})
    server.wait_child("shard-0", other_than=shard.pid)
    server.wait_ready()

    assert_each_ends_with_one_error(events)
    assert statuses == [424, 503]
    assert native.result().json()["error_type"] == "generation"
    assert openai.result().json()["error"]["code"] == "generation"
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert server.wait_child("router").pid == router.pid, "the router stays"
    assert greedy_ids(server) == expected
    server.wait_idle()


def test_a_shard_that_hangs_is_replaced(server: RunningServer) -> None:
    server.wait_ready()
    shard = server.wait_child("shard-0")
    streams = OpenStreams(server)

    shard.send_signal(signal.SIGSTOP)
    events = streams.finish()
    server.wait_child("shard-0", other_than=shard.pid)
    server.wait_ready()

    assert_each_ends_with_one_error(events)
    assert len(greedy_ids(server)) == 12
    server.wait_idle()


def test_killing_the_router_starts_another_one_without_loading_weights_again(server: RunningServer) -> None:
    server.wait_ready()
    expected = greedy_ids(server)
    router, shard = server.wait_child("router"), server.wait_child("shard-0")
    with server.http.stream("POST", "/generate_stream", json=stream_body("/generate_stream")) as answer:
        lines = answer.iter_lines()
        next(lines)

        router.kill()

        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    server.wait_child("router", other_than=router.pid)
    server.wait_ready()

    assert server.wait_child("shard-0").pid == shard.pid
    assert greedy_ids(server) == expected
    server.wait_idle()


def test_killing_one_of_two_ranks_restarts_both_and_hangs_nobody(default_model_gguf: Path) -> None:
    with serving(default_model_gguf, "--num-shard", "2", "--kv-pool-bytes", "256MiB") as server:
        expected = greedy_ids(server)
        router, first, second = (server.wait_child(title) for title in ("router", "shard-0", "shard-1"))
        streams = OpenStreams(server)

        second.kill()
        events = streams.finish()
        server.wait_child("shard-0", other_than=first.pid)
        server.wait_child("shard-1", other_than=second.pid)
        server.wait_ready()

        assert_each_ends_with_one_error(events)
        assert server.wait_child("router").pid == router.pid
        assert greedy_ids(server) == expected


def test_a_server_whose_shard_keeps_dying_gives_up_and_says_so(default_model_gguf: Path) -> None:
    with serving(default_model_gguf, "--kv-pool-bytes", "256MiB", "--max-quick-failures", "1") as server:
        first = server.wait_child("shard-0")
        first.kill()
        server.wait_child("shard-0", other_than=first.pid).kill()

        status = server.process.wait(30)

        assert status == 1
        assert "shard-0 died 2 times in a row" in server.output
        assert server.run_directories == []
