"""Figures count what was complete, percentiles interpolate, tables pair what belongs together."""

import pytest

from weft.benchmark.load import Reply
from weft.benchmark.report import markdown_table, percentile, summarize

SECOND = 10**9
MS = 10**6


def make_reply(start_ms: int, *token_ms: int, error: str | None = None) -> Reply:
    return Reply(
        sent_ns=start_ms * MS,
        finished_ns=(token_ms[-1] if token_ms else start_ms) * MS,
        status=200,
        token_ns=[moment * MS for moment in token_ms],
        prompt_tokens=10,
        completion_tokens=len(token_ms),
        error=error,
    )


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([4.0], 99, 4.0), ([3.0, 1.0, 2.0], 50, 2.0), ([0.0, 10.0], 25, 2.5), ([1.0, 2.0], 100, 2.0)],
)
def test_percentiles_interpolate_between_ranks(values: list[float], percent: float, expected: float | None) -> None:
    assert percentile(values, percent) == expected


def test_rates_span_first_sending_to_last_end() -> None:
    figures = summarize([make_reply(0, 100, 500), make_reply(200, 1000, 2000)])

    assert figures.wall_s == 2.0
    assert figures.output_tokens_per_s == 2.0
    assert figures.total_tokens_per_s == 12.0
    assert figures.ttft_p50_ms == 450.0
    assert figures.itl_p50_ms == 700.0
    assert figures.failed == 0


def test_failed_replies_are_counted_but_their_tokens_are_not() -> None:
    replies = [make_reply(0, 100, 1000), make_reply(0, 50, 60, error="reset"), make_reply(0, error="reset")]

    figures = summarize(replies)

    assert (figures.requests, figures.failed) == (3, 2)
    assert figures.errors == ("reset",)
    assert figures.output_tokens == 2
    assert figures.ttft_p50_ms == 100.0


def test_a_table_has_one_rule_and_equal_widths() -> None:
    lines = markdown_table(["a", "number"], [["long name", "1"]]).splitlines()

    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|-----------|-------:|"
