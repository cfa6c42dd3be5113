"""CPU time per token chunk of the streaming path: engine event → detokenizer → JSON → ASGI → socket.

    python benchmark/sse.py [--streams 64] [--tokens 256] [--route chat|native]

The router runs in this process with a backend that costs next to nothing; the clients are another process, so their
time does not count. Budget: 12 µs per chunk (DESIGN.md). `raw` is uvicorn alone, writing chunks of the same size.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import statistics
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import uvicorn
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.contract.house import build_house, ids_of

from weft.core.events import TokenEvent
from weft.core.info import EngineHealth, EngineInfo
from weft.core.request import FinishReason, Request
from weft.router.backend import Taker
from weft.router.main import SystemClock, http_config
from weft.router.protocol import HttpServer
from weft.telemetry import logging as weft_logging

BUDGET_US = 12.0
TEXT = " and so the story went on for a good long while"
ROUTES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
    "native": ("/generate_stream", {"inputs": "Hi"}),
}


class NullBackend:
    """Says TEXT over and over, one token per turn of the event loop."""

    def __init__(self, info: EngineInfo, num_tokens: int) -> None:
        self._info = info
        self._ids = [ids_of(TEXT, eos=False)[index % len(TEXT)] for index in range(num_tokens)]

    async def generate(self, request: Request, taker: Taker | None = None) -> AsyncGenerator[list[TokenEvent], None]:
        """See `Backend.generate`."""
        last = len(self._ids) - 1
        for index, token_id in enumerate(self._ids):
            await asyncio.sleep(0)
            reason = FinishReason.LENGTH if index == last else None
            event = TokenEvent(
                request_id=request.request_id,
                token_index=index,
                token_id=token_id,
                logprob=-0.7312,
                finish_reason=reason,
            )
            if reason is not None or taker is None or not taker(event):
                yield [event]

    async def info(self) -> EngineInfo:
        """See `Backend.info`."""
        return self._info

    async def health(self) -> EngineHealth:
        """See `Backend.health`."""
        return EngineHealth(is_ready=True)

    async def close(self) -> None:
        """See `Backend.close`."""
        return


def read_streams(port: int, path: str, body: dict[str, object], num_streams: int) -> None:
    """The clients: their own process, all streams at once, bytes thrown away."""

    async def read_one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        content = json.dumps(body).encode()
        writer.write(
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n" % (path.encode(), len(content)) + content
        )
        while await reader.read(1 << 16):
            pass
        writer.close()

    async def read_all() -> None:
        await asyncio.gather(*(read_one() for _ in range(num_streams)))

    asyncio.run(read_all())


async def raw_app(scope, receive, send):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """What uvicorn itself costs."""
    del receive
    chunk = b"data: " + b"x" * 240 + b"\n\n"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(scope["state"]["num_tokens"]):
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def measure(app: object, path: str, body: dict[str, object], num_streams: int, num_tokens: int) -> float:
    """µs of CPU in this process per chunk."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config: uvicorn.Config = http_config(app)  # type: ignore[arg-type]
    server = HttpServer(config)
    if app is raw_app:
        config.load()
        server.lifespan = config.lifespan_class(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    if app is raw_app:
        server.lifespan.state["num_tokens"] = num_tokens
    clients = multiprocessing.get_context("spawn").Process(
        target=read_streams, args=(listener.getsockname()[1], path, body, num_streams)
    )
    before = cpu_seconds()
    clients.start()
    while clients.is_alive():  # noqa: ASYNC110 - a process, not a task
        await asyncio.sleep(0.02)
    spent = cpu_seconds() - before
    server.should_exit = True
    await serving
    return spent * 1e6 / (num_streams * num_tokens)


def cpu_seconds() -> float:
    """User and system time of this process, children not counted."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--route", choices=ROUTES, action="append")
    arguments = parser.parse_args()
    weft_logging.configure(process="benchmark", level="error")
    results: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name in (*(arguments.route or ROUTES), "raw"):
            path, body = ROUTES.get(name, ("/", {}))
            app = raw_app if name == "raw" else build_router(arguments.tokens)
            cost = uvloop.run(measure(app, path, dict(body), arguments.streams, arguments.tokens))
            results.setdefault(name, []).append(cost)
    for name, costs in results.items():
        note = "" if name == "raw" else f"  (budget {BUDGET_US} µs)"
        print(f"{name:8} {statistics.median(costs):6.2f} µs of CPU per token chunk{note}")


def build_router(num_tokens: int) -> object:
    """Our application over a backend that costs nothing."""
    house = build_house(max_total_tokens=num_tokens + 1024, settings={"max_concurrent_requests": 1024})
    assert house.context.model is not None
    house.context.backend = NullBackend(house.context.model.info, num_tokens)
    house.context.clock = house.context.streams.clock = SystemClock()
    return house.app


if __name__ == "__main__":
    main()
