"""Which implementation runs an operation: a table of rows, each with a condition and a priority.

A new kernel is a row here. The row with the largest priority whose condition holds is used; the reference, which
computes everything everywhere, is the last row of every operation.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

import torch

from weft.kernels import kv_layout, onednn, quantized, reference
from weft.kernels.cpu import library as cpu_library
from weft.kernels.cpu import operations as cpu_operations
from weft.kernels.cpu import quantized as cpu_quantized

MAX_HEAD_SIZE = 1024
"""Of the compiled attention; models use 64 to 256."""


class Case(NamedTuple):
    """What an implementation may depend on. A tuple: each call of an operation makes, hashes and compares one."""

    device: str
    """Type of the device: `cpu`, `cuda` …"""
    dtype: torch.dtype
    head_size: int = 0
    """D of attention and rotary operations, otherwise 0."""
    block_size: int = 0
    """B of attention and rotary operations, otherwise 0."""
    kv_dtype: torch.dtype | None = None
    """Of keys and values, for attention and rotary operations."""
    layout: str = ""
    """Of the packed weight, for operations that read one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation:
    """One row: `function` computes `operation` wherever `supports` holds."""

    operation: str
    name: str
    function: Callable[..., Any]
    priority: int
    supports: Callable[[Case], bool]
    is_batch_invariant: bool


OPERATIONS = (
    "pack_linear",
    "linear",
    "embedding",
    "take_rows",
    "softcap",
    "rms_norm",
    "add_rms_norm",
    "rotary_and_store",
    "paged_attention",
    "gated_activation",
    "greedy",
    "token_logprobs",
    "race",
    "draw",
)


def _reads_rows(case: Case) -> bool:
    return case.layout in {"", "rows"}


def _compiled_supports(case: Case) -> bool:
    return (
        case.device == "cpu"
        and case.dtype in cpu_operations.DTYPES
        and case.layout in {"", "panels"}
        and case.head_size % 2 == 0
        and case.head_size <= MAX_HEAD_SIZE
        and case.block_size % kv_layout.RUN_POSITIONS == 0
        and (case.kv_dtype is None or case.kv_dtype in cpu_operations.KV_DTYPE_CODES)
    )


def _onednn_supports(case: Case) -> bool:
    is_bfloat16 = case.device == "cpu" and case.dtype == torch.bfloat16
    return is_bfloat16 and case.layout in {"", "onednn"} and onednn.is_available()


REFERENCE_ROWS = tuple(
    Implementation(
        operation=name,
        name="reference",
        function=getattr(reference, name),
        priority=0,
        supports=_reads_rows,
        is_batch_invariant=False,
    )
    for name in OPERATIONS
)

ONEDNN_ROWS = tuple(
    Implementation(
        operation=name,
        name="onednn",
        function=getattr(onednn, name),
        priority=10,
        supports=_onednn_supports,
        is_batch_invariant=False,
    )
    for name in ("pack_linear", "linear")
)

COMPILED_ROWS = tuple(
    Implementation(
        operation=name,
        name="compiled",
        function=getattr(cpu_operations, name),
        priority=20,
        supports=_compiled_supports,
        # One fixed order of additions per element, whatever else is in the batch: see kernels.h.
        is_batch_invariant=True,
    )
    for name in OPERATIONS
)

QUANTIZED_OPERATIONS = ("quantize_linear", "pack_codes", "linear", "embedding")


def _reads_codes(case: Case) -> bool:
    return case.layout in {"", quantized.LAYOUT}


def _compiled_reads_codes(case: Case) -> bool:
    return case.device == "cpu" and case.dtype in cpu_operations.DTYPES and case.layout in {"", cpu_quantized.LAYOUT}


def _quantized_rows(
    name: str, module: ModuleType, priority: int, reads: Callable[[Case], bool]
) -> list[Implementation]:
    """Rows that make quantized weights, and rows that read them and no others."""
    return [
        Implementation(
            operation=operation,
            name=name,
            function=getattr(module, operation),
            priority=priority,
            supports=reads if operation in {"quantize_linear", "pack_codes"} else partial(_has_layout, reads),
            is_batch_invariant=True,
        )
        for operation in QUANTIZED_OPERATIONS
    ]


def _has_layout(reads: Callable[[Case], bool], case: Case) -> bool:
    return bool(case.layout) and reads(case)


QUANTIZED_REFERENCE_ROWS = tuple(_quantized_rows("reference", quantized, 0, _reads_codes))
QUANTIZED_COMPILED_ROWS = tuple(_quantized_rows("compiled", cpu_quantized, 20, _compiled_reads_codes))


@cache
def _rows() -> tuple[Implementation, ...]:
    """Rows that this machine can run. The first call looks for the compiled kernels, and may compile them."""
    has_library = cpu_library.load().library is not None
    compiled = COMPILED_ROWS + QUANTIZED_COMPILED_ROWS if has_library else ()
    return REFERENCE_ROWS + QUANTIZED_REFERENCE_ROWS + ONEDNN_ROWS + compiled


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
    """Uses only the named kernel set from now on: one of `kernel_sets()`, or None for the best available.

    Works at once and lasts; `with force("reference"): …` puts the previous choice back. Weights packed before keep
    the implementation that reads their layout. Raises ValueError for a set that this machine does not have.
    """
    if name is not None and name not in kernel_sets():
        raise ValueError(f"the kernel set must be one of {', '.join(kernel_sets())} on this machine. Given: {name}")
    previous = _Choice.forced
    _set_forced(name)
    return Forced(previous)


def _set_forced(name: str | None) -> None:
    _Choice.forced = name
    find.cache_clear()
    library = cpu_library.load().library
    if library is not None:
        library.weft_select(name.encode() if name in cpu_library.INSTRUCTION_SETS else None)


@cache
def kernel_sets() -> tuple[str, ...]:
    """Names that `force` accepts on this machine."""
    return ("reference", *cpu_library.supported_instruction_sets())


@lru_cache(maxsize=256)
def find(operation: str, case: Case) -> Implementation:
    """The row that runs `operation` in this case. Raises ValueError when none does."""
    rows = [row for row in _rows() if row.operation == operation and row.supports(case)]
    if _Choice.forced == "reference":
        rows = [row for row in rows if row.name == "reference"] or rows
    if not rows:
        raise ValueError(f"no implementation of {operation} for {case}")
    return max(rows, key=lambda row: row.priority)


def kernel_set(device: str = "cpu") -> str:
    """One line for the start-up banner, for example `cpu: avx512-bf16 (gcc 12.2.0)`."""
    if device != "cpu" or _Choice.forced == "reference":
        return f"{device}: torch {torch.__version__}"
    library = cpu_library.load().library
    if library is None:
        return f"{device}: torch {torch.__version__} ({notice()})"
    return f"{device}: {library.weft_selected().decode()} ({library.weft_compiler().decode()})"


def notice() -> str:
    """Why the compiled kernels are not in use, in one line; empty when they are."""
    return cpu_library.load().notice


def is_batch_invariant(
    dtype: torch.dtype, device: str = "cpu", *, head_sizes: Iterable[int] = (64,), block_size: int = 32
) -> bool:
    """Whether every operation gives a row the same bits whatever else is computed with it.

    head_sizes   of the model's layers; an odd one runs on the reference kernels, as do blocks of less than 16 tokens
    """
    cases = [Case(device=device, dtype=dtype, head_size=size, block_size=block_size) for size in set(head_sizes)]
    return all(find(name, case).is_batch_invariant for name in OPERATIONS for case in cases)


def must_compile() -> bool:
    """Whether the first use of the CPU's kernels compiles them, which takes a minute or more."""
    return not cpu_library.is_compiled()


def set_threads(num_threads: int) -> None:
    """Threads that CPU operations use, the calling one included. Results do not depend on it. Raises ValueError.

    With compiled kernels torch keeps one thread: its OpenMP threads spin after each operation, on the very cores that
    ours need for the next one.
    """
    if num_threads < 1:
        raise ValueError(f"`num_threads` must be >= 1. Given: {num_threads}")
    library = cpu_library.load().library
    torch.set_num_threads(num_threads if library is None else 1)
    if library is not None:
        library.weft_set_threads(num_threads)
