"""Child processes: started in groups of their own, heard line by line, stopped for certain.

Knows nothing of routers, shards or models: only what it takes to never lose a process. Every child runs through
`child.py` and therefore dies with this process, whatever kills it.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_MAX_LINE_BYTES = 2**20
_NUM_LAST_LINES = 60

OnLine = Callable[["Child", str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """How to start a child."""

    name: str
    """As in logs: `router`, `shard-0`."""
    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


class Child:
    """A running process and its last words."""

    def __init__(
        self, spec: ChildSpec, process: asyncio.subprocess.Process, on_line: OnLine, said: int, told: int
    ) -> None:
        self.name = spec.name
        self.last_lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
        """What it wrote lately that was no log event: tracebacks, words of native libraries."""
        self._process = process
        self._on_line = on_line
        self._told = told
        self._reader = asyncio.create_task(self._read_lines(said))

    @classmethod
    async def start(cls, spec: ChildSpec, on_line: OnLine) -> "Child":
        """Start a process; `on_line` gets each line it writes, to standard output or standard error."""
        # The pipes are ours: asyncio would not report the end of a process before its pipes are closed, and
        # whatever the process started may hold them open.
        said, its_output = os.pipe()
        its_input, told = os.pipe()
        os.set_blocking(told, False)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "weft.launcher.child", str(os.getpid()), f"weft: {spec.name}", spec.module,
                *spec.arguments,
                stdin=its_input,
                stdout=its_output,
                stderr=its_output,
                env=spec.environment,
                process_group=0,
            )  # fmt: skip
        finally:
            os.close(its_output)
            os.close(its_input)
        return cls(spec, process, on_line, said, told)

    @property
    def pid(self) -> int:
        """Of the process, which is also that of its group."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Exit code, minus the signal's number when it was killed, None while it runs."""
        return self._process.returncode

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Until it has ended and its last line was heard; returns its exit status."""
        status = await self._process.wait()
        self._signal_group(signal.SIGKILL)
        # Something that it started outside its group may hold the pipe open for longer.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reader), timeout=1.0)
        if self._told >= 0:
            os.close(self._told)
            self._told = -1
        return status

    def tell(self, line: str) -> None:
        """Write a line to its standard input; a child that no longer listens is not told."""
        if self._told >= 0:
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._told, line.encode() + b"\n")

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything it started."""
        self._signal_group(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """Ask it to end; end it when it has not after `grace_s` seconds."""
        self.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), timeout=grace_s)
        except TimeoutError:
            self.kill()
        await self.wait()

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _read_lines(self, said: int) -> None:
        stream = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(said, "rb", buffering=0)
        )
        try:
            while True:
                try:
                    line = await stream.readline()
                except ValueError:  # longer than _MAX_LINE_BYTES; what was read of it is gone
                    continue
                if not line:
                    return
                self._on_line(self, line.decode(errors="replace").rstrip("\n"))
        finally:
            transport.close()


class RestartPolicy:
    """How long to wait before the next start, and when to give up.

    A child that served for `lasting_s` seconds is forgiven all earlier deaths. The first restart is immediate, so
    that a single crash costs no more than loading; the next ones wait 1, 2, 4 … up to 30 seconds.
    """

    def __init__(self, max_quick_failures: int, lasting_s: float = 60.0) -> None:
        self._max_quick_failures = max_quick_failures
        self._lasting_s = lasting_s
        self.num_quick_failures = 0

    def note_death(self, served_s: float) -> float | None:
        """Seconds to wait before starting again; None to give up."""
        self.num_quick_failures = 1 if served_s >= self._lasting_s else self.num_quick_failures + 1
        if self.num_quick_failures > self._max_quick_failures:
            return None
        return 0.0 if self.num_quick_failures == 1 else min(30.0, 2.0 ** (self.num_quick_failures - 2))
