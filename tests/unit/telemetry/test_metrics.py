"""The table and the text that Prometheus reads."""

import re

import pytest

from weft.limits import LIMITS
from weft.telemetry.metrics import DURATION_BUCKETS, METRICS, MetricKind, MetricSpec, Registry

COUNTER = MetricSpec("things", MetricKind.COUNTER, 'Things\nthat "count" \\', ("kind",))
PLAIN = MetricSpec("plain", MetricKind.COUNTER, "Plain")
GAUGE = MetricSpec("level", MetricKind.GAUGE, "Level")
HISTOGRAM = MetricSpec("seconds", MetricKind.HISTOGRAM, "Seconds", ("route",), (0.1, 1.0))

SAMPLE = re.compile(r'[a-z0-9_:]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)+\})? (\+Inf|-Inf|NaN|-?[0-9.e+-]+)')


def test_names_are_unique_and_legal():
    names = [spec.name for spec in METRICS]

    assert len(set(names)) == len(names)
    assert all(re.fullmatch("(tgi_|weft_|vllm:)[a-z0-9_]+", name) for name in names)


def test_tgi_names_have_no_total_suffix():
    assert not [spec.name for spec in METRICS if spec.name.endswith("_total") and not spec.name.startswith("vllm:")]


TGI_METRICS = {
    "tgi_request_count": ("counter", ()),
    "tgi_request_success": ("counter", ()),
    "tgi_request_failure": ("counter", ("err",)),
    "tgi_request_duration": ("histogram", ()),
    "tgi_request_validation_duration": ("histogram", ()),
    "tgi_request_queue_duration": ("histogram", ()),
    "tgi_request_inference_duration": ("histogram", ()),
    "tgi_request_mean_time_per_token_duration": ("histogram", ()),
    "tgi_request_generated_tokens": ("histogram", ()),
    "tgi_request_input_length": ("histogram", ()),
    "tgi_request_max_new_tokens": ("histogram", ()),
    # A summary in TGI, whose own dashboard asks for its buckets.
    "tgi_request_skipped_tokens": ("histogram", ()),
    "tgi_queue_size": ("gauge", ()),
    "tgi_batch_current_size": ("gauge", ()),
    "tgi_batch_current_max_tokens": ("gauge", ()),
    "tgi_batch_max_total_tokens": ("gauge", ()),
    "tgi_batch_next_size": ("histogram", ()),
    "tgi_batch_concat": ("counter", ("reason",)),
    "tgi_batch_inference_count": ("counter", ("method",)),
    "tgi_batch_inference_success": ("counter", ("method",)),
    "tgi_batch_inference_failure": ("counter", ("method",)),
    "tgi_batch_inference_duration": ("histogram", ("method",)),
    "tgi_batch_forward_duration": ("histogram", ("method",)),
    "tgi_batch_decode_duration": ("histogram", ("method",)),
    "tgi_batch_filter_duration": ("histogram", ("method",)),
    "tgi_batch_concat_duration": ("histogram", ("method",)),
}


def test_every_metric_of_tgi_is_there_with_its_type_and_labels():
    assert {spec.name: (str(spec.kind), spec.labels) for spec in METRICS if spec.name.startswith("tgi_")} == TGI_METRICS


# Read by the Gateway API's endpoint picker, by autoscalers and by vLLM's dashboards.
VLLM_METRICS = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc",
    "time_to_first_token_seconds", "time_per_output_token_seconds", "inter_token_latency_seconds",
    "e2e_request_latency_seconds", "prompt_tokens_total", "generation_tokens_total", "request_success_total",
    "num_preemptions_total", "cache_config_info", "lora_requests_info",
)  # fmt: skip


def test_the_metrics_that_gateways_read_are_there():
    assert {f"vllm:{name}" for name in VLLM_METRICS} <= {spec.name for spec in METRICS}


def test_a_metric_that_repeats_another_shows_its_samples_and_the_model():
    again = MetricSpec("other:seconds", MetricKind.HISTOGRAM, "Again", ("model_name", "route"), (0.1, 1.0), "seconds")
    level = MetricSpec("other:level", MetricKind.GAUGE, "Again", ("model_name",), (), "level")
    registry = Registry((HISTOGRAM, GAUGE, again, level))
    registry.model_name = "m"
    registry.histogram("seconds").observe(0.5, "/a")
    registry.gauge("level").set(3)

    lines = registry.exposition().splitlines()

    assert 'other:seconds_bucket{model_name="m",route="/a",le="1"} 1' in lines
    assert 'other:seconds_sum{model_name="m",route="/a"} 0.5' in lines
    assert 'other:level{model_name="m"} 3' in lines
    assert "level 3" in lines


def test_durations_have_the_buckets_of_tgi():
    assert len(DURATION_BUCKETS) == 35
    assert DURATION_BUCKETS[0] == pytest.approx(0.00015)
    assert DURATION_BUCKETS[-1] == pytest.approx(145.6, rel=1e-3)
    for spec in METRICS:
        assert (spec.kind is MetricKind.HISTOGRAM) == bool(spec.buckets)
        assert list(spec.buckets) == sorted(spec.buckets)
        if spec.name.endswith("duration"):
            assert spec.buckets == DURATION_BUCKETS


def test_counters_and_gauges_are_written_with_escaped_labels():
    registry = Registry((COUNTER, GAUGE))
    registry.counter("things").add(1, 'a"b\\c\nd')
    registry.counter("things").add(2.5, 'a"b\\c\nd')
    registry.gauge("level").set(-3)

    assert registry.exposition() == (
        '# HELP things Things\\nthat "count" \\\\\n'
        "# TYPE things counter\n"
        'things{kind="a\\"b\\\\c\\nd"} 3.5\n'
        "# HELP level Level\n"
        "# TYPE level gauge\n"
        "level -3\n"
    )


def test_a_counter_without_labels_starts_at_zero_and_one_with_labels_is_absent():
    assert Registry((COUNTER, PLAIN)).exposition() == "# HELP plain Plain\n# TYPE plain counter\nplain 0\n"


def test_histograms_are_cumulative_with_sum_and_count():
    registry = Registry((HISTOGRAM,))
    for value in (0.1, 0.5, 7.0):
        registry.histogram("seconds").observe(value, "/x")

    assert registry.exposition().splitlines()[2:] == [
        'seconds_bucket{route="/x",le="0.1"} 1',
        'seconds_bucket{route="/x",le="1"} 2',
        'seconds_bucket{route="/x",le="+Inf"} 3',
        'seconds_sum{route="/x"} 7.6',
        'seconds_count{route="/x"} 3',
    ]


def test_an_observation_may_count_several_times():
    registry = Registry((HISTOGRAM,))
    registry.histogram("seconds").observe(0.5, "/x", times=4)

    assert registry.histogram("seconds").count("/x") == 4
    assert 'seconds_sum{route="/x"} 2' in registry.exposition()


def test_label_values_are_bounded():
    """Some come from clients: a scrape must not grow without end."""
    registry = Registry((COUNTER,))
    for number in range(LIMITS.max_label_values + 100):
        registry.counter("things").add(1, str(number))

    assert registry.exposition().count("\nthings{") == LIMITS.max_label_values + 1
    assert registry.counter("things").value("other") == 100


def test_numbers_that_are_none_are_spelled_as_prometheus_does():
    registry = Registry((GAUGE,))
    for value, text in (
        (float("inf"), "+Inf"),
        (float("-inf"), "-Inf"),
        (float("nan"), "NaN"),
        (2.0**60, "1.15292150461e+18"),
    ):
        registry.gauge("level").set(value)
        assert registry.exposition().endswith(f"level {text}\n")


def test_collectors_run_before_each_scrape():
    registry = Registry((GAUGE,))
    registry.before_exposition(lambda: registry.gauge("level").add(1))

    registry.exposition()
    assert registry.exposition().endswith("level 2\n")


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        Registry(()).counter("nothing")


def test_the_whole_table_can_be_scraped():
    registry = Registry()
    for spec in METRICS:
        if spec.same_as:
            continue
        labels = tuple("value" for _ in spec.labels)
        if spec.kind is MetricKind.HISTOGRAM:
            registry.histogram(spec.name).observe(1.0, *labels)
        elif spec.kind is MetricKind.GAUGE:
            registry.gauge(spec.name).set(1.0, *labels)
        else:
            registry.counter(spec.name).add(1.0, *labels)

    lines = registry.exposition().splitlines()

    assert all(line.startswith("# ") or SAMPLE.fullmatch(line) for line in lines)
    assert sum(line.startswith("# TYPE ") for line in lines) == len(METRICS)
