"""Real servers for the end-to-end tests: started by the real command, watched, and never left behind.

Nothing here sleeps for luck: whatever takes time is polled until a deadline, and a deadline that passes shows the
server's own output.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

START_TIMEOUT_S = 240.0
"""Far more than a start takes: the first one after a change of the C++ sources compiles them."""
STOP_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 120.0

LAUNCHER = str(Path(sysconfig.get_path("scripts")) / "text-generation-launcher")

_SETTINGS_IN_ENVIRONMENT = re.compile("(WEFT_.*|PORT|HOSTNAME|MODEL_ID|API_KEY|NUM_SHARD|DTYPE|REVISION|QUANTIZE)")
_METRIC = re.compile(r"([A-Za-z_:]+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


class ServerFailed(AssertionError):
    """The server did not do what a test waited for; the message ends with its output."""


def clean_environment() -> dict[str, str]:
    """The environment without settings of ours, so that a developer's shell cannot change what is tested."""
    return {name: value for name, value in os.environ.items() if not _SETTINGS_IN_ENVIRONMENT.fullmatch(name)}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(
    condition: Callable[[], Any], what: str, timeout_s: float, explain: Callable[[], str] = lambda: ""
) -> Any:
    """Poll until `condition` returns something true, and return that. Raises ServerFailed at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise ServerFailed(f"not within {timeout_s:g} s: {what}\n{explain()}")
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Metrics:
    """One reading of /metrics."""

    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    @classmethod
    def parse(cls, text: str) -> "Metrics":
        """From the text exposition format."""
        samples = {}
        for line in text.splitlines():
            if line.startswith("#") or not (found := _METRIC.fullmatch(line)):
                continue
            labels = frozenset((name, value) for name, value in _LABEL.findall(found[2] or ""))
            samples[found[1], labels] = float(found[3])
        return cls(samples)

    def value(self, name: str, **labels: str) -> float:
        """One sample; 0 when it was never counted."""
        return self.samples.get((name, frozenset(labels.items())), 0.0)


class RunningServer:
    """A launcher and everything below it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, directory: Path) -> None:
        self.process = process
        self.port = port
        self.directory = directory
        """Holds the run directory and the output; belongs to this server alone."""
        self.base_url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.base_url, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    # What it says

    @property
    def output(self) -> str:
        """Everything that launcher and children wrote so far."""
        return (self.directory / "output.log").read_text(errors="replace")

    def explain(self) -> str:
        """The end of the output, for failure messages."""
        lines = [line for line in self.output.splitlines() if "route=/health" not in line]
        return f"exit status {self.process.poll()}; output ends:\n" + "\n".join(lines[-40:])

    def wait_until(self, condition: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
        """As the function, with this server's output in the failure."""
        return wait_until(condition, what, timeout_s, self.explain)

    def health(self) -> httpx.Response | None:
        """Answer of /health; None while nothing listens."""
        try:
            return self.http.get("/health", timeout=5.0)
        except httpx.TransportError:
            return None

    def is_ready(self) -> bool:
        """Whether a generation would be served now."""
        if self.process.poll() is not None:
            raise ServerFailed(f"the server ended\n{self.explain()}")
        answer = self.health()
        return answer is not None and answer.status_code == 200

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until generation requests are served."""
        self.wait_until(self.is_ready, "ready", timeout_s)

    def metrics(self) -> Metrics:
        """All metrics, now."""
        return Metrics.parse(self.http.get("/metrics").text)

    # Its processes

    @property
    def run_directories(self) -> list[Path]:
        """Private directories that exist now."""
        return sorted(self.directory.glob("run-*"))

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def child(self, title: str) -> psutil.Process | None:
        """The child with this title, for example `router` or `shard-0`; None while there is none."""
        for process in self.processes():
            try:
                command = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            if command and command[0].strip() == f"weft: {title}":
                return process
        return None

    def wait_child(self, title: str, other_than: int | None = None) -> psutil.Process:
        """The child with this title, once it runs; `other_than` is the process id of its predecessor."""

        def found() -> psutil.Process | None:
            child = self.child(title)
            return child if child is not None and child.pid != other_than else None

        process: psutil.Process = self.wait_until(found, f"{title} runs")
        return process

    # Its work

    def generate(self, inputs: str, **parameters: Any) -> dict[str, Any]:
        """POST /generate; the answer's JSON. Raises ServerFailed for any other status than 200."""
        answer = self.http.post("/generate", json={"inputs": inputs, "parameters": parameters})
        if answer.status_code != 200:
            raise ServerFailed(f"/generate answered {answer.status_code} {answer.text}\n{self.explain()}")
        body: dict[str, Any] = answer.json()
        return body

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Until no sequence runs or waits and no block is held, as the engine itself says."""

        def is_idle() -> bool:
            metrics = self.metrics()
            gauges = (
                metrics.value("tgi_batch_current_size"),
                metrics.value("tgi_queue_size"),
                metrics.value("weft_kv_blocks", state="used"),
                metrics.value("weft_admission_permits", state="used"),
            )
            return not any(gauges)

        self.wait_until(is_idle, "no sequence runs and no block is held", timeout_s)

    # Its end

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Send a signal to the launcher and wait for its end; returns the exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"still running {timeout_s:g} s after {number.name}\n{self.explain()}") from None

    def destroy(self) -> None:
        """End everything for certain, however the test went, orphans included."""
        self.http.close()
        processes = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self.process.wait(10)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.cwd() == str(self.directory)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False


def launch(model: str | Path, *flags: str, port: int | None = None, directory: Path | None = None) -> RunningServer:
    """Start the launcher, on a free port and in a directory of its own, and return at once.

    The caller calls `destroy`.
    """
    directory = directory or Path(tempfile.mkdtemp(prefix="weft-e2e-")).resolve()
    port = port or free_port()
    command = [LAUNCHER, "--model-id", str(model), "--hostname", "127.0.0.1", "--port", str(port)]
    with (directory / "output.log").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--shard-uds-path", str(directory / "run"), *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Also the mark by which its processes are known when they have lost their parent.
            cwd=directory,
            env=clean_environment(),
        )
    return RunningServer(process, port, directory)


@contextmanager
def serving(model: str | Path, *flags: str) -> Iterator[RunningServer]:
    """A server that is ready; gone afterwards."""
    server = launch(model, *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.destroy()


class RawClient:
    """A client that can leave at any byte."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)

    def send(self, path: str, body: dict[str, Any], share: float = 1.0) -> "RawClient":
        """Send a request, or the given share of its body."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        self._socket.sendall(head.encode() + b"\r\n\r\n" + content[: int(len(content) * share)])
        return self

    def read_until(self, text: bytes) -> "RawClient":
        """Read until the answer holds `text`."""
        seen = b""
        while text not in seen:
            part = self._socket.recv(65536)
            assert part, f"the server closed after {seen[-300:]!r}"
            seen += part
        return self

    def leave(self) -> None:
        """Close the connection without a word."""
        self._socket.close()


def run_command(arguments: Sequence[str], timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    """Run a command that ends by itself, in a clean environment."""
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=timeout_s, env=clean_environment(), check=False
    )


def chat(content: str, **fields: Any) -> dict[str, Any]:
    """Body of a chat completion with one user message."""
    return {"messages": [{"role": "user", "content": content}], **fields}
