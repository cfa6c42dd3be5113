"""Memory arithmetic that needs no torch: `weft plan` foretells with it what the start-up will measure.

A container's limit counts, not the machine's memory: the least of what the machine and each enclosing control group
leave is what there is.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

CPU_POOL_BYTES = 4 * 1024**3
CPU_POOL_SHARE = 0.25
"""On the CPU other processes live in the same memory: the pool takes a quarter of what is left, 4 GiB at most."""
PROMPT_LOGPROB_BYTES = 64 * 1024 * 1024
"""Most memory that the logits of prompt tokens may take at a time; part of the activation budget."""


def available_bytes() -> int:
    """Memory that this process may still take."""
    return int(min([psutil.virtual_memory().available, *control_group_bytes_left()]))


def default_pool_bytes(available_bytes: int) -> int:
    """Size of the KV pool on the CPU when the user names none. Units: available_bytes is what the weights left."""
    return min(CPU_POOL_BYTES, int(CPU_POOL_SHARE * available_bytes))


def activation_bytes(
    *,
    max_step_tokens: int,
    max_step_rows: int,
    hidden_size: int,
    widest_layer: int,
    vocab_size: int,
    element_bytes: int,
) -> int:
    """Most memory that one step takes beside weights and pool, by arithmetic.

    Two residual streams, the widest layer's input and output, and for the rows that sample the logits, the copy that
    processors change and one of work space, all in float32.

    Units   max_step_tokens T, max_step_rows S, widest_layer: largest output of a linear layer (2F, or Hq·D + 2·Hkv·D)
    """
    hidden_bytes = max_step_tokens * (4 * hidden_size + 2 * widest_layer) * element_bytes
    logits_bytes = max(3 * max_step_rows * vocab_size * 4, PROMPT_LOGPROB_BYTES)
    return hidden_bytes + logits_bytes


def control_group_bytes_left(root: Path = Path("/")) -> list[int]:
    """What each control group around this process that has a limit still leaves, version 1 and 2.

    The page cache of files counts as used there but is given back on demand, so its inactive part counts as left.

    Source  Linux Documentation/admin-guide/cgroup-v2.rst, "Memory"; cgroup-v1/memory.rst, section 5
    """
    left: list[int] = []
    for directory, names in _memory_control_groups(root):
        limit, used = (_read_integer(directory / name) for name in names[:2])
        if limit is not None and used is not None:
            left.append(max(0, limit - used + _read_statistic(directory / "memory.stat", names[2])))
    return left


_V2_FILES = ("memory.max", "memory.current", "inactive_file")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory_control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """This process' memory control groups, innermost first, with the names of their files.

    Inside a container the path in /proc may be the host's while the mount shows only the container's own group:
    directories that do not exist are skipped, and the top of the mount is always looked at.
    """
    memberships = root / "proc/self/cgroup"
    if not memberships.is_file():
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", _V2_FILES
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1_FILES
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount:
            yield group, names
            group = group.parent
        yield mount, names


def _read_integer(path: Path) -> int | None:
    """The number in a control file; None when there is no such file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
