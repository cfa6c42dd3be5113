"""What a rank says while it starts."""

from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from weft.config import Settings
from weft.server.startup import PhaseTimer, _max_total_tokens


def test_a_phase_is_announced_with_the_reason_why_it_takes_long() -> None:
    timer = PhaseTimer()

    with capture_logs() as events:
        with timer.phase("kernels", "compiling"):
            pass
        with timer.phase("load"):
            timer.progress("load", 5.0)
            timer.progress("load", 50.0)

    shown = [(event["phase"], event["percent"], event.get("message")) for event in events]
    assert shown == [("kernels", 0.0, "compiling"), ("load", 0.0, None), ("load", 50.0, None)]
    assert [name for name, _ in timer.seconds] == ["kernels", "load"]


@pytest.mark.parametrize(
    ("settings", "pool_tokens", "granted", "flags"),
    [
        (Settings(), 8192, 8192, []),
        (Settings(max_total_tokens=100), 8192, 100, []),
        (Settings(), 320, 321, ["--kv-pool-bytes"]),
        (Settings(max_total_tokens=100_000), 9000, 8192, ["--max-total-tokens"]),
        (Settings(max_total_tokens=100_000), 320, 321, ["--max-total-tokens", "--kv-pool-bytes"]),
        (Settings(max_batch_total_tokens=300), 320, 321, ["--max-batch-total-tokens"]),
        (Settings(max_batch_total_tokens=5000), 320, 321, ["--kv-pool-bytes"]),
    ],
)
def test_a_shorter_context_is_said_with_the_flag_that_makes_it_longer(
    settings: Settings, pool_tokens: int, granted: int, flags: list[str]
) -> None:
    description: Any = SimpleNamespace(max_positions=8192, pooling=None)
    plan: Any = SimpleNamespace(max_batch_total_tokens=pool_tokens)

    with capture_logs() as events:
        assert _max_total_tokens(settings, description, plan) == granted

    assert [event["flag"] for event in events] == flags
