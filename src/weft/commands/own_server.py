"""A server for as long as a command needs one: `weft serve` as a child on a port that was free.

The child stands in a process group of its own, so that Ctrl-C reaches the command and not the server, and dies with
the command, whatever kills that.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

import httpx2

from weft.commands.endpoint import Endpoint, find_endpoint
from weft.errors import StartupError

START_TIMEOUT_S = 3600.0
"""A first start may download for a long time; a child that fails ends, which is noticed at once."""
STOP_TIMEOUT_S = 30.0
_POLL_S = 0.1
_NUM_SHOWN_LINES = 15

Report = Callable[[str], None]


class OwnServerError(StartupError):
    """The server that a command needs did not start."""

    code = "own_server"

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # that of the child, which says what went wrong


@contextmanager
def own_server(
    model: str | None, flags: Sequence[str], environ: Mapping[str, str], report: Report
) -> Iterator[Endpoint]:
    """Serve `model` (None: the default one) on the loopback interface until the block ends.

    report   hears what the server is doing while it starts

    Raises   OwnServerError: it ended before it was ready, with the end of its output and its exit code
    """
    port = _free_port()
    words = ["weft", "serve", *([model] if model else []), *flags, "--hostname", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "weft.launcher.child", str(os.getpid()), "weft: launcher", *words]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 - ourselves
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=dict(environ), process_group=0
        )
        try:
            endpoint = find_endpoint(f"http://127.0.0.1:{port}", environ)
            _wait_ready(process, endpoint, output, report)
            yield endpoint
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], endpoint: Endpoint, output: IO[bytes], report: Report) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx2.Client(timeout=5.0, trust_env=False) as client:
        while process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                answer = client.get(f"{endpoint.root}/health")
                if answer.status_code == 200:
                    return
                report(_progress_of(answer))
            if time.monotonic() > deadline:
                raise OwnServerError(f"the server was not ready within {START_TIMEOUT_S / 60:.0f} minutes.")
            time.sleep(_POLL_S)
    lines = _last_lines(output)
    raise OwnServerError("the server did not start:\n" + "\n".join(lines), process.returncode or 1)


def _progress_of(answer: httpx2.Response) -> str:
    try:
        body = answer.json()
    except ValueError:
        return "starting"
    text = body.get("error") if isinstance(body, dict) else None
    return text if isinstance(text, str) else "starting"


def _last_lines(output: IO[bytes]) -> list[str]:
    output.seek(0)
    lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    reasons = [place for place, line in enumerate(lines) if line.startswith("Error: ")]
    shown = lines[reasons[-1] :] if reasons else lines
    return [line.removeprefix("Error: ") for line in shown][-_NUM_SHOWN_LINES:]


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
