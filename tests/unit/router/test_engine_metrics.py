from weft.core.info import EngineInfo, EngineStats
from weft.router.engine_metrics import EngineMetrics
from weft.telemetry.metrics import Registry


def stats(**changes: int) -> EngineStats:
    values = {
        "num_steps": 1, "num_running": 3, "num_waiting": 2, "used_blocks": 4, "cached_blocks": 1, "total_blocks": 10,
        "step_decode_rows": 3, "step_tokens": 3, "step_elapsed_ns": 5_000_000,
    }  # fmt: skip
    return EngineStats(**{**values, **changes})


def test_a_step_becomes_tgi_metrics():
    registry = Registry()
    metrics = EngineMetrics(registry)
    metrics.note_info(EngineInfo(model_id="m", vocab_size=1, max_total_tokens=1, block_size_tokens=32))

    metrics.note_step(stats())
    metrics.note_step(stats(num_steps=2, step_prefill_rows=2, step_starts=1, oldest_waiting_ns=1_500_000_000))
    metrics.note_delivery(2_000)

    assert registry.gauge("tgi_queue_size").value() == 2
    assert registry.gauge("tgi_batch_current_size").value() == 3
    assert registry.gauge("tgi_batch_current_max_tokens").value() == 128
    assert registry.counter("tgi_batch_inference_count").value("decode") == 1
    assert registry.counter("tgi_batch_inference_count").value("prefill") == 1
    assert registry.histogram("tgi_batch_forward_duration").count("decode") == 1
    assert registry.histogram("tgi_batch_next_size").count() == 1
    assert registry.gauge("weft_kv_blocks").value("free") == 5
    assert registry.gauge("weft_kv_usage_ratio").value() == 0.4
    assert registry.gauge("weft_queue_oldest_seconds").value() == 1.5
    assert registry.counter("tgi_batch_inference_success").value("prefill") == 1
    assert registry.counter("tgi_batch_concat").value("chunking") == 1
    assert registry.histogram("tgi_batch_filter_duration").count("prefill") == 1
    assert registry.histogram("weft_step_sequences").count() == 2
    assert registry.histogram("weft_step_tokens").count() == 2


def test_sequences_that_begin_alone_join_nobody():
    registry = Registry()

    EngineMetrics(registry).note_step(stats(step_decode_rows=0, step_prefill_rows=2, step_starts=2))

    assert registry.counter("tgi_batch_concat").value("chunking") == 0
    assert registry.histogram("tgi_batch_next_size").count() == 1


def test_a_step_that_raised_is_a_failure():
    registry = Registry()
    metrics = EngineMetrics(registry)

    metrics.note_step(stats(num_failed_steps=1))
    metrics.note_step(stats(num_failed_steps=1, num_steps=2))

    assert registry.counter("tgi_batch_inference_failure").value("decode") == 1
    assert registry.counter("tgi_batch_inference_success").value("decode") == 1


def test_the_sizes_of_the_pool_are_labels():
    registry = Registry()

    EngineMetrics(registry).note_info(
        EngineInfo(model_id="m", vocab_size=1, max_total_tokens=1, block_size_tokens=32, num_blocks=7)
    )

    assert registry.gauge("vllm:cache_config_info").value("32", "7") == 1


def test_a_step_that_is_told_twice_counts_once():
    registry = Registry()
    metrics = EngineMetrics(registry)

    for _ in range(3):
        metrics.note_step(stats())

    assert registry.counter("tgi_batch_inference_count").value("decode") == 1


def test_an_idle_engine_counts_no_steps():
    registry = Registry()

    EngineMetrics(registry).note_step(EngineStats())

    assert registry.counter("tgi_batch_inference_count").value("decode") == 0
    assert registry.gauge("weft_kv_usage_ratio").value() == 0


def test_losing_the_shard_is_counted():
    registry = Registry()
    metrics = EngineMetrics(registry)

    for is_connected in (True, False, True):
        metrics.note_connection(is_connected)

    assert registry.gauge("weft_engine_up").value() == 1
    assert registry.counter("weft_engine_reconnects").value() == 1


def test_the_times_of_a_step_are_cut_where_tgi_cuts_them():
    registry = Registry()
    metrics = EngineMetrics(registry)
    metrics.note_info(EngineInfo(model_id="m", vocab_size=1, max_total_tokens=1, max_batch_total_tokens=320))
    a_second = 1_000_000_000

    metrics.note_step(
        stats(step_plan_ns=a_second, step_elapsed_ns=2 * a_second, step_apply_ns=4 * a_second, step_prefill_rows=2,
              step_starts=2, num_preemptions=3, prefix_query_tokens=50, prefix_hit_tokens=40)
    )  # fmt: skip
    metrics.note_delivery(8 * a_second)

    shown = registry.exposition().splitlines()
    assert 'tgi_batch_inference_duration_sum{method="prefill"} 7' in shown
    assert 'tgi_batch_forward_duration_sum{method="prefill"} 2' in shown
    assert 'tgi_batch_decode_duration_sum{method="prefill"} 4' in shown
    assert 'tgi_batch_filter_duration_sum{method="prefill"} 8' in shown
    assert 'tgi_batch_concat_duration_sum{method="decode"} 1' in shown
    assert "tgi_batch_next_size_sum 2" in shown
    assert "tgi_batch_max_total_tokens 320" in shown
    assert {"weft_engine_preemptions 3", "weft_prefix_query_tokens 50", "weft_prefix_hit_tokens 40"} <= set(shown)


def test_nothing_is_speculated():
    registry = Registry()

    EngineMetrics(registry).note_step(stats(step_decode_rows=3))

    shown = registry.exposition().splitlines()
    assert "tgi_request_skipped_tokens_count 3" in shown
    assert "tgi_request_skipped_tokens_sum 0" in shown


ASKED_BY_TGIS_BOARD = (
    'tgi_batch_inference_duration_count{method="prefill"}', 'tgi_batch_inference_duration_count{method="decode"}',
    'tgi_batch_forward_duration_count{method="prefill"}', 'tgi_batch_forward_duration_count{method="decode"}',
    'tgi_batch_decode_duration_count{method="prefill"}', 'tgi_batch_decode_duration_count{method="decode"}',
    'tgi_batch_filter_duration_count{method="prefill"}', 'tgi_batch_filter_duration_count{method="decode"}',
    'tgi_batch_concat_duration_count{method="decode"}', 'tgi_batch_concat{reason="chunking"}',
    'tgi_batch_inference_count{method="prefill"}', 'tgi_batch_inference_count{method="decode"}',
    "tgi_batch_current_max_tokens", "tgi_batch_max_total_tokens", "tgi_batch_next_size_count", "tgi_queue_size",
    "tgi_request_skipped_tokens_count",
)  # fmt: skip


def test_tgis_board_finds_samples_under_every_label_it_asks_for():
    registry = Registry()
    metrics = EngineMetrics(registry)

    for step in (stats(step_prefill_rows=2, step_starts=1), stats(num_steps=2)):
        metrics.note_step(step)
        metrics.note_delivery(1_000)

    samples = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in registry.exposition().splitlines()
               if not line.startswith("#")}  # fmt: skip
    assert set(ASKED_BY_TGIS_BOARD) <= set(samples)
    assert all(samples[name] > 0 for name in ASKED_BY_TGIS_BOARD if "_count" in name)
