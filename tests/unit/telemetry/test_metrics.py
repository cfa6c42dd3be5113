"""The table and the text that Prometheus reads."""

import re

import pytest

from weft.limits import LIMITS
from weft.telemetry.metrics import DURATION_BUCKETS, METRICS, MetricKind, MetricSpec, Registry

COUNTER = MetricSpec("things", MetricKind.COUNTER, 'Things\nthat "count" \\', ("kind",))
PLAIN = MetricSpec("plain", MetricKind.COUNTER, "Plain")
GAUGE = MetricSpec("level", MetricKind.GAUGE, "Level")
HISTOGRAM = MetricSpec("seconds", MetricKind.HISTOGRAM, "Seconds", ("route",), (0.1, 1.0))

SAMPLE = re.compile(r'[a-z_]+(\{([a-z_]+="([^"\\\n]|\\["\\n])*",?)+\})? (\+Inf|-Inf|NaN|-?[0-9.e+-]+)')


def test_names_are_unique_and_legal():
    names = [spec.name for spec in METRICS]

    assert len(set(names)) == len(names)
    assert all(re.fullmatch("(tgi|weft)_[a-z0-9_]+", name) for name in names)


def test_tgi_names_have_no_total_suffix():
    assert not [spec.name for spec in METRICS if spec.name.endswith("_total")]


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
