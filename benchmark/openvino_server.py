"""Serve an exported model with OpenVINO GenAI's continuous batching on an OpenAI-compatible port, until ended.

    .venv-peers-openvino/bin/python benchmark/openvino_server.py DIRECTORY --port 8102

OpenVINO GenAI is a library; this is the least that lets a load generator of HTTP drive it: `POST /v1/completions` with
`"stream": true`, a prompt of text or of token ids, greedy; and `GET /health`. One thread steps the pipeline, and hands
what a step brought to the event loop at once. uvicorn on uvloop is what Weft's own router uses.

Runs in the environment of the peer: nothing of Weft is imported.
"""

import argparse
import asyncio
import json
import os
import queue
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import uvicorn
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

BATCHED_TOKENS = 512
KV_CACHE_GIB = 2
END = None
"""Behind the last token of a request."""


@dataclass(slots=True)
class Generation:
    """One request: what was asked, and the queue that its token ids arrive in."""

    prompt_ids: list[int]
    max_new_tokens: int
    ignore_eos: bool
    tokens: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)


class Engine:
    """The pipeline and the thread that steps it."""

    def __init__(self, model: Path, threads: int, loop: asyncio.AbstractEventLoop) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.max_num_batched_tokens = BATCHED_TOKENS
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._loop = loop
        self._arrivals: queue.SimpleQueue[Generation] = queue.SimpleQueue()
        self._open: dict[int, tuple[Any, Generation]] = {}
        self._num_requests = 0
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, generation: Generation) -> None:
        """Start as soon as the step that runs is over."""
        self._arrivals.put(generation)

    def _run(self) -> None:
        while True:
            if not self._open:
                self._add(self._arrivals.get())
            while not self._arrivals.empty():
                self._add(self._arrivals.get())
            self._pipeline.step()
            news = [(generation, ids) for handle, generation in self._open.values() if (ids := self._read(handle))]
            finished = [
                number
                for number, (handle, _) in self._open.items()
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING and not handle.can_read()
            ]
            ended = [self._open.pop(number)[1] for number in finished]
            if news or ended:
                self._loop.call_soon_threadsafe(_publish, news, ended)

    def _add(self, generation: Generation) -> None:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = generation.max_new_tokens
        config.ignore_eos = generation.ignore_eos
        config.do_sample = False
        ids = openvino.Tensor(np.asarray([generation.prompt_ids], dtype=np.int64))
        handle = self._pipeline.add_request(self._num_requests, ids, config)
        self._open[self._num_requests] = (handle, generation)
        self._num_requests += 1

    @staticmethod
    def _read(handle: Any) -> list[int]:  # noqa: ANN401 - a class that the library does not export
        ids: list[int] = []
        while handle.can_read():
            for output in handle.read().values():
                ids += output.generated_ids
        return ids


def _publish(news: list[tuple[Generation, list[int]]], ended: list[Generation]) -> None:
    for generation, ids in news:
        generation.tokens.put_nowait(ids)
    for generation in ended:
        generation.tokens.put_nowait(END)


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Application:
    """ASGI: two routes."""

    def __init__(self, model: Path, threads: int) -> None:
        self._model = model
        self._threads = threads
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._engine: Engine | None = None

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
        self._engine = Engine(self._model, self._threads, asyncio.get_running_loop())
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
        generation = Generation(ids, body.get("max_tokens", 16), ignore_eos=bool(body.get("ignore_eos")))
        assert self._engine is not None
        self._engine.submit(generation)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream")],
            }
        )
        async for event in self._events(generation, body.get("model", "")):
            await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _events(self, generation: Generation, model: str) -> AsyncGenerator[bytes, None]:
        decoding = DecodeStream(skip_special_tokens=True)
        num_tokens = 0
        head = {"id": "cmpl", "object": "text_completion", "model": model}
        while (ids := await generation.tokens.get()) is not END:
            num_tokens += len(ids)
            text = "".join(decoding.step(self._tokenizer, token_id) or "" for token_id in ids)
            yield _encode({**head, "choices": [{"index": 0, "text": text, "finish_reason": None}]})
        yield _encode({**head, "choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(generation.prompt_ids), "completion_tokens": num_tokens}
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
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
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
