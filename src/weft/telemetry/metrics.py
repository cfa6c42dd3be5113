"""Every metric once: name, type, labels, buckets and meaning; and the text that Prometheus reads.

Names that begin with `tgi_` are TGI's own, without the `_total` suffix that client libraries insist on, so that its
dashboards keep working: the reason for a small encoder of our own (ADR-0007). `docs/reference/metrics.md` is
generated from the table.

Source: Prometheus text exposition format 0.0.4; spec of TGI 3.3.7, metrics.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from weft.limits import LIMITS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OTHER = "other"
"""Label value that stands for all values beyond `limits.max_label_values`."""


class MetricKind(StrEnum):
    """The three types of the exposition format that are in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


DURATION_BUCKETS = tuple(0.0001 * 1.5**k for k in range(1, 36))
"""Seconds, 0.15 ms to 146 s: TGI's buckets for every name that ends in `duration`."""

LENGTH_BUCKETS = tuple(float(2**k) for k in range(21))
"""Tokens. TGI's depend on the limits in force, which makes two servers incomparable."""

BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 512.0, 1024.0)
"""Sequences in one step."""


SPECULATION_BUCKETS = tuple(map(float, range(17)))
"""Tokens of a step beyond the first."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One row of the table."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    same_as: str = ""
    """Name of the metric whose samples it repeats, with a label for the model's name; never counted by itself."""


def _counter(name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, MetricKind.COUNTER, text, labels)


def _gauge(name: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, MetricKind.GAUGE, text, labels)


def _histogram(name: str, buckets: tuple[float, ...], text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name, MetricKind.HISTOGRAM, text, labels, buckets)


def _vllm(name: str, same_as: str, text: str = "") -> MetricSpec:
    """Name of vLLM for something that is counted under ours."""
    original = next(spec for spec in _OWN_METRICS if spec.name == same_as)
    labels = ("model_name", *original.labels)
    return MetricSpec(name, original.kind, text or original.help, labels, original.buckets, same_as)


_OWN_METRICS: tuple[MetricSpec, ...] = (
    # Requests, with TGI's names. One HTTP request counts once, whatever its dialect and number of choices.
    _counter("tgi_request_count", "HTTP requests that ask for a generation"),
    _counter("tgi_request_success", "Generation requests that ended with their final token"),
    _counter("tgi_request_failure", "Generation requests that failed", "err"),
    _histogram("tgi_request_duration", DURATION_BUCKETS, "Seconds from a request's arrival to its last byte"),
    _histogram("tgi_request_validation_duration", DURATION_BUCKETS, "Seconds from arrival to the engine's queue"),
    _histogram("tgi_request_queue_duration", DURATION_BUCKETS, "Seconds from the engine's queue to the first step"),
    _histogram("tgi_request_inference_duration", DURATION_BUCKETS, "Seconds from the first step to the last token"),
    _histogram(
        "tgi_request_mean_time_per_token_duration", DURATION_BUCKETS, "Inference seconds divided by generated tokens"
    ),
    _histogram("tgi_request_generated_tokens", LENGTH_BUCKETS, "Completion tokens of a request"),
    _histogram("tgi_request_input_length", LENGTH_BUCKETS, "Prompt tokens of a request"),
    _histogram("tgi_request_max_new_tokens", LENGTH_BUCKETS, "Completion tokens that a request may have"),
    _histogram(
        "tgi_request_skipped_tokens",
        SPECULATION_BUCKETS,
        "Speculated tokens accepted per sequence and step; nothing is speculated yet, so it stays empty",
    ),
    # Queue and batch, with TGI's names; taken from the state that the shard sends with each frame.
    _gauge("tgi_queue_size", "Requests waiting in the engine"),
    _gauge("tgi_batch_current_size", "Sequences running in the engine"),
    _gauge("tgi_batch_current_max_tokens", "Tokens that the blocks in use can hold"),
    _gauge("tgi_batch_max_total_tokens", "Tokens that the KV pool can hold"),
    _histogram("tgi_batch_next_size", BATCH_BUCKETS, "Sequences that joined in one step"),
    _counter("tgi_batch_concat", "Steps in which sequences joined running ones", "reason"),
    _counter("tgi_batch_inference_count", "Engine steps; prefill when any row computes prompt tokens", "method"),
    _counter("tgi_batch_inference_success", "Engine steps that returned tokens", "method"),
    _counter("tgi_batch_inference_failure", "Engine steps that raised", "method"),
    _histogram("tgi_batch_inference_duration", DURATION_BUCKETS, "Seconds of an engine step, all included", "method"),
    _histogram("tgi_batch_forward_duration", DURATION_BUCKETS, "Seconds of a step's forward and sampling", "method"),
    _histogram("tgi_batch_decode_duration", DURATION_BUCKETS, "Seconds from a step's tokens to its events", "method"),
    _histogram(
        "tgi_batch_filter_duration", DURATION_BUCKETS, "Seconds of handing a step's tokens to their requests", "method"
    ),
    _histogram(
        "tgi_batch_concat_duration", DURATION_BUCKETS, "Seconds of planning a step in which sequences joined", "method"
    ),
    # HTTP.
    _counter("weft_http_requests", "HTTP requests by route and status", "route", "status"),
    _gauge("weft_http_connections", "Open HTTP connections"),
    _gauge("weft_http_requests_in_flight", "HTTP requests being answered"),
    _gauge("weft_streams_open", "Event streams being written"),
    _counter("weft_request_cancelled", "Requests whose client left, by the stage they had reached", "stage"),
    _counter("weft_stream_stalled", "Event streams ended because their reader stopped reading"),
    # Tokens and latency.
    _counter("weft_sequences_finished", "Sequences delivered to their end", "finish_reason"),
    _counter("weft_prompt_tokens", "Prompt tokens accepted"),
    _counter("weft_cached_prompt_tokens", "Prompt tokens whose keys and values came from the prefix index"),
    _counter("weft_completion_tokens", "Completion tokens delivered"),
    _histogram("weft_time_to_first_token_seconds", DURATION_BUCKETS, "Seconds from arrival to the first token"),
    _histogram("weft_inter_token_seconds", DURATION_BUCKETS, "Seconds between two tokens of one sequence"),
    # Engine.
    _gauge("weft_queue_oldest_seconds", "Age of the request at the head of the engine's queue; 0: nobody waits"),
    _histogram("weft_step_sequences", BATCH_BUCKETS, "Sequences in an engine step"),
    _histogram("weft_step_tokens", LENGTH_BUCKETS, "Tokens computed in an engine step"),
    _gauge("weft_admission_permits", "Places for concurrent requests", "state"),
    _gauge("weft_engine_up", "1 while the router's stream to the shard is open"),
    _counter("weft_engine_reconnects", "Times the stream to the shard was lost"),
    _counter("weft_engine_steps", "Engine steps since the shard started"),
    _counter("weft_engine_preemptions", "Sequences whose blocks were taken back and recomputed"),
    _gauge("weft_kv_blocks", "Blocks of the KV pool", "state"),
    _gauge("weft_kv_usage_ratio", "Share of the KV pool's blocks that running sequences hold"),
    _counter("weft_prefix_query_tokens", "Prompt tokens looked up in the prefix index"),
    _counter("weft_prefix_hit_tokens", "Prompt tokens found in the prefix index"),
    _counter(
        "weft_trace_spans", "Spans of the router: ended, delivered, failed; the rest waits or was dropped", "result"
    ),
    _counter("weft_recorded_lines", "Lines of the recording: written, or dropped by a slow or full disk", "outcome"),
    # Facts.
    _gauge("weft_ready", "1 when generation requests are accepted"),
    _gauge("weft_build_info", "Always 1; the labels say what runs", "version", "model_id"),
    _gauge("weft_limit", "Bounds in force, see docs/reference", "name"),
)

METRICS: tuple[MetricSpec, ...] = (
    *_OWN_METRICS,
    # vLLM's names, for gateways and autoscalers that choose a server by them.
    _vllm("vllm:num_requests_running", "tgi_batch_current_size"),
    _vllm("vllm:num_requests_waiting", "tgi_queue_size"),
    _vllm("vllm:kv_cache_usage_perc", "weft_kv_usage_ratio", "Share of the KV pool in use, 0 to 1"),
    _vllm("vllm:gpu_cache_usage_perc", "weft_kv_usage_ratio", "As vllm:kv_cache_usage_perc, its older name"),
    _vllm("vllm:time_to_first_token_seconds", "weft_time_to_first_token_seconds"),
    _vllm("vllm:inter_token_latency_seconds", "weft_inter_token_seconds"),
    _vllm(
        "vllm:time_per_output_token_seconds",
        "weft_inter_token_seconds",
        "As vllm:inter_token_latency_seconds, its older name",
    ),
    _vllm("vllm:e2e_request_latency_seconds", "tgi_request_duration"),
    _vllm("vllm:request_queue_time_seconds", "tgi_request_queue_duration"),
    _vllm("vllm:request_inference_time_seconds", "tgi_request_inference_duration"),
    _vllm("vllm:request_time_per_output_token_seconds", "tgi_request_mean_time_per_token_duration"),
    _vllm("vllm:request_prompt_tokens", "tgi_request_input_length"),
    _vllm("vllm:request_generation_tokens", "tgi_request_generated_tokens"),
    _vllm("vllm:prompt_tokens_total", "weft_prompt_tokens"),
    _vllm("vllm:generation_tokens_total", "weft_completion_tokens"),
    _vllm("vllm:num_preemptions_total", "weft_engine_preemptions"),
    _vllm("vllm:prefix_cache_queries_total", "weft_prefix_query_tokens"),
    _vllm("vllm:prefix_cache_hits_total", "weft_prefix_hit_tokens"),
    _counter(
        "vllm:request_success_total",
        "Requests that ended with their final token, by OpenAI's finish reason",
        "model_name",
        "finished_reason",
    ),
    _gauge("vllm:cache_config_info", "Always 1; the labels are the KV pool's sizes", "block_size", "num_gpu_blocks"),
    _gauge(
        "vllm:lora_requests_info",
        "Unix time of the scrape; the labels say which adapters are in use",
        "max_lora",
        "running_lora_adapters",
        "waiting_lora_adapters",
    ),
)


class Counter:
    """A number that only grows. Label values come in the order of the table."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec
        self._values: dict[tuple[str, ...], float] = {} if spec.labels else {(): 0.0}

    def add(self, amount: float = 1.0, *labels: str) -> None:
        """Grow by `amount` ≥ 0."""
        key = _bounded(self._values, labels)
        self._values[key] = self._values.get(key, 0.0) + amount

    def set_to(self, total: float, *labels: str) -> None:
        """Take over a count that somebody else keeps (the shard's), which may restart from zero."""
        self._values[_bounded(self._values, labels)] = total

    def value(self, *labels: str) -> float:
        """Current count; 0 for labels never seen."""
        return self._values.get(labels, 0.0)

    def lines(self, shown: MetricSpec, first_labels: tuple[str, ...] = ()) -> Iterator[str]:
        """Sample lines of the exposition format, as `shown` names them."""
        for labels, value in self._values.items():
            yield _sample(shown.name, shown.labels, (*first_labels, *labels), value)


class Gauge(Counter):
    """A number that goes up and down."""

    def set(self, value: float, *labels: str) -> None:
        """Replace the value."""
        self._values[_bounded(self._values, labels)] = value


class Histogram:
    """Counts of observations below each bucket's upper bound, with sum and count."""

    def __init__(self, spec: MetricSpec) -> None:
        self.spec = spec
        self._series: dict[tuple[str, ...], _Series] = {} if spec.labels else {(): _Series(len(spec.buckets))}

    def observe(self, value: float, *labels: str, times: int = 1) -> None:
        """Count `value`, `times` times."""
        series = self._series.get(labels)
        if series is None:
            series = self._series.setdefault(_bounded(self._series, labels), _Series(len(self.spec.buckets)))
        series.counts[bisect_left(self.spec.buckets, value)] += times
        series.sum += value * times

    def count(self, *labels: str) -> int:
        """Number of observations."""
        series = self._series.get(labels)
        return sum(series.counts) if series else 0

    def lines(self, shown: MetricSpec, first_labels: tuple[str, ...] = ()) -> Iterator[str]:
        """Sample lines of the exposition format, as `shown` names them."""
        names = (*shown.labels, "le")
        bounds = [*map(_number, self.spec.buckets), "+Inf"]
        for own_labels, series in self._series.items():
            labels = (*first_labels, *own_labels)
            total = 0
            for bound, count in zip(bounds, series.counts, strict=True):
                total += count
                yield _sample(f"{shown.name}_bucket", names, (*labels, bound), total)
            yield _sample(f"{shown.name}_sum", shown.labels, labels, series.sum)
            yield _sample(f"{shown.name}_count", shown.labels, labels, total)


class _Series:
    """One labelled histogram; the last count is of values above every bound."""

    __slots__ = ("counts", "sum")

    def __init__(self, num_buckets: int) -> None:
        self.counts = [0] * (num_buckets + 1)
        self.sum = 0.0


class Registry:
    """The metrics of one process. Not thread-safe: everything that counts runs on the event loop."""

    def __init__(self, specs: Sequence[MetricSpec] = METRICS) -> None:
        self._specs = specs
        counted = [spec for spec in specs if not spec.same_as]
        self._counters = {spec.name: Counter(spec) for spec in counted if spec.kind is MetricKind.COUNTER}
        self._gauges = {spec.name: Gauge(spec) for spec in counted if spec.kind is MetricKind.GAUGE}
        self._histograms = {spec.name: Histogram(spec) for spec in counted if spec.kind is MetricKind.HISTOGRAM}
        self.model_name = ""
        """Label of the metrics that repeat others under another server's names."""
        self._collectors: list[Callable[[], None]] = []

    def counter(self, name: str) -> Counter:
        """The counter of this name. KeyError: the table has none."""
        return self._counters[name]

    def gauge(self, name: str) -> Gauge:
        """The gauge of this name. KeyError: the table has none."""
        return self._gauges[name]

    def histogram(self, name: str) -> Histogram:
        """The histogram of this name. KeyError: the table has none."""
        return self._histograms[name]

    def before_exposition(self, collector: Callable[[], None]) -> None:
        """Call `collector` before each scrape, for gauges that are cheaper to read than to keep."""
        self._collectors.append(collector)

    def exposition(self) -> str:
        """The page that Prometheus reads. Metrics without a sample are left out, as TGI does."""
        for collect in self._collectors:
            collect()
        metrics: dict[str, Counter | Histogram] = {**self._counters, **self._gauges, **self._histograms}
        lines: list[str] = []
        for spec in self._specs:
            first_labels = (self.model_name,) if spec.same_as else ()
            samples = list(metrics[spec.same_as or spec.name].lines(spec, first_labels))
            if samples:
                lines += (f"# HELP {spec.name} {_escape_help(spec.help)}", f"# TYPE {spec.name} {spec.kind}", *samples)
        return "\n".join(lines) + "\n"


def _bounded(series: Mapping[tuple[str, ...], object], labels: tuple[str, ...]) -> tuple[str, ...]:
    """The key to count under: label values may come from clients, so their number is bounded."""
    if labels in series or len(series) < LIMITS.max_label_values:
        return labels
    return (OTHER,) * len(labels)


def _sample(name: str, label_names: Sequence[str], label_values: Sequence[str], value: float) -> str:
    pairs = ",".join(f'{label}="{_escape_label(text)}"' for label, text in zip(label_names, label_values, strict=True))
    return f"{name}{{{pairs}}} {_number(value)}" if pairs else f"{name} {_number(value)}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else f"{value:.12g}"


def _escape_label(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
