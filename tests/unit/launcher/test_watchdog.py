"""A shard that lives and does not move."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weft.launcher.watchdog import wait_for_stall

pytestmark = pytest.mark.e2e


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []

    def start(stalled_ns: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.unit.launcher.fake_engine", str(tmp_path / "s"), str(stalled_ns)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def test_an_engine_that_stands_still_is_noticed(
    engine: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    engine(60 * 10**9)

    stalled_s = await asyncio.wait_for(wait_for_stall(tmp_path / "s", 0.4), timeout=10)

    assert stalled_s >= 0.4


async def test_a_stopped_process_is_noticed(engine: Callable[[int], subprocess.Popen[str]], tmp_path: Path) -> None:
    process = engine(0)
    watch = asyncio.create_task(wait_for_stall(tmp_path / "s", 0.4))
    await asyncio.sleep(0)
    os.kill(process.pid, signal.SIGSTOP)

    stalled_s = await asyncio.wait_for(watch, timeout=10)

    assert stalled_s >= 0.4


async def test_an_engine_that_moves_is_left_alone(
    engine: Callable[[int], subprocess.Popen[str]], tmp_path: Path
) -> None:
    engine(10**6)
    began = time.monotonic()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(wait_for_stall(tmp_path / "s", 0.5), timeout=2)

    assert time.monotonic() - began >= 2
