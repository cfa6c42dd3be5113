"""One server's processes: started, awaited, paused while others are measured, and ended with all they started."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
from peers import Launch, Server

from weft.benchmark.host import process_tree

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 20.0


class ServerEndedError(Exception):
    """The server stopped, or never became ready."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def set_autogroup(process_id: int | str, nice: int | None) -> None:
    """Give a session of processes another share of the CPU than the machine's other sessions have (Linux, root)."""
    if nice is not None:
        Path(f"/proc/{process_id}/autogroup").write_text(str(nice))


def _read_through(path: Path) -> None:
    """Bring files into the page cache, so that no server's start depends on what was read before."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as content:
                while content.read(1 << 24):
                    pass


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class LiveServer:
    """A server that answers. Raises ServerEndedError when it does not get that far."""

    def __init__(self, server: Server, launch: Launch, log_file: Path, nice: int | None) -> None:
        self.server = server
        self.launch = launch
        self.port = _free_port()
        command = [part.replace("{port}", str(self.port)) for part in launch.command]
        say(f"$ {shlex.join(command)}")
        _read_through(server.weights)
        started = time.perf_counter()
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **server.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            set_autogroup(self._process.pid, nice)
            self._wait_until_ready(started + START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.perf_counter() - started

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def get(self, path: str) -> bytes:
        """The body of a GET. Raises OSError when the server does not answer."""
        with urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def pause(self) -> None:
        """Stop all its processes where they are: they keep their memory and use no processor."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again. Raises ServerEndedError when the server is gone."""
        self._signal_all(signal.SIGCONT)
        if self._process.poll() is not None:
            raise ServerEndedError(f"the server exited with {self._process.returncode}")

    def stop(self) -> None:
        """End it, politely first."""
        self._signal_all(signal.SIGCONT)
        descendants = process_tree(self.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                say(f"process {self.pid} did not stop within {STOP_TIMEOUT_S:g} s of SIGTERM")
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _signal_all(self, number: signal.Signals) -> None:
        for process in process_tree(self.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _wait_until_ready(self, deadline: float) -> None:
        while time.perf_counter() < deadline:
            if self._process.poll() is not None:
                raise ServerEndedError(f"the server exited with {self._process.returncode}")
            # Refused, reset, or an error status: not ready yet.
            with suppress(OSError), urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.05)
        raise ServerEndedError(f"not ready after {START_TIMEOUT_S:g} s")
