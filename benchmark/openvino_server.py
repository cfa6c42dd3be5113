"""Serve an exported model with OpenVINO GenAI's continuous batching on an OpenAI-compatible port, until ended.

    .venv-peers-openvino/bin/python benchmark/openvino_server.py DIRECTORY --port 8102

OpenVINO GenAI is a library; this is the least that lets a load generator of HTTP drive it: `POST /v1/completions` with
`"stream": true`, a prompt of text or of token ids, greedy; and `GET /health`. A step of the pipeline holds Python's
interpreter lock from its first to its last instruction, so the pipeline has a process of its own; one line of JSON per
step brings what it yielded. uvicorn on uvloop is what Weft's own router uses.

Runs in the environment of the peer: nothing of Weft is imported.
"""

import argparse
import asyncio
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

BATCHED_TOKENS = 512
KV_CACHE_GIB = 2
READ_BYTES = 1 << 20
END = None
"""Behind the last token of a request."""


class Engine:
    """The pipeline's process: lines with requests in, a line per step out.

    In   `{"number": 3, "prompt": [1, 2], "max_new_tokens": 8, "ignore_eos": true}`
    Out  `{"tokens": {"3": [17]}, "ended": [3]}`; the first line comes when the model is loaded
    """

    def __init__(self, model: Path, threads: int, connection: socket.socket) -> None:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_batched_tokens = BATCHED_TOKENS
        scheduler.enable_prefix_caching = True
        self._genai = openvino_genai
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._connection = connection
        self._pending = b""
        self._open: dict[int, Any] = {}
        """Number → the library's handle of a generation."""

    def run(self) -> None:
        """Until the other end closes."""
        self._send({}, [])
        while self._receive():
            if self._open:
                self._step()

    def _receive(self) -> bool:
        """Add what has arrived; wait for it when nothing is to be done. False: the other end is gone."""
        while select.select([self._connection], [], [], 0 if self._open else None)[0]:
            data = self._connection.recv(READ_BYTES)
            if not data:
                return False
            *lines, self._pending = (self._pending + data).split(b"\n")
            for line in lines:
                self._add(json.loads(line))
        return True

    def _add(self, request: dict[str, Any]) -> None:
        import numpy as np
        import openvino

        config = self._genai.GenerationConfig()
        config.max_new_tokens = request["max_new_tokens"]
        config.ignore_eos = request["ignore_eos"]
        config.do_sample = False
        ids = openvino.Tensor(np.asarray([request["prompt"]], dtype=np.int64))
        self._open[request["number"]] = self._pipeline.add_request(request["number"], ids, config)

    def _step(self) -> None:
        self._pipeline.step()
        tokens = {number: ids for number, handle in self._open.items() if (ids := self._read(handle))}
        running = self._genai.GenerationStatus.RUNNING
        ended = [number for number, handle in self._open.items() if handle.get_status() != running]
        for number in ended:
            del self._open[number]
        if tokens or ended:
            self._send(tokens, ended)

    @staticmethod
    def _read(handle: Any) -> list[int]:  # noqa: ANN401 - a class that the library does not export
        ids: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
        return ids

    def _send(self, tokens: dict[int, list[int]], ended: list[int]) -> None:
        self._connection.sendall(_encode({"tokens": tokens, "ended": ended}) + b"\n")


@dataclass(slots=True)
class EngineClient:
    """The HTTP process's end: a queue of token ids per open request."""

    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader
    queues: dict[int, asyncio.Queue[list[int] | None]] = field(default_factory=dict)
    num_requests: int = 0

    def submit(self, prompt: list[int], max_new_tokens: int, *, ignore_eos: bool) -> asyncio.Queue[list[int] | None]:
        """Start a request; its queue ends with END."""
        number = self.num_requests
        self.num_requests += 1
        request = {"number": number, "prompt": prompt, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
        self.writer.write(_encode(request) + b"\n")
        self.queues[number] = asyncio.Queue()
        return self.queues[number]

    async def distribute(self) -> None:
        """Hand out tokens until the engine is gone; then so is this process."""
        while line := await self.reader.readline():
            news = json.loads(line)
            for number, ids in news["tokens"].items():
                self.queues[int(number)].put_nowait(ids)
            for number in news["ended"]:
                self.queues.pop(number).put_nowait(END)
        print("the engine is gone", file=sys.stderr, flush=True)
        os._exit(1)


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Application:
    """ASGI: two routes."""

    def __init__(self, model: Path, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._engine: EngineClient | None = None
        self._distributing: asyncio.Task[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["path"] == "/health":
            await _respond(send, 200, b"{}")
        elif scope["path"] == "/v1/completions" and scope["method"] == "POST":
            await self._complete(receive, send)
        else:
            await _respond(send, 404, b'{"error":"not found"}')

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        ours, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(self._model), "--threads", str(self._threads)]
        subprocess.Popen([*command, "--engine", str(theirs.fileno())], pass_fds=[theirs.fileno()])  # noqa: ASYNC220
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=READ_BYTES)
        self._engine = EngineClient(writer, reader)
        if not await reader.readline():
            await send({"type": "lifespan.startup.failed", "message": "the engine did not start"})
            return
        self._distributing = asyncio.create_task(self._engine.distribute())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _complete(self, receive: Receive, send: Send) -> None:
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(content)
        if not body.get("stream"):
            await _respond(send, 400, b'{"error":"only stream: true is served"}')
            return
        prompt = body["prompt"]
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids if isinstance(prompt, str) else prompt
        assert self._engine is not None
        tokens = self._engine.submit(ids, body.get("max_tokens", 16), ignore_eos=bool(body.get("ignore_eos")))
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        async for event in self._events(tokens, len(ids), body.get("model", "")):
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _events(
        self, tokens: asyncio.Queue[list[int] | None], prompt_tokens: int, model: str
    ) -> AsyncGenerator[bytes, None]:
        decoding = DecodeStream(skip_special_tokens=True)
        num_tokens = 0
        head = {"id": "cmpl", "object": "text_completion", "model": model}
        while (ids := await tokens.get()) is not END:
            num_tokens += len(ids)
            text = "".join(decoding.step(self._tokenizer, token_id) or "" for token_id in ids)
            yield _encode({**head, "choices": [{"index": 0, "text": text, "finish_reason": None}]})
        yield _encode({**head, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}
        yield _encode({**head, "choices": [], "usage": usage})


def _encode(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


async def _respond(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an exported model with OpenVINO GenAI")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, default=8102)
    parser.add_argument("--engine", type=int, metavar="FD", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    if arguments.engine is not None:
        Engine(arguments.model, arguments.threads, socket.socket(fileno=arguments.engine)).run()
        return
    application = Application(arguments.model, arguments.threads)
    uvicorn.run(
        application,
        host="127.0.0.1",
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
