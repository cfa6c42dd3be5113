"""The router of `house.py` behind a real socket, in a thread: for official clients and for hand-made bytes."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvloop
from tests.contract.house import House, build_house

from weft.router.main import http_config
from weft.router.protocol import HttpServer


@dataclass
class Live:
    """A server that runs while the block does."""

    house: House
    port: int
    server: HttpServer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def exchange(self, data: bytes) -> bytes:
        """Send bytes, return all bytes until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def post(path: str, body: object, *extra: bytes) -> bytes:
    """Bytes of a request that asks to close the connection afterwards."""
    content = json.dumps(body).encode()
    head = [
        b"POST %b HTTP/1.1" % path.encode(),
        b"host: test",
        b"content-type: application/json",
        b"content-length: %d" % len(content),
        b"connection: close",
        *extra,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + content


@contextlib.contextmanager
def serve(make_house: Callable[[], House] = build_house) -> Iterator[Live]:
    """Start a server on a free port; stop it afterwards."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    lives: list[Live] = []
    is_started = threading.Event()

    async def run() -> None:
        house = make_house()
        server = HttpServer(http_config(house.app))
        lives.append(Live(house, listener.getsockname()[1], server))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        is_started.set()
        await serving

    thread = threading.Thread(target=lambda: uvloop.run(run()), daemon=True)
    thread.start()
    assert is_started.wait(10)
    try:
        yield lives[0]
    finally:
        lives[0].server.should_exit = lives[0].server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()
