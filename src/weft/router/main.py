"""A router process: `python -m weft.router.main --run-dir D`, started by the launcher.

The port is open from the first moment and says how far the start has come. The launcher tells states on standard
input, one JSON object per line; its end means that the launcher is gone, and so is the router. SIGTERM drains: no new
generations, running ones finish (bounded), exit 0; a second SIGTERM ends at once.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec
import structlog
import uvicorn
import uvloop
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application

import weft
from weft.config import Settings, load_settings
from weft.core.clock import Clock
from weft.core.info import EngineInfo
from weft.errors import NotReadyError, PortInUseError, StartupError, TemplateError
from weft.router.app import build_app
from weft.router.backend import ShardBackend
from weft.router.context import RouterContext
from weft.router.engine_metrics import EngineMetrics
from weft.router.lifecycle import Progress, ServerState
from weft.router.protocol import HttpServer, LimitedHttpProtocol
from weft.router.recording import Recorder, server_line
from weft.router.served import served_model
from weft.telemetry import logging as weft_logging
from weft.telemetry.metrics import Registry
from weft.telemetry.tracing import open_tracing
from weft.text.assets import TextAssets, load_text_assets
from weft.text.chat import ChatTemplate

log = structlog.get_logger("weft.router")

KEEP_ALIVE_S = 75
"""Longer than the pools of common clients and proxies keep a connection, so that they close it and not we."""
_BACKLOG = 2048
_LINE_BYTES = 64 * 1024
_LAST_WORDS_S = 2.0
"""What is left of the termination timeout for streams to be told that they end."""


class SystemClock(Clock):
    """The monotonic clock of this machine."""

    def now_ns(self) -> int:
        """See `Clock.now_ns`."""
        return time.monotonic_ns()


class LauncherLine(msgspec.Struct):
    """One line of the launcher's."""

    state: ServerState
    phase: str = ""
    percent: int = 0
    message: str = ""


def main(argv: Sequence[str] | None = None, *, is_alone: bool = False) -> int:
    """Serve until told to stop. Returns the exit code.

    is_alone   no launcher reads what is written: logs are as the settings say, and a StartupError is raised
    """
    parser = argparse.ArgumentParser(prog="weft router", description="The HTTP side; the launcher starts it.")
    parser.add_argument("--run-dir", type=Path, required=True)
    run_dir: Path = parser.parse_args(argv).run_dir
    settings = load_settings(run_dir)
    weft_logging.configure(
        process="router",
        level=settings.log_level,
        json_output=settings.json_output or not is_alone,
        secrets=filter(None, (settings.api_key, settings.hub_token)),
        colors=settings.log_colorize,
    )
    try:
        with bind(settings.hostname, settings.port) as listener:
            return uvloop.run(RouterProcess(settings, run_dir, os.environ).run(listener))
    except StartupError as error:
        if is_alone:
            raise
        log.error("startup.failed", code=error.code, message=error.message)  # noqa: TRY400 - the text says it all
        return error.exit_code


def bind(hostname: str, port: int) -> socket.socket:
    """Listen. Raises PortInUseError."""
    try:
        addresses = socket.getaddrinfo(hostname.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise PortInUseError(
            f"Cannot listen on {hostname} port {port}: {error.strerror or error}. Choose --hostname or --port"
        ) from error
    listener.setblocking(False)
    return listener


class RouterProcess:
    """The life of one router process."""

    def __init__(self, settings: Settings, run_dir: Path, environ: Mapping[str, str]) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._compute_type = environ.get("COMPUTE_TYPE", "")
        self._exit_code = 0
        self._are_shards_ready = False
        self._assets: asyncio.Task[TextAssets] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> int:
        """Serve on a socket that listens."""
        loop = asyncio.get_running_loop()
        metrics = Registry()
        self._engine_metrics = EngineMetrics(metrics)
        clock = SystemClock()
        self._backend = ShardBackend(
            f"unix://{self._run_dir / 'shard-0.sock'}",
            clock,
            on_stats=self._engine_metrics.note_step,
            on_delivery=self._engine_metrics.note_delivery,
            on_connection=self._on_connection,
        )
        recorder = Recorder.from_settings(self._settings, metrics)
        tracing = open_tracing(self._settings, "router", weft.__version__, clock)
        self._context = RouterContext(
            settings=self._settings,
            backend=self._backend,
            clock=clock,
            metrics=metrics,
            tracing=tracing,
            recorder=recorder,
        )
        self._server = HttpServer(http_config(build_app(self._context)))
        self._context.num_connections = lambda: len(self._server.server_state.connections)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        threading.Thread(target=self._read_launcher, args=(loop,), daemon=True).start()
        await self._server.serve(sockets=[listener])
        await self._end_streams()
        if self._context.responses is not None:
            await self._context.responses.close()
        if recorder is not None:
            await asyncio.to_thread(recorder.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        return self._exit_code

    # --- what the launcher says -----------------------------------------------------------------------------------

    def _read_launcher(self, loop: asyncio.AbstractEventLoop) -> None:
        """On a thread of its own: standard input may be anything, also what an event loop cannot wait for.

        Read without Python's buffered reader, whose lock would be held for ever and spoil the end of the process.
        """
        unfinished = b""
        while read := os.read(sys.stdin.fileno(), _LINE_BYTES):
            *lines, unfinished = (unfinished + read).split(b"\n")
            for line in lines:
                loop.call_soon_threadsafe(self._on_line, line)
        loop.call_soon_threadsafe(self._on_launcher_gone)

    def _on_line(self, line: bytes) -> None:
        try:
            said = msgspec.json.decode(line, type=LauncherLine)
        except msgspec.MsgspecError as error:
            log.warning("launcher.unknown_line", problem=str(error))
            return
        self._prepare_text()
        self._are_shards_ready = said.state is ServerState.READY
        if self._are_shards_ready:
            self._start_opening()
            return
        if self._opening is not None:
            self._opening.cancel()
        self._context.lifecycle.become(Progress(said.state, said.phase, said.percent, said.message))

    def _on_connection(self, is_connected: bool) -> None:  # noqa: FBT001 - a callback with one fact
        """The stream to the shard knows of a death before the launcher does."""
        self._engine_metrics.note_connection(is_connected)
        lifecycle = self._context.lifecycle
        if not is_connected and lifecycle.state is ServerState.READY:
            lifecycle.become(Progress(ServerState.LOADING, "restart"))
        elif is_connected and self._are_shards_ready and lifecycle.state is ServerState.LOADING:
            self._start_opening()

    def _start_opening(self) -> None:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(self._on_opened)

    def _on_launcher_gone(self) -> None:
        log.warning("launcher.gone")
        self._stop_now()

    def _prepare_text(self) -> None:
        """Load the tokenizer while the shards load the weights, as soon as the model is on disk."""
        if self._assets is not None:
            return
        if not self._settings.model_path:
            self._settings = self._context.settings = load_settings(self._run_dir)
        if self._settings.model_path:
            self._assets = asyncio.create_task(asyncio.to_thread(self._load_text))

    def _load_text(self) -> TextAssets:
        settings = self._settings
        config = settings.tokenizer_config_path
        return load_text_assets(
            Path(settings.model_path),
            Path(settings.cache_dir),
            None if config is None else Path(config),
            num_threads=settings.validation_workers,
        )

    async def _open(self) -> None:
        """Everything between the shards being ready and requests being welcome."""
        await self._backend.wait_connected()
        info = await self._info()
        if self._assets is None:
            raise StartupError("The launcher called the model ready before it said where it is")
        assets = await self._assets
        if not info.pooling:
            await _warm(assets.chat_template)
        self._context.model = served_model(self._settings, info, assets)
        self._context.compute_type = self._compute_type or compute_type(info)
        self._engine_metrics.note_info(info)
        if self._context.recorder is not None:
            self._context.recorder.begin(server_line(self._settings, info, self._context.version))
        # What lives from here on lives long; the collector need not look at it again.
        gc.collect()
        gc.freeze()
        self._context.lifecycle.become(Progress(ServerState.READY, "ready", 100))
        log.info("router.ready", max_total_tokens=self._context.model.max_total_tokens)

    def _on_opened(self, opening: "asyncio.Task[None]") -> None:
        """A router that cannot open ends, so that the launcher can say why."""
        error = None if opening.cancelled() else opening.exception()
        if error is None:
            return
        if isinstance(error, StartupError):
            log.error("startup.failed", code=error.code, message=error.message)
            self._exit_code = error.exit_code
        else:
            log.error("startup.bug", exc_info=error)
            self._exit_code = 1
        self._stop_now()

    async def _info(self) -> EngineInfo:
        while True:
            try:
                return await self._backend.info()
            except NotReadyError:
                await self._backend.wait_connected()

    # --- the end --------------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self._stop_now()

    async def _drain(self) -> None:
        lifecycle = self._context.lifecycle
        lifecycle.become(Progress(ServerState.DRAINING, "draining"))
        timeout_s = self._settings.graceful_termination_timeout
        log.info("router.draining", num_generating=lifecycle.num_generating, seconds_at_most=timeout_s)
        try:
            async with asyncio.timeout(max(timeout_s - _LAST_WORDS_S, timeout_s / 2)):
                await lifecycle.wait_idle()
        except TimeoutError:
            log.warning("router.drain_timeout", num_generating=lifecycle.num_generating)
            await self._backend.close()
        self._server.should_exit = True

    async def _end_streams(self) -> None:
        """Whatever still runs is told that it ends; those that do not listen are left."""
        await self._backend.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S / 4):
                await self._context.lifecycle.wait_idle()

    def _stop_now(self) -> None:
        self._server.should_exit = self._server.force_exit = True


async def _warm(template: ChatTemplate | None) -> None:
    """Compile the template. A defect of it ends no server: chat routes will say what is wrong, others work."""
    if template is None:
        log.warning("chat_template.missing")
        return
    try:
        await template.start()
    except TemplateError as error:
        log.warning("chat_template.unusable", problem=error.message)


def compute_type(info: EngineInfo) -> str:
    """TGI's form: number of shards and name of the device, in small letters with dashes."""
    device = "-".join((info.device_name or info.device_type).lower().split())
    return f"{info.world_size}-{device.encode('ascii', 'ignore').decode()}"


def http_config(app: ASGIApp) -> uvicorn.Config:
    """Uvicorn as we use it: our protocol, no access log, no websockets, no header that names it."""
    return uvicorn.Config(
        cast("ASGI3Application", app),
        http=LimitedHttpProtocol,
        ws="none",
        lifespan="off",
        loop="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(_LAST_WORDS_S),
    )


if __name__ == "__main__":
    sys.exit(main())
