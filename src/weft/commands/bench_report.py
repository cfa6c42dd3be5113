"""From the replies of a sweep to figures, and from figures to tables, JSON and a chart of characters."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from weft.benchmark.load import Reply
from weft.benchmark.report import NS_PER_MS, format_number, markdown_table, percentile

_CHART_WIDTH = 50


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one measure over runs and requests."""

    average: float
    lowest: float
    highest: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None without values."""
        p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
        if p50 is None or p90 is None or p99 is None:
            return None
        return cls(statistics.fmean(values), min(values), max(values), p50, p90, p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """What was measured at one batch size. Latencies are per request, rates per run; None when there was no value."""

    batch_size: int
    prompt_tokens: float
    """Per request, as the server counted them; 0 when it does not."""
    output_tokens: int
    """Of all complete replies."""
    prefill_ms: Spread | None
    """From sending to the first token."""
    decode_token_ms: Spread | None
    """Mean time per token behind the first."""
    decode_ms: Spread | None
    """From the first token to the last."""
    total_ms: Spread | None
    """From sending to the end."""
    prefill_tokens_per_s: Spread | None
    """Prompt tokens of a run until its last first token."""
    decode_tokens_per_s: Spread | None
    """Tokens behind the first ones, from the first first token to the end of the run."""
    output_tokens_per_s: Spread | None
    """All tokens of a run over all of its time."""
    num_failed: int
    errors: tuple[str, ...]
    """Up to three different ones."""


def summarize_runs(batch_size: int, runs: Sequence[Sequence[Reply]]) -> SweepPoint:
    """Figures of one batch size. A run with a failed reply has no rates."""
    replies = [reply for run in runs for reply in run]
    complete = [reply for reply in replies if reply.error is None]
    errors = [reply.error for reply in replies if reply.error is not None]
    whole_runs = [run for run in runs if all(reply.error is None for reply in run)]
    decoded = [reply for reply in complete if reply.completion_tokens > 1]
    return SweepPoint(
        batch_size=batch_size,
        prompt_tokens=statistics.fmean(reply.prompt_tokens for reply in complete) if complete else 0.0,
        output_tokens=sum(reply.completion_tokens for reply in complete),
        prefill_ms=Spread.of([(reply.token_ns[0] - reply.sent_ns) / NS_PER_MS for reply in complete]),
        decode_token_ms=Spread.of([_decode_ms(reply) / (reply.completion_tokens - 1) for reply in decoded]),
        decode_ms=Spread.of([_decode_ms(reply) for reply in decoded]),
        total_ms=Spread.of([(reply.finished_ns - reply.sent_ns) / NS_PER_MS for reply in complete]),
        prefill_tokens_per_s=_rates(whole_runs, _prefill_rate),
        decode_tokens_per_s=_rates(whole_runs, _decode_rate),
        output_tokens_per_s=_rates(whole_runs, _output_rate),
        num_failed=len(errors),
        errors=tuple(dict.fromkeys(errors))[:3],
    )


def _decode_ms(reply: Reply) -> float:
    return (reply.token_ns[-1] - reply.token_ns[0]) / NS_PER_MS


def _rates(runs: Sequence[Sequence[Reply]], rate: Callable[[Sequence[Reply]], float | None]) -> Spread | None:
    return Spread.of([value for value in map(rate, runs) if value is not None])


def _prefill_rate(run: Sequence[Reply]) -> float | None:
    span_ns = max(reply.token_ns[0] for reply in run) - min(reply.sent_ns for reply in run)
    return _per_second(sum(reply.prompt_tokens for reply in run), span_ns)


def _decode_rate(run: Sequence[Reply]) -> float | None:
    span_ns = max(reply.token_ns[-1] for reply in run) - min(reply.token_ns[0] for reply in run)
    return _per_second(sum(reply.completion_tokens - 1 for reply in run), span_ns)


def _output_rate(run: Sequence[Reply]) -> float | None:
    span_ns = max(reply.finished_ns for reply in run) - min(reply.sent_ns for reply in run)
    return _per_second(sum(reply.completion_tokens for reply in run), span_ns)


def _per_second(num_tokens: int, span_ns: int) -> float | None:
    return num_tokens / (span_ns / 1e9) if num_tokens > 0 and span_ns > 0 else None


def tables(parameters: dict[str, Any], points: Sequence[SweepPoint]) -> str:
    """Parameters, latency and throughput as Markdown, with the rows of TGI's tool."""
    known = [(name, "" if value is None else str(value)) for name, value in parameters.items()]
    latency = [
        [step, str(point.batch_size), *_cells(spread, 2, " ms")]
        for step, spreads in (
            ("Prefill", [point.prefill_ms for point in points]),
            ("Decode (token)", [point.decode_token_ms for point in points]),
            ("Decode (total)", [point.decode_ms for point in points]),
            ("Request", [point.total_ms for point in points]),
        )
        for point, spread in zip(points, spreads, strict=True)
    ]
    throughput = [
        [step, str(point.batch_size), *_cells(spread, 1, "")[:3]]
        for step, spreads in (
            ("Prefill", [point.prefill_tokens_per_s for point in points]),
            ("Decode", [point.decode_tokens_per_s for point in points]),
            ("Output", [point.output_tokens_per_s for point in points]),
        )
        for point, spread in zip(points, spreads, strict=True)
    ]
    spread_header = ["Average", "Lowest", "Highest"]
    return "\n\n".join(
        [
            markdown_table(["Parameter", "Value"], known),
            "Latency",
            markdown_table(["Step", "Batch Size", *spread_header, "p50", "p90", "p99"], latency),
            "Throughput (tokens/s)",
            markdown_table(["Step", "Batch Size", *spread_header], throughput),
        ]
    )


def _cells(spread: Spread | None, digits: int, unit: str) -> list[str]:
    if spread is None:
        return ["–"] * 6
    values = (spread.average, spread.lowest, spread.highest, spread.p50, spread.p90, spread.p99)
    return [format_number(value, digits) + unit for value in values]


def chart(points: Sequence[SweepPoint]) -> str:
    """Output rate by batch size, one bar each."""
    rates = [(point, 0.0 if (rate := point.output_tokens_per_s) is None else rate.average) for point in points]
    highest = max((rate for _, rate in rates), default=0.0) or 1.0
    lines = [
        f"{point.batch_size:>6} {'█' * round(_CHART_WIDTH * rate / highest):{_CHART_WIDTH}} {rate:,.1f}"
        for point, rate in rates
    ]
    return "\n".join(["Output tokens/s by batch size", *lines])


def as_json(parameters: dict[str, Any], points: Sequence[SweepPoint]) -> dict[str, Any]:
    """Parameters under names for programs, and every figure."""
    names = {name.lower().replace(" ", "_"): value for name, value in parameters.items()}
    return {"parameters": names, "results": [asdict(point) for point in points]}
