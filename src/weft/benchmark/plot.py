"""A sitting as a picture: one panel of bars per workload, drawn as SVG with nothing but text.

Ours are coloured, peers grey; a thin line behind one of our bars marks what the machine's limit would allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from weft.benchmark.goals import GAP_P99, OUTPUT_RATE, TOTAL_RATE, Metric
from weft.benchmark.records import Cell, Sitting, by_title_and_server
from weft.benchmark.report import format_number, median_of

PANEL_WIDTH, ROW_HEIGHT, TITLE_HEIGHT, GAP = 470, 20, 26, 24
LABEL_WIDTH, VALUE_WIDTH = 160, 64
COLUMNS = 2
COLOURS = {"bf16": "#2f6fb0", "int8": "#2a9d6e", "int4": "#b8742a"}
PEER_COLOUR = "#a9adb3"
_METRICS = {"long-prompt": TOTAL_RATE, "running-stream": GAP_P99}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One server in one panel."""

    label: str
    value: float
    colour: str
    limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One workload."""

    title: str
    bars: Sequence[Bar]

    @property
    def height(self) -> int:
        """Pixels."""
        return TITLE_HEIGHT + ROW_HEIGHT * len(self.bars)


def draw(sitting: Sitting) -> str:
    """The picture as an SVG document."""
    panels = _panels(sitting)
    width = COLUMNS * PANEL_WIDTH + (COLUMNS + 1) * GAP
    bodies: list[str] = []
    top = GAP + TITLE_HEIGHT
    for start in range(0, len(panels), COLUMNS):
        row = panels[start : start + COLUMNS]
        bodies += [_draw_panel(panel, GAP + column * (PANEL_WIDTH + GAP), top) for column, panel in enumerate(row)]
        top += max(panel.height for panel in row) + GAP
    heading = f"{sitting.machine}, {sitting.when}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}" '
        'font-family="sans-serif" font-size="12" fill="#222">\n'
        f'<rect width="{width}" height="{top}" fill="#fff"/>\n'
        f'<text x="{GAP}" y="{GAP}" font-weight="bold">{escape(heading)}</text>\n' + "\n".join(bodies) + "\n</svg>\n"
    )


def _panels(sitting: Sitting) -> list[Panel]:
    grouped = by_title_and_server(sitting.cells)
    panels = []
    for title in dict.fromkeys(title for title, _ in grouped):
        cells = {server: theirs for (name, server), theirs in grouped.items() if name == title}
        metric = _METRICS.get(next(iter(cells.values()))[0].profile, OUTPUT_RATE)
        bars = [bar for server, theirs in cells.items() if (bar := _bar(server, theirs, metric)) is not None]
        panels.append(Panel(title=f"{title}: {metric.name}", bars=sorted(bars, key=lambda bar: -bar.value)))
    return panels


def _bar(server: str, cells: Sequence[Cell], metric: Metric) -> Bar | None:
    value = median_of(map(metric.read, cells))
    if not value:
        return None
    share = median_of(cell.limit_share for cell in cells)
    has_limit = metric is not GAP_P99 and not cells[0].is_peer and share
    return Bar(
        label=server,
        value=value,
        colour=PEER_COLOUR if cells[0].is_peer else COLOURS.get(cells[0].precision, "#666"),
        limit=value / share if has_limit and share else None,
    )


def _draw_panel(panel: Panel, left: int, top: int) -> str:
    space = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    largest = max((max(bar.value, bar.limit or 0.0) for bar in panel.bars), default=1.0)
    parts = [f'<text x="{left}" y="{top + 14}" font-weight="bold">{escape(panel.title)}</text>']
    for index, bar in enumerate(panel.bars):
        y = top + TITLE_HEIGHT + index * ROW_HEIGHT
        start = left + LABEL_WIDTH
        width = space * bar.value / largest
        parts.append(f'<text x="{start - 6}" y="{y + 12}" text-anchor="end">{escape(bar.label)}</text>')
        if bar.limit is not None:
            end = start + space * bar.limit / largest
            parts.append(f'<path d="M{start} {y + 8}H{end:.1f}M{end:.1f} {y + 3}V{y + 13}" stroke="{bar.colour}"/>')
        parts.append(f'<rect x="{start}" y="{y + 2}" width="{width:.1f}" height="13" fill="{bar.colour}"/>')
        end = start + space * max(bar.value, bar.limit or 0.0) / largest
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 12}">{format_number(bar.value, 0)}</text>')
    return "\n".join(parts)
