"""A shard without an engine: both of its sockets, and whatever a test makes of what comes in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from weft.core.events import Event
from weft.core.info import EngineInfo, EngineStats
from weft.proto import convert
from weft.proto.frames import pack_frame, read_frames
from weft.proto.v1 import generate_pb2 as pb
from weft.proto.v1 import generate_pb2_grpc


class FakeShard(generate_pb2_grpc.GenerationServicer):
    """Answers what is asked over gRPC; subclasses say what happens with the frames of a stream."""

    def __init__(self, info: EngineInfo) -> None:
        self.stream_path = ""
        self.has_router = asyncio.Event()
        self._info = info
        self._writers: list[asyncio.StreamWriter] = []

    def receive(self, frame: pb.ClientFrame) -> None:
        raise NotImplementedError

    def send(self, *events: Event, stats: EngineStats | None = None) -> None:
        """One frame to every router."""
        self.send_bytes(pack_frame(convert.frame_from_events(events, stats)))

    def send_bytes(self, sent: bytes) -> None:
        for writer in self._writers:
            writer.write(sent)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.has_router.set()
        async for frame in read_frames(reader, pb.ClientFrame):
            self.receive(frame)
        self._writers.remove(writer)
        writer.close()

    def stop_reading(self) -> None:
        for writer in self._writers:
            writer.transport.pause_reading()

    def hang_up(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def ServiceDiscovery(self, request, context) -> pb.ServiceDiscoveryResponse:  # noqa: N802
        return pb.ServiceDiscoveryResponse(stream_path=self.stream_path)

    async def Info(self, request, context) -> pb.InfoResponse:  # noqa: N802
        return convert.info_to_wire(self._info)

    async def Health(self, request, context) -> pb.HealthResponse:  # noqa: N802
        return pb.HealthResponse(is_ready=True, stalled_ns=3)


@asynccontextmanager
async def running(shard: FakeShard, socket: Path) -> AsyncIterator[None]:
    """Let a shard answer at `socket`, and take streams beside it."""
    shard.stream_path = f"{socket}.frames"
    streams = await asyncio.start_unix_server(shard.serve, shard.stream_path)
    server = grpc.aio.server()
    generate_pb2_grpc.add_GenerationServicer_to_server(shard, server)
    server.add_insecure_port(f"unix://{socket}")
    await server.start()
    try:
        yield
    finally:
        streams.close()
        shard.hang_up()
        await server.stop(None)
