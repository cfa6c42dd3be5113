"""A sitting as a page for the lab: how it was taken, cells, goals, starts and memory, and what was not measured."""

from weft.benchmark.goals import judge, verdict_table
from weft.benchmark.records import Sitting, by_title_and_server
from weft.benchmark.report import format_number, markdown_table, median_of


def render(sitting: Sitting, picture: str | None = None) -> str:
    """Markdown. `picture`: file name of the plot beside the page."""
    return "\n\n".join(part for part in _parts(sitting, picture) if part) + "\n"


def _parts(sitting: Sitting, picture: str | None) -> list[str]:
    bandwidths = [cell.bandwidth_gb_per_s for cell in sitting.cells]
    peaks = ", ".join(f"{name} {value / 1e9:,.0f} G/s" for name, value in sitting.peaks.items())
    versions = ", ".join(f"{name} {version}" for name, version in sitting.versions.items())
    verdicts = judge(sitting)
    return [
        f"{sitting.machine}, {sitting.when}, commit {sitting.commit}. {versions}",
        f"Operations at the peak of our own kernels: {peaks}. Memory read beside the cells: "
        f"{min(bandwidths):.0f} to {max(bandwidths):.0f} GB/s."
        if bandwidths
        else "",
        verdict_table(verdicts) if verdicts else "",
        f"![rates of all servers]({picture})" if picture else "",
        cells_table(sitting),
        starts_table(sitting) if sitting.starts else "",
        _absences(sitting),
    ]


def cells_table(sitting: Sitting) -> str:
    """One line per workload and server, medians over the repeats, beside the distance to the machine's limit."""
    rows = []
    for (title, server), cells in by_title_and_server(sitting.cells).items():
        failed = sum(cell.figures.failed for cell in cells)
        share = median_of(cell.limit_share for cell in cells)
        causes = dict.fromkeys(cell.limit_cause for cell in cells)
        rows.append(
            [
                title,
                f"{server} ({failed} failed)" if failed else server,
                str(len(cells)),
                format_number(median_of(cell.figures.output_tokens_per_s for cell in cells), 1),
                format_number(median_of(cell.figures.total_tokens_per_s for cell in cells), 0),
                format_number(median_of(cell.figures.ttft_p50_ms for cell in cells), 0),
                format_number(median_of(cell.figures.ttft_p99_ms for cell in cells), 0),
                format_number(median_of(cell.figures.itl_p50_ms for cell in cells), 1),
                format_number(median_of(cell.figures.itl_p99_ms for cell in cells), 1),
                f"{share:.0%} ({', '.join(causes)})" if share else "–",
                format_number(median_of(cell.bandwidth_gb_per_s for cell in cells), 0),
                format_number(median_of(cell.control_us_per_token for cell in cells), 1),
                format_number(median_of(cell.figures.foreign_cpu_percent for cell in cells), 1),
            ]
        )
    header = [
        *("workload", "server", "repeats", "output tok/s", "total tok/s", "TTFT p50 ms", "TTFT p99 ms"),
        *("ITL p50 ms", "ITL p99 ms", "of the limit (by)", "GB/s", "µs per token beside the model", "foreign CPU %"),
    ]
    return markdown_table(header, rows)


def starts_table(sitting: Sitting) -> str:
    """One line per server and model: start and memory."""
    rows = []
    keys = dict.fromkeys((start.server, start.is_large_model) for start in sitting.starts)
    for server, is_large in keys:
        starts = [start for start in sitting.starts if (start.server, start.is_large_model) == (server, is_large)]
        beside = [start.pss_mb - start.kv_pool_mb for start in starts if start.kv_pool_mb]
        rows.append(
            [
                f"{server}, 1.07B" if is_large else server,
                format_number(median_of(start.ready_s for start in starts), 1),
                format_number(median_of(start.pss_mb or None for start in starts), 0),
                format_number(median_of(beside), 0),
                str(max(start.num_processes for start in starts)),
            ]
        )
    return markdown_table(["server", "start to ready s", "PSS MB", "PSS beside the KV pool MB", "processes"], rows)


def _absences(sitting: Sitting) -> str:
    if not sitting.absent:
        return ""
    lines = [f"* {what}: {why}" for what, why in sitting.absent.items()]
    return "Not measured:\n\n" + "\n".join(lines)
