"""What a command says and how it exits when it cannot do what was asked."""

import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from tests.e2e.harness import LAUNCHER, free_port, run_command

pytestmark = pytest.mark.e2e

WEFT = str(Path(sysconfig.get_path("scripts")) / "weft")


def test_every_wrong_setting_is_listed_at_once_and_at_once() -> None:
    started = time.monotonic()

    done = run_command([LAUNCHER, "--no-such-flag", "--port", "abc", "--max-best-of", "0", "--dtype", "int3"])

    assert done.returncode == 2
    for wrong in ("--no-such-flag", "--port", "--max-best-of", "--dtype"):
        assert wrong in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 10, "nothing was downloaded or loaded first"


def test_contradictory_settings_are_a_usage_error() -> None:
    done = run_command([LAUNCHER, "--max-input-tokens", "100", "--max-total-tokens", "100"])

    assert done.returncode == 2
    assert "--max-input-tokens" in done.stderr
    assert "--max-total-tokens" in done.stderr


@pytest.mark.parametrize("reference", ["/no/such/directory", "./nothing.gguf", "pypi:nothing"])
def test_a_model_that_is_not_there_has_an_exit_code_of_its_own(reference: str) -> None:
    done = run_command([LAUNCHER, "--model-id", reference])

    assert done.returncode == 3
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_model_has_the_same_exit_code(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))

    done = run_command([LAUNCHER, "--model-id", str(file), "--port", str(free_port())])

    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_port_in_use_has_an_exit_code_of_its_own(default_model_gguf: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        done = run_command(
            [LAUNCHER, "--model-id", str(default_model_gguf), "--hostname", "127.0.0.1", "--port", str(port)]
        )

    assert done.returncode == 6
    assert str(port) in done.stderr


def test_too_little_memory_has_an_exit_code_of_its_own(default_model_gguf: Path) -> None:
    done = run_command(
        [LAUNCHER, "--model-id", str(default_model_gguf), "--port", str(free_port()), "--kv-pool-bytes", "100TiB"],
        timeout_s=60,
    )

    assert done.returncode == 4, done.stdout + done.stderr
    assert "--kv-pool-bytes" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments", [["serve", "--help"], ["--help"], ["--version"], ["config"], ["serve", "--port", "x"]]
)
def test_commands_that_only_talk_load_neither_torch_nor_grpc(arguments: list[str]) -> None:
    """The reason why help comes at once: these imports take seconds."""
    script = (
        "import sys; from weft.cli import main; sys.argv = ['weft', *sys.argv[1:]]; main(); "
        "print(sorted({'torch', 'transformers', 'grpc', 'numpy', 'uvicorn'} & set(sys.modules)), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=30
    )

    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [WEFT, LAUNCHER])
def test_help_and_version_go_to_standard_output(command: str) -> None:
    told = run_command([command, "--help"])
    version = run_command([command, "--version"])

    assert told.returncode == version.returncode == 0
    assert told.stdout
    assert version.stdout.startswith("weft ")
    assert not told.stderr
