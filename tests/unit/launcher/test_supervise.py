"""The launcher with real processes: fake router, fake shards, real signals."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from weft.launcher.supervise import RestartPolicy

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[3]
DEADLINE_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Launch:
    """A running launcher and the record that its fake children write."""

    def __init__(self, directory: Path, *flags: str, **behaviour: str) -> None:
        self.directory = directory
        self.record_file = directory / "record"
        self.model = directory / "model.gguf"
        self.model.write_bytes(b"GGUF")
        environ = {
            **os.environ,
            "FAKE_RECORD": str(self.record_file),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
            "API_KEY": "the-secret-key",
            **behaviour,
        }
        command = [
            sys.executable, "-m", "tests.unit.launcher.fake_launch", "--model-id", str(self.model),
            "--port", str(free_port()), "--hostname", "127.0.0.1", "--watchdog-timeout-s", "0",
            "--shard-uds-path", str(directory / "run"), *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def entries(self, **wanted: object) -> list[dict[str, Any]]:
        if not self.record_file.exists():
            return []
        lines = self.record_file.read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return [entry for entry in entries if wanted.items() <= entry.items()]

    def wait_for(self, count: int = 1, **wanted: object) -> list[dict[str, Any]]:
        return until(lambda: found if len(found := self.entries(**wanted)) >= count else None)

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return output


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("did not happen in time")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(*flags: str, **behaviour: str) -> Launch:
        started.append(Launch(tmp_path, *flags, **behaviour))
        return started[-1]

    yield start
    for launch in started:
        launch.process.kill()
        launch.process.communicate()
        for entry in launch.entries(event="started"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)


def test_the_router_hears_of_loading_and_readiness_and_sigterm_ends_all_with_code_0(
    launches: Callable[..., Launch], tmp_path: Path
) -> None:
    launch = launches("--num-shard", "2")
    launch.wait_for(who="router", state="ready")
    run_dirs = list(tmp_path.glob("run-*"))
    modes = [stat.S_IMODE(run_dir.stat().st_mode) for run_dir in run_dirs]

    launch.process.send_signal(signal.SIGTERM)
    output = launch.finish()

    assert launch.process.returncode == 0, output
    states = [entry["state"] for entry in launch.entries(who="router", event="state")]
    assert states[0] == "loading"
    assert states[-2:] == ["ready", "draining"]
    assert modes == [0o700]
    assert list(tmp_path.glob("run-*")) == []
    assert not any(is_running(entry["pid"]) for entry in launch.entries(event="started"))
    events = [(entry["who"], entry["event"]) for entry in launch.entries()]
    assert events.index(("router", "stopped")) < events.index(("shard", "stopped"))


def test_children_learn_the_model_but_no_secret_from_their_surroundings(launches: Callable[..., Launch]) -> None:
    launch = launches("--threads", "3")
    (shard,) = launch.wait_for(who="shard", event="started")
    (router,) = launch.wait_for(who="router", event="started")
    launch.process.send_signal(signal.SIGTERM)
    output = launch.finish()

    assert shard["model_path"] == str(launch.model)
    assert shard["environ"]["OMP_NUM_THREADS"] == "3"
    assert "the-secret-key" not in shard["environ"].values()
    assert "API_KEY" not in router["environ"]
    assert "the-secret-key" not in output


def test_an_api_key_does_not_stay_on_the_command_line(launches: Callable[..., Launch]) -> None:
    launch = launches("--api-key", "hush-hush")
    launch.wait_for(who="router", state="ready")

    assert b"hush-hush" not in Path(f"/proc/{launch.process.pid}/cmdline").read_bytes()


def test_the_banner_has_at_most_15_lines_and_a_pasteable_request(launches: Callable[..., Launch]) -> None:
    launch = launches()
    launch.wait_for(who="router", state="ready")
    launch.process.send_signal(signal.SIGTERM)
    output = launch.finish()

    lines = output[: output.index("launcher.draining")].splitlines()[:-1]
    assert len(lines) <= 15
    assert any(line.startswith("curl http://127.0.0.1:") for line in lines)


def test_a_dead_shard_group_is_restarted_as_a_whole_while_the_router_stays(launches: Callable[..., Launch]) -> None:
    launch = launches("--num-shard", "2", FAKE_SHARD="crash-once")
    launch.wait_for(count=2, who="router", state="ready")
    launch.process.send_signal(signal.SIGTERM)
    output = launch.finish()

    assert launch.process.returncode == 0, output
    assert len(launch.entries(who="router", event="started")) == 1
    assert len(launch.entries(who="shard", event="started")) == 4
    assert "restart" in [entry.get("phase") for entry in launch.entries(who="router", event="state")]
    assert "the last words" in output


def test_shards_that_die_again_and_again_end_the_launcher(launches: Callable[..., Launch]) -> None:
    launch = launches("--max-quick-failures", "1", FAKE_SHARD="crash")
    output = launch.finish()

    assert launch.process.returncode == 1
    assert "died 2 times in a row" in output
    assert launch.entries(who="router", event="state")[-1]["state"] == "failed"


def test_a_dead_router_is_restarted_without_touching_the_shards(launches: Callable[..., Launch]) -> None:
    launch = launches()
    (first,) = launch.wait_for(who="router", state="ready")
    os.kill(first["pid"], signal.SIGKILL)

    second = launch.wait_for(count=2, who="router", state="ready")[1]
    launch.process.send_signal(signal.SIGTERM)
    launch.finish()

    assert second["pid"] != first["pid"]
    assert len(launch.entries(who="shard", event="started")) == 1


@pytest.mark.parametrize("code", [3, 4, 5])
def test_a_shard_that_cannot_start_gives_the_launcher_its_exit_code(launches: Callable[..., Launch], code: int) -> None:
    launch = launches(FAKE_SHARD=f"exit:{code}")
    launch.finish()

    assert launch.process.returncode == code
    assert len(launch.entries(who="shard", event="started")) == 1


def test_a_shard_that_crashes_while_loading_shows_its_last_words(launches: Callable[..., Launch]) -> None:
    launch = launches(FAKE_SHARD="exit:1")
    output = launch.finish()

    assert launch.process.returncode == 1
    assert "shard-0 | a native library says hello" in output


def test_a_router_that_cannot_listen_gives_the_launcher_its_exit_code(launches: Callable[..., Launch]) -> None:
    launch = launches(FAKE_ROUTER="exit:6")
    launch.finish()

    assert launch.process.returncode == 6


def test_a_second_signal_does_not_wait_for_running_requests(launches: Callable[..., Launch]) -> None:
    launch = launches(FAKE_DRAIN_S="60")
    launch.wait_for(who="router", state="ready")
    launch.process.send_signal(signal.SIGTERM)
    launch.wait_for(who="router", event="draining")

    began = time.monotonic()
    launch.process.send_signal(signal.SIGTERM)
    launch.finish()

    assert time.monotonic() - began < 2
    assert launch.process.returncode == 0
    assert not any(is_running(entry["pid"]) for entry in launch.entries(event="started"))


def test_a_router_that_drains_too_long_is_killed(launches: Callable[..., Launch]) -> None:
    launch = launches("--graceful-termination-timeout", "0.3", FAKE_DRAIN_S="60")
    launch.wait_for(who="router", state="ready")
    launch.process.send_signal(signal.SIGTERM)
    launch.finish()

    assert launch.process.returncode == 0
    assert launch.entries(who="router", event="stopped") == []


def test_nobody_survives_a_killed_launcher_and_the_next_one_cleans_up(
    launches: Callable[..., Launch], tmp_path: Path
) -> None:
    launch = launches("--num-shard", "2")
    launch.wait_for(who="router", state="ready")
    launch.process.kill()
    launch.process.wait()
    until(lambda: not any(is_running(entry["pid"]) for entry in launch.entries(event="started")))
    left_over = list(tmp_path.glob("run-*"))

    second = launches()
    second.wait_for(count=2, who="router", state="ready")

    assert len(left_over) == 1
    assert not left_over[0].exists()


def test_what_a_shard_started_dies_with_it(launches: Callable[..., Launch]) -> None:
    launch = launches(FAKE_SHARD="grandchild")
    (entry,) = launch.wait_for(who="shard", event="grandchild")
    launch.wait_for(who="router", state="ready")
    launch.process.send_signal(signal.SIGTERM)
    launch.finish()

    until(lambda: not is_running(entry["grandchild"]))


def test_a_port_in_use_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "weft", "serve", "--hostname", "127.0.0.1", "--port", str(port)],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip

    assert done.returncode == 6
    assert f"--port: {port} is in use" in done.stderr


def test_restarts_are_immediate_once_then_slower_and_forgiven_after_a_while() -> None:
    policy = RestartPolicy(max_quick_failures=4)

    assert [policy.note_death(0.1) for _ in range(4)] == [0.0, 1.0, 2.0, 4.0]
    assert policy.note_death(61) == 0.0
    assert [policy.note_death(0.1) for _ in range(4)] == [1.0, 2.0, 4.0, None]


@pytest.mark.parametrize(
    ("code", "last_line"),
    [(3, "Error: --model-id MODEL: there are no weights"), (4, "Error: there are no weights")],
)
def test_the_reason_of_a_failed_start_is_the_last_line(
    launches: Callable[..., Launch], code: int, last_line: str
) -> None:
    launch = launches(FAKE_SHARD=f"exit:{code}")

    output = launch.finish()

    assert launch.process.returncode == code
    assert output.splitlines()[-1] == last_line.replace("MODEL", str(launch.model))


def test_a_phase_with_a_reason_is_shown_at_once(launches: Callable[..., Launch]) -> None:
    launch = launches()
    launch.wait_for(who="router", state="ready")
    launch.process.send_signal(signal.SIGTERM)

    shown = [line for line in launch.finish().splitlines() if "startup.progress" in line]

    assert len(shown) == 1, "the quick ones are left out"
    assert "compiling kernels" in shown[0]


def test_what_every_rank_finds_wrong_is_said_once(launches: Callable[..., Launch]) -> None:
    output = launches("--num-shard", "3", FAKE_SHARD="exit:4").finish()

    assert sum("startup.failed" in line for line in output.splitlines()) == 1


def test_with_json_output_the_reason_is_an_event_and_nothing_else(launches: Callable[..., Launch]) -> None:
    launch = launches("--json-output", FAKE_SHARD="exit:3")

    events = [json.loads(line) for line in launch.finish().splitlines()]

    assert "there are no weights" in [event.get("message") for event in events if event["event"] == "startup.failed"]
