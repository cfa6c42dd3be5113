"""What the scheduler says about itself after a step: `EngineStats` of the wire, field by field."""

import msgspec


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the start; gauges of this moment; the last applied step."""

    num_steps: int
    """Applied steps, failed ones included."""
    num_running: int
    num_waiting: int
    """Queued requests and preempted sequences."""
    used_blocks: int
    cached_blocks: int
    total_blocks: int
    num_preemptions: int
    prefix_hit_tokens: int
    prefix_query_tokens: int
    """Known tokens of first starts that looked into the prefix index."""
    step_decode_rows: int
    step_prefill_rows: int
    step_tokens: int
    step_elapsed_ns: int
