"""Notices that a shard hangs: its process lives, its engine does not move.

An engine that is idle counts as moving, so that silence always means trouble. A process that is stopped does not
answer at all; that counts as standing still since its last answer.
"""

import asyncio
import time
from pathlib import Path

import grpc

from weft.proto.v1 import generate_pb2 as pb
from weft.proto.v1 import generate_pb2_grpc as pb_grpc


async def wait_for_stall(socket: Path, timeout_s: float) -> float:
    """Ask the shard behind `socket` now and then; returns when it has stood still for `timeout_s`, with that time.

    Two looks in a row must agree: when this machine slept, everything looks stalled for a moment.
    """
    # Each look wakes a dozen sleeping threads in two processes: a millisecond of a machine that is busy otherwise.
    interval_s = min(5.0, timeout_s / 4)
    last_moved = time.monotonic()
    num_bad_looks = 0
    async with grpc.aio.insecure_channel(f"unix://{socket}") as channel:
        stub = pb_grpc.GenerationStub(channel)
        while num_bad_looks < 2:
            await asyncio.sleep(interval_s if num_bad_looks == 0 else min(0.5, interval_s))
            try:
                health = await stub.Health(pb.HealthRequest(), timeout=interval_s)
                last_moved = max(last_moved, time.monotonic() - health.stalled_ns / 1e9)
            except grpc.aio.AioRpcError:
                pass  # no answer is the very thing that is measured
            num_bad_looks = num_bad_looks + 1 if time.monotonic() - last_moved > timeout_s else 0
    return time.monotonic() - last_moved
