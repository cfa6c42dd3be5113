"""What a user types besides `serve`, each as a process, against a real server."""

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from tests.e2e.harness import RunningServer, clean_environment, free_port, run_command, wait_until

from weft_client import AsyncClient, Client, NotFoundError

pytestmark = pytest.mark.e2e

WEFT = str(Path(sysconfig.get_path("scripts")) / "weft")
QUESTION = "What is the capital of France?"


def weft(*arguments: str, stdin: str = "", timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [WEFT, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=clean_environment(),
        check=False,
    )


def batch_line(custom_id: str, **body: object) -> str:
    body = {"max_tokens": 5, "temperature": 0, **body}
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body}) + "\n"


# Makes standard input the controlling terminal, so that Ctrl-C becomes a signal, and turns into the program.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A program in a terminal of its own, typed at and read."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def wait_for(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Read until the pattern is shown; returns everything up to its end, and forgets it."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([self._descriptor], [], [], left_s)[0]:
                raise AssertionError(f"never shown: {pattern!r}; shown: {self.shown[-2000:]!r}")
            self.shown += self._decode(os.read(self._descriptor, 65536))
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    environment = {**clean_environment(), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-c", _TAKE_TERMINAL, *arguments]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_piped_question_is_answered_on_standard_output(running_server: RunningServer) -> None:
    result = weft("chat", "--url", running_server.base_url, "--temperature", "0", "--max-tokens", "20", stdin=QUESTION)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Paris" in result.stdout


def test_a_conversation_in_a_terminal(running_server: RunningServer, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    with terminal(WEFT, "chat", "--url", running_server.base_url, "--temperature", "0") as screen:
        screen.wait_for("/help lists commands.*› ")
        screen.type(f"{QUESTION}\r")
        assert "Paris" in screen.wait_for(r"first token [\d,]+ ms · [\d,.]+ tok/s · \d+ tokens · prompt \d+ tokens.*› ")

        screen.type("Write a very long story about a dragon and a princess.\r")
        screen.wait_for(r"princess\.\r\n.*\w+ \w+ \w+ ", timeout_s=90)
        screen.type("\x03")
        screen.wait_for("stopped · .*› ")

        screen.type(f"/save {saved}\r")
        screen.wait_for("Saved to.*› ")
        screen.type("/exit\r")
        assert screen.process.wait(20) == 0

    turns = json.loads(saved.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant"]
    running_server.wait_idle()


def test_without_a_server_chat_says_what_to_do() -> None:
    result = weft("chat", "--url", f"localhost:{free_port()}", stdin="hi")
    assert result.returncode == 1
    assert "`weft serve`" in result.stderr


def test_the_benchmark_measures_a_running_server(running_server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    flags = ["-b", "1", "-b", "3", "-s", "32", "-d", "6", "-r", "2", "-w", "1", "--json", str(file)]
    benchmark = str(Path(WEFT).with_name("text-generation-benchmark"))

    result = run_command([benchmark, "--url", running_server.base_url, "-t", "any/tokenizer", *flags], timeout_s=120)

    assert result.returncode == 0, result.stderr
    assert "| Decode (token) |" in result.stdout
    points = json.loads(file.read_text())["results"]
    assert [(point["batch_size"], point["prompt_tokens"], point["output_tokens"]) for point in points] == [
        (1, 32.0, 12),
        (3, 32.0, 36),
    ]


def test_a_batch_is_answered_and_resumed(running_server: RunningServer, tmp_path: Path) -> None:
    source, output, errors = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.errors.jsonl"))
    good = [batch_line(f"c{n}", messages=[{"role": "user", "content": f"Say {n}"}]) for n in range(6)]
    source.write_text("".join([*good, batch_line("bad", prompt="x", temperature=9)]))
    command = ["batch", "run", str(source), "-o", str(output), "--url", running_server.base_url]

    first = weft(*command)

    assert first.returncode == 1, first.stderr
    assert "6 answered, 30 tokens generated" in first.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == [f"c{n}" for n in range(6)]
    assert {answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers} == {5}
    failure = json.loads(errors.read_text())
    assert (failure["custom_id"], failure["response"]["status_code"]) == ("bad", 400)

    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:4]) + lines[4][:30])
    source.write_text("".join([*good, batch_line("bad", prompt="x")]))
    second = weft(*command)

    assert second.returncode == 0, second.stderr
    assert "3 answered" in second.stderr
    assert len(output.read_text().splitlines()) == 7
    assert not errors.exists()
    assert "All 7 requests have their answer" in weft(*command).stderr


def test_without_a_url_a_batch_brings_its_own_server_and_leaves_nothing(
    default_model_gguf: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(batch_line("a", model="any-name", prompt="One two three"))

    result = weft("batch", "run", str(source), "--model", str(default_model_gguf))

    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "in.out.jsonl").read_text())["response"]["status_code"] == 200
    assert servers_of(default_model_gguf) == []


def test_a_killed_command_takes_its_server_along(default_model_gguf: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(batch_line("a", prompt="x"))
    command = [WEFT, "batch", "run", str(source), "--model", str(default_model_gguf), "--concurrency", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=clean_environment()) as process:
        wait_until(lambda: psutil.Process(process.pid).children(recursive=True), "the server starts", 30)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)

    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), "all end", 30)


def servers_of(model: Path) -> list[psutil.Process]:
    processes = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [process for process, words in processes if str(model) in words and "--any-model-name" in words]


def test_a_server_that_cannot_start_ends_the_command_with_its_reason() -> None:
    result = weft("chat", "/no/such/model", stdin="hi")
    assert result.returncode == 3
    assert "there is no file or directory" in result.stderr


def test_the_plan_of_a_model_is_what_the_server_then_does(
    running_server: RunningServer, default_model_gguf: Path
) -> None:
    info = running_server.http.get("/info").json()
    result = weft("plan", str(default_model_gguf), "--kv-pool-bytes", str(info["kv_pool_bytes"]), "--json")
    plan = json.loads(result.stdout)
    assert result.returncode == 0
    assert plan["context"] == info["max_total_tokens"]
    assert plan["dtype"] == info["model_dtype"]
    assert (plan["num_parameters"], plan["pool_tokens"]) == (info["num_parameters"], info["max_batch_total_tokens"])
    assert plan["activation_bytes"] == info["activation_bytes"]


def test_the_doctor_finds_this_machine_fit() -> None:
    result = weft("doctor", "--json", "--port", str(free_port()))
    report = json.loads(result.stdout)
    assert result.returncode == 0, [finding for finding in report["findings"] if finding["status"] == "bad"]
    assert "self-test" in {finding["name"] for finding in report["findings"]}


async def test_the_python_client_against_the_server(running_server: RunningServer) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    with Client(running_server.base_url) as client:
        assert client.health().is_ready
        assert client.info().max_total_tokens > 0
        assert "Paris" in client.generate("The capital of France is", max_new_tokens=5).generated_text
        streamed = list(client.generate_stream("The capital of France is", max_new_tokens=5))
        assert "".join(event.token.text for event in streamed) == streamed[-1].generated_text
        whole = client.chat(messages, max_tokens=10, temperature=0)
        chunks = list(client.chat_stream(messages, max_tokens=10, temperature=0))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].usage is not None
        assert client.completion("One two", max_tokens=2, logprobs=1).choices[0].logprobs is not None
        assert [span.text for span in client.tokenize("hello world")] == ["hello", " world"]
        with pytest.raises(NotFoundError):
            client.chat(messages, model="another")
    async with AsyncClient(running_server.base_url) as client:
        assert [model.id for model in await client.models()]
        stream = client.chat_stream([{"role": "user", "content": "Count to a thousand."}], max_tokens=1000)
        await anext(stream)
        await stream.aclose()
    running_server.wait_idle()
