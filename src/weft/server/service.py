"""The gRPC service of rank 0: what is asked rarely. Requests and tokens have their own way, see `streams`."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from weft.core.info import EngineInfo
from weft.proto import convert
from weft.proto.v1 import generate_pb2 as pb
from weft.proto.v1 import generate_pb2_grpc
from weft.server.engine import Engine


@dataclass(frozen=True, slots=True)
class _Serving:
    """What exists once the model is loaded."""

    engine: Engine
    info: EngineInfo
    warmup_seconds: float


class _NotLoadedError(Exception):
    """Raised to leave a handler after the call was answered with UNAVAILABLE."""


class GenerationService(generate_pb2_grpc.GenerationServicer):
    """Implements `weft.v1.Generation`; the engine arrives when the model is loaded."""

    def __init__(self, urls: Sequence[str], stream_path: Path) -> None:
        """`urls`: sockets that answer gRPC, rank 0 first. `stream_path`: the socket that takes streams."""
        self._discovery = pb.ServiceDiscoveryResponse(urls=urls, stream_path=str(stream_path))
        self._serving: _Serving | None = None

    def open(self, engine: Engine, info: EngineInfo, warmup_seconds: float) -> None:
        """The model is loaded and streams are taken."""
        self._serving = _Serving(engine, info, warmup_seconds)

    async def Info(  # noqa: N802 - gRPC's spelling
        self, request: pb.InfoRequest, context: "grpc.aio.ServicerContext[pb.InfoRequest, pb.InfoResponse]"
    ) -> pb.InfoResponse:
        """What is served. UNAVAILABLE while loading."""
        del request
        return convert.info_to_wire((await self._require_ready(context)).info)

    async def Health(  # noqa: N802 - gRPC's spelling
        self, request: pb.HealthRequest, context: "grpc.aio.ServicerContext[pb.HealthRequest, pb.HealthResponse]"
    ) -> pb.HealthResponse:
        """Answered here and not by the engine, so that a hung engine shows as a large `stalled_ns`."""
        del request, context
        if self._serving is None:
            return pb.HealthResponse(is_ready=False)
        return pb.HealthResponse(is_ready=True, stalled_ns=self._serving.engine.stalled_ns)

    async def ServiceDiscovery(  # noqa: N802 - gRPC's spelling
        self,
        request: pb.ServiceDiscoveryRequest,
        context: "grpc.aio.ServicerContext[pb.ServiceDiscoveryRequest, pb.ServiceDiscoveryResponse]",
    ) -> pb.ServiceDiscoveryResponse:
        """Where to connect. UNAVAILABLE while loading: no stream is taken then."""
        del request
        await self._require_ready(context)
        return self._discovery

    async def Warmup(  # noqa: N802 - gRPC's spelling
        self, request: pb.WarmupRequest, context: "grpc.aio.ServicerContext[pb.WarmupRequest, pb.WarmupResponse]"
    ) -> pb.WarmupResponse:
        """The worst-case step has run when the engine opens; UNAVAILABLE before."""
        del request
        return pb.WarmupResponse(seconds=(await self._require_ready(context)).warmup_seconds)

    async def ClearCache(  # noqa: N802 - gRPC's spelling
        self,
        request: pb.ClearCacheRequest,
        context: "grpc.aio.ServicerContext[pb.ClearCacheRequest, pb.ClearCacheResponse]",
    ) -> pb.ClearCacheResponse:
        """Forget unused prefix blocks."""
        del request
        engine = (await self._require_ready(context)).engine
        return pb.ClearCacheResponse(freed_blocks=await asyncio.wrap_future(engine.clear_cache()))

    async def _require_ready(self, context: "grpc.aio.ServicerContext[Any, Any]") -> _Serving:
        if self._serving is None:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the model is loading")
            raise _NotLoadedError
        return self._serving
