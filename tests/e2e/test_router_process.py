"""The router as a process, told by a launcher that is this test, in front of a shard that is this test, too."""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from tests.contract.house import byte_tokenizer, ids_of
from tests.e2e.harness import free_port
from tests.fake_shard import FakeShard, running

from weft.config import Settings, save_settings
from weft.core.events import TokenEvent
from weft.core.info import EngineInfo
from weft.core.request import FinishReason, RequestId
from weft.proto.v1 import generate_pb2 as pb

pytestmark = pytest.mark.e2e

INFO = EngineInfo(model_id="tiny", vocab_size=258, max_total_tokens=64, device_name="Test Device")
TEXT = "hello"


class Shard(FakeShard):
    """Says TEXT to everybody, as far as `steps` allows."""

    def __init__(self) -> None:
        super().__init__(INFO)
        self.steps = asyncio.Semaphore(1000)
        self.aborted: list[int] = []
        self._speakers: set[asyncio.Task[None]] = set()

    def receive(self, frame: pb.ClientFrame) -> None:
        if frame.WhichOneof("kind") == "add":
            self._speakers.add(asyncio.create_task(self._speak(RequestId(frame.add.request_id))))
        else:
            self.aborted.append(frame.abort.request_id)

    async def _speak(self, request_id: RequestId) -> None:
        ids = ids_of(TEXT)
        for index, token_id in enumerate(ids):
            await self.steps.acquire()
            reason = FinishReason.EOS_TOKEN if index == len(ids) - 1 else None
            self.send(
                TokenEvent(
                    request_id=request_id, token_index=index, token_id=token_id, logprob=-1.0, finish_reason=reason
                )
            )


@asynccontextmanager
async def shard_at(socket: Path) -> AsyncIterator[Shard]:
    shard = Shard()
    async with running(shard, socket):
        yield shard


@dataclass
class Router:
    process: asyncio.subprocess.Process
    client: httpx.AsyncClient

    def tell(self, state: str, **fields: object) -> None:
        self.process.stdin.write(json.dumps({"state": state, **fields}).encode() + b"\n")

    async def health(self) -> httpx.Response:
        """The answer once the port is open."""
        async with asyncio.timeout(20):
            while True:
                try:
                    return await self.client.get("/health")
                except httpx.TransportError:
                    await asyncio.sleep(0.02)

    async def until_status(self, status: int) -> httpx.Response:
        async with asyncio.timeout(20):
            while (answer := await self.health()).status_code != status:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
            return answer

    async def exit_code(self, timeout_s: float = 10) -> int:
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()


@asynccontextmanager
async def router(run_dir: Path, **changes: object) -> AsyncIterator[Router]:
    model = run_dir / "model"
    model.mkdir(parents=True)
    byte_tokenizer()._backend.save(str(model / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
    port = free_port()
    settings = replace(
        Settings(model_id="tiny", hostname="127.0.0.1", port=port, model_path=str(model), cache_dir=str(run_dir)),
        **changes,
    )
    save_settings(run_dir, settings)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "weft.router.main", "--run-dir", str(run_dir), stdin=asyncio.subprocess.PIPE
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield Router(process, client)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}


async def test_from_the_first_moment_to_the_last(tmp_path: Path):
    """Loading, ready, a lost shard, its successor, and a drain that lets a stream finish: exit 0."""
    async with router(tmp_path) as served:
        served.tell("loading", phase="load", percent=30)
        async with asyncio.timeout(20):
            while (loading := (await served.health()).json())["percent"] != 30:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert loading["phase"] == "load"
        assert (await served.client.post("/generate", json={"inputs": "a"})).status_code == 503

        async with shard_at(tmp_path / "shard-0.sock"):
            served.tell("ready")
            await served.until_status(200)
            answer = await served.client.post("/generate", json={"inputs": "a"})
            assert answer.json() == {"generated_text": TEXT}
            assert answer.headers["x-compute-type"] == "1-test-device"

        await served.until_status(503)
        assert (await served.client.post("/generate", json={"inputs": "a"})).status_code == 503

        async with shard_at(tmp_path / "shard-0.sock") as shard:
            served.tell("loading", phase="restart")
            served.tell("ready")
            await served.until_status(200)
            shard.steps = asyncio.Semaphore(1)
            async with served.client.stream("POST", "/v1/chat/completions", json=CHAT) as stream:
                lines = stream.aiter_lines()
                assert (await anext(lines)).startswith("data: ")
                served.process.send_signal(signal.SIGTERM)
                await served.until_status(503)
                assert (await served.client.get("/health/live")).status_code == 200
                refused = await served.client.post("/generate", json={"inputs": "a"})
                assert (refused.status_code, refused.json()["state"]) == (503, "draining")
                for _ in ids_of(TEXT):
                    shard.steps.release()
                rest = [line async for line in lines]
            assert rest[-2] == "data: [DONE]"
            assert await served.exit_code() == 0


async def test_a_drain_ends_in_time_with_one_typed_error_per_stream(tmp_path: Path):
    impatient = router(tmp_path, graceful_termination_timeout=1.0)
    async with impatient as served, shard_at(tmp_path / "shard-0.sock") as shard:
        served.tell("ready")
        await served.until_status(200)
        shard.steps = asyncio.Semaphore(1)
        async with served.client.stream("POST", "/v1/chat/completions", json=CHAT) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            served.process.send_signal(signal.SIGTERM)
            rest = [line async for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "generation"
        assert await served.exit_code() == 0


async def test_a_second_signal_ends_it_at_once(tmp_path: Path):
    async with router(tmp_path) as served, shard_at(tmp_path / "shard-0.sock") as shard:
        served.tell("ready")
        await served.until_status(200)
        shard.steps = asyncio.Semaphore(1)
        async with served.client.stream("POST", "/v1/chat/completions", json=CHAT) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            served.process.send_signal(signal.SIGTERM)
            await served.until_status(503)
            served.process.send_signal(signal.SIGTERM)
            assert await served.exit_code(3) == 0


async def test_a_launcher_that_dies_takes_its_router_along(tmp_path: Path):
    async with router(tmp_path) as served:
        await served.health()
        served.process.stdin.close()

        assert await served.exit_code(3) == 0


async def test_a_port_that_is_taken_is_exit_code_6(tmp_path: Path):
    async with router(tmp_path / "first") as first:
        await first.health()
        port = first.client.base_url.port
        async with router(tmp_path / "second", port=port) as second:
            assert await second.exit_code() == 6


async def test_a_model_without_a_tokenizer_is_exit_code_3(tmp_path: Path):
    async with router(tmp_path, model_path=str(tmp_path)) as served, shard_at(tmp_path / "shard-0.sock"):
        served.tell("ready")

        assert await served.exit_code() == 3
