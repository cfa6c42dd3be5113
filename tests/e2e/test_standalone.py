"""TGI's two processes started by hand: a shard, and a router for it."""

import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.e2e.harness import clean_environment, free_port, run_command, wait_until

pytestmark = pytest.mark.e2e

SCRIPTS = Path(sysconfig.get_path("scripts"))


@contextmanager
def running(directory: Path, name: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            [str(SCRIPTS / name), *words], stdout=output, stderr=subprocess.STDOUT, env=clean_environment()
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_router_serves_for_a_shard_that_somebody_started(default_model_gguf: Path, tmp_path: Path) -> None:
    prefix, port = str(tmp_path / "tgi"), free_port()
    serve = ("serve", str(default_model_gguf), "--uds-path", prefix, "--kv-pool-bytes", "64MiB")
    route = (
        "--tokenizer-name", str(default_model_gguf), "--master-shard-uds-path", prefix + "-0", "--port", str(port),
        "--shard-uds-path", str(tmp_path / "router"),
    )  # fmt: skip

    def answers() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    with running(tmp_path, "text-generation-server", *serve) as shard:
        wait_until(lambda: Path(prefix + "-0").exists(), "the shard's socket", 60)
        with running(tmp_path, "text-generation-router", *route) as router:
            wait_until(answers, "the router", 90, (tmp_path / "text-generation-router.log").read_text)
            body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 3}}
            answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, trust_env=False, timeout=60)
            router.send_signal(signal.SIGTERM)
            router_status = router.wait(30)
        shard.send_signal(signal.SIGTERM)
        shard_status = shard.wait(30)

    assert answer.status_code == 200
    assert "Paris" in answer.json()["generated_text"]
    assert (router_status, shard_status) == (0, 0)
    assert "Traceback" not in (tmp_path / "text-generation-router.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".log")) == []


def test_a_shard_that_cannot_start_says_why_in_one_last_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    done = run_command(
        [str(SCRIPTS / "text-generation-server"), "serve", str(tmp_path), "--uds-path", str(tmp_path / "tgi")]
    )

    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith(f"Error: --model-id {tmp_path}: ")
    assert "Traceback" not in done.stderr
    assert "{" not in done.stderr, "no JSON unless --json-output"
