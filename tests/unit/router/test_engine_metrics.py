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
    metrics.note_step(stats(num_steps=2, step_prefill_rows=2))

    assert registry.gauge("tgi_queue_size").value() == 2
    assert registry.gauge("tgi_batch_current_size").value() == 3
    assert registry.gauge("tgi_batch_current_max_tokens").value() == 128
    assert registry.counter("tgi_batch_inference_count").value("decode") == 1
    assert registry.counter("tgi_batch_inference_count").value("prefill") == 1
    assert registry.histogram("tgi_batch_forward_duration").count("decode") == 1
    assert registry.histogram("tgi_batch_next_size").count() == 1
    assert registry.gauge("weft_kv_blocks").value("free") == 5
    assert registry.gauge("weft_kv_usage_ratio").value() == 0.4


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
