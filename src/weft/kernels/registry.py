"""Which implementation runs an operation: a table of rows, each with a condition and a priority.

A new kernel is a row here. The row with the largest priority whose condition holds is used; the reference, which
has no condition, is the last row of every operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import torch

from weft.kernels import reference


@dataclass(frozen=True, slots=True)
class Case:
    """What an implementation may depend on."""

    device: str
    """Type of the device: `cpu`, `cuda` …"""
    dtype: torch.dtype
    head_size: int = 0
    """D of attention and rotary operations, otherwise 0."""
    layout: str = ""
    """Of the packed weight, for operations that read one; decides before any priority."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One row: `function` computes `operation` wherever `supports` holds."""

    operation: str
    name: str
    function: Callable[..., Any]
    priority: int
    supports: Callable[[Case], bool]
    is_batch_invariant: bool


REFERENCE_NAMES = (
    "pack_linear",
    "linear",
    "embedding",
    "rms_norm",
    "add_rms_norm",
    "rotary_and_store",
    "paged_attention",
    "gated_activation",
    "greedy",
    "token_logprobs",
    "race",
)

REFERENCE_ROWS = tuple(
    Implementation(
        operation=name,
        name="reference",
        function=getattr(reference, name),
        priority=0,
        supports=lambda _: True,
        is_batch_invariant=False,
    )
    for name in REFERENCE_NAMES
)


class _Choice:
    """The kernel set forced on this process; None chooses by condition and priority."""

    forced: str | None = None


class Forced:
    """Puts the previous choice back when used as a context manager."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set_forced(self._previous)


def force(name: str | None) -> Forced:
    """Uses only the named kernel set from now on: `reference`, or None for the best available.

    Works at once and lasts; `with force("reference"): …` puts the previous choice back. Raises ValueError.
    """
    if name not in kernel_sets() and name is not None:
        raise ValueError(f"`kernels` must be one of {', '.join(kernel_sets())}. Given: {name}")
    previous = _Choice.forced
    _set_forced(name)
    return Forced(previous)


def _set_forced(name: str | None) -> None:
    _Choice.forced = name
    find.cache_clear()


def kernel_sets() -> tuple[str, ...]:
    """Names that `force` accepts on this machine."""
    return ("reference",)


@lru_cache(maxsize=256)
def find(operation: str, case: Case) -> Implementation:
    """The row that runs `operation` in this case."""
    rows = [row for row in _rows() if row.operation == operation and row.supports(case)]
    return max(rows, key=lambda row: row.priority)


def _rows() -> tuple[Implementation, ...]:
    return REFERENCE_ROWS


def kernel_set(device: str = "cpu") -> str:
    """One line for the start-up banner."""
    return f"{device}: torch {torch.__version__}"


def is_batch_invariant(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether every operation gives a row the same bits whatever else is computed with it."""
    case = Case(device=device, dtype=dtype, head_size=64)
    return all(find(name, case).is_batch_invariant for name in REFERENCE_NAMES)


def set_threads(num_threads: int) -> None:
    """Threads that CPU operations use, the calling one included. Results do not depend on it. Raises ValueError."""
    if num_threads < 1:
        raise ValueError(f"`num_threads` must be >= 1. Given: {num_threads}")
    torch.set_num_threads(num_threads)
