"""What a sitting measured, cell by cell, with what stood beside it; kept as JSON and read back as it was."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from weft.benchmark.report import Figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One server's figures of one round of one workload."""

    profile: str
    title: str
    """Of the workload and, where it has several, the round."""
    server: str
    precision: str
    """`bf16`, `int8` or `int4`: servers of one precision are compared."""
    is_peer: bool
    repeat: int
    figures: Figures
    bandwidth_gb_per_s: float
    """Read from memory on all cores, the mean of just before and just after."""
    limit_s: float
    """The least seconds for this load: see `roofline`."""
    limit_cause: str
    control_us_per_token: float | None = None
    """CPU time per streamed token outside of the model; only of servers that say how long their model ran."""

    @property
    def limit_share(self) -> float:
        """Least over measured time; 1.0 is the machine's limit."""
        return self.limit_s / self.figures.wall_s if self.figures.wall_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a server, and its memory after the cells that followed."""

    server: str
    precision: str
    is_peer: bool
    is_large_model: bool
    ready_s: float
    pss_mb: float = 0.0
    kv_pool_mb: float = 0.0
    """The part of it that is the KV pool; 0 where it is not known."""
    num_processes: int = 0


@dataclass(slots=True, kw_only=True)
class Sitting:
    """Everything measured in one go, in order of measuring."""

    when: str
    machine: str
    commit: str
    versions: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    """Operations per second: `bf16` and `int8`."""
    cells: list[Cell] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Server, or server and workload → why it was not measured."""

    def to_json(self) -> bytes:
        """All of it, indented."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Sitting":
        """What `to_json` wrote. Raises msgspec.ValidationError for anything else."""
        return msgspec.json.decode(content, type=cls)

    def servers(self) -> list[str]:
        """Labels in order of appearance."""
        return list(dict.fromkeys([start.server for start in self.starts] + [cell.server for cell in self.cells]))


def by_title_and_server(cells: Iterable[Cell]) -> Mapping[tuple[str, str], Sequence[Cell]]:
    """Repeats of the same cell together, in order of appearance."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.title, cell.server), []).append(cell)
    return grouped
