"""From replies to figures, and from figures to a table that people can paste."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weft.benchmark.load import Reply

NS_PER_MS = 1e6


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The value below which `percent` of the values lie, interpolated linearly between ranks. None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100.0
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one server did under one workload. Rates count complete replies only; latencies are milliseconds."""

    requests: int
    failed: int
    errors: tuple[str, ...]
    """Up to three different ones."""
    wall_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    e2e_p50_ms: float | None
    foreign_cpu_percent: float = 0.0
    server_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    pss_mb: float = 0.0


def summarize(replies: Sequence[Reply]) -> Figures:
    """Figures of one run. The wall time is from the first request sent to the last reply's end."""
    complete = [reply for reply in replies if reply.error is None]
    failures = [reply.error for reply in replies if reply.error is not None]
    wall_s = (max(reply.finished_ns for reply in replies) - min(reply.sent_ns for reply in replies)) / 1e9
    prompt_tokens = sum(reply.prompt_tokens for reply in complete)
    output_tokens = sum(reply.completion_tokens for reply in complete)
    ttft_ms = [ttft / NS_PER_MS for reply in complete if (ttft := reply.time_to_first_token_ns) is not None]
    itl_ms = [gap / NS_PER_MS for reply in complete for gap in reply.inter_token_ns]
    return Figures(
        requests=len(replies),
        failed=len(failures),
        errors=tuple(dict.fromkeys(failures))[:3],
        wall_s=wall_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_tokens=sum(reply.cached_tokens for reply in complete),
        output_tokens_per_s=output_tokens / wall_s if complete else 0.0,
        total_tokens_per_s=(prompt_tokens + output_tokens) / wall_s if complete else 0.0,
        ttft_p50_ms=percentile(ttft_ms, 50),
        ttft_p99_ms=percentile(ttft_ms, 99),
        itl_p50_ms=percentile(itl_ms, 50),
        itl_p99_ms=percentile(itl_ms, 99),
        e2e_p50_ms=percentile([(reply.finished_ns - reply.sent_ns) / NS_PER_MS for reply in complete], 50),
    )


def median_of(values: Iterable[float | None]) -> float | None:
    """Median of those that are there; None when none is."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def format_number(value: float | None, digits: int) -> str:
    """A number with thousands separators, or a dash."""
    return "–" if value is None else f"{value:,.{digits}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right, padded so that it also reads as plain text."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def pad(cell: str, column: int) -> str:
        return cell.ljust(widths[column]) if column == 0 else cell.rjust(widths[column])

    texts = ["| " + " | ".join(pad(cell, column) for column, cell in enumerate(line)) + " |" for line in lines]
    rule = (
        "|" + "|".join("-" * (w + 2) if column == 0 else "-" * (w + 1) + ":" for column, w in enumerate(widths)) + "|"
    )
    return "\n".join([texts[0], rule, *texts[1:]])
