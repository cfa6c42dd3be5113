"""However a server ends, nothing of it is left: no process, no socket, no directory, no open question to a client."""

import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.e2e.harness import RunningServer, launch

pytestmark = pytest.mark.e2e

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def server(default_model_gguf: Path) -> Iterator[RunningServer]:
    """A server of its own for each test, because each ends it."""
    server = launch(default_model_gguf, "--kv-pool-bytes", "256MiB")
    try:
        server.wait_ready()
        yield server
    finally:
        server.destroy()


class OpenStream:
    """A completion stream that is read on a thread; it has given some tokens when this exists."""

    def __init__(self, server: RunningServer, num_tokens: int) -> None:
        self._pool = ThreadPoolExecutor(1)
        self.lines: list[str] = []
        self._read: Future[int] = self._pool.submit(self._run, server, num_tokens)
        server.wait_until(lambda: len(self.lines) > 4 or self._read.done(), "the stream runs")

    def _run(self, server: RunningServer, num_tokens: int) -> int:
        body = {"prompt": "One, two,", "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as answer:
            self.lines.extend(line for line in answer.iter_lines() if line)
            return answer.status_code

    def finish(self) -> list[dict[str, Any]]:
        """Its events, when the server has ended it; the end mark must be the last one."""
        assert self._read.result(60) == 200
        self._pool.shutdown()
        assert self.lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in self.lines[:-1]]


def assert_nothing_is_left(server: RunningServer, processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=2)
    assert not alive, f"still running: {alive}\n{server.explain()}"
    assert server.run_directories == []
    assert not [file for file in SHARED_MEMORY.iterdir() if "weft" in file.name]


def test_sigterm_lets_running_streams_finish_and_takes_no_new_ones(server: RunningServer) -> None:
    processes = server.processes()
    stream = OpenStream(server, num_tokens=300)

    server.process.send_signal(signal.SIGTERM)

    server.wait_until(lambda: (answer := server.health()) is not None and answer.status_code == 503, "not ready", 5)
    refused = server.http.post("/generate", json={"inputs": "Hello"})
    live = server.http.get("/health/live")
    events = stream.finish()
    status = server.process.wait(30)

    assert refused.status_code == 503
    assert live.status_code == 200
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert len(events) >= 300, "not one token was cut off"
    assert status == 0
    assert_nothing_is_left(server, processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_with_status_0(server: RunningServer, number: signal.Signals) -> None:
    processes = server.processes()

    assert server.stop(number, timeout_s=10) == 0

    assert len(processes) >= 3, "launcher, router and shard"
    assert_nothing_is_left(server, processes)


def test_a_drain_that_takes_too_long_ends_streams_with_one_typed_error(default_model_gguf: Path) -> None:
    server = launch(default_model_gguf, "--kv-pool-bytes", "256MiB", "--graceful-termination-timeout", "1")
    try:
        server.wait_ready()
        processes = server.processes()
        stream = OpenStream(server, num_tokens=8000)

        assert server.stop(signal.SIGTERM, timeout_s=15) == 0

        events = stream.finish()
        assert_nothing_is_left(server, processes)
    finally:
        server.destroy()
    assert [event for event in events if "error" in event] == events[-1:], "exactly one error, at the end"


def test_a_second_sigterm_ends_everything_at_once(server: RunningServer) -> None:
    processes = server.processes()
    stream = OpenStream(server, num_tokens=8000)

    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: "draining" in server.output, "the drain begins")
    started = time.monotonic()
    server.stop(signal.SIGTERM, timeout_s=10)

    assert time.monotonic() - started < 5
    assert_nothing_is_left(server, processes)
    del stream


def test_a_server_that_is_still_loading_ends_with_status_0(default_model_gguf: Path) -> None:
    server = launch(default_model_gguf, "--kv-pool-bytes", "256MiB")
    try:
        server.wait_child("shard-0")
        processes = server.processes()

        assert server.stop(signal.SIGTERM, timeout_s=10) == 0

        assert_nothing_is_left(server, processes)
    finally:
        server.destroy()


def test_killing_the_launcher_kills_its_children_and_the_next_start_tidies_up(
    server: RunningServer, default_model_gguf: Path
) -> None:
    processes = server.processes()
    stream = OpenStream(server, num_tokens=8000)

    server.process.kill()

    _, alive = psutil.wait_procs(processes, timeout=2)
    # One that is dead and whose new parent has not asked for its status yet is no survivor.
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert len(server.run_directories) == 1, "nobody was left to remove it"
    del stream
    successor = launch(default_model_gguf, "--kv-pool-bytes", "256MiB", port=server.port, directory=server.directory)
    try:
        successor.wait_ready()
        assert len(successor.run_directories) == 1
        assert successor.stop() == 0
        assert successor.run_directories == []
    finally:
        successor.destroy()
