"""A shard process: `python -m weft.server.main --run-dir D --rank R --world-size N`.

Rank 0 answers gRPC on `<run dir>/shard-0.sock`, takes streams on `<run dir>/frames.sock` and runs the engine; every
other rank runs the plans it is sent. The process ends with the exit code of a StartupError, with 0 after SIGTERM, and
with 70 (EX_SOFTWARE) when the engine cannot be trusted any more.
"""

import argparse
import asyncio
import gc
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import grpc
import structlog
import uvloop

from weft import __version__
from weft.config import Settings, load_settings
from weft.core.clock import Clock
from weft.errors import EngineFatal, StartupError
from weft.limits import LIMITS
from weft.parallel.broadcast import PlanReceiver, PlanSender
from weft.proto.v1 import generate_pb2_grpc
from weft.runner.worker import run_plans
from weft.scheduler.scheduler import Scheduler
from weft.server.engine import Engine
from weft.server.executor import Executor, LocalExecutor, ShardExecutor
from weft.server.request_spans import RequestSpans
from weft.server.service import GenerationService
from weft.server.startup import PhaseTimer, StartedRank, start_rank
from weft.server.streams import RouterStreams
from weft.telemetry import logging as weft_logging
from weft.telemetry.tracing import open_tracing

log = structlog.get_logger("weft.shard")

EXIT_ENGINE_FATAL = 70
STOP_GRACE_S = 1.0


class SystemClock(Clock):
    """The monotonic clock of this machine."""

    def now_ns(self) -> int:
        """See `Clock.now_ns`."""
        return time.monotonic_ns()


def main(argv: Sequence[str] | None = None, *, is_alone: bool = False) -> int:
    """Run one rank until it is told to stop. Returns the exit code.

    is_alone   no launcher reads what is written: logs are as the settings say, and a StartupError is raised
    """
    parser = argparse.ArgumentParser(prog="weft shard", description="One rank of a model; the launcher starts it.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    arguments = parser.parse_args(argv)
    settings = load_settings(arguments.run_dir)
    weft_logging.configure(
        process=f"shard-{arguments.rank}",
        level=settings.log_level,
        json_output=settings.json_output or not is_alone,
        colors=settings.log_colorize,
    )
    try:
        if arguments.rank == 0:
            return uvloop.run(serve_rank_zero(settings, arguments.run_dir, arguments.world_size))
        return run_other_rank(settings, arguments.run_dir, arguments.rank, arguments.world_size)
    except StartupError as error:
        if is_alone:
            raise
        log.error("startup.failed", code=error.code, message=error.message)  # noqa: TRY400 - the text says it all
        return error.exit_code
    except EngineFatal as error:
        log.error("shard.fatal", code=error.code, message=error.message)  # noqa: TRY400 - the text says it all
        return EXIT_ENGINE_FATAL


def run_other_rank(settings: Settings, run_dir: Path, rank: int, world_size: int) -> int:
    """Load this rank's share and run plans until rank 0 hangs up. No sockets, no decisions."""
    started = start_rank(settings, rank=rank, world_size=world_size, timer=PhaseTimer())
    receiver = PlanReceiver(run_dir)
    log.info("startup.ready", rank=rank)
    run_plans(started.runner, receiver)
    return 0


async def serve_rank_zero(settings: Settings, run_dir: Path, world_size: int) -> int:
    """Answer Health while the model loads on another thread, then run the engine until a signal comes."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    clock = SystemClock()
    url = f"unix://{run_dir / 'shard-0.sock'}"
    tracing = open_tracing(settings, "shard-0", __version__, clock)
    streams = RouterStreams(clock, run_dir / "frames.sock", None if tracing is None else RequestSpans(tracing, clock))
    service = GenerationService([url], streams.path)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", LIMITS.max_wire_message_bytes),
            ("grpc.max_send_message_length", LIMITS.max_wire_message_bytes),
        ]
    )
    generate_pb2_grpc.add_GenerationServicer_to_server(service, server)
    server.add_insecure_port(url)
    await server.start()

    timer = PhaseTimer()
    loading = loop.run_in_executor(None, lambda: start_rank(settings, rank=0, world_size=world_size, timer=timer))
    stopping = asyncio.create_task(stop.wait())
    waiting: set[asyncio.Future[object]] = {loading, stopping}  # type: ignore[arg-type]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        # Loading cannot be interrupted in the middle of a kernel; the process simply ends.
        return 0
    try:
        started = await loading
    except BaseException:
        # One that still listens when its loop is gone adds a traceback of its own to the reason.
        await server.stop(None)
        raise
    fatal: list[EngineFatal] = []

    def on_fatal(error: EngineFatal) -> None:
        fatal.append(error)
        loop.call_soon_threadsafe(stop.set)

    executor = await loop.run_in_executor(None, build_executor, started, run_dir, world_size)
    engine = Engine(
        Scheduler(started.scheduler_config),
        executor,
        clock,
        streams.deliver_threadsafe,
        on_fatal,
        lookahead=settings.lookahead,
    )
    engine.start()
    await streams.listen(engine, started.info)
    service.open(engine, started.info, dict(started.info.phases)["warmup"])
    # What exists now lives as long as the process: keep the collector from walking it in the middle of a step.
    gc.collect()
    gc.freeze()
    log.info("startup.ready", rank=0, **asdict(started.info))
    await stopping
    await server.stop(STOP_GRACE_S)
    await streams.close()
    if fatal:
        raise fatal[0]
    await loop.run_in_executor(None, engine.stop)
    if tracing is not None:
        await loop.run_in_executor(None, tracing.close)
    return 0


def build_executor(started: StartedRank, run_dir: Path, world_size: int) -> Executor:
    """Rank 0's executor, with every other rank connected: those report ready once they are.

    Raises   EngineFatal: a rank did not come
    """
    if world_size == 1:
        return LocalExecutor(started.runner)
    sender = PlanSender(run_dir, world_size - 1)
    sender.wait_for_receivers()
    return ShardExecutor(started.runner, sender)


if __name__ == "__main__":
    sys.exit(main())
