"""What a sitting should show, and whether it does: ratios to the best peer of the same sitting, and plain bounds.

A precision is compared with every peer that computes at least as exactly: 8 bits must beat 16 bits too. Where memory or
arithmetic leaves less than the ratio, 95 % of the machine's limit is enough; only the goals that say so ask for less.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from weft.benchmark.records import Cell, Sitting, Start
from weft.benchmark.report import format_number, markdown_table, median_of

PRECISIONS = ("bf16", "int8", "int4")
"""From the most exact on."""
SHARE_OF_LIMIT = 0.95


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure of a cell."""

    name: str
    read: Callable[[Cell], float | None]
    digits: int = 0


OUTPUT_RATE = Metric("output tok/s", lambda cell: cell.figures.output_tokens_per_s)
TOTAL_RATE = Metric("total tok/s", lambda cell: cell.figures.total_tokens_per_s)
GAP_P99 = Metric("ITL p99 ms", lambda cell: cell.figures.itl_p99_ms)
CONTROL = Metric("CPU µs per token beside the model", lambda cell: cell.control_us_per_token, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateGoal:
    """At least so many times the best peer's rate."""

    profile: str
    metric: Metric
    ratios: dict[str, float]
    """By precision; a precision that is not named has no goal."""
    round: int | None = None
    """The round that counts; None: there is only one."""
    is_capped_by_limit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundGoal:
    """At most so much."""

    profile: str
    metric: Metric
    bounds: dict[str, float]


RATE_GOALS = (
    RateGoal(profile="streams-1", metric=OUTPUT_RATE, ratios={"bf16": 1.2, "int8": 1.6, "int4": 1.5}),
    RateGoal(profile="streams-16", metric=OUTPUT_RATE, ratios={"bf16": 1.25, "int8": 1.7, "int4": 1.7}),
    RateGoal(profile="streams-64", metric=OUTPUT_RATE, ratios={"bf16": 1.25, "int8": 1.6}),
    RateGoal(profile="long-prompt", metric=TOTAL_RATE, ratios={"bf16": 1.15, "int8": 1.4}),
    RateGoal(profile="shared-prefix", metric=OUTPUT_RATE, ratios={"bf16": 2.0, "int8": 2.5}, round=2),
    RateGoal(
        profile="large-1",
        metric=OUTPUT_RATE,
        ratios={"bf16": 1.15, "int8": 1.2, "int4": 1.6},
        is_capped_by_limit=True,
    ),
    RateGoal(profile="large-16", metric=OUTPUT_RATE, ratios={"bf16": 1.15, "int8": 1.2}, is_capped_by_limit=True),
)
BOUND_GOALS = (
    BoundGoal(profile="streams-64", metric=GAP_P99, bounds={"bf16": 120.0, "int8": 90.0}),
    BoundGoal(profile="running-stream", metric=GAP_P99, bounds={"bf16": 120.0, "int8": 100.0}),
    BoundGoal(profile="streams-64", metric=CONTROL, bounds={"bf16": 60.0, "int8": 60.0, "int4": 60.0}),
)
READY_BOUND_S = 3.0
MEMORY_BOUNDS_MB = {"bf16": 1000.0, "int8": 900.0, "int4": 800.0}
"""Of all processes, the KV pool not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One goal, one of our servers."""

    what: str
    server: str
    measured: float | None
    needed: float | None
    """None: no peer was measured."""
    is_upper_bound: bool = False
    best_peer: str = ""
    best_peer_value: float | None = None
    limit_share: float | None = None
    digits: int = 0

    @property
    def is_reached(self) -> bool | None:
        """None: there is nothing to compare."""
        if self.measured is None or self.needed is None:
            return None
        return self.measured <= self.needed if self.is_upper_bound else self.measured >= self.needed

    @property
    def ratio(self) -> float | None:
        """Ours over the best peer's."""
        return self.measured / self.best_peer_value if self.measured is not None and self.best_peer_value else None


def judge(sitting: Sitting) -> list[Verdict]:
    """Every goal that this sitting says something about."""
    verdicts: list[Verdict] = []
    for rate in RATE_GOALS:
        verdicts += _judge_rate(rate, _cells_of(sitting, rate.profile, rate.round))
    for bound in BOUND_GOALS:
        verdicts += _judge_bound(bound, _cells_of(sitting, bound.profile, None))
    for server, starts in _our_small_starts(sitting).items():
        verdicts += _judge_start(server, starts)
    return verdicts


def _cells_of(sitting: Sitting, profile: str, number: int | None) -> list[Cell]:
    suffix = "" if number is None else f", round {number}"
    return [cell for cell in sitting.cells if cell.profile == profile and cell.title.endswith(suffix)]


def _judge_rate(goal: RateGoal, cells: Sequence[Cell]) -> list[Verdict]:
    verdicts = []
    for server, ours in _by_server(cell for cell in cells if not cell.is_peer).items():
        ratio = goal.ratios.get(ours[0].precision)
        if ratio is None:
            continue
        exact_enough = PRECISIONS[: PRECISIONS.index(ours[0].precision) + 1]
        peers = _by_server(cell for cell in cells if cell.is_peer and cell.precision in exact_enough)
        rates = {peer: rate for peer, theirs in peers.items() if (rate := median_of(map(goal.metric.read, theirs)))}
        best = max(rates, key=lambda peer: rates[peer], default="")
        measured = median_of(map(goal.metric.read, ours))
        limit_share = median_of(cell.limit_share for cell in ours)
        needed = ratio * rates[best] if best else None
        if goal.is_capped_by_limit and needed is not None and measured is not None and limit_share:
            needed = min(needed, SHARE_OF_LIMIT * measured / limit_share)
        verdicts.append(
            Verdict(
                what=f"{ours[0].title}, {goal.metric.name}",
                server=server,
                measured=measured,
                needed=needed,
                best_peer=best,
                best_peer_value=rates.get(best),
                limit_share=limit_share,
                digits=goal.metric.digits,
            )
        )
    return verdicts


def _judge_bound(goal: BoundGoal, cells: Sequence[Cell]) -> list[Verdict]:
    verdicts = []
    for server, ours in _by_server(cell for cell in cells if not cell.is_peer).items():
        bound = goal.bounds.get(ours[0].precision)
        measured = median_of(map(goal.metric.read, ours))
        if bound is None or measured is None:
            continue
        peers = _by_server(cell for cell in cells if cell.is_peer and cell.precision == ours[0].precision)
        values = {peer: value for peer, theirs in peers.items() if (value := median_of(map(goal.metric.read, theirs)))}
        best = min(values, key=lambda peer: values[peer], default="")
        verdicts.append(
            Verdict(
                what=f"{ours[0].title}, {goal.metric.name}",
                server=server,
                measured=measured,
                needed=bound,
                is_upper_bound=True,
                best_peer=best,
                best_peer_value=values.get(best),
                digits=goal.metric.digits,
            )
        )
    return verdicts


def _judge_start(server: str, starts: Sequence[Start]) -> list[Verdict]:
    ready = median_of(start.ready_s for start in starts)
    memory = median_of(start.pss_mb - start.kv_pool_mb for start in starts if start.pss_mb)
    bound_mb = MEMORY_BOUNDS_MB.get(starts[0].precision)
    return [
        Verdict(
            what="start to ready, s",
            server=server,
            measured=ready,
            needed=READY_BOUND_S,
            is_upper_bound=True,
            digits=1,
        ),
        Verdict(
            what="memory beside the KV pool (PSS), MB",
            server=server,
            measured=memory,
            needed=bound_mb,
            is_upper_bound=True,
        ),
    ]


def _by_server(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.server, []).append(cell)
    return grouped


def _our_small_starts(sitting: Sitting) -> dict[str, list[Start]]:
    grouped: dict[str, list[Start]] = {}
    for start in sitting.starts:
        if not start.is_peer and not start.is_large_model:
            grouped.setdefault(start.server, []).append(start)
    return grouped


def verdict_table(verdicts: Iterable[Verdict]) -> str:
    """One line per goal and server of ours."""
    marks = {True: "yes", False: "no", None: "–"}
    rows = []
    for verdict in verdicts:
        peer = f"{verdict.best_peer} {format_number(verdict.best_peer_value, verdict.digits)}"
        sign = "≤" if verdict.is_upper_bound else "≥"
        needed = "–" if verdict.needed is None else f"{sign} {format_number(verdict.needed, verdict.digits)}"
        share = "" if verdict.limit_share is None else f"{verdict.limit_share:.0%}"
        rows.append(
            [
                verdict.what,
                verdict.server,
                format_number(verdict.measured, verdict.digits),
                peer if verdict.best_peer else "–",
                format_number(verdict.ratio, 2),
                needed,
                marks[verdict.is_reached],
                share,
            ]
        )
    header = ["goal", "server", "measured", "best peer", "× peer", "needed", "reached", "of the machine's limit"]
    return markdown_table(header, rows)
