"""What the shard says about itself, as metrics: TGI's queue and batch family, and our own gauges."""

from weft.core.info import EngineInfo, EngineStats
from weft.telemetry.metrics import Registry


class EngineMetrics:
    """Takes over the statistics that come with every frame."""

    def __init__(self, metrics: Registry) -> None:
        self._block_size_tokens = 0
        self._last_step = -1
        self._num_failed_steps = 0
        self._method = ""
        self._queue_size = metrics.gauge("tgi_queue_size")
        self._batch_size = metrics.gauge("tgi_batch_current_size")
        self._batch_tokens = metrics.gauge("tgi_batch_current_max_tokens")
        self._max_tokens = metrics.gauge("tgi_batch_max_total_tokens")
        self._next_size = metrics.histogram("tgi_batch_next_size")
        self._inference_count = metrics.counter("tgi_batch_inference_count")
        self._inference_success = metrics.counter("tgi_batch_inference_success")
        self._inference_failure = metrics.counter("tgi_batch_inference_failure")
        self._inference_duration = metrics.histogram("tgi_batch_inference_duration")
        self._forward_duration = metrics.histogram("tgi_batch_forward_duration")
        self._decode_duration = metrics.histogram("tgi_batch_decode_duration")
        self._filter_duration = metrics.histogram("tgi_batch_filter_duration")
        self._concat = metrics.counter("tgi_batch_concat")
        self._concat_duration = metrics.histogram("tgi_batch_concat_duration")
        self._skipped = metrics.histogram("tgi_request_skipped_tokens")
        self._step_sequences = metrics.histogram("weft_step_sequences")
        self._step_tokens = metrics.histogram("weft_step_tokens")
        self._oldest = metrics.gauge("weft_queue_oldest_seconds")
        self._cache_config = metrics.gauge("vllm:cache_config_info")
        self._up = metrics.gauge("weft_engine_up")
        self._reconnects = metrics.counter("weft_engine_reconnects")
        self._steps = metrics.counter("weft_engine_steps")
        self._preemptions = metrics.counter("weft_engine_preemptions")
        self._blocks = metrics.gauge("weft_kv_blocks")
        self._usage = metrics.gauge("weft_kv_usage_ratio")
        self._query_tokens = metrics.counter("weft_prefix_query_tokens")
        self._hit_tokens = metrics.counter("weft_prefix_hit_tokens")

    def note_info(self, info: EngineInfo) -> None:
        """Constant while a shard lives."""
        self._block_size_tokens = info.block_size_tokens
        self._max_tokens.set(info.max_batch_total_tokens)
        self._cache_config.set(1, str(info.block_size_tokens), str(info.num_blocks))

    def note_connection(self, is_connected: bool) -> None:  # noqa: FBT001 - a callback with one fact
        """The stream to the shard opened or broke."""
        self._up.set(float(is_connected))
        self._last_step = -1
        self._num_failed_steps = 0
        if not is_connected:
            self._reconnects.add()

    def note_step(self, stats: EngineStats) -> None:
        """The state after a step. The same step may be told twice; it counts once."""
        self._queue_size.set(stats.num_waiting)
        self._batch_size.set(stats.num_running)
        self._oldest.set(stats.oldest_waiting_ns / 1e9)
        self._batch_tokens.set(stats.used_blocks * self._block_size_tokens)
        self._steps.set_to(stats.num_steps)
        self._preemptions.set_to(stats.num_preemptions)
        self._query_tokens.set_to(stats.prefix_query_tokens)
        self._hit_tokens.set_to(stats.prefix_hit_tokens)
        self._blocks.set(stats.used_blocks, "used")
        self._blocks.set(stats.cached_blocks, "cached")
        self._blocks.set(stats.total_blocks - stats.used_blocks - stats.cached_blocks, "free")
        self._usage.set(stats.used_blocks / stats.total_blocks if stats.total_blocks else 0.0)
        self._method = ""
        if stats.num_steps != self._last_step and stats.step_tokens:
            self._note_new_step(stats)
        self._last_step = stats.num_steps

    def note_delivery(self, elapsed_ns: int) -> None:
        """The events that came with the step noted last have been handed to their requests."""
        if self._method:
            self._filter_duration.observe(elapsed_ns / 1e9, self._method)

    def _note_new_step(self, stats: EngineStats) -> None:
        self._method = method = "prefill" if stats.step_prefill_rows else "decode"
        num_rows = stats.step_prefill_rows + stats.step_decode_rows
        self._inference_count.add(1, method)
        if stats.num_failed_steps > self._num_failed_steps:
            self._inference_failure.add(1, method)
        else:
            self._inference_success.add(1, method)
        self._num_failed_steps = stats.num_failed_steps
        self._inference_duration.observe(
            (stats.step_plan_ns + stats.step_elapsed_ns + stats.step_apply_ns) / 1e9, method
        )
        self._forward_duration.observe(stats.step_elapsed_ns / 1e9, method)
        self._decode_duration.observe(stats.step_apply_ns / 1e9, method)
        # As in TGI: tokens of a sequence in a step beyond the first. Nothing is speculated yet.
        self._skipped.observe(0.0, times=stats.step_decode_rows)
        self._step_sequences.observe(num_rows)
        self._step_tokens.observe(stats.step_tokens)
        if stats.step_starts:
            self._next_size.observe(stats.step_starts)
        if 0 < stats.step_starts < num_rows:
            # TGI joins for three reasons; sequences that come chunk by chunk have the first.
            self._concat.add(1, "chunking")
            # TGI's label is always this one, and its board asks for it.
            self._concat_duration.observe(stats.step_plan_ns / 1e9, "decode")
