"""Recording a real server's traffic and asking it again of others: `make replay` does the same at length."""

import os
import stat
import sys
from pathlib import Path

import pytest
from tests.e2e.harness import run_command, serving
from tests.e2e.recorded_load import send_random_requests
from tests.e2e.replay import wait_recorded

pytestmark = pytest.mark.e2e


def verify(recording: Path, *words: str) -> tuple[int, str]:
    ended = run_command([sys.executable, "-m", "weft", "verify", str(recording), *words], timeout_s=240)
    return ended.returncode, " ".join((ended.stdout + ended.stderr).split())


@pytest.fixture(scope="module")
def recording(default_model_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A file, and how many sequences it holds. While it was written it was verified with the very server."""
    path = tmp_path_factory.mktemp("recording") / "requests.jsonl"
    with serving(default_model_gguf, "--dtype", "bfloat16", "--record", str(path)) as server:
        num_sequences = send_random_requests(server, 50, seed=3)
        wait_recorded(server, num_sequences)
        same, text = verify(path, "--url", server.base_url, "--shuffle", "--concurrency", "24")
    assert same == 0, text
    return path, num_sequences


def test_a_restart_under_other_conditions_gives_the_same_bits(recording: tuple[Path, int]) -> None:
    path, num_sequences = recording

    status, text = verify(path, "--seed", "1", "--concurrency", "7", "--", "--threads", "1",
                          "--max-batch-prefill-tokens", "32", "--no-prefix-caching")  # fmt: skip

    assert status == 0, text
    assert f"{num_sequences:,} requests" in text
    assert "every id and every bit is the same" in text


def test_other_numbers_are_another_server_and_are_refused(recording: tuple[Path, int]) -> None:
    path, _ = recording

    status, text = verify(path, "--", "--quantize", "int8")

    assert status == 1
    assert "another numeric configuration" in text
    assert "--any-fingerprint" in text


def test_other_numbers_give_other_tokens_and_the_first_one_is_named(recording: tuple[Path, int]) -> None:
    path, _ = recording

    status, text = verify(path, "--any-fingerprint", "--limit", "8", "--", "--quantize", "int8")

    assert status == 1
    assert "request " in text
    assert ": recorded " in text
    assert "logprob -0x" in text


def test_only_the_owner_can_read_what_was_recorded(recording: tuple[Path, int]) -> None:
    path, _ = recording

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_lines_and_no_answer(default_model_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "recording"
    path.symlink_to("/dev/full")
    with serving(default_model_gguf, "--record", str(path)) as server:
        answer = server.generate("The capital of France is", max_new_tokens=4)
        server.wait_until(lambda: server.metrics().value("weft_recorded_lines", outcome="dropped") >= 2, "dropped")

        assert "Paris" in answer["generated_text"]
        assert "recording.failed" in server.output
    assert os.path.samestat(path.stat(), Path("/dev/full").stat())
